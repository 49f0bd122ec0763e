"""What there is and how it goes: jobs, accelerators, and what this cluster does to a job."""
