"""`python -m slurm` and the console command `crosscoder`."""

from slurm.commands import main

if __name__ == "__main__":
    main()
