"""In shards a base computes what it computes whole: loss, gradient to the prefix, keys and values of a text.

Two ranks, families that differ in what could trip ZeRO-3: Conv1D weights, experts in one tensor, tied and
scaled embeddings, sinks, low-rank keys, a window, parameters that one module reads from another.
"""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from prefix_ds.config import parse_config
from prefix_ds.dist import joined_world
from prefix_ds.engine.filling import _place_buffers, in_shards
from prefix_ds.engine.pace import keep_pace
from prefix_ds.engine.prefix_engine import PrefixEngine
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.initial import initial_prefix
from prefix_ds.loading import load_base
from prefix_ds.model import PrefixLM
from prefix_ds.model.recompute import repeatable_layers
from prefix_ds.model.trial import Trial
from prefix_ds.prefix import Direct, random_table, table_of
from tests.laws import whole_batch
from tests.planned import Case, config_of, engine_of, share_of
from tests.ranks import on_ranks
from tests.tiny_models import SIZES, SPECIAL, tiny

FAMILIES = [
    "gpt2",
    "opt",
    "gemma2",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_moe",
    "phi",
    "mistral",
    "bart",
    "bert",
    "falcon_h1",
]
TURNS = 3  # ZeRO-3 learns the order of modules in the first, and fetches ahead by it from then on


def batch(seed):
    """Two rows of two documents each."""
    ids_BT = torch.randint(10, 90, (2, 9), generator=torch.Generator().manual_seed(seed))
    positions_BT = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, -1)
    targets = torch.tensor([1, 2, 5, 10, 16]), torch.tensor([11, 12, 13, 14, 15])
    return whole_batch(ids_BT, positions_BT, *targets)


def answers(lm, seed):
    """Loss and gradient behind a text's keys and values, of a batch of this seed."""
    table_PD = table_of(lm.keys_values_of(torch.tensor([[5, 6, 7]]), lm.slots)).requires_grad_()
    loss = lm.loss(batch(seed), table_PD, lm.slots)
    loss.backward()
    lm.detach()
    return loss.item(), table_PD.detach().numpy(), table_PD.grad.numpy()


def test_buffers_lie_where_the_base_runs():
    """DeepSpeed moves none of a base in shards; here the meta device is the GPU."""
    base = tiny("deepseek_v3")
    _place_buffers(base, torch.device("meta"))
    assert {buffer.device.type for buffer in base.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in base.parameters()} == {"cpu"}
    assert "e_score_correction_bias" in " ".join(name for name, _ in base.named_buffers())


class Words:
    """A tokenizer of the small vocabulary."""

    all_special_ids = ()

    def __call__(self, text):
        return SimpleNamespace(input_ids=[5, 6, 7])


def starts_that_round_differently(folder):
    """A text's keys and values, which the second rank finds a little larger."""
    config = parse_config(f"model: {{name: {folder}/llama, dtype: float32}}\nprefix: {{text: a b c}}")
    with joined_world() as world:
        settings = deepspeed_settings(config, world.size)
        base = sharded(in_shards(load_base(config.model), settings), settings)
        lm = PrefixLM(base.module)
        exact = lm.keys_values_of
        lm.keys_values_of = lambda *a: [(key * (1 + world.rank), value) for key, value in exact(*a)]
        prefix = initial_prefix(lm, config.prefix, Words(), 0, world.device)
        return prefix.table().detach().numpy()


