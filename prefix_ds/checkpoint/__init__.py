"""A run's memory on disk, written whole or not at all."""

from prefix_ds.checkpoint.saved_prefix import PrefixFacts, SavedPrefix, SlotShape, read_prefix, write_prefix
from prefix_ds.checkpoint.steps import (
    Checkpoint,
    begin,
    discard,
    latest,
    pending_folder,
    prune,
    save_checkpoint,
    seal,
)
from prefix_ds.checkpoint.tensors import FileDigest, read_tensors, write_tensors

__all__ = [
    "Checkpoint",
    "FileDigest",
    "PrefixFacts",
    "SavedPrefix",
    "SlotShape",
    "begin",
    "discard",
    "latest",
    "pending_folder",
    "prune",
    "read_prefix",
    "read_tensors",
    "save_checkpoint",
    "seal",
    "write_prefix",
    "write_tensors",
]
