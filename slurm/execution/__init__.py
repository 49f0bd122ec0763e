"""From a frozen run to a task at work: handed to Slurm, a local queue or this process, held, stopped and requeued."""
