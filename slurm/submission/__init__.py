"""What happens before anything is queued: looks ahead, freezing, sweeps, going on with earlier runs."""
