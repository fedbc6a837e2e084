"""Sampling, speculation and generation over a model; token ids only below the engine."""
