"""Text to tokens to batches. Knows nothing of the model."""
