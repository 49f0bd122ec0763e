"""Changes to what is queued or running: by scontrol where Slurm does it, else by a new submission."""
