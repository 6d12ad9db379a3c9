"""What benchmarks work on: texts of ../shared/data, Llamas of random numbers, batches, an engine on a rank.

A base's numbers are promises of noise, so that each rank makes what it will hold, on its own device, and a
base of any size needs no file.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from prefix_ds.config import TrainKeys, parse_config
from prefix_ds.data.packing import Limits
from prefix_ds.data.stream import Stream
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.prefix_engine import PrefixEngine
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.int8 import stored_in_8_bits
from prefix_ds.model import PrefixLM
from prefix_ds.new_tokenizer import trained_tokenizer
from prefix_ds.prefix import Direct, random_table
from prefix_ds.promise import Promise

_PLACES = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
DATA = next((place for place in _PLACES if place.is_dir()), _PLACES[3])
RUN = "model: {{name: none, recompute: {recompute}}}\nprefix: {{init: random, length: {prefix}}}"


def rows(name):
    """The records of a file of ../shared/data."""
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def captions():
    """E2E's training file: short ones, a sentence from data."""
    return [{"prompt": row["mr"] + "\n", "target": row["ref"]} for row in rows("e2e/train.jsonl")]


def summaries():
    """DialogSum's training file: long ones, a summary of a dialogue."""
    return [
        {"prompt": row["dialogue"] + "\nTL;DR:", "target": " " + row["summary"]}
        for row in rows("dialogsum/train.jsonl")
    ]


def base_folder(folder, sizes, texts):
    """A Llama of random numbers on the disk, with a tokenizer of 4,096 entries learned from records."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(llama(sizes), dtype=torch.bfloat16)
    base.save_pretrained(folder)
    trained_tokenizer((" ".join(row.values()) for row in texts), 4096).save_pretrained(folder)
    return folder


def llama(sizes):
    """The configuration; sizes by transformers' names."""
    return LlamaConfig(**{"pad_token_id": None, "max_position_embeddings": 131072} | sizes)


@dataclass(frozen=True)
class Noise:
    """Normal numbers, the same ones for the same range; ones where a tensor is a norm's."""

    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def read(self, start, stop):
        """Elements [start, stop), made here and now."""
        made = torch.empty(stop - start, dtype=self.dtype, device=self.device)
        if len(self.shape) == 1:
            return made.fill_(1.0)
        generator = torch.Generator(self.device).manual_seed(start + sum(self.shape))
        return made.normal_(0, 0.02, generator=generator)


def promised_base(sizes, device):
    """A Llama whose parameters are promises of noise."""
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(llama(sizes), dtype=torch.bfloat16)
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            promise = Promise.of(Noise(tuple(parameter.shape), device))
            module._parameters[name] = nn.Parameter(promise, requires_grad=False)
    return base.eval()


def new_engine(sizes, world, prefix, *, recompute=False, bits=16, outliers=None):
    """An engine that trains a random prefix on a Llama of noise. Every rank calls this."""
    config = parse_config(RUN.format(recompute=str(recompute).lower(), prefix=prefix))
    base = promised_base(sizes, world.device)
    if bits == 8:
        stored_in_8_bits(base, False, (), outliers)
    return engine_on(base, config, world, prefix)


def engine_on(base, config, world, prefix):
    """An engine that trains a random prefix on a base. Every rank calls this."""
    settings = deepspeed_settings(config, world.size)
    shards = sharded(in_shards(base, settings), settings)
    lm = PrefixLM(shards.module, recompute=config.model.recompute, device=world.device)
    table = random_table(lm.slots, prefix, 0.02, seed=0)
    return PrefixEngine(lm, shards, Direct(lm.slots, table), config.train, world, write=None)


class Documents:
    """Examples of random tokens, by their lengths; the second half of each is its target."""

    def __init__(self, lengths, vocab_size):
        chance = np.random.default_rng(0)
        self.lengths = np.array(lengths)
        self.num_targets = self.lengths // 2
        self.texts = [chance.integers(0, vocab_size, length, dtype=np.int32) for length in lengths]

    def __len__(self):
        return len(self.texts)

    def ids(self, indices):
        """As data of a run gives them."""
        return [self.texts[index] for index in indices]


def made_share(lengths, vocab_size, world, micro_batch_tokens):
    """A rank's part of a step that has so many such documents for each rank, packed as a run packs them."""
    documents = Documents(list(lengths) * world.size, vocab_size)
    keys = TrainKeys(global_batch_size=len(documents), max_steps=1)
    return Stream(documents, Limits(micro_batch_tokens, micro_batch_tokens), keys, world).share(0)


def use_threads(count):
    """Of the world that this process will join."""
    os.environ["PREFIX_DS_THREADS"] = str(count)


def seconds(work):
    """That it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
