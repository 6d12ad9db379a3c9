"""What 8 bits cost a prefix in quality: on the base and the task of `tests.benchmarks.e2e`.

    python -m tests.benchmarks.int8_curve FOLDER [RATE]

FOLDER is where that benchmark has run: its base is pretrained, so its weights are what weights are, not
noise. Two prefixes are tuned on it with one seed and one rate (0.1 unless told otherwise), on the base in 16
bits and in 8; printed are their validation losses every 50 steps. Before that, on validation texts of 64
tokens behind the first prefix, before any training: the KL divergence of the predictions in 8 bits from those
in 16, in nats a token, and how near the gradients to the prefix are."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from prefix_ds.config import read_config
from prefix_ds.dist import joined_world
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.saving import saving_parameters
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.loading import load_base, load_tokenizer
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import random_table
from tests.benchmarks.e2e import train, valid_losses
from tests.benchmarks.made import rows
from tests.laws import whole_batch
from tests.ranks import on_ranks

BITS = (16, 8)
NUM_TEXTS, LENGTH = 64, 64


def main():
    folder = Path(sys.argv[1]).resolve()
    rate = sys.argv[2] if len(sys.argv) > 2 else "0.1"
    path = folder / "tuning.yaml"
    show_nearness(*(on_ranks(1, answers, path, bits)[0] for bits in BITS))
    with ThreadPoolExecutor(2) as two:
        losses = list(two.map(lambda bits: tuned(path, bits, rate), BITS))
    table = Table("step", *(f"{bits} bits" for bits in BITS), "ratio")
    for step, plain in losses[0].items():
        table.add_row(str(step), f"{plain:.4f}", f"{losses[1][step]:.4f}", f"{losses[1][step] / plain:.4f}")
    Console(width=110).print(table)


def tuned(path, bits, rate):
    run = path.parent / f"bits-{bits}-{rate}"
    words = [f"model.bits={bits}", f"train.lr={rate}", "run.valid_every=50", f"run.folder={run}"]
    train(path, *words, threads=1)
    return valid_losses(run)


def answers(path, bits):
    """Logits [M, V] and the gradient to a prefix, on texts of the validation file."""
    with joined_world() as world:
        config = read_config(path, [f"model.bits={bits}"])
        settings = deepspeed_settings(config, world.size)
        base = sharded(in_shards(load_base(config.model), settings), settings)
        lm = PrefixLM(base.module, device=world.device)
        table_PD = random_table(lm.slots, 16, 0.5, seed=0).requires_grad_()
        batch = texts(load_tokenizer(config.model, config.data))
        with saving_parameters():
            lm.loss(batch, table_PD, lm.slots).backward()
        with torch.no_grad():
            return lm.logits(batch, table_PD, lm.slots).float().numpy(), table_PD.grad.numpy()


def texts(tokenizer):
    """Validation texts, cut to one length, every token of which is a target."""
    ids = [tokenizer(f"{row['mr']}\n{row['refs'][0]}").input_ids for row in rows("e2e/valid.jsonl")]
    ids_BT = torch.tensor([one[:LENGTH] for one in ids if len(one) >= LENGTH][:NUM_TEXTS])
    positions_BT = torch.arange(LENGTH).expand_as(ids_BT)
    index_M = torch.arange(ids_BT.numel()).view_as(ids_BT)[:, :-1].flatten()
    return whole_batch(ids_BT, positions_BT, index_M, ids_BT[:, 1:].flatten())


def show_nearness(plain, near):
    (expected_MV, expected_grad), (found_MV, found_grad) = (
        [*map(torch.from_numpy, x)] for x in (plain, near)
    )
    divergence = functional.kl_div(
        found_MV.log_softmax(-1), expected_MV.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    cosine = torch.cosine_similarity(found_grad.flatten(), expected_grad.flatten(), dim=0)
    error = (found_grad - expected_grad).norm() / expected_grad.norm()
    Console(width=110).print(
        f"{len(expected_MV):,} tokens: KL {divergence:.2e} nats; gradient to the prefix: cosine {cosine:.5f}, "
        f"relative error {error:.4f}"
    )


if __name__ == "__main__":
    main()
