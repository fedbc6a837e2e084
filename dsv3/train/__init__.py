"""Loss, optimizer, checkpoint, metrics and the loop that holds them together."""
