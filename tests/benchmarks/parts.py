"""Parts of a layer alone, ours beside the plain way: attention of packed documents, a norm, the loss.

    python -m tests.benchmarks.parts [--quick] [PART OF A NAME ...]

In bfloat16, forward and backward, on one thread and on two, medians of seven calls (`--quick`: of three) in milliseconds, and
the error of the gradient beside float64. Attention: a row of documents behind a prefix of 30, by
`model.apart`, and by torch's scaled dot product called for a document at a time with a mask. Norm: 2,048
places of 768, by `model.norms`, and by transformers' Llama. Loss: 512 targets behind 512 numbers and a
vocabulary of 128,256, by `model.likelihood`, and by torch's cross entropy of float32 logits.
"""

import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy, linear, rms_norm, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prefix_ds.data.batch import Document
from prefix_ds.model import apart, norms
from prefix_ds.model.likelihood import summed_nll_behind
from prefix_ds.model.masks import Causal
from tests.benchmarks.made import seconds

THREADS, FRONT = (1, 2), 30
ROWS = {  # lengths of documents, heads, heads of keys
    "32 documents of 64": ((64,) * 32, 12, 12),
    "8 documents of 256": ((256,) * 8, 12, 12),
    "2 documents of 1,024, grouped heads": ((1024,) * 2, 16, 4),
    "1 document of 4,096": ((4096,), 8, 8),
}


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    calls = 3 if "--quick" in sys.argv else 7
    table = Table("part", "way", "threads", "forward, ms", "backward, ms", "error of the gradient")
    for name, make in parts().items():
        if all(word in name for word in words):
            compare(name, make, calls, table)
    Console(width=130).print(table)


def parts():
    """By name: what makes (inputs, what is given to the backward pass, ways by name)."""
    attentions = {f"attention, {name}": lambda row=row: attention(*row) for name, row in ROWS.items()}
    return attentions | {"norm": norm, "loss": loss}


def compare(name, make, calls, table):
    """A row of the table for each way and number of threads."""
    inputs, weight, ways = make()
    exact = gradients(next(iter(ways.values())), [each.double() for each in inputs], weight.double())
    for way, work in ways.items():
        for threads in THREADS:
            torch.set_num_threads(threads)
            forward, backward = zip(*(timed(work, inputs, weight) for _ in range(calls + 2)), strict=True)
            error = max(map(distance, gradients(work, inputs, weight), exact))
            times = [f"{1e3 * statistics.median(column[2:]):.1f}" for column in (forward, backward)]
            table.add_row(name, way, str(threads), *times, f"{error:.4f}")


def timed(work, inputs, weight):
    """Seconds forward, and backward."""
    leaves, made = [each.clone().requires_grad_() for each in inputs], []
    forward = seconds(lambda: made.append(work(*leaves)))
    return forward, seconds(lambda: made[0].backward(weight))


def gradients(work, inputs, weight):
    """To each input."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    return torch.autograd.grad(work(*leaves), leaves, weight)


def distance(ours, exact):
    """Relative, by the norms."""
    return float((ours.double() - exact).norm() / exact.norm())


def attention(lengths, heads, keys, size=64):
    """A row of documents."""
    shapes = [(1, sum(lengths), n, size) for n in (heads, keys, keys)]
    text = [torch.randn(shape).bfloat16().transpose(1, 2) for shape in shapes]
    front = [torch.randn(keys, FRONT, size).bfloat16() for _ in range(2)]
    stops = torch.tensor(lengths).cumsum(0).tolist()
    documents = tuple(Document(0, stop - n, stop) for n, stop in zip(lengths, stops, strict=True))
    layout = apart.Layout(documents, Causal(), frozenset([0]), size**-0.5)

    def ours(query, key, value, front_key, front_value):
        return apart.attended(query, key, value, (front_key, front_value), layout)

    def by_torch(query, key, value, front_key, front_value):
        return torch.cat([alone(d, query, key, value, front_key, front_value) for d in documents], dim=1)

    def alone(document, query, key, value, front_key, front_value):
        places = slice(document.start, document.stop)
        seen = Causal().seen(document.length, document.length, torch.device("cpu"))
        joined = [
            torch.cat([before[None], text[:, :, places]], dim=2)
            for before, text in ((front_key, key), (front_value, value))
        ]
        mask = torch.nn.functional.pad(seen, (FRONT, 0), value=True)
        options = {"attn_mask": mask, "enable_gqa": heads != keys, "scale": layout.scale}
        return scaled_dot_product_attention(query[:, :, places], *joined, **options).transpose(1, 2)

    weight = torch.randn(1, sum(lengths), heads, size).bfloat16()
    return [*text, *front], weight, {"ours": ours, "torch's, a document at a time": by_torch}


def norm(places=2048, width=768):
    """Of the root mean square."""
    theirs = LlamaRMSNorm(width).bfloat16().requires_grad_(False)
    ours = LlamaRMSNorm(width).bfloat16().requires_grad_(False)
    norms.take_over_norms(ours)

    def of(module):
        return lambda hidden: module(hidden) if hidden.dtype == torch.bfloat16 else exact(hidden)

    def exact(hidden):
        return rms_norm(hidden, (width,), eps=ours.variance_epsilon)  # weights are ones

    shape = (1, places, width)
    inputs, weight = [torch.randn(shape).bfloat16()], torch.randn(shape).bfloat16()
    return inputs, weight, {"ours": of(ours), "transformers'": of(theirs)}


def loss(targets=512, width=512, vocabulary=128_256):
    """Of targets, through an output layer."""
    layer = torch.randn(vocabulary, width).bfloat16().mul_(0.02)
    ids = torch.randint(0, vocabulary, (targets,))

    def ours(hidden):
        return summed_nll_behind(
            hidden, ids, lambda part: linear(part[None], layer.to(hidden.dtype)), vocabulary
        )

    def plain(hidden):
        logits = linear(hidden, layer.to(hidden.dtype))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(wide, ids, reduction="sum").double()

    return (
        [torch.randn(targets, width).bfloat16()],
        torch.ones((), dtype=torch.float64),
        {
            "ours": ours,
            "torch's cross entropy": plain,
        },
    )


if __name__ == "__main__":
    main()
