"""Answers token by token, greedy or sampled: rows that have ended leave the batch.

transformers' own loop goes on with all rows until the last has ended. Answers differ in length, so half of
what it computes may be padding. This loop is handed to `generate`, which prepares it as its own: which
arguments a family wants, its cache, what is done to scores. A row that ends is taken out of ids, mask,
positions and cache. Caches with recurrent states cannot give up single rows: there they stay until the end.

Rejected: rows of the queue taking the place of those that left. A row that joins must line up with the others
column by column, which windows and recurrent states do not allow; batches of like lengths lose little.

Knows nothing of prefixes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prefix_ds.dist import largest
from prefix_ds.model.cache import make_room, may_leave


class Steps:
    """One use of `generate` on a batch of prompts."""

    def __init__(
        self,
        num_rows: int,
        *,
        eos_ids: Sequence[int],
        front: int,
        draw: Callable[[Sequence[int]], Tensor] | None,
        when_left: Callable[[Tensor], None],
        synced: bool,
    ) -> None:
        """`draw` gives numbers from [0, 1), one for each of these prompts; None takes the likeliest token.

        The cache keeps `front` positions free. `when_left` hears which rows [B] of the batch stay. With
        `synced`, forward passes go on until the last rank's rows have ended.
        """
        self.answers: list[list[int]] = [[] for _ in range(num_rows)]
        self._ends, self._front, self._draw = set(eos_ids), front, draw
        self._when_left, self._synced = when_left, synced
        self._rows = list(range(num_rows))  # the prompt of each row of the batch
        self._ended: set[int] = set()

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **told: Any
    ) -> Tensor:
        """What `generate` calls: the ids of the rows that are left."""
        told.pop("stopping_criteria", None)
        make_room(told.get("past_key_values"), self._front)
        length = generation_config.max_length
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **told)
        output = model(**inputs, return_dict=True)
        while True:
            told = model._update_model_kwargs_for_generation(
                output, told, is_encoder_decoder=model.config.is_encoder_decoder
            )
            scores_BV = logits_processor(input_ids, output.logits[:, -1].float())
            next_B = self._chosen(scores_BV)
            input_ids = torch.cat([input_ids, next_B[:, None]], dim=1)
            input_ids, told = self._noted(next_B.tolist(), input_ids, told)
            if not self._goes_on(input_ids.shape[1] < length):
                return input_ids
            del output, scores_BV  # of a whole prompt's places, in some families
            last = 1 if told["use_cache"] else None
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=last, **told)
            output = model(**inputs, return_dict=True)

    def _chosen(self, scores_BV: Tensor) -> Tensor:
        """The next token of each row: the likeliest, or the one at whose share a drawn number lies."""
        if self._draw is None:
            return scores_BV.argmax(dim=-1)
        drawn_B = self._draw(self._rows).to(scores_BV.device, torch.float64)
        below_BV = scores_BV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        place_B1 = drawn_B[:, None] * below_BV[:, -1:]
        return (below_BV <= place_B1).sum(dim=-1).clamp_(max=scores_BV.shape[1] - 1)

    def _noted(
        self, tokens: list[int], ids_BT: Tensor, told: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Adds the tokens to the answers; what goes on with the rows that have not ended."""
        for row, token in zip(self._rows, tokens, strict=True):
            if token in self._ends:
                self._ended.add(row)
            elif row not in self._ended:
                self.answers[row].append(token)
        stay = [n for n, row in enumerate(self._rows) if row not in self._ended]
        if not stay or len(stay) == len(self._rows) or not may_leave(told.get("past_key_values")):
            return ids_BT, told
        self._rows = [self._rows[n] for n in stay]
        return self._left(torch.tensor(stay, device=ids_BT.device), ids_BT, told)

    def _left(self, index_B: Tensor, ids_BT: Tensor, told: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        told["past_key_values"].batch_select_indices(index_B)
        self._when_left(index_B)
        in_rows = {
            name: value[index_B]
            for name, value in told.items()
            if isinstance(value, Tensor) and value.shape[:1] == ids_BT.shape[:1]
        }
        return ids_BT[index_B], told | in_rows

    def _goes_on(self, has_room: bool) -> bool:
        """Whether another token is wanted, here or, of ranks that move together, anywhere."""
        wanted = has_room and not self._ended.issuperset(self._rows)
        return largest(float(wanted)) > 0 if self._synced else wanted
