"""A saved prefix as a PEFT adapter, and a PEFT prefix as ours.

PEFT keeps a prefix as one float32 table `prompt_embeddings` [P, 2*L*N*H]: for each position, layer after
layer, the layer's key (after RoPE) and then its value, each N x H. That is the order of our table too, so
both ways are exact. The format names no layer: the l-th pair is layer l of the base. It therefore cannot hold
a prefix on some layers only, nor layers that differ in shape, nor values of another size than keys (MLA);
those are refused rather than written wrong.

Knows nothing of models: the base's slots come from the caller.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefix_ds.checkpoint import PrefixFacts, SavedPrefix, SlotShape, read_prefix, write_prefix, write_tensors
from prefix_ds.checkpoint.saved_prefix import KeyValue
from prefix_ds.checkpoint.tensors import read_tensors
from prefix_ds.errors import ModelError, RunError
from prefix_ds.files import whole_folder, write_text_atomically

_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CARD = "README.md"
_TABLE = "prompt_embeddings"


@dataclass(frozen=True)
class PeftPrefix:
    """A PEFT prefix: (key_NPH, value_NPH) of each layer, and the base and revision it names."""

    path: Path
    base: str
    revision: str | None  # of the base
    layers: list[KeyValue]


def export_peft(run: Path, out: Path) -> None:
    """Writes the prefix of a run as a PEFT adapter, as `export_prefix` does. Raises ModelError, RunError."""
    export_prefix(read_prefix(run / "prefix"), out)


def export_prefix(prefix: SavedPrefix, out: Path, card: str = "") -> None:
    """Writes a prefix as a PEFT adapter, to a folder that does not exist yet or is empty.

    `card` is the text of its README.md; none is written without. Raises ModelError if PEFT's format cannot
    hold the prefix, RunError if the disk or the folder refuses.
    """
    _check_exportable(prefix)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: exists and is not empty; name a new folder")
    with whole_folder(out.absolute()) as building:
        write_tensors(building / _TENSORS, {_TABLE: _peft_table(prefix)})
        write_text_atomically(building / _CONFIG, json.dumps(_peft_config(prefix), indent=2) + "\n")
        if card:
            write_text_atomically(building / _CARD, card)


def import_peft(peft: Path, out: Path, slots: Sequence[SlotShape], facts: PrefixFacts) -> None:
    """Writes a PEFT prefix as a prefix folder of ours, for the base that has these slots, in layer order.

    Raises RunError if the folder holds no PEFT prefix, ModelError if it is one of another base.
    """
    prefix = read_peft(peft)
    key_NPH = prefix.layers[0][0]
    here = f"{len(prefix.layers)} layers of {key_NPH.shape[0]} heads of {key_NPH.shape[2]}"
    if len(slots) != len(prefix.layers):
        raise ModelError(f"{prefix.path}: has {here}, the base {len(slots)} attentions")
    for slot in slots:
        if (slot.num_heads, slot.key_dim, slot.value_dim) != (key_NPH.shape[0], *[key_NPH.shape[2]] * 2):
            sizes = f"{slot.num_heads} heads, keys of {slot.key_dim} and values of {slot.value_dim}"
            raise ModelError(f"{prefix.path}: has {here}, but {slot.name} of the base has {sizes}")
    names = (slot.name for slot in slots)
    write_prefix(out, dict(zip(names, prefix.layers, strict=True)), facts)


def read_peft(folder: Path) -> PeftPrefix:
    """A PEFT prefix from its folder. Raises RunError."""
    path = folder / _TENSORS
    config = _read_config(folder / _CONFIG)
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise RunError(f"{folder}: holds a pickle, which could run code; save it again with safetensors")
    table_PD = read_tensors(path).get(_TABLE)
    length, layers = config["num_virtual_tokens"], config["num_layers"]
    heads, width = config["num_attention_heads"], config["token_dim"]
    if table_PD is None or table_PD.shape != (length, 2 * layers * width) or width % heads:
        found = None if table_PD is None else list(table_PD.shape)
        raise RunError(f"{path}: {_TABLE} is {found}, {_CONFIG} describes {[length, 2 * layers * width]}")
    kinds = table_PD.float().view(length, 2 * layers, heads, width // heads).permute(1, 2, 0, 3)
    base, revision = str(config["base_model_name_or_path"]), config.get("revision")
    pairs = [*zip(kinds[::2], kinds[1::2], strict=True)]
    return PeftPrefix(path, base, str(revision) if revision else None, pairs)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, submodules = config["peft_type"], config.get("num_transformer_submodules") or 1
        sizes = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
        is_complete = all(isinstance(config[name], int) and config[name] > 0 for name in sizes)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; expected a PEFT adapter's folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise RunError(f"{path}: not the configuration of a PEFT adapter: {reason}") from None
    if kind != "PREFIX_TUNING" or submodules != 1 or not is_complete:
        raise RunError(f"{path}: expected a PREFIX_TUNING adapter of a decoder with all sizes, found {kind}")
    return config | {"base_model_name_or_path": config.get("base_model_name_or_path") or ""}


def _check_exportable(prefix: SavedPrefix) -> None:
    shapes = {
        name: (key.shape[0], key.shape[2], value.shape[2]) for name, (key, value) in prefix.slots.items()
    }
    (first, shape), *others = shapes.items()
    cannot = f"{prefix.path}: PEFT's format cannot hold this prefix"
    if len(shapes) != prefix.facts.base_num_layers:
        layers = prefix.facts.base_num_layers
        raise ModelError(f"{cannot}: {len(shapes)} attentions have one, of {layers} layers; it needs all")
    if shape[1] != shape[2]:
        raise ModelError(f"{cannot}: {first} has keys of {shape[1]} and values of {shape[2]} numbers")
    for name, other in others:
        if other != shape:
            raise ModelError(f"{cannot}: {first} and {name} have different shapes, {shape} and {other}")


def _peft_table(prefix: SavedPrefix) -> Tensor:
    """[P, 2*L*N*H]."""
    return torch.cat([t.transpose(0, 1).flatten(1) for pair in prefix.slots.values() for t in pair], dim=1)


def _peft_config(prefix: SavedPrefix) -> dict[str, Any]:
    key_NPH, _ = next(iter(prefix.slots.values()))
    num_heads, length, head_dim = key_NPH.shape
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": prefix.facts.base,
        "revision": prefix.facts.revision,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": len(prefix.slots),
        "num_attention_heads": num_heads,  # PEFT means those of keys and values
        "token_dim": num_heads * head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": num_heads * head_dim,
    }
