"""Everything that runs inside a job: token shards, activations, crosscoders, stages. Knows nothing of Slurm."""
