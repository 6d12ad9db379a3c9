"""A run as it is planned and as it is: the memory of a rank at the peak of a step, and what is gathered in
one.

Both are asked of one run file, a base in a folder, in real processes.
"""

import json
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers

from prefix_ds.config import parse_config
from prefix_ds.data.batch import Share
from prefix_ds.dist import joined_world, wait_for_all
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.full_engine import FullEngine
from prefix_ds.engine.prefix_engine import PrefixEngine
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded, sharded_with_optimizer
from prefix_ds.loading import load_base
from prefix_ds.model import PrefixLM
from prefix_ds.optim import adamw
from prefix_ds.plan import Device, Job, estimator
from prefix_ds.prefix import Direct, random_table
from tests.laws import whole_batch
from tests.ranks import on_ranks
from tests.resident import MIB, forget_highest, give_back_what_is_free, highest, resident, settle

CPU = Device("CPU", 24.0, 0.1, 1.0, 1.0, 1.0, 10.0, kind="cpu")
STEPS = 3  # watched; as many before are not, in which DeepSpeed learns the order of modules
ZERO = {"stage3_max_live_parameters": 20_000_000, "stage3_prefetch_bucket_size": 10_000_000}


@dataclass(frozen=True)
class Case:
    """A run: its base's family and sizes, ranks, keys, and one micro-batch of rows of one document each."""

    family: str
    ranks: int = 2
    words: tuple[str, ...] = ()
    rows: int = 4
    length: int = 128
    prefix: int = 16
    zero: tuple[tuple[str, int], ...] = tuple(ZERO.items())

    @property
    def name(self):
        """For people."""
        words = " ".join(self.words) or "bf16"
        own = "" if dict(self.zero) == ZERO else " sizes of the model"
        return f"{self.family} {self.ranks} ranks {words} {self.rows}x{self.length} P{self.prefix}{own}"


SIZES = {
    "llama": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 16384,
    },
    "gpt2": {"n_embd": 1024, "n_layer": 8, "n_head": 16, "vocab_size": 16384},
    "qwen3": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 65536, "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "hidden_size": 768, "moe_intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 2,
        "vocab_size": 16384, "intermediate_size": 1024,
    },
    "gemma2": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 16384,
    },
    "deepseek_v3": {
        "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 512, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16384, "n_routed_experts": 16,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
}  # fmt: skip


def made_base(folder, family, **sizes):
    """A base of random numbers on the disk."""
    config = transformers.AutoConfig.for_model(family, **(SIZES[family] | sizes), pad_token_id=None)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(folder / family)


def config_of(case, folder):
    """The run, as its file would say."""
    zero = {"stage": 3, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 5_000_000} | dict(case.zero)
    file = folder / f"zero{abs(hash(case.zero))}-{os.getpid()}.json"  # every rank writes its own
    file.write_text(json.dumps({"zero_optimization": zero}))
    text = (
        f"model: {{name: {folder / case.family}}}\nprefix: {{init: random, length: {case.prefix}}}\n"
        f"data: {{max_length: {case.length}}}\nengine: {{deepspeed: {file}}}\n"
        f"train: {{global_batch_size: {case.rows * case.ranks}, "
        f"micro_batch_tokens: {case.rows * case.length}}}"
    )
    return parse_config(text, list(case.words))


def planned(case, folder):
    """Of a rank: bytes at the peak, term by term; bytes gathered in a step, its own part included."""
    config = config_of(case, folder)
    length = 0 if config.train.method == "full" else case.prefix
    job = Job(1, case.ranks, case.length, 1.0)
    found = estimator(CPU, length)(config, job)
    return found.memory, found.traffic.gathered_bytes


def measured(case, folder):
    """The same, of the rank that holds most; and what oneDNN has come to keep for kernels of new shapes (the
    number of tokens that an expert gets differs from step to step), which is not in the first."""
    return max(on_ranks(case.ranks, _measured, case, folder, timeout_seconds=600))


