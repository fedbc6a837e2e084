"""Whole runs as short Python: read one to see how the pieces fit."""
