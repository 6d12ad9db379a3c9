"""From a hub id or a folder to a model and its tokenizer. Knows nothing of training, sharding or prefixes."""

from prefix_ds.loading.base import load_base, load_tokenizer, new_base
from prefix_ds.loading.complaints import one_line
from prefix_ds.loading.vetting import base_config, check_folder, check_new, vetted_config

__all__ = [
    "base_config",
    "check_folder",
    "check_new",
    "load_base",
    "load_tokenizer",
    "new_base",
    "one_line",
    "vetted_config",
]
