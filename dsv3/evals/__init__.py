"""Evaluation: graders, a sandbox for programs, tasks, a runner. Knows the engine; knows nothing of training or serving."""
