"""What a family does to the logits of its output layer before it gives them out.

Most do nothing, some scale them, some cap them softly. A loss that is computed where the output layer runs
must do the same. What it is can be found out: by comparing what left the layer with what left the model.

Knows nothing of losses.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prefix_ds.model.agreement import error_between

Finish = Callable[[Tensor], Tensor]  # element by element


def finish_of(raw: Tensor, final: Tensor, config: Any) -> Finish | None:
    """The function that makes `final` of `raw`; None where it is none of those known."""
    if raw.shape != final.shape:
        return None
    known = list(_known(raw, final, config))
    if raw.is_meta:
        return known[0]
    errors = [(error_between(finish(raw), final), finish) for finish in known]
    least, finish = min(errors, key=lambda found: found[0])  # a cap may change small logits hardly at all
    return finish if least < 8 * torch.finfo(final.dtype).eps else None


def _known(raw: Tensor, final: Tensor, config: Any) -> Iterator[Finish]:
    dtype = final.dtype
    yield lambda logits: logits.to(dtype)
    for cap in _caps(config):
        yield lambda logits, cap=cap: torch.tanh(logits.to(dtype) / cap) * cap  # type: ignore[misc]
    if not raw.is_meta:
        scale = float((final.double() * raw.double()).sum() / raw.double().square().sum())
        yield lambda logits: logits.to(dtype) * scale


def _caps(config: Any) -> list[float]:
    names = (name for name in vars(config) if "cap" in name and "attn" not in name)
    return [float(value) for name in names if isinstance(value := getattr(config, name), (int, float))]
