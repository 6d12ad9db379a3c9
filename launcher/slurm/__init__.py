"""Runs a job under Slurm: a batch script that queues itself again, or `srun` in an allocation that is there.

Knows nothing of other ways to start a job.
"""
