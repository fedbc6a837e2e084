"""Post-training: distillation, and reinforcement learning by rule rewards."""
