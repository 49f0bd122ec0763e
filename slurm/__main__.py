"""`python -m slurm` and the console command `crosscoder`."""

from slurm.commands.command_line import main

if __name__ == "__main__":
    main()
