"""A step on one GPU: ours beside PEFT's, and beside the rate of the GPU's bare matrix products.

    python -m tests.benchmarks.gpu [--tiny] [PART OF A NAME ...]

A base of Llama 3 8B's shape, random weights made on the device; a step is one micro-batch of ours: a row of
4,096 or 16,384 tokens, packed with documents of 64 to 1,024, half of each a target, a prefix of 30. PEFT gets
the same documents in micro-batches padded to the longest, of no more tokens padded than ours has in its row;
plain transformers, without DeepSpeed. Each case is a process of its own, so one that runs out of memory says
so and no more. Printed: tokens a second, the arithmetic of `tests.benchmarks.arithmetic` over time and over the
rate of bare products, peak memory, the attention kernels that ran, the longest kernels and the largest gaps
between them; and for 8 bits each shape's product by a cast tile by tile, by bitsandbytes' int8 kernels, and
in bfloat16.

`--tiny` is for machines without a GPU: a base of two layers, in seconds.
"""

import json
import logging
import statistics
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from prefix_ds.dist import joined_world
from prefix_ds.int8.activations import times_rows_in_int8
from prefix_ds.int8.product import product_of
from prefix_ds.int8.quantise import quantised
from prefix_ds.promise import kept
from tests.benchmarks.arithmetic import Bare, Work
from tests.benchmarks.made import Documents, made_share, new_engine, promised_base, seconds, use_threads
from tests.benchmarks.profiled import profiled
from tests.resident import forget_highest, highest

PREFIX, STEPS, MARK = 30, 5, "FOUND "
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip
ROWS = {False: (4096, 16384), True: (512, 1024)}
IS_TINY = "--tiny" in sys.argv
SIZES = TINY if IS_TINY else SHAPE
CONSOLE = Console(width=150)
CASES = {
    "ours": {},
    "ours, recomputed": {"recompute": True},
    "ours, 8 bits": {"bits": 8},
    "ours, 8 bits, recomputed": {"bits": 8, "recompute": True},
    "ours, int8 inputs": {"bits": 8, "outliers": 6.0},
}


@dataclass(frozen=True)
class Found:
    """What a case came to."""

    step_seconds: float
    memory_gib: float
    loss: float
    attention: list
    operators: list
    gaps: list
    idle: float


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    table = Table("row", "case", "tokens/s", "s a step", "TFLOP/s", "bare", "of bare", "GiB", "idle", "loss")
    for row in ROWS[IS_TINY]:
        cases = ("PEFT", "PEFT, 8 bits", *CASES)
        chosen = [case for case in cases if all(word in f"{case}, {row}" for word in words)]
        if not chosen or (bare := in_a_process("bare", row)) is None:
            continue
        show_products(row, bare["rates"], in_a_process("8-bit products", row))
        for case in chosen:
            told = cells(row, in_a_process(case, row), bare["rate"])
            CONSOLE.print(f"{case}, a row of {row:,}: {' '.join(told)}", markup=False)
            table.add_row(f"{row:,}", case, *told)
    CONSOLE.print(table)


def in_a_process(case, row):
    """What a case says of itself; None, with its last words shown, where it fails."""
    words = [sys.executable, "-m", "tests.benchmarks.gpu", "case", case, str(row)]
    done = subprocess.run(
        [*words, *(["--tiny"] if IS_TINY else [])], capture_output=True, text=True, check=False
    )
    told = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if told is None:
        error = [line for line in done.stderr.splitlines() if "Error" in line]
        CONSOLE.print(f"{row:,}, {case}: {(error or ['nothing said'])[-1][:300]}", markup=False)
        return None
    found = json.loads(told.removeprefix(MARK))
    if "step_seconds" in found:
        show(f"{case}, a row of {row:,}", Found(**found))
    return found


def cells(row, found, rate):
    """Of the table."""
    if found is None:
        return ("failed",)
    found, work = Found(**found), work_of(row)
    done = work.flops() / found.step_seconds
    return (
        f"{row / found.step_seconds:,.0f}",
        f"{found.step_seconds:.3f}",
        f"{done / 1e12:,.3g}",
        f"{rate / 1e12:,.3g}",
        f"{done / rate:.2f}",
        f"{found.memory_gib:.2f}",
        f"{found.idle:.1%}",
        f"{found.loss:.3f}",
    )


def show(name, found):
    """At once, what the profiler saw."""
    kernels = ", ".join(f"{kernel[:90]} x{count}" for kernel, count in found.attention)
    CONSOLE.print(f"{name}: {found.step_seconds:.3f} s a step; attention: {kernels}", markup=False)
    table = Table("longest", "calls", "part of the step", title=name)
    for kernel, count, part in found.operators:
        table.add_row(kernel[:110], str(count), f"{part:.1%}")
    CONSOLE.print(table)
    for gap, before, after in found.gaps:
        CONSOLE.print(f"  idle {gap:.2f} ms between {before[:60]} and {after[:60]}", markup=False)


