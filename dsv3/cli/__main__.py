"""`python -m dsv3.cli VERB`."""

from dsv3.cli import main

if __name__ == "__main__":
    main()
