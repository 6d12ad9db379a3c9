"""Runs side by side, from their folders or from MLflow: what differs, what each is worth, which is best."""

from prefix_ds.compare.command import Request, compare

__all__ = ["Request", "compare"]
