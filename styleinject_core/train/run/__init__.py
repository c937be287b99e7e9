"""The run: the loop, its checkpoints and optimizers, and what it shows."""
