"""Starts training jobs: on this machine, on many over ssh, under Slurm, on Kubernetes.

Needs neither torch nor anything heavy, so it runs on a laptop that could not train. Of the product it knows
the configuration, which it checks before anything starts, and the exit codes. `prefix_ds` does not know it.
"""
