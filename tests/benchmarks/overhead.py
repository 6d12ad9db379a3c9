"""What our step costs beside the same step written by hand: no DeepSpeed, no attention function, no packing
code.

    python -m tests.benchmarks.overhead [PAIRS]

A Llama of 12 layers, 768 wide, 32,000 tokens, bfloat16, one process; 2,048 tokens in 8 rows of 256, a prefix
of 30; half of the tokens are targets. By hand: transformers' model, the prefix as its key/value cache, the
head on the targets only, `cross_entropy`, AdamW. Ours: `PrefixEngine.step` on the ZeRO-3 engine. The two take
turns; printed are the seconds of each pair and the median of the ratios.
"""

import statistics
import sys
import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from prefix_ds.config import parse_config
from prefix_ds.data.batch import Share
from prefix_ds.dist import joined_world
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.prefix_engine import PrefixEngine
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import Direct, keys_values_of, random_table
from tests.laws import whole_batch

ROWS, LENGTH, PREFIX = 8, 256, 30
RUN = "model: {name: none}\nprefix: {init: random, length: 30}\ntrain: {lr: 1.0e-3}"
BASE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32000,
    "pad_token_id": None,
}


def main():
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with joined_world() as world:
        share, config = made_share(), parse_config(RUN)
        plain = new_model()
        settings = deepspeed_settings(config, world.size)
        shards = sharded(in_shards(new_model(), settings), settings)
        lm = PrefixLM(shards.module, device=world.device)
        table = random_table(lm.slots, PREFIX, 0.02, seed=0)
        engine = PrefixEngine(lm, shards, Direct(lm.slots, table), config.train, world, write=None)
        by_hand = Hand(plain, [[t.clone() for t in pair] for pair in keys_values_of(table, lm.slots)])
        report(pairs, lambda: engine.step(share, 1e-3).loss, lambda: by_hand.step(share.micro_batches[0]))


def new_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**BASE), dtype=torch.bfloat16).requires_grad_(False)


def made_share():
    ids_BT = torch.randint(0, 32000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    places = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[:, LENGTH // 2 : -1].flatten()
    positions_BT = torch.arange(LENGTH).expand(ROWS, -1)
    batch = whole_batch(ids_BT, positions_BT, places, ids_BT.flatten()[places + 1])
    return Share((batch,), len(places), ROWS * LENGTH)


class Hand:
    """The step a careful person would write."""

    def __init__(self, model, keys_values):
        self.model = model
        self.prefix = [[nn.Parameter(t) for t in pair] for pair in keys_values]
        self.optimizer = torch.optim.AdamW([t for pair in self.prefix for t in pair], lr=1e-3)

    def step(self, batch):
        cache = DynamicCache()
        for layer, pair in enumerate(self.prefix):
            key, value = (t.to(torch.bfloat16).expand(ROWS, -1, -1, -1) for t in pair)
            cache.update(key, value, layer)
        hidden = self.model.model(batch.ids_BT, past_key_values=cache).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[batch.target_index_M])
        loss = nn.functional.cross_entropy(logits.float(), batch.target_ids_M)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([t for pair in self.prefix for t in pair], 1.0)
        self.optimizer.step()
        return loss.item()


def report(pairs, ours, by_hand):
    print(f"losses before the first update: ours {ours():.4f}, by hand {by_hand():.4f}")  # and warm-up
    ratios = []
    for _ in range(pairs):
        mine, theirs = timed(ours), timed(by_hand)
        ratios.append(mine / theirs)
        print(f"ours {mine:6.3f} s, by hand {theirs:6.3f} s, ratio {ratios[-1]:.3f}")
    print(
        f"median ratio {statistics.median(ratios):.3f}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
