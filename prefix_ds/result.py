"""What a prefix run leaves behind: the best table as named keys and values, with where they come from.

The base is recognised by a digest of its configuration as well as by name, because folders get renamed. Knows
nothing of how the table was trained.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prefix_ds import __version__
from prefix_ds.checkpoint import PrefixFacts, write_prefix
from prefix_ds.config import ModelKeys
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import Slot, keys_values_of
from prefix_ds.progress import Progress

# What differs between two copies of one base: where it lies, how it is held, who saved it.
_NOT_THE_MODEL = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
}


def prefix_writer(
    keys: ModelKeys, lm: PrefixLM, slots: Sequence[Slot]
) -> Callable[[Path, Tensor, Progress], None]:
    """A function that writes a table [P, D] into a folder as the prefix of this base."""

    def write(folder: Path, table_PD: Tensor, progress: Progress) -> None:
        pairs = keys_values_of(table_PD, slots)
        named = {slot.name: pair for slot, pair in zip(slots, pairs, strict=True)}
        write_prefix(folder, named, prefix_facts(keys, lm, progress))

    return write


def prefix_facts(keys: ModelKeys, lm: PrefixLM, progress: Progress) -> PrefixFacts:
    """Where a prefix of this base comes from, trained as far as `progress` says."""
    return PrefixFacts(
        base=str(keys.name),
        revision=keys.revision,
        model_type=lm.family,
        base_config_sha256=config_digest(lm.base.config),
        base_num_layers=num_layers(lm),
        step=progress.step,
        valid_loss=progress.valid_loss,
        version=__version__,
        window=window_of(lm.base.config),
    )


def num_layers(lm: PrefixLM) -> int:
    """Layers of the base, with and without attention."""
    return int(getattr(lm.base.config.get_text_config(decoder=True), "num_hidden_layers", len(lm.slots)))


def window_of(base_config: Any) -> int | None:
    """Tokens that layers with a sliding window see; None where there are none. Chunks count as windows."""
    text = base_config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ("sliding_attention",))
    sizes = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min(filter(None, sizes), default=None) if kinds - {"full_attention"} else None


def config_digest(base_config: Any) -> str:
    """SHA-256 of what a transformers configuration says of the architecture."""
    facts = _of_the_model(base_config.to_dict())
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _of_the_model(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: _of_the_model(value) for key, value in tree.items() if key not in _NOT_THE_MODEL}
