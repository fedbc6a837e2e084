"""Transforms of a finished model, applied from outside in one order."""
