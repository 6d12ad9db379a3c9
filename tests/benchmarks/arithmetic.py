"""What a step of a prefix on a Llama must compute, and how fast this machine does its matrix products alone.

Counted is what cannot be left out: products with weights, forward and for the gradient to their input (not
below the first prefix: the first layer's queries, keys and values want none; never to a weight), the logits
of targets, and attention within each document, to what comes before and to the prefix. Recomputation is not
counted, nor is a fused attention's second look at its scores.
"""

from dataclasses import dataclass

import torch

from tests.benchmarks.made import seconds


@dataclass(frozen=True)
class Work:
    """One micro-batch on a Llama whose sizes have transformers' names."""

    sizes: dict
    documents: tuple[int, ...]
    targets: int
    prefix: int

    @property
    def tokens(self):
        """Of all documents."""
        return sum(self.documents)

    def products(self):
        """(name, outputs, inputs) of each weight of a layer."""
        width, inner = self.sizes["hidden_size"], self.sizes["intermediate_size"]
        heads = self.sizes["num_attention_heads"]
        keys = width * self.sizes.get("num_key_value_heads", heads) // heads
        return (
            ("query", width, width),
            ("key", keys, width),
            ("value", keys, width),
            ("attention's output", width, width),
            ("gate", inner, width),
            ("up", inner, width),
            ("down", width, inner),
        )

    def calls(self):
        """(name, rows, outputs, inputs, forward calls, backward calls) of every product with a weight."""
        layers, width = self.sizes["num_hidden_layers"], self.sizes["hidden_size"]
        for name, outputs, inputs in self.products():
            backward = layers - (name in ("query", "key", "value"))
            yield name, self.tokens, outputs, inputs, layers, backward
        yield "head", self.targets, self.sizes["vocab_size"], width, 1, 1

    def product_flops(self):
        """With weights."""
        return sum(
            2 * rows * outputs * inputs * (forward + backward)
            for _, rows, outputs, inputs, forward, backward in self.calls()
        )

    def attention_flops(self):
        """Two products forward, four backward; to the first layer's text none."""
        pairs = sum(n * self.prefix + n * (n + 1) // 2 for n in self.documents)
        layers = self.sizes["num_hidden_layers"]
        return 2 * pairs * self.sizes["hidden_size"] * (2 * layers + 4 * (layers - 1))

    def flops(self):
        """Of one micro-batch, in all."""
        return self.product_flops() + self.attention_flops()


class Bare:
    """The same products with weights, alone: bfloat16, nothing allocated, each layer with a weight of its
    own."""

    def __init__(self, work, device, dtype=torch.bfloat16):
        self.calls = list(work.calls())
        self.made = {
            name: _operands(rows, outputs, inputs, max(forward, 1), device, dtype)
            for name, rows, outputs, inputs, forward, _ in self.calls
        }

    def timed(self, finish=lambda: None):
        """Seconds of all calls, by (name, direction). `finish` waits for the device."""
        found = {}
        for name, _, _, _, forward, backward in self.calls:
            x, y, weights = self.made[name]
            found[name, "forward"] = seconds(lambda: (_forward(x, weights[:forward], y), finish()))  # noqa: B023
            found[name, "backward"] = seconds(lambda: (_backward(y, weights[:backward], x), finish()))  # noqa: B023
        return found

    def rates(self, found):
        """FLOP/s, by the same names."""
        rates = {}
        for name, rows, outputs, inputs, *counts in self.calls:
            for direction, count in zip(("forward", "backward"), counts, strict=True):
                rates[name, direction] = 2 * rows * outputs * inputs * count / found[name, direction]
        return rates


def _operands(rows, outputs, inputs, count, device, dtype):
    """An input, a result, and so many weights."""
    shapes = [(rows, inputs), (rows, outputs), *[(outputs, inputs)] * count]
    x, y, *weights = (torch.randn(shape, device=device).to(dtype).mul_(0.02) for shape in shapes)
    return x, y, weights


def _forward(x, weights, y):
    for weight in weights:
        torch.mm(x, weight.t(), out=y)


def _backward(y, weights, x):
    for weight in weights:
        torch.mm(y, weight, out=x)
