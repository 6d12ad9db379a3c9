"""One step of prefix tuning: the base runs in shards, the prefix is an ordinary tensor beside them.

Within a step the table of keys and values is cut loose from whatever computes it. Micro-batches add their
gradients into that one leaf; it is summed over the ranks once, and once carried back to what is trained (the
table itself, or the MLP behind it). Every micro-batch's loss is divided by the number of targets of the
*global* batch, so neither the number of micro-batches nor that of ranks changes the step.

Every rank holds the same prefix and takes the same step; nothing of it is sharded. Knows nothing of time or
files.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prefix_ds.config import TrainKeys
from prefix_ds.data.batch import Share
from prefix_ds.dist import World, on_first, summed
from prefix_ds.engine.saving import saving_parameters
from prefix_ds.engine.sharding import Sharded, no_modules_left
from prefix_ds.engine.step import StepReport
from prefix_ds.engine.waiting import waiting
from prefix_ds.errors import RunError
from prefix_ds.model import PrefixLM
from prefix_ds.model.unread import masks_unread
from prefix_ds.optim import adamw, optimizer_tensors, restore_optimizer
from prefix_ds.prefix import Prefix, Slot
from prefix_ds.progress import Progress

WriteTable = Callable[[Path, Tensor, Progress], None]


class PrefixEngine:
    """Trains a prefix on a frozen, sharded base."""

    every_rank_saves = False

    def __init__(
        self, lm: PrefixLM, base: Sharded, prefix: Prefix, keys: TrainKeys, world: World, write: WriteTable
    ) -> None:
        """`base` is what `lm` runs; `write` puts a finished table into a folder: only rank 0 calls it."""
        assert isinstance(prefix, nn.Module)
        self.lm, self.prefix, self.keys, self.world = lm, prefix.to(world.device), keys, world
        self._base, self._write = base, write
        self.trained = list(prefix.parameters())
        self.optimizer = adamw(self.trained, keys)

    def step(self, share: Share, lr: float) -> StepReport:
        """One optimizer step on this rank's share of the global batch. Every rank calls this."""
        with waiting(self.world.device) as waited, masks_unread(), no_modules_left():
            loss, norm = self._gradient(share)
        refuse_nonsense(loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return StepReport(loss, norm, share.global_tokens, waited.seconds)

    def _gradient(self, share: Share) -> tuple[float, float]:
        """Leaves the clipped gradient in what is trained; the loss, and the gradient's norm before that."""
        table = self.prefix.table()
        leaf = table.detach().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in share.micro_batches:
            with saving_parameters():
                summed_nll = self.lm.loss(batch.to(self.world.device), leaf, self.prefix.slots)
            torch.autograd.backward(summed_nll)
            self._base.let_go()
            loss += summed_nll.detach()
            self.lm.detach()
        assert leaf.grad is not None
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(table, summed(leaf.grad) / share.global_targets)  # in float32, once
        norm = nn.utils.clip_grad_norm_(self.trained, self.keys.clip_norm or float("inf"))
        return read_once(summed(loss) / share.global_targets, norm)

    @torch.no_grad()
    def validate(self, shares: Iterable[Share]) -> float:
        """Mean negative log-likelihood of a target token, in nats. Every rank calls this."""
        return mean_loss(self.lm, self.prefix.table(), self.prefix.slots, shares, self.world.device)

    def tensors(self) -> dict[str, Tensor]:
        """The prefix (with its MLP, if any) and the optimizer's moments."""
        prefix = {f"prefix.{name}": t for name, t in self.prefix.state_dict().items()}
        return prefix | {f"optimizer.{name}": t for name, t in optimizer_tensors(self.optimizer).items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave, on any number of ranks."""
        self.prefix.load_state_dict(_below("prefix.", tensors))
        restore_optimizer(self.optimizer, _below("optimizer.", tensors))

    @torch.no_grad()
    def write_result(self, folder: Path, progress: Progress) -> None:
        """Writes the plain keys and values; an MLP is baked in. Every rank calls this."""
        on_first(self.world, lambda: self._write(folder, self.prefix.table().detach().cpu(), progress))


def mean_loss(
    lm: PrefixLM,
    table: Tensor | None,
    slots: Sequence[Slot],
    shares: Iterable[Share],
    device: torch.device,
) -> float:
    """Mean negative log-likelihood of a target token over all ranks' shares, in nats.

    Every rank calls this.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with masks_unread():
        for share in shares:
            for batch in share.micro_batches:
                totals[0] += lm.loss(batch.to(device), table, slots)
                totals[1] += len(batch.target_ids_M)
    lm.detach()
    loss, count = summed(totals).tolist()
    return float(loss / count)


def read_once(loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """Both numbers with a single wait for the device: the only one of a step."""
    first, second = torch.stack([loss, norm.to(loss)]).tolist()
    return first, second


def refuse_nonsense(loss: float, norm: float) -> None:
    """Raises RunError when the loss or the gradient is no number: the update would ruin what was learned."""
    if not (abs(loss) < float("inf") and norm < float("inf")):
        raise RunError(
            f"the loss is {loss}, its gradient's norm {norm}: training has diverged; "
            "lower train.lr, or raise train.warmup_steps"
        )


def _below(start: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
