"""A private Slurm in a directory: for a lone workstation that needs a queue, and for the tests. No root or systemd."""
