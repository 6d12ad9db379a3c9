"""Checkpoints that bitsandbytes has quantised to 8 bits already, read as what they stand for.

Beside such a weight (int8) lie `SCB`, the largest magnitude of each row, and `weight_format`. A weight is
promised as int8 * SCB / 127 in float32, which the base's own type follows. Stored in 8 bits again, it gets
the same int8 numbers back: the largest of a row is 127 by construction.

Knows nothing of modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefix_ds.errors import ModelError
from prefix_ds.promise import Source

_SCALES, _FORMAT = ".SCB", ".weight_format"


def dequantised(tensors: Mapping[str, Source], config: Any) -> dict[str, Source]:
    """The tensors of a checkpoint, without bitsandbytes' storage; `config` no longer speaks of it."""
    if getattr(config, "quantization_config", None) is None:
        return dict(tensors)
    del config.quantization_config
    named = {name.removesuffix(_SCALES): scales for name, scales in tensors.items() if name.endswith(_SCALES)}
    stored = {f"{name}.weight": RowScaled(tensors[f"{name}.weight"], s) for name, s in named.items()}
    plain = {n: t for n, t in tensors.items() if not n.endswith((_SCALES, _FORMAT))}
    return plain | stored


def check_storage(config: Any) -> None:
    """Raises ModelError for a checkpoint that is neither in ordinary numbers nor in bitsandbytes' 8 bits."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        return
    settings = told if isinstance(told, dict) else told.to_dict()
    if not settings.get("load_in_8bit"):
        kind = settings.get("quant_method", "unknown")
        raise ModelError(
            f"model.name: {config.name_or_path}: its weights are stored as {kind}; expected ordinary weights "
            "or bitsandbytes' 8 bits"
        )


@dataclass(frozen=True)
class RowScaled:
    """int8 rows, each times its largest magnitude / 127."""

    values: Source
    largest: Source
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return self.values.shape

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop)."""
        width = self.shape[-1]
        first, last = start // width, -(-stop // width)
        scale = self.largest.read(first, last).float() / 127.0
        rows = self.values.read(first * width, last * width).view(-1, width) * scale[:, None]
        return rows.flatten()[start - first * width : stop - first * width]
