"""A frozen causal language model that sees a prefix: its loss on a batch, its answers to prompts.

The base is a transformers model, whole or sharded: it is only ever called, and its parameters are never
looked at, so their shapes may be `[0]` and its hooks may gather them. What it can do is found out by one
forward pass when it is wrapped.

Knows nothing of sharding, optimizers or files.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefix_ds.data.batch import Batch, Document
from prefix_ds.dist import on_all
from prefix_ds.int8 import Watched
from prefix_ds.model import decoding
from prefix_ds.model.attention import OVER_OWN, Documents, Joint
from prefix_ds.model.base import (
    AttentionChoice,
    family_of,
    no_attention_to_join,
    silence,
    switch_attention,
    text_config,
)
from prefix_ds.model.finish import finish_of
from prefix_ds.model.gates import take_over_gates
from prefix_ds.model.head import Head
from prefix_ds.model.likelihood import nll_of_each, nll_of_each_behind, summed_nll
from prefix_ds.model.norms import take_over_norms
from prefix_ds.model.positions import check_length, num_rotary, positions_of
from prefix_ds.model.recompute import Recomputation
from prefix_ds.model.sources import Given, Recorder
from prefix_ds.model.steps import Steps
from prefix_ds.model.trial import Findings, Trial, limits_of
from prefix_ds.prefix import KeyValue, Slot, num_positions

_Answer = Callable[[Callable[[], Tensor]], Tensor]  # made of a forward pass, which gives logits


class PrefixLM:
    """A frozen causal language model that sees a prefix."""

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        attention: AttentionChoice = "auto",
        recompute: bool | int = False,
        device: torch.device | None = None,
    ) -> None:
        """Takes the base over: its attention, its dropout (none), its mode (eval). Every rank calls this.

        `device` is where forward passes run, if not where the base's parameters lie; `recompute` is all
        layers, none, or so many. Raises ModelError where the base cannot take a prefix.
        """
        self.base = base
        self.family = family_of(base)
        self.device: torch.device = device or base.device
        silence(base)
        take_over_gates(base)
        take_over_norms(base)
        switch_attention(base, attention)
        self._joint = Joint(base)
        self._positions = positions_of(base)
        self._head = Head(base)
        contexts = self._joint.checkpoint_contexts
        self._recomputation = Recomputation(base, recompute, contexts) if recompute else None
        self.num_tries = 0  # passes of a trial: what they took is told by whoever measures
        self._findings = self._tried()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The places for a prefix, in order of call."""
        return self._findings.slots

    @property
    def can_pack(self) -> bool:
        """Whether documents may share a row."""
        return self._findings.can_pack

    @property
    def attends_alone(self) -> bool:
        """Whether a document in a row costs what it costs alone, however long the row is."""
        return self._findings.attends_alone

    @property
    def dtype(self) -> torch.dtype:
        """The number format of keys and values."""
        return self._findings.dtype

    @property
    def vocab_size(self) -> int:
        """Numbers of a token's logits."""
        return self._findings.vocab_size

    @property
    def num_products(self) -> int:
        """Numbers that attention writes down for each query and key; 0 where its kernel keeps none."""
        config = text_config(self.base)
        is_own = config._attn_implementation == OVER_OWN
        return int(getattr(config, "num_attention_heads", 0)) if is_own else 0

    @property
    def width(self) -> int:
        """Numbers of a token between two layers; 0 for a base that does not tell."""
        return int(getattr(text_config(self.base), "hidden_size", 0))

    @property
    def made_for(self) -> int | None:
        """The most rotary positions that the base was made for; None where it does not tell."""
        return num_rotary(self.base)

    @property
    def limits(self) -> tuple[str, ...]:
        """What does not hold for this base, a line each."""
        return limits_of(text_config(self.base), self._findings)

    def check_length(self, num_positions: int, key: str) -> None:
        """Raises ConfigError, naming `key`, where the base has a table of positions and it is shorter."""
        check_length(self.base, num_positions, key)

    def loss(self, batch: Batch, table_PD: Tensor | None, slots: Sequence[Slot]) -> Tensor:
        """The summed negative log-likelihood of the batch's targets, behind the prefix or behind none.

        A scalar in float64, differentiable with respect to the table. A batch
        without targets costs a forward and a backward pass like any other, so that all ranks make the same
        collective calls, and gives zeros. Every rank calls this.
        """
        if len(batch.target_ids_M) == 0:
            any_M = batch.ids_BT.new_zeros(1)
            return 0.0 * self.loss(replace(batch, target_index_M=any_M, target_ids_M=any_M), table_PD, slots)
        finish, size = self._findings.finish, self._findings.vocab_size
        if finish is None or not self._head.gives_losses:
            return summed_nll(self.logits(batch, table_PD, slots), batch.target_ids_M)
        asked = batch.target_index_M, batch.target_ids_M, finish, size
        return self._behind(batch, table_PD, slots, lambda forward: self._head.nll(*asked, forward))

    @torch.no_grad()
    def nll_of_each(self, batch: Batch, table_PD: Tensor | None, slots: Sequence[Slot]) -> Tensor:
        """The negative log-likelihood [M] of each target, in float64, as `loss` adds them up.

        No gradient. Every rank calls this, also with a batch without targets.
        """
        if len(batch.target_ids_M) == 0:
            return self.loss(batch, table_PD, slots)[None][:0]
        finish, size = self._findings.finish, self._findings.vocab_size
        if finish is None or not self._head.gives_losses:
            return nll_of_each(self.logits(batch, table_PD, slots), batch.target_ids_M)
        asked = batch.target_index_M, batch.target_ids_M, finish, size
        return self._behind(
            batch, table_PD, slots, lambda forward: self._head.nll(*asked, forward, nll_of_each_behind)
        )

    def logits(self, batch: Batch, table_PD: Tensor | None, slots: Sequence[Slot]) -> Tensor:
        """The logits [M, V] of the batch's targets, behind the prefix or none. Every rank calls this."""
        index_M = batch.target_index_M
        return self._behind(batch, table_PD, slots, lambda forward: self._head.logits(index_M, forward))

    def _behind(
        self, batch: Batch, table_PD: Tensor | None, slots: Sequence[Slot], answer: _Answer
    ) -> Tensor:
        self._attach(table_PD, slots)
        positions_BT = batch.positions_BT + num_positions(table_PD)
        result = answer(lambda: self._forward(batch.ids_BT, positions_BT, batch.documents))
        if isinstance(self._joint.source, Given):
            self._joint.source.check_seen()
        return result

    @torch.no_grad()
    def keys_values_of(self, ids_BT: Tensor, slots: Sequence[Slot]) -> list[KeyValue]:
        """What the attention of each slot sees of the tokens [1, P] at positions 0..P-1.

        Every rank calls this.
        """
        self.detach()
        recorder = self._joint.source = Recorder()
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        text = [Document(0, 0, ids_BT.shape[1])]
        self._head.logits(positions_BT[0, :1], lambda: self._forward(ids_BT, positions_BT, text))
        self.detach()
        return [recorder.seen[slot.name] for slot in slots]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        table_PD: Tensor | None,
        slots: Sequence[Slot],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        pad_id: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        synced: bool = False,
    ) -> list[list[int]]:
        """The answers to some prompts behind the prefix, without the tokens that end them.

        Samples at a temperature above 0: with `seeds`, one for each prompt, what is drawn for a prompt
        depends on nothing else. Ranks that share a sharded base call this together, with `synced`: they go on
        until the last of them is done.
        """
        settings = decoding.settings(
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            pad_id=pad_id,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
        )
        ids_BT, mask_BT = decoding.left_padded(prompts, pad_id, self.device)
        positions_BT = decoding.positions_of(mask_BT) + num_positions(table_PD)
        steps = Steps(
            len(prompts),
            eos_ids=eos_ids,
            front=num_positions(table_PD),
            draw=decoding.drawer(seeds) if temperature > 0 else None,
            when_left=self._positions.keep,
            synced=synced,
        )
        with self.prefixed(table_PD, slots), decoding.no_settings_of(self.base):
            told = self._positions.told(positions_BT) | {"attention_mask": mask_BT}
            if num_beams == 1:
                self.base.generate(ids_BT, settings, custom_generate=steps, **told)
                return steps.answers
            rows = self.base.generate(ids_BT, settings, synced_gpus=synced, **told)
        return decoding.cut(rows[:, ids_BT.shape[1] :], eos_ids)

    @contextmanager
    def prefixed(self, table_PD: Tensor | None, slots: Sequence[Slot]) -> Iterator[None]:
        """The base behind a prefix, for whoever calls it. Positions are theirs: text starts at P."""
        self._attach(table_PD, slots)
        try:
            yield
        finally:
            self.detach()

    def detach(self) -> None:
        """Lets go of the last prefix. Until then it stays: recomputation meets it in the backward pass."""
        self._joint.source = self._joint.documents = None
        self._positions.forget()

    def _attach(self, table_PD: Tensor | None, slots: Sequence[Slot]) -> None:
        self.detach()
        if table_PD is not None:
            # Here and once: what lies elsewhere would be sent at every layer, and the host would wait for it.
            self._joint.source = Given(table_PD.to(self.device, self._findings.dtype), slots)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor, documents: Documents) -> Tensor:
        """A forward pass over rows, each of one or several documents."""
        self._joint.documents = documents
        told = self._positions.told(positions_BT)
        again = self._recomputation.on() if self._recomputation and torch.is_grad_enabled() else nullcontext()
        with again:
            logits: Tensor = self.base(input_ids=ids_BT, use_cache=False, **told).logits
        return logits

    def _tried(self) -> Findings:
        """What a trial finds; one more without kernels of GPUs where they do not give what they should."""
        findings = self._try()
        if self.device.type == "cuda" and not (findings.means_text and findings.can_pack):
            self._joint.has_kernels = False
            without = self._try()
            self._joint.has_kernels = (without.means_text, without.can_pack) == (
                findings.means_text,
                findings.can_pack,
            )
            return without
        return findings

    @torch.no_grad()
    def _try(self) -> Findings:
        """One pass; what ranks might round differently holds only where it does on all of them."""
        self.num_tries += 1
        trial = Trial(self.device)
        self._joint.source = trial
        with Watched(self.base), self._head.heard() as raw:
            logits_MV = self._head.logits(
                trial.text_index_M,
                lambda: self._forward(trial.ids_BT, trial.positions_BT, trial.documents),
            )
        self.detach()
        if not trial.slots:
            raise no_attention_to_join(self.base)
        finish = finish_of(raw[0][0], logits_MV, text_config(self.base)) if raw else None
        found = trial.findings(logits_MV, not self._joint.attended_whole, finish)
        if self.device.type == "meta":  # a rehearsal, which a rank makes alone
            return found
        means_text, can_pack, is_known = on_all(found.means_text, found.can_pack, found.finish is not None)
        return replace(
            found, means_text=means_text, can_pack=can_pack, finish=found.finish if is_known else None
        )
