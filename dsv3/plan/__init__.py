"""What a run will need before it is paid for: memory, time, money; and what a deployment can serve."""
