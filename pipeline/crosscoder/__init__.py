"""The crosscoder: the model, what makes it sparse, its losses, and the trainer."""
