"""Prefixes that were trained apart, side by side in one.

What holds. Keys and values carry no number of their place in the prefix, so

    order        a and b in either order give the same logits, and merging more of them is associative;
    meaning      made of the keys and values of two texts, each at positions 0, 1, ... and without the
                 other, the merged prefix is these two texts, neither of which sees the other, in front of a
                 text that starts behind both.

What cannot hold. A prefix was trained in front of a text that begins at its own end. Merged, the text begins
at the end of all: from the keys of a it is farther by the length of b, and the other way round (with learnt
positions the text itself has others). And attention is one share-out among all keys: what a token takes from
a it does not take from b, and no prefix is neutral, not even one of zeros. So a merged prefix is not both
tasks at once; it is a place to start from, or one to measure. Turning keys by the missing distance would mend
the first for rotary positions, where one knows how each family turns them; it mends nothing of the second,
and is not done.

Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from prefix_ds.checkpoint import SavedPrefix
from prefix_ds.errors import RunError

MEANING = (
    "merged: each part sees none of the others, and text begins behind all of them, farther from every part "
    "than it was trained for; nothing says that the tasks add up: measure it"
)


def merged(parts: Sequence[SavedPrefix]) -> SavedPrefix:
    """All positions of the parts, in their order. Raises RunError where they are not of one base."""
    first, *others = parts
    for other in others:
        _check_same_base(first, other)
        _check_same_layers(first, other)
    slots = {
        name: (
            torch.cat([part.slots[name][0] for part in parts], dim=1),
            torch.cat([part.slots[name][1] for part in parts], dim=1),
        )
        for name in first.slots
    }
    facts = replace(first.facts, step=max(part.facts.step for part in parts), valid_loss=None)
    return SavedPrefix(first.path, slots, facts)


def _check_same_base(first: SavedPrefix, other: SavedPrefix) -> None:
    for what, mine, theirs in (
        ("base", _base(first), _base(other)),
        ("family", first.facts.model_type, other.facts.model_type),
        ("configuration of the base", first.facts.base_config_sha256, other.facts.base_config_sha256),
        ("attentions with a prefix", _shapes(first), _shapes(other)),
    ):
        if mine != theirs:
            raise RunError(f"--merge: {first.path} and {other.path} differ in {what}: {mine}, {theirs}")


def _base(prefix: SavedPrefix) -> str:
    revision = prefix.facts.revision
    return f"{prefix.facts.base} ({revision})" if revision else prefix.facts.base


def _shapes(prefix: SavedPrefix) -> str:
    """How many attentions, and a shape of each kind."""
    shapes = {
        name: (key.shape[0], key.shape[2], value.shape[2]) for name, (key, value) in prefix.slots.items()
    }
    kinds = " or ".join(
        f"{heads} heads, keys of {key}, values of {value}"
        for heads, key, value in dict.fromkeys(shapes.values())
    )
    return f"{len(shapes)} from {next(iter(shapes))} to {list(shapes)[-1]}, {kinds}"


def _check_same_layers(first: SavedPrefix, other: SavedPrefix) -> None:
    for name in first.slots.keys() ^ other.slots.keys():
        raise RunError(f"--merge: {first.path} and {other.path}: only one of them has {name}")