def documents_of(row):
    """Lengths that fill a row."""
    chance, lengths = np.random.default_rng(0), []
    longest = min(1024, row // 4)
    while sum(lengths) < row:
        drawn = int(np.exp(chance.uniform(np.log(64), np.log(longest))))
        lengths.append(min(drawn, row - sum(lengths)))
    return lengths if lengths[-1] > 1 else [*lengths[:-2], lengths[-2] + 1]


def work_of(row):
    """A step's."""
    documents = documents_of(row)
    return Work(SIZES, tuple(documents), sum(n // 2 for n in documents), PREFIX)


def run_case(case, row):
    """In a process of its own."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    use_threads(1)  # where there is no GPU, others may need the cores
    with joined_world() as world:
        if case == "bare":
            return bare_products(row, world.device)
        if case == "8-bit products":
            return products_in_8_bits(row, world.device)
        step = peer(row, world.device, case.endswith("8 bits")) if "PEFT" in case else ours(case, row, world)
        return asdict(measured(step))


def ours(case, row, world):
    """A step, to be called."""
    engine = new_engine(SIZES, world, PREFIX, **CASES[case])
    share = made_share(documents_of(row), SIZES["vocab_size"], world, row)
    return lambda: engine.step(share, 1e-3).loss


def peer(row, device, in_8_bits):
    """The same with PEFT."""
    from peft import PrefixTuningConfig, get_peft_model

    base = promised_base(SIZES, device)
    for module in list(base.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(kept(parameter), requires_grad=False)
    if in_8_bits:
        to_bitsandbytes(base.model)
    told = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    model = get_peft_model(base.to(device), told).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    groups = [{name: t.to(device) for name, t in batch.items()} for batch in padded_groups(row)]
    return partial(peer_step, model, optimizer, groups)


def to_bitsandbytes(model):
    """Linear layers as bitsandbytes has them."""
    import bitsandbytes

    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        new = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=6.0
        )
        data, device = linear.weight.data, linear.weight.device
        new.weight = bitsandbytes.nn.Int8Params(data.cpu(), requires_grad=False, has_fp16_weights=False)
        model.set_submodule(name, new.to(device))


def padded_groups(row):
    """The documents of a row in micro-batches, as they come, of no more tokens padded than the row has."""
    from tests.benchmarks.peft_zero3 import padded

    groups = [[]]
    for ids in Documents(documents_of(row), SIZES["vocab_size"]).texts:
        longest = max(len(ids), *(len(e["ids"]) for e in groups[-1]), 0)
        if longest * (len(groups[-1]) + 1) > row:
            groups.append([])
        groups[-1].append({"ids": ids.astype("int64"), "prompt": len(ids) - len(ids) // 2})
    return list(map(padded, groups))


def peer_step(model, optimizer, groups):
    """The mean loss of the micro-batches."""
    optimizer.zero_grad()
    total = 0.0
    for batch in groups:
        loss = model(**batch).loss / len(groups)
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    return float(total)


def finish():
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(step):
    """Two steps are not counted."""
    first = step()
    step()
    finish()
    (torch.cuda.reset_peak_memory_stats if torch.cuda.is_available() else forget_highest)()
    times = [seconds(lambda: (step(), finish())) for _ in range(STEPS)]
    gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else highest() / 1024
    seen = profiled(lambda: (step(), finish()))
    return Found(statistics.median(times), gib, first, seen.attention, seen.operators, seen.gaps, seen.idle)


def bare_products(row, device):
    """The rate of bare products, and the rates by shape."""
    work = work_of(row)
    bare = Bare(work, device)
    found = [bare.timed(finish) for _ in range(5)][2:]
    medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
    rates = {" ".join(key): rate for key, rate in bare.rates(medians).items()}
    return {"rate": work.product_flops() / sum(medians.values()), "rates": rates}


def products_in_8_bits(row, device):
    """By shape of the weight, the rates of each way."""
    shapes = {(outputs, inputs) for _, outputs, inputs in work_of(row).products()}
    return {f"{r} x {k}": int8_rates(row, r, k, device) for r, k in sorted(shapes)}


def int8_rates(rows, outputs, inputs, device):
    """FLOP/s of one shape: bfloat16, cast tile by tile (forward, backward), bitsandbytes' kernels."""
    x, y = (torch.randn(rows, n, device=device).bfloat16() for n in (inputs, outputs))
    weight = torch.randn(outputs, inputs, device=device).bfloat16()
    numbers, scales = quantised(weight)
    in_int8 = times_rows_in_int8(6.0)
    ways = {
        "bfloat16": lambda: x @ weight.t(),
        "cast, forward": lambda: product_of(x, numbers, scales, None, True),
        "cast, backward": lambda: product_of(y, numbers, scales, None, False),
        "int8 kernels": lambda: in_int8(x, numbers, scales),
    }
    return {way: 2 * rows * outputs * inputs / a_call(work) for way, work in ways.items()}


def a_call(work, count=10):
    """Seconds of one of several."""
    work(), work(), finish()
    return statistics.median(seconds(lambda: (work(), finish())) for _ in range(count))


def show_products(row, bare, in_8_bits):
    """Rates of shapes, in TFLOP/s."""
    table = Table("product, alone", "TFLOP/s", title=f"{row:,} tokens: bare, bfloat16")
    for name, rate in bare.items():
        table.add_row(name, f"{rate / 1e12:,.3g}")
    ways = next(iter(in_8_bits.values())) if in_8_bits else ()
    shapes = Table("weight", *ways, title=f"{row:,} tokens: TFLOP/s with a weight in 8 bits, and in 16")
    for name, rates in (in_8_bits or {}).items():
        shapes.add_row(name, *(f"{rate / 1e12:,.3g}" for rate in rates.values()))
    CONSOLE.print(table, shapes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        print(MARK + json.dumps(run_case(sys.argv[2], int(sys.argv[3]))), flush=True)
    else:
        main()
