"""How well a run uses its devices: what a step needs, what they could do, where time goes, what is read."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from prefix_ds.data.batch import Share
from prefix_ds.data.examples import tokenise_split
from prefix_ds.data.stream import Stream
from prefix_ds.dist import World, joined_world, largest, summed
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.waiting import waiting
from prefix_ds.loading import load_tokenizer
from prefix_ds.model import PrefixLM
from prefix_ds.rows import limits_for
from prefix_ds.speed import Cost, Gauge, Products, cost_of, medians, peak_flops
from prefix_ds.speed.peak import tflops_of
from prefix_ds.tracking import Record
from prefix_ds.train import _wrapped
from tests.laws import batch_of, noisy_table, tokens
from tests.ranks import on_ranks
from tests.test_laws import changed, metrics, train_here
from tests.tiny_models import tiny, tiny_config
from tests.workshop import run_config, tokenizer

# --- what a step needs -----------------------------------------------------------------------------------


def wrapped(family, experts="eager"):
    base = tiny(family).float()
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation(experts)
    with Products() as products:
        lm = PrefixLM(base)
    return lm, products.flops


def inner_weights(lm):
    """Numbers of all matrices but embeddings and output layer."""
    outer = {id(lm.base.get_input_embeddings().weight), id(lm.base.get_output_embeddings().weight)}
    return sum(p.numel() for p in lm.base.parameters() if p.dim() == 2 and id(p) not in outer)


def test_a_second_trial_is_not_counted_as_work(tmp_path, monkeypatch):
    """Some bases have one on GPUs."""
    tried = PrefixLM._tried
    config = run_config(tmp_path)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    shards = SimpleNamespace(module=tiny("llama").float())
    _, once = _wrapped(shards, config, world)
    monkeypatch.setattr(PrefixLM, "_tried", lambda self: (tried(self), tried(self))[1])
    lm, twice = _wrapped(shards, config, world)
    assert (lm.num_tries, twice) == (2, once)


def test_a_token_costs_two_operations_a_weight_in_each_pass():
    lm, flops = wrapped("llama")
    head = lm.base.get_output_embeddings().weight.numel()
    pair = 2 * len(lm.slots) * lm.base.config.num_attention_heads * (2 * lm.slots[0].key_dim)
    prefix, full = cost_of(lm, flops, lm.slots, 5), cost_of(lm, flops, (), 0)
    assert prefix == Cost(4 * inner_weights(lm) + 3 * 5 * pair, 4 * head, 3 * pair)
    assert full == Cost(6 * inner_weights(lm), 6 * head, 3 * pair)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "opt"])
def test_the_cost_is_what_a_step_without_padding_computes(family):
    """But for the first attention's gradient to its inputs, which nobody needs."""
    lm, flops = wrapped(family)
    table_PD, batch = noisy_table(lm).detach().float().requires_grad_(), batch_of([tokens(16)])
    cost = cost_of(lm, flops, lm.slots, 0)
    with Products() as step:
        lm.loss(batch, table_PD, lm.slots).backward()
    expected = 16 * (cost.per_token + cost.per_target)
    assert 0.9 * expected <= step.flops <= expected


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_are_not_chosen_cost_nothing(implementation):
    lm, flops = wrapped("qwen3_moe", implementation)
    experts = [p for name, p in lm.base.named_parameters() if "experts" in name and p.dim() == 3]
    config = lm.base.config
    active = sum(p.numel() for p in experts) * config.num_experts_per_tok / config.num_experts
    assert cost_of(lm, flops, (), 0).per_token == pytest.approx(6 * (inner_weights(lm) + active))


def cost_of_run(config):
    from prefix_ds.train import _trained

    with joined_world() as world:
        words = load_tokenizer(config.model, config.data)
        return _trained(config, deepspeed_settings(config, world.size), words, world).cost


def test_weights_in_8_bits_and_in_shards_cost_what_they_cost_whole(tmp_path):
    config = run_config(tmp_path)
    (whole,) = on_ranks(1, cost_of_run, config)
    eights = "model.bits=8", "model.vocabulary_bits=8"
    for size, *overrides in ((2,), (2, *eights), (1, "model.bits=8", "model.int8_outliers=6")):
        found = on_ranks(size, cost_of_run, changed(config, *overrides))
        assert found == [whole] * size


def test_nothing_is_carried_back_below_the_first_prefix():
    lm, flops = wrapped("llama")
    every, last = (cost_of(lm, flops, slots, 0) for slots in (lm.slots, lm.slots[-1:]))
    assert last.per_token == pytest.approx(every.per_token / 2 * (1 + 1 / len(lm.slots)))


def test_tokens_attend_to_what_stands_before_them_in_their_document():
    share = Share((), global_targets=3, global_tokens=10, global_squares=4**2 + 6**2)
    pairs = sum(1 for length in (4, 6) for query in range(length) for key in range(query + 1))
    assert Cost(100, 1000, 1).of(share) == 10 * 100 + 3 * 1000 + pairs


