"""What a rank holds is its shard and the layers in flight: measured as the kernel counts it, in real
processes.

A case is a family, a number of bits, and recomputation or not. The terms of each are printed (`pytest -s`):
what the process had before, 1.03 times its shard, what ZeRO-3 may have gathered at a time, activations.
"""

import logging
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers

from prefix_ds.config import parse_config
from prefix_ds.dist import joined_world, wait_for_all
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.saving import saving_parameters
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.int8.product import times_columns, times_rows
from prefix_ds.loading import load_base
from prefix_ds.model import PrefixLM
from prefix_ds.model.recompute import repeatable_layers
from prefix_ds.prefix import random_table
from tests.laws import batch_of, tokens
from tests.ranks import on_ranks
from tests.resident import MIB, forget_highest, give_back_what_is_free, highest, resident, settle
from tests.tiny_models import tiny, tiny_config

FAMILIES = ["llama", "gpt2", "qwen3_moe", "deepseek_v3"]
WIDE = {"hidden_size": 1024, "n_embd": 1024, "intermediate_size": 2048, "moe_intermediate_size": 2048}
LIVE = 3_000_000  # elements that ZeRO-3 may have gathered before it fetches no more ahead
# Of an allocator and of Python's own growth, measured up to 6. And what oneDNN keeps for kernels of new
# shapes, of which the tiles of 8-bit experts make many: up to 20, no more after the fifth step than after
# the first, while the tensors alive are the shards to 0.1 MiB.
NOISE_MIB = {16: 10, 8: 24}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder a family, 50 to 220 MiB of bfloat16 each."""
    folder = tmp_path_factory.mktemp("wide")
    for family in FAMILIES:
        config = tiny_config(family)
        for name, size in WIDE.items():
            if name in config.to_dict():
                setattr(config, name, size)
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        base.save_pretrained(folder / family)
    tiny("llama").save_pretrained(folder / "small")
    return folder


def terms_of(case, folder, keeps_aliases=False):
    """The terms of a case in MiB, in a process of its own: DeepSpeed keeps parts of an engine that is
    gone."""
    settle()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    family, bits, recompute = case
    with joined_world() as world:
        used_once(folder, family, bits, world)
        give_back_what_is_free()
        own = resident()
        base = sharded_base(folder / family, bits, world)
        give_back_what_is_free()
        loaded = resident() - own
        lm = PrefixLM(base.module, recompute=recompute, device=world.device)
        peak = highest_of_steps(lm, nullcontext if keeps_aliases else saving_parameters, base.let_go) - own
        give_back_what_is_free()
        assert not [n for n, p in base.module.named_parameters() if p.numel() and not p.ds_persist]
        terms = {
            "noise": NOISE_MIB[bits],
            "own": own,
            "shard": base.resident_bytes() / MIB,
            "gathered": gathered_mib(base.module),
        }
        return terms | {"loaded": loaded, "peak": peak, "after": resident() - own}


def used_once(folder, family, bits, world):
    """What torch and its libraries load at first use, and keep as working space for matrices of these sizes,
    is the process's own: the family whole, then a small base in shards."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.bfloat16)
    highest_of_steps(PrefixLM(whole.requires_grad_(False)), nullcontext)
    for shape in {weight.shape[-2:] for weight in whole.parameters() if weight.dim() > 1}:
        for times, width in ((times_rows, shape[1]), (times_columns, shape[0])):
            x = torch.zeros(16, width, dtype=torch.bfloat16)
            times(x, torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[0]))
    small = sharded_base(folder / "small", bits, world)
    highest_of_steps(PrefixLM(small.module, device=world.device), saving_parameters, small.let_go)


def highest_of_steps(lm, saving, let_go=lambda: None):
    """Of four: ZeRO-3 learns the order of modules in the first, and fetches ahead in the others."""
    table_PD = random_table(lm.slots, 4, 0.1, seed=0).requires_grad_()
    batch = batch_of([tokens(8, 1)], [tokens(8, 2)])
    wait_for_all()
    forget_highest()
    for _ in range(4):
        with saving():
            loss = lm.loss(batch, table_PD, lm.slots)
        loss.backward()
        let_go()
        lm.detach()
    return highest()


def sharded_base(folder, bits, world):
    config = parse_config(f"model: {{name: {folder}, bits: {bits}}}\nprefix: {{init: random, length: 4}}")
    settings = deepspeed_settings(config, world.size)
    settings["zero_optimization"]["stage3_max_live_parameters"] = LIVE
    return sharded(in_shards(load_base(config.model), settings), settings)


def gathered_mib(module):
    """The widest of what comes at once, a layer or a module's own, or all that may be there before nothing
    more is fetched ahead; and the parameter that passes the limit; twice, as gathered and as put in order."""
    layers = repeatable_layers(module)
    sizes = [
        sum(p.ds_numel * p.element_size() for p in m.parameters(recurse=m in layers))
        for m in module.modules()
    ]
    largest = max(p.ds_numel * p.element_size() for p in module.parameters())
    width = max(p.element_size() for p in module.parameters() if not p.ds_persist)
    return 2 * (max(*sizes, LIVE * width) + largest) / MIB


def allowed(terms):
    return 1.03 * terms["shard"] + terms["noise"]


CASES = [
    *((2, family, bits, False) for family in FAMILIES for bits in (16, 8)),
    *((2, family, 16, True) for family in ("llama", "qwen3_moe")),
    *((4, family, bits, False) for family in ("llama", "qwen3_moe") for bits in (16, 8)),
]


@pytest.mark.parametrize(("size", "family", "bits", "recompute"), CASES)
def test_a_rank_holds_its_shard_and_the_layers_in_flight(bases, size, family, bits, recompute):
    for terms in on_ranks(size, terms_of, (family, bits, recompute), bases):
        told = " ".join(f"{name} {mib:.1f}" for name, mib in terms.items())
        sys.stdout.write(f"{size} ranks, {family}, {bits} bits, recomputed {recompute}, MiB: {told}\n")
        assert terms["loaded"] <= allowed(terms)
        assert terms["peak"] <= allowed(terms) + terms["gathered"]
        assert terms["after"] <= allowed(terms)


def test_this_test_sees_a_gathered_weight_that_is_kept(bases):
    """The same without `saving_parameters`: what autograd saves of the experts keeps all of them."""
    terms = on_ranks(2, terms_of, ("qwen3_moe", 16, False), bases, True)[0]
    assert terms["peak"] > allowed(terms) + terms["gathered"]
