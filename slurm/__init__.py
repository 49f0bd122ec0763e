"""How work gets to machines: freeze, submit, watch and change runs through Slurm. Never imports torch."""