def test_all_ranks_start_from_one_prefix(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    one, other = on_ranks(2, starts_that_round_differently, tmp_path)
    assert (one == other).all()


def trials_that_differ(folder):
    config = parse_config(f"model: {{name: {folder}/llama, dtype: float32}}\nprefix: {{text: a b c}}")
    with joined_world() as world:
        settings = deepspeed_settings(config, world.size)
        base = sharded(in_shards(load_base(config.model), settings), settings)
        findings = Trial.findings
        Trial.findings = lambda *a: replace(findings(*a), can_pack=world.rank == 0)
        return PrefixLM(base.module).can_pack


def test_ranks_agree_on_what_a_base_can_do(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    assert on_ranks(2, trials_that_differ, tmp_path) == [False, False]


def answers_in_shards(folder, names, recompute):
    found = {}
    with joined_world() as world:
        for name in names:
            config = parse_config(
                f"model: {{name: {folder}/{name}, dtype: float32}}\nprefix: {{init: random, length: 3}}"
            )
            settings = deepspeed_settings(config, world.size)
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # everything is in shards
            shards = sharded(in_shards(load_base(config.model), settings), settings)
            assert all(p.numel() == 0 for p in shards.module.parameters())
            lm = PrefixLM(shards.module, recompute=recompute, device=world.device)
            for turn in range(TURNS):
                found[name] = answers(lm, world.rank + 2 * turn)
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_in_shards_as_whole(tmp_path, recompute):
    assert_as_whole(tmp_path, FAMILIES, recompute)


def test_ranks_hit_different_experts(tmp_path, monkeypatch):
    """Families that call modules for each expert that is hit; of sixteen, each rank's tokens hit others."""
    monkeypatch.setitem(SIZES, "n_routed_experts", 16)
    monkeypatch.setitem(SPECIAL["dbrx"]["ffn_config"], "moe_num_experts", 16)
    assert_as_whole(tmp_path, ["dbrx", "longcat_flash"], recompute=False)


def assert_as_whole(folder, families, recompute):
    """Two ranks, each with its own batches, find what the whole base finds of the last of both."""
    whole = {}
    for name in families:
        model = tiny(name)
        model.save_pretrained(folder / name)
        lm = PrefixLM(model.float())
        whole[name] = [answers(lm, rank + 2 * (TURNS - 1)) for rank in range(2)]
    for rank, found in enumerate(on_ranks(2, answers_in_shards, folder, families, recompute)):
        for name in families:
            for mine, expected in zip(found[name], whole[name][rank], strict=True):
                assert mine == pytest.approx(expected, rel=1e-4, abs=1e-5), name


class Place:
    """An event of a device that has done nothing yet: who waits for it is written down."""

    def __init__(self, told):
        self.told, self.number = told, len([word for word, _ in told if word == "queued"])

    def record(self):
        self.told.append(("queued", self.number))

    def synchronize(self):
        self.told.append(("waited for", self.number))


@pytest.mark.parametrize("again", [False, True])
def test_the_host_stays_two_layers_ahead_of_the_device(again):
    base, told = tiny("llama").requires_grad_(False), []
    layers = repeatable_layers(base)
    keep_pace(layers, lambda: Place(told))
    lm = PrefixLM(base, recompute=again)
    trial = len(told)
    lm.loss(batch(0), random_table(lm.slots, 3, 0.1, seed=0).requires_grad_(), lm.slots).backward()
    queued = [number for word, number in told[trial:] if word == "queued"]
    assert len(queued) == 2 * len(layers)
    for (word, number), following in pairwise(told):
        if word == "waited for":
            assert following == ("queued", number + 2)
    assert told[trial:].count(("waited for", queued[-1] - 2)) == 1


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_nothing_stays_gathered_after_a_step(tmp_path, recompute):
    """Whichever layer is the lowest with a prefix: below it nothing has a gradient."""
    for family in ("llama", "jamba"):
        tiny(family).save_pretrained(tmp_path / family)
    assert on_ranks(2, left_gathered, tmp_path, recompute) == [{"llama": [], "jamba": []}] * 2


def left_gathered(folder, recompute):
    found = {}
    with joined_world() as world:
        for family in ("llama", "jamba"):
            words, zero = (f"model.recompute={recompute}",), (("stage3_param_persistence_threshold", 0),)
            case = Case(family, rows=2, length=9, words=words, zero=zero)
            config = config_of(case, folder)
            whole = engine_of(config, case, world)
            slots = whole.prefix.slots[-1:]
            upper = Direct(slots, random_table(slots, 3, 0.02, seed=0))
            engine = PrefixEngine(whole.lm, whole._base, upper, config.train, world, write=None)
            for _ in range(TURNS):
                engine.step(share_of(case, 90), 1e-3)
            found[family] = [name for name, p in engine.lm.base.named_parameters() if p.numel()]
    return found


def test_modules_that_recomputation_leaves_early_are_not_kept(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    (lengths,) = on_ranks(1, modules_kept, tmp_path)
    assert len(set(lengths)) == 1


def modules_kept(folder):
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    case, lengths = Case("llama", ranks=1, rows=2, length=9, words=("model.recompute=true",)), []
    with joined_world() as world:
        engine, share = engine_of(config_of(case, folder), case, world), share_of(case, 90)
        for _ in range(3):
            engine.step(share, 1e-3)
            lengths.append(len(FWD_MODULE_STACK))
        return lengths
