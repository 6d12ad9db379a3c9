"""One step of training every weight: the baseline of a prefix, and how a base is made from scratch.

Here DeepSpeed's own ZeRO-3 optimizer holds master weights and moments in shards. It averages gradients over
ranks, and our loss is a part of a global mean, so each part is multiplied by the number of ranks. The number
of micro-batches of a step varies, which is why the accumulation border is set by hand, and why each forward
pass is announced: the engine's own `forward` would do it, but its module is called directly.

A checkpoint is one file a rank, bound to the number of ranks it was written on. Knows nothing of prefixes or
time.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefix_ds.config import TrainKeys
from prefix_ds.data.batch import Share
from prefix_ds.dist import World, on_first, summed, together
from prefix_ds.engine.prefix_engine import mean_loss, read_once, refuse_nonsense
from prefix_ds.engine.saving import saving_parameters
from prefix_ds.engine.sharding import Sharded, no_modules_left, whole_tensors
from prefix_ds.engine.step import StepReport
from prefix_ds.engine.waiting import waiting
from prefix_ds.errors import RunError
from prefix_ds.files import whole_folder
from prefix_ds.model import PrefixLM
from prefix_ds.model.unread import masks_unread
from prefix_ds.progress import Progress


class FullEngine:
    """Trains all parameters of a sharded model."""

    every_rank_saves = True

    def __init__(self, lm: PrefixLM, model: Sharded, keys: TrainKeys, world: World, tokenizer: Any) -> None:
        """`tokenizer` is saved beside the weights."""
        self.lm, self.model, self.keys, self.world, self.tokenizer = lm, model, keys, world, tokenizer

    def step(self, share: Share, lr: float) -> StepReport:
        """One optimizer step on this rank's share of the global batch. Every rank calls this."""
        with waiting(self.world.device) as waited, masks_unread(), no_modules_left():
            loss, norm = self._updated(share, lr)
        refuse_nonsense(loss, norm)
        return StepReport(loss, norm, share.global_tokens, waited.seconds)

    def _updated(self, share: Share, lr: float) -> tuple[float, float]:
        """Updates the weights; the loss before, and the gradient's norm before clipping."""
        engine = self.model.engine
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(share.micro_batches, start=1):
            engine.optimizer.clear_backward_seen_flag()  # or the last gradient replaces the others
            engine.set_gradient_accumulation_boundary(number == len(share.micro_batches))
            with saving_parameters():
                part = self.lm.loss(batch.to(self.world.device), None, ()) / share.global_targets
            engine.backward(part * self.world.size)
            loss += part.detach()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        engine.step()
        return read_once(summed(loss), torch.as_tensor(engine.get_global_grad_norm()))

    @torch.no_grad()
    def validate(self, shares: Iterable[Share]) -> float:
        """Mean negative log-likelihood of a target token, in nats. Every rank calls this."""
        return mean_loss(self.lm, None, (), shares, self.world.device)

    def tensors(self) -> dict[str, Tensor]:
        """This rank's shards of the master weights and of the moments."""
        state = self.model.engine.optimizer.state_dict()
        moments = {
            f"optimizer.{i}.{name}": torch.as_tensor(t)
            for i, parts in state["optimizer_state_dict"]["state"].items()
            for name, t in parts.items()
        }
        return _weights_of(state) | moments

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave on the same rank of as many. Every rank calls this.

        Raises RunError where DeepSpeed keeps the weights in other groups now.
        """
        optimizer = self.model.engine.optimizer
        optimizer.parameter_offload.partition_all_parameters()  # small ones may lie whole on every rank still
        state = optimizer.state_dict()
        together(lambda: _refuse_other_groups(tensors, _weights_of(state)))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, index, *name = key.split(".")
            if kind == "optimizer":
                moments.setdefault(int(index), {})[name[0]] = tensor
        state["optimizer_state_dict"]["state"] = moments
        state["fp32_flat_groups"] = [tensors[f"weights.{i}"] for i in range(len(state["fp32_flat_groups"]))]
        optimizer._rigid_load_state_dict(state)

    def write_result(self, folder: Path, progress: Progress) -> None:
        """Writes an ordinary Hugging Face folder, gathered parameter by parameter. Every rank calls this."""
        model = self.model.module
        whole = whole_tensors(model, keep=self.world.is_first)

        def write() -> None:
            with whole_folder(folder) as temporary:
                model.save_pretrained(temporary, state_dict=whole)  # type: ignore[operator]
                self.tokenizer.save_pretrained(temporary)

        on_first(self.world, write)


def _refuse_other_groups(tensors: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    found = {key: t.shape for key, t in tensors.items() if key.startswith("weights.")}
    if found != {key: t.shape for key, t in weights.items()}:
        raise RunError(
            "engine.deepspeed: the checkpoint has the weights in other groups than this file makes of them: "
            "go on with the sub_group_size it was written with"
        )


def _weights_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The master weights of DeepSpeed's state, in its groups."""
    return {f"weights.{i}": t.detach() for i, t in enumerate(state["fp32_flat_groups"])}
