"""Slurm's own commands, asked and read: the one door to them, and pure functions over what they print."""