def _measured(case, folder):
    settle()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with joined_world() as world:
        _used_once(case, folder, world)
        give_back_what_is_free()
        own = resident()
        engine = engine_of(config_of(case, folder), case, world)
        share = share_of(case)
        engine.step(share, 1e-4)
        give_back_what_is_free()
        idle = resident()
        for _ in range(STEPS):
            engine.step(share, 1e-4)
        give_back_what_is_free()
        with counted_gathers() as gathered:
            wait_for_all()
            forget_highest()
            for _ in range(STEPS):
                engine.step(share, 1e-4)
            peak = highest() - own
        give_back_what_is_free()
        kept = resident() - idle
        return (peak - kept) * MIB, sum(gathered) / STEPS, kept * MIB


def _used_once(case, folder, world):
    """What torch and its libraries load at first use, and keep as working space for products of these sizes:
    the same steps on a base in one piece."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / case.family, dtype=torch.bfloat16)
    lm = PrefixLM(base.requires_grad_(False))
    table = random_table(lm.slots, case.prefix, 0.02, seed=0).requires_grad_()
    for _ in range(2):
        lm.loss(share_of(case).micro_batches[0], table, lm.slots).backward()
        lm.detach()


def engine_of(config, case, world):
    """An engine on the case's base, in shards."""
    settings = deepspeed_settings(config, world.size)
    base = in_shards(load_base(config.model), settings)
    if config.train.method == "full":
        shards = sharded_with_optimizer(base, settings, adamw(base.parameters(), config.train))
        return FullEngine(PrefixLM(shards.module, device=world.device), shards, config.train, world, None)
    shards = sharded(base, settings)
    lm = PrefixLM(shards.module, recompute=config.model.recompute, device=world.device)
    prefix = Direct(lm.slots, random_table(lm.slots, case.prefix, 0.02, seed=0))
    return PrefixEngine(lm, shards, prefix, config.train, world, write=lambda *_: None)


def share_of(case, vocab_size=16000):
    """Each rank's: rows of one document."""
    ids_BT = torch.randint(
        0, vocab_size, (case.rows, case.length), generator=torch.Generator().manual_seed(0)
    )
    positions_BT = torch.arange(case.length).expand(case.rows, -1)
    index_M = torch.arange(ids_BT.numel())
    batch = whole_batch(ids_BT, positions_BT, index_M, ids_BT.flatten().roll(-1))
    return Share((batch,), len(index_M) * case.ranks, ids_BT.numel() * case.ranks)


@contextmanager
def counted_gathers():
    """The bytes that each collective gather inside puts together."""
    from deepspeed.runtime.zero import partition_parameters

    sizes, real = [], partition_parameters._dist_allgather_fn

    def counting(mine, whole, *rest):
        sizes.append(whole.numel() * whole.element_size())
        return real(mine, whole, *rest)

    partition_parameters._dist_allgather_fn = counting
    try:
        yield sizes
    finally:
        partition_parameters._dist_allgather_fn = real


CASES = [
    Case("llama"),
    Case("llama", words=("model.recompute=true",)),
    Case("llama", words=("model.bits=8",)),
    Case("llama", words=("model.bits=8", "model.recompute=true")),
    Case("llama", ranks=1),
    Case("llama", ranks=1, words=("model.bits=8", "model.recompute=true")),
    Case("llama", ranks=4),
    Case("llama", ranks=4, words=("model.bits=8", "model.recompute=true")),
    Case("llama", zero=()),
    Case("llama", rows=1, length=1024, words=("model.recompute=true",)),
    Case("llama", rows=8, length=64, prefix=256),
    Case("llama", words=("model.dtype=float32",)),
    Case("gpt2"),
    Case("gpt2", words=("model.bits=8",)),
    Case("qwen3"),
    Case("qwen3", words=("model.bits=8", "model.vocabulary_bits=8")),
    Case("qwen3_moe"),
    Case("qwen3_moe", words=("model.bits=8",)),
    Case("gemma2"),
    Case("deepseek_v3"),
    Case("llama", words=("train.method=full",)),
]