# --- what devices could do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_gpu_is_known_by_the_name_its_driver_gives(name, tflops):
    assert tflops_of(name) == tflops


def look_at_peak():
    with joined_world() as world:
        threads = torch.get_num_threads()
        peak = peak_flops(world, torch.float32)
        assert torch.get_num_threads() == threads
        return peak, largest(float(world.rank))


def test_all_ranks_know_the_peak_of_a_node_and_whose_number_is_largest():
    peaks, most = zip(*on_ranks(2, look_at_peak), strict=True)
    assert peaks[0] == peaks[1] > 1e8
    assert most == (1.0, 1.0)


# --- what became of the time -----------------------------------------------------------------------------


def wait_for_a_late_rank():
    with joined_world() as world, waiting(world.device) as waited:
        time.sleep(0.4 * world.rank)
        summed(torch.ones(4))
    return waited.seconds


def test_a_rank_that_waits_for_a_late_one_knows_how_long():
    punctual, late = on_ranks(2, wait_for_a_late_rank)
    assert late < 0.2 < punctual


def test_where_the_host_does_not_wait_nothing_is_told():
    with waiting(torch.device("meta")) as waited:
        pass
    values = Gauge(Cost(2, 0, 0), 100.0, torch.device("cpu")).of_step(
        Share((), 0, 10), seconds=2.0, for_data=0.5, for_ranks=waited.seconds
    )
    assert values == {
        "time/step_seconds": 2.0,
        "time/tokens_per_second": 5.0,
        "time/mfu": 0.1,
        "time/waiting_for_data_share": 0.25,
    }


@pytest.mark.parametrize("method", ["prefix", "full"])
def test_every_logged_step_tells_what_became_of_its_time(tmp_path, method):
    config = run_config(tmp_path, f"train.method={method}")
    on_ranks(2, train_here, config)
    steps = [row for row in metrics(config) if "train/loss" in row]
    assert len(steps) == 6
    for row in steps:
        assert 0 < row["time/mfu"] < 1
        assert 0 <= row["time/waiting_for_data_share"] < 1
        assert 0 < row["time/waiting_for_ranks_share"] < 1
        assert 0.05 < row["memory/peak_gib"] < 16
    assert [row["memory/peak_gib"] for row in steps] == sorted(row["memory/peak_gib"] for row in steps)


def test_the_end_of_a_run_tells_medians():
    rows = [
        {"time/tokens_per_second": n, "time/mfu": n / 1e4, "time/waiting_for_data_share": 0.0}
        for n in (1000.0, 3000.0, 9000.0)
    ]
    records = [Record(n, 0.0, row) for n, row in enumerate([*rows, {"valid/loss": 1.0}])]
    assert medians(records) == "3,000 tokens/s, MFU 30.0%, 0.00% of the time waiting for data"
    assert medians(records[3:]) == ""


# --- what a step reads -----------------------------------------------------------------------------------

_aten = torch.ops.aten
_WAITS = {_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select, _aten._unique2}


class Waits(TorchDispatchMode):
    """Counts operations whose result the host needs before it goes on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in _WAITS:
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts tensors that are read as lists or arrays."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.Tensor.tolist, torch.Tensor.numpy)
        return func(*args, **(kwargs or {}))


def reads_of_a_step(config):
    """Micro-batches of a step, what it reads (apart from the optimizer's counters, which lie on the CPU
    everywhere), and lists it makes."""
    from prefix_ds.train import _trained

    with joined_world() as world:
        words = load_tokenizer(config.model, config.data)
        engine = _trained(config, deepspeed_settings(config, world.size), words, world).engine
        stream = Stream(
            tokenise_split("train", config.data, words), limits_for(engine.lm, config), config.train, world
        )
        for step in range(3):
            engine.step(stream.share(step), 1e-2)
        share = stream.share(3)
        counters = {state["step"].data_ptr() for state in engine.optimizer.state.values()}
        with Waits() as waits, Lists() as lists:
            engine.step(share, 1e-2)
        with Waits() as sweep:
            engine.validate([share, share])
        read = [t for t in waits.seen if t.data_ptr() not in counters]
        return len(share.micro_batches), len(read), lists.count, len(sweep.seen)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_a_step_reads_its_loss_and_norm_once_and_nothing_else(tmp_path, family, recompute):
    base = tmp_path / family
    tokenizer().save_pretrained(base)
    config = tiny_config(family)
    config.vocab_size = len(tokenizer())
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    limits = "data.max_length=32", "train.micro_batch_tokens=48"
    config = run_config(tmp_path, *limits, f"model.recompute={recompute}", base=base)
    ((micro_batches, reads, lists, in_a_sweep),) = on_ranks(1, reads_of_a_step, config)
    assert micro_batches > 2
    assert (reads, lists, in_a_sweep) == (0, 1, 0)
