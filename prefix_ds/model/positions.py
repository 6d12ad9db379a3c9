"""How a base is told the positions of its tokens, which start after the prefix.

Most take `position_ids`. Decoders that stem from BART have no such argument, but a module `embed_positions`
that does; which it is, is read off the signatures. Some have a table with a row for each position, and none
behind its end: an index error on a CPU, a dead process on a GPU.

Knows nothing of attention or of what is trained.
"""

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prefix_ds.errors import ConfigError
from prefix_ds.model.base import family_of

_TABLES = ("wpe", "embed_positions", "position_embeddings")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Positions(Protocol):
    """A way of telling positions."""

    def told(self, positions_BT: Tensor) -> dict[str, Tensor]:
        """Arguments for the forward pass that follows, or for a generation that starts with it."""
        ...

    def keep(self, index_B: Tensor) -> None:
        """Only these of the rows that were told of go on."""
        ...

    def forget(self) -> None:
        """Forward passes are as if nothing had been told."""
        ...


def positions_of(base: nn.Module) -> Positions:
    """The way this base is told positions."""
    embeddings = [
        module
        for name, module in base.named_modules()
        if name.endswith("embed_positions") and "position_ids" in _parameters(module)
    ]
    if embeddings and "position_ids" not in _parameters(base):
        return ByEmbedding(embeddings)
    return ByArgument(_first_position(base))


def num_learnt(base: Any) -> int | None:
    """How many positions the base has rows for in a table; None where it computes any position."""
    limit = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = [
        module.num_embeddings
        for name, module in base.named_modules()
        if name.endswith(_TABLES) and isinstance(module, nn.Embedding)
    ]
    if limit is None or not any(limit <= rows <= limit + 2 for rows in tables):  # OPT has two rows more
        return None
    return int(limit) - _first_position(base)


def check_length(base: Any, num_positions: int, key: str) -> None:
    """Raises ConfigError, naming `key`, where the base has a table of positions and it is shorter."""
    limit = num_learnt(base)
    if limit is not None and num_positions > limit:
        raise ConfigError(
            f"{key}: takes {num_positions} positions with all that comes before; {family_of(base)} has only "
            f"learnt {limit}"
        )


def beyond_training(base: Any, num_positions: int, key: str) -> str | None:
    """A line that names `key`, where the base has rotary positions and was made for fewer."""
    limit = num_rotary(base)
    if limit is None or num_positions <= limit:
        return None
    return (
        f"{key}: prefix and text may take {num_positions} positions; {family_of(base)} was made for {limit} "
        "(max_position_embeddings), and may fail beyond"
    )


def num_rotary(base: Any) -> int | None:
    """The rotary positions that a base was made for: as many as are said, or what a factor makes of them.

    None where that is not known.
    """
    config = base.config.get_text_config(decoder=True)
    limit, rotary = (getattr(config, key, None) for key in ("max_position_embeddings", "rope_parameters"))
    if not rotary or not limit or limit < 1:
        return None
    kinds = [kind for kind in rotary.values() if isinstance(kind, dict)] or [rotary]  # by kind of layer
    stretched = [
        (kind.get("factor") or 1) * (kind.get("original_max_position_embeddings") or limit) for kind in kinds
    ]
    return int(max(limit, *stretched))


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _first_position(base: nn.Module) -> int:
    """RoBERTa and its kin count from behind the position that stands for padding."""
    embeddings = (getattr(module, "position_embeddings", None) for module in base.modules())
    padding = (e.padding_idx for e in embeddings if isinstance(e, nn.Embedding))
    return next((index + 1 for index in padding if index is not None), 0)


class ByArgument:
    """As `position_ids`, which `generate` continues by itself."""

    def __init__(self, first: int) -> None:
        self._first = first

    def told(self, positions_BT: Tensor) -> dict[str, Tensor]:
        """The positions, counted from the base's first."""
        return {"position_ids": positions_BT + self._first}

    def keep(self, index_B: Tensor) -> None:
        """`generate` has the positions."""

    def forget(self) -> None:
        """Nothing is kept."""


class ByEmbedding:
    """To the module that embeds them. Tokens after those told of continue from the last."""

    def __init__(self, embeddings: list[nn.Module]) -> None:
        self._told_BT: Tensor | None = None
        for module in embeddings:
            module.register_forward_pre_hook(self._replace, with_kwargs=True)
            module.register_forward_hook(self._reshape)

    def told(self, positions_BT: Tensor) -> dict[str, Tensor]:
        """Nothing to pass: the hooks know."""
        self._told_BT = positions_BT
        return {}

    def keep(self, index_B: Tensor) -> None:
        """The rows that go on."""
        if self._told_BT is not None:
            self._told_BT = self._told_BT[index_B]

    def forget(self) -> None:
        """Positions are the base's own again."""
        self._told_BT = None

    def _replace(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Arguments | None:
        if self._told_BT is None:
            return None
        num_rows, num_columns = _shape(args[0])
        positions_BT = _continued(self._told_BT, _past(args, options), num_columns)
        rows = positions_BT.repeat_interleave(num_rows // len(positions_BT), dim=0)  # beams lie side by side
        return args, options | {"position_ids": rows.flatten()}  # only one dimension suits all of them

    def _reshape(self, _: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        if self._told_BT is None:
            return None
        return embedded.view(*_shape(args[0]), -1)


def _shape(tokens: Any) -> tuple[int, int]:
    num_rows, num_columns = getattr(tokens, "shape", tokens)[:2]
    return num_rows, num_columns


def _past(args: tuple[Any, ...], options: dict[str, Any]) -> int:
    past: int = args[1] if len(args) > 1 else options.get("past_key_values_length", 0)
    return past


def _continued(told_BT: Tensor, past: int, num_columns: int) -> Tensor:
    """Columns past..past + num_columns of positions that go on after the last one told."""
    missing = past + num_columns - told_BT.shape[1]
    if missing <= 0:
        return told_BT[:, past : past + num_columns]
    more = told_BT[:, -1:] + torch.arange(1, missing + 1, device=told_BT.device)
    return torch.cat([told_BT, more], dim=1)[:, past:]
