"""What `prefix-ds plan` says is what happens: DeepSpeed gathers what its replay gathers, call by call, and a
rank's memory at the peak of a step is near the sum of its terms.

More runs, larger: `tests.benchmarks.plan_check`.
"""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from prefix_ds.cli import app
from prefix_ds.config import ModelKeys, config_text, parse_config
from prefix_ds.devices import DEVICES
from prefix_ds.dist import World, joined_world
from prefix_ds.errors import ConfigError, ModelError
from prefix_ds.model import PrefixLM
from prefix_ds.model.skeleton import skeleton
from prefix_ds.plan import Job, device_named, estimator, fitting
from prefix_ds.plan import rehearsal as rehearsing
from prefix_ds.plan.choice import chosen
from prefix_ds.plan.estimate import Estimate, step_of
from prefix_ds.plan.fitting import job_of
from prefix_ds.plan.here import left_in_groups
from prefix_ds.plan.rehearsal import Shape, Stage, between
from prefix_ds.suitability import slots_without_weights
from tests.planned import (
    CPU,
    Case,
    config_of,
    counted_gathers,
    engine_of,
    made_base,
    measured,
    planned,
    share_of,
)
from tests.ranks import command, on_ranks
from tests.resident import MIB
from tests.test_families import NAMED, NEEDS
from tests.tiny_models import FAMILIES, tiny, tiny_config
from tests.workshop import run_config

# What goes a way that depends on numbers, in their own code.
NOT_PLANNED = {"dbrx", "jetmoe", "longcat_flash", "qwen4_exp", "qwen4_exp_text", "xmod"}
NOT_MADE = {"emu3", "mllama"}  # transformers makes no causal model of the configuration that is shrunk
PLANNED = [f for f in FAMILIES if f not in {*NAMED, *NOT_PLANNED, *NOT_MADE, *NEEDS}]
TRIED = ("llama", "gpt2", "qwen3_moe", "deepseek_v3", "gemma2")
SMALL = (("stage3_max_live_parameters", 60_000), ("stage3_prefetch_bucket_size", 20_000))
ALL_SHARDED = (*SMALL, ("stage3_param_persistence_threshold", 0))
EIGHT = ("model.bits=8", "model.vocabulary_bits=8")
SHAPE = Shape(rows=2, length=16, targets=16, prefix_length=4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny bases in a folder, for what is gathered; larger ones, for memory."""
    folder = tmp_path_factory.mktemp("bases")
    for family in TRIED:
        config = tiny_config(family)
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        base.save_pretrained(folder / "tiny" / family)
    made_base(folder, "llama", num_hidden_layers=4)
    return folder


def gathered_in_steps(cases, folder):
    """For each case, (bytes, calls) of some steps, the first of which is the fourth."""
    transformers.logging.disable_progress_bar()
    found = {case: [] for case in cases}
    with joined_world() as world:
        for case in cases:
            engine, share = engine_of(config_of(case, folder), case, world), share_of(case, 90)
            for number in range(6):
                with counted_gathers() as sizes:
                    engine.step(share, 1e-4)
                if number > 2:
                    found[case].append((sum(sizes), len(sizes)))
    return found


@pytest.mark.parametrize("words", [(), ("model.recompute=true",), ("model.recompute=2",), EIGHT])
def test_deepspeed_gathers_what_its_replay_gathers(bases, words):
    cases = [
        Case(family, words=words, rows=2, length=16, prefix=4, zero=ALL_SHARDED)
        for family in TRIED
        if (family, words) != ("gemma2", EIGHT)  # its embedding does more than look up rows
    ]
    for case, found in on_ranks(2, gathered_in_steps, cases, bases / "tiny")[0].items():
        traffic = estimate_of(case, bases / "tiny").traffic
        assert found == [(traffic.gathered_bytes, traffic.calls)] * 3, case.name


def test_modules_that_deepspeed_takes_as_one():
    from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES

    assert set(DEFAULT_LEAF_MODULE_CLASSES) == rehearsing.LEAVES


def estimate_of(case, folder):
    return estimator(CPU, case.prefix)(config_of(case, folder), Job(1, case.ranks, case.length, 1.0))


@pytest.mark.parametrize(
    "case",
    [Case("llama"), Case("llama", words=("model.bits=8", "model.recompute=true"))],
    ids=lambda case: case.name,
)
def test_memory_is_near_the_plan(bases, case):
    (terms, gathered), (peak, found, _) = planned(case, bases), measured(case, bases)
    told = ", ".join(f"{name} {size / MIB:.0f}" for name, size in terms.items())
    assert sum(terms.values()) == pytest.approx(peak, rel=0.1), told
    assert gathered == pytest.approx(found, rel=0.03)


def test_eight_bits_gather_half(bases):
    """As counted at the collective calls; the vocabulary in 8 bits too."""
    few = {"rows": 1, "length": 16}  # what is gathered does not depend on them
    cases = Case("llama", **few), Case("llama", words=EIGHT, **few)
    plain, eight = (on_ranks(2, gathered_in_steps, [case], bases)[0][case][-1][0] for case in cases)
    assert eight <= 0.52 * plain


def stage_of(family, **sizes):
    config = tiny_config(family)
    for name, size in sizes.items():
        setattr(config, name, size)
    return Stage(skeleton(config, False, torch.bfloat16).requires_grad_(False))


def seen(stage, recompute=False, shape=SHAPE):
    return stage.rehearsed(ModelKeys(recompute=recompute), shape, "cpu")


def test_most_families_can_be_planned_for():
    assert len(PLANNED) >= 120


@pytest.mark.parametrize("family", PLANNED)
def test_it_is_rehearsed(family):
    rehearsal = seen(stage_of(family))
    assert rehearsal.flops > 0
    assert rehearsal.slots
    assert max(alive.total for alive in rehearsal.highest) > 0
    assert {moment.module for moment in rehearsal.course.moments} <= set(rehearsal.course.held)


@pytest.mark.parametrize("family", sorted(NOT_PLANNED))
def test_a_base_whose_way_depends_on_numbers_is_refused(family):
    with pytest.raises(ModelError, match="cannot be planned for: its code depends on numbers"):
        seen(stage_of(family))


@pytest.mark.parametrize("recompute", [False, True, 3])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "deepseek_v3", "qwen3_next", "opt"]
)
def test_a_deep_base_is_rehearsed_by_its_kinds_of_layers(monkeypatch, family, recompute):
    deep = {} if family in ("gemma3_text", "qwen3_next") else {"num_hidden_layers": 9}
    short = seen(stage_of(family, **deep), recompute)
    monkeypatch.setattr(rehearsing, "shortened", lambda *_: None)
    whole = seen(stage_of(family, **deep), recompute)
    assert short.course.moments == whole.course.moments
    assert short.flops == whole.flops
    assert short.slots == whole.slots
    prefix = (
        8 * SHAPE.prefix_length * sum(slot.width for slot in whole.slots)
    )  # the table's copies are smaller
    for mine, theirs in zip(short.highest, whole.highest, strict=True):
        assert abs(mine.total - theirs.total) <= prefix


def test_rows_between_two_numbers_are_in_line():
    few, some, many = (
        seen(stage_of("llama"), shape=replace(SHAPE, rows=rows, targets=8 * rows)) for rows in (1, 3, 5)
    )
    found = between(few, many, 0.5)
    assert found.flops == pytest.approx(some.flops, rel=0.01)
    for mine, theirs in zip(found.highest, some.highest, strict=True):
        # while a layer is there the larger of several things counts, which is in line for each of them
        assert 0.99 * theirs.total <= mine.total <= 1.12 * theirs.total
    peaks = (max(alive.total for alive in rehearsal.highest) for rehearsal in (found, some))
    assert next(peaks) == pytest.approx(next(peaks), rel=0.02)


def test_every_layer_computed_again_takes_memory_and_costs_its_forward_pass():
    found = [seen(stage_of("llama", num_hidden_layers=9), again) for again in (False, 3, 6, True)]
    highest = [max(alive.total for alive in rehearsal.highest) for rehearsal in found]
    flops = [rehearsal.flops for rehearsal in found]
    assert highest[0] > highest[1] > highest[2] > highest[3]
    assert flops[1] - flops[0] == flops[2] - flops[1] == flops[3] - flops[2] > 0


def test_no_more_layers_are_planned_for_than_there_are():
    with pytest.raises(ModelError, match=r"model\.recompute: 10, but LlamaForCausalLM has 9 layers"):
        seen(stage_of("llama", num_hidden_layers=9), 10)


def test_a_layer_without_a_prefix_above_or_below_changes_what_is_kept():
    """Nothing is kept of the layers below the lowest prefix."""

    def highest(chosen):
        found = stage_of("llama").rehearsed(ModelKeys(), SHAPE, "cpu", chosen)
        return max(alive.total for alive in found.highest)

    every, last = highest(lambda slots: slots), highest(lambda slots: slots[-1:])
    assert last < 0.5 * every


RUN = """
model: {{name: {folder}}}
prefix: {{length: 20, text: "Sum up:"}}
data: {{train: nowhere.jsonl, max_length: 512}}
train: {{global_batch_size: 256, micro_batch_tokens: 4096}}
"""
BIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def run_file(tmp_path):
    """A run on 70 billion parameters of which there is a config.json and nothing else."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BIG))
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=folder))
    return path


def told(capsys, *words):
    app([*map(str, words)], standalone_mode=False)
    return capsys.readouterr().out


def test_a_base_of_which_there_is_only_a_configuration(run_file, capsys):
    text = told(capsys, "plan", run_file, "--nodes", 4)
    assert "32 x h100-80gb" in text
    for term in ("shards", "gathered layers", "activations", "logits", "prefix", "optimizer", "total"):
        assert re.search(rf"│ {term} +│ +[0-9.]+", text), term
    assert "limited by" in text
    assert "(4 nodes of 8), 1 micro-batch a step, each of 8 rows of 512 tokens behind 20 prefix" in text
    assert "tokens/s" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{base}", r"model\.name: {base}: has no tokenizer that can be loaded .*; or give prefix\.length"),
        ("./nope", r"model\.name: \./nope: there is no such folder"),
    ],
)
def test_a_prefix_as_long_as_its_text_needs_a_tokenizer(run_file, name, said):
    base = run_file.parent / "base"
    words = ["plan", str(run_file), "prefix.length=null", f"model.name={name.format(base=base)}"]
    with pytest.raises(ModelError) as error:
        app(words, standalone_mode=False)
    assert re.fullmatch(said.format(base=re.escape(str(base))), str(error.value))


def test_the_same_for_programs(run_file, capsys):
    data = json.loads(told(capsys, "plan", run_file, "--nodes", 4, "--json"))
    plain, other = data["estimates"].values()
    assert plain["total_bytes"] == sum(plain["memory"].values())
    assert other["memory"]["activations"] < plain["memory"]["activations"] / 4
    assert other["flops"] > 1.2 * plain["flops"]
    assert plain["memory"]["shards"] == pytest.approx(70.55e9 * 2 / 32, rel=0.01)
    assert plain["flops"] == pytest.approx(
        4 * 70e9 * 8 * 512, rel=0.1
    )  # 8 rows: forward, and back to the inputs
    assert [way["overrides"] for way in data["ways"]][:2] == [[], ["model.recompute=true"]]


def test_what_is_computed_again_is_not_gathered_again(run_file, capsys):
    """A layer comes once for each pass."""
    plain, other = json.loads(told(capsys, "plan", run_file, "--json"))["estimates"].values()
    assert other["traffic"]["gathered_bytes"] < 1.02 * plain["traffic"]["gathered_bytes"]


def test_one_is_not_several(run_file, capsys):
    device = ["--link-gbps=1", "--memory-gib=80", "--tflops=989"]
    text = told(capsys, "plan", run_file, "train.global_batch_size=8", "prefix.length=1", *device)
    assert "(1 node of 8), 1 micro-batch a step, each of 1 row of 512 tokens behind 1 prefix pos" in text
    assert "note: the links of the node take " in text


@pytest.mark.parametrize(("dtype", "is_told"), [("float32", True), ("bfloat16", False)])
def test_that_float32_takes_longer_than_planned_is_told(run_file, capsys, dtype, is_told):
    notes = json.loads(told(capsys, "plan", run_file, f"model.dtype={dtype}", "--json"))["notes"]
    assert any("the times are those of bfloat16" in note for note in notes) == is_told


def test_ways_are_what_a_plan_of_them_says(run_file, capsys):
    def data_of(*words):
        return json.loads(told(capsys, "plan", run_file, *words, "--json"))

    way = data_of("--nodes", 4)["ways"][1]
    assert way["overrides"] == ["model.recompute=true"]
    there = data_of(*way["overrides"], "--nodes", 4)["estimates"]["as it is"]
    assert there["total_bytes"] == way["total_bytes"]
    limit = DEVICES["h100-80gb"].usable_bytes
    assert 1 < way["fewest"] <= 8
    for number, fits in ((way["fewest"], True), (way["fewest"] - 1, False)):
        there = data_of(*way["overrides"], "--gpus-per-node", number)["estimates"]["as it is"]
        assert (there["total_bytes"] <= limit) == fits


def test_as_few_layers_are_computed_again_as_fit(run_file, capsys):
    """An eighth of the layers less would not fit."""

    def estimates_of(again):
        longer = ["data.max_length=1024", "train.micro_batch_tokens=8192"]
        words = ["plan", run_file, f"model.recompute={again}", *longer, "--nodes", 4, "--json"]
        return json.loads(told(capsys, *words))

    data, limit = estimates_of("auto"), DEVICES["h100-80gb"].usable_bytes
    found = re.fullmatch(
        r"model.recompute: auto: (\d+) of 80 layers computed again: ([0-9.]+) GiB planned "
        r"\(([0-9.]+) without; (\d+)% more arithmetic\), 71.3 a device may use",
        data["notes"][0],
    )
    again, total, plain, _ = map(float, found.groups())
    chosen, without = data["estimates"]["as it is"], data["estimates"]["model.recompute=false"]
    assert [total, plain] == [round(e["total_bytes"] / 2**30, 1) for e in (chosen, without)]
    assert chosen["total_bytes"] <= limit < without["total_bytes"]
    assert chosen == estimates_of(int(again))["estimates"]["as it is"]
    less = estimates_of(int(again) - 10 or "false")
    assert less["estimates"]["as it is"]["total_bytes"] > limit
    assert [f"model.recompute={again:.0f}"] in [way["overrides"] for way in less["ways"]]


def chosen_of(gib, limit_gib, had=None):
    """The choice among plans that take so many GiB without recomputation, for a number of layers, for all."""
    asked = []

    def estimated(again):
        asked.append(again)
        return Estimate({"all": round(gib(again) * 2**30)}, 0, None, 1, {"arithmetic": 1.0}, 1, num_layers=20)

    return chosen(estimated, limit_gib * 2**30, had), asked


def linear(again):
    return 100 - 4 * (20 if again is True else again)


@pytest.mark.parametrize(
    ("limit", "again"), [(100, False), (99, 3), (64, 10), (48, 13), (25, True), (1, True)]
)
def test_the_least_recomputation_is_found_with_few_plans(limit, again):
    choice, asked = chosen_of(linear, limit)
    assert choice.again is again or choice.again == again is not True
    assert len(set(map(str, asked))) <= 5
    assert ("too little" in choice.line()) == (limit == 1)


def test_what_a_run_had_is_kept_while_it_fits():
    assert chosen_of(linear, 99, had=10)[0].again == 10
    assert chosen_of(linear, 99, had=True)[0].again is True
    assert chosen_of(linear, 50, had=10)[0].again == 13


def test_memory_left_in_control_groups(tmp_path):
    """Of both versions, and of the groups around: the kernel's file cache counts as left."""

    def group(path, limit, used, files):
        old = path.is_relative_to(tmp_path / "memory")
        path.mkdir(parents=True, exist_ok=True)
        names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        for name, text in zip(names, (limit, used), strict=True):
            (path / f"memory.{name}").write_text(f"{text}\n")
        (path / "memory.stat").write_text(f"cache 7\n{'total_' * old}inactive_file {files}\n")

    own = tmp_path / "cgroup"
    own.write_text("4:memory:/job/step\n1:cpu:/elsewhere\n0::/slurm/job\n")
    assert list(left_in_groups(tmp_path, own)) == []
    group(tmp_path / "memory" / "job", 1000, 900, 50)
    group(tmp_path / "memory" / "another", 10, 10, 0)
    group(tmp_path / "slurm" / "job", "max", 900, 50)
    group(tmp_path / "slurm", 500, 480, 0)
    assert sorted(left_in_groups(tmp_path, own)) == [20, 150]


def test_examples_of_like_lengths_run_together():
    """Long ones have few targets, short ones many: a micro-batch of short ones is planned for."""
    examples = SimpleNamespace(
        lengths=np.array([100] * 8 + [10] * 40), num_targets=np.array([5] * 8 + [9] * 40)
    )
    text = "model: {name: x}\nprefix: {text: x}\ndata: {max_length: 100}\ntrain: {micro_batch_tokens: 200}"
    job = job_of(parse_config(text), examples, World(0, 8, 0, 4, torch.device("cpu")))
    assert (job.nodes, job.devices_per_node, job.example_tokens, job.target_part) == (2, 4, 25, 0.9)


def memory_of_two(sizes, rank):
    """Runs in a rank's process before anything: what memory it finds."""
    fitting.memory_here = lambda world: sizes[rank]


def test_all_ranks_do_what_fits_the_one_with_the_least_memory(tmp_path):
    """And when the run goes on, it does what it did as long as that fits."""
    config = run_config(tmp_path, "model.recompute=auto", "run.valid_every=0", "train.max_steps=2")
    (tmp_path / "run.yaml").write_text(config_text(config))

    def run(*sizes):
        words = "train", tmp_path / "run.yaml"
        first, *others = command(*words, size=2, before=partial(memory_of_two, sizes))
        assert [first.code, *(other.code for other in others)] == [0, 0], first.err
        assert not any("model.recompute" in other.err for other in others)
        lines = [line for line in first.err.splitlines() if "model.recompute" in line]
        return lines, json.loads((tmp_path / "run" / "recompute.json").read_text())["recompute"]

    (line,), again = run(2**40, 1)
    assert again is True
    assert "all of 2 layers computed again" in line
    assert "too little" in line
    assert "recompute: auto" in (tmp_path / "run" / "run.yaml").read_text()
    assert run(2**40, 2**40)[1] is True  # as before, since it fits
    shutil.rmtree(tmp_path / "run")
    (line,), again = run(2**40, 2**40)
    assert again is False
    assert "none of 2 layers computed again" in line
    assert run(1, 2**40)[1] is True


def test_devices_without_work_are_told(run_file, capsys):
    assert "leaves 256 of 512 devices without an example" in " ".join(
        told(capsys, "plan", run_file, "--nodes", 64).split()
    )


def test_a_base_on_disks_is_planned_and_given_no_advice_that_would_be_refused(run_file, capsys):
    on_disks = ["engine.deepspeed=zero3_nvme", "engine.nvme_folder=/x"]
    text = " ".join(told(capsys, "plan", run_file, *on_disks, "--nodes", 2).split())
    assert "how fast the disks are is not in this plan" in text
    assert "model.bits=8" not in text


def test_a_device_of_ones_own(run_file, capsys):
    words = ["--memory-gib", 30, "--tflops", 100, "--link-gbps", 100]
    text = " ".join(told(capsys, "plan", run_file, *words).split())
    assert "a run may fill 27.00 of 30" in text
    assert "DOES NOT FIT" in text


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_one_device_of_ones_own_needs_no_link(run_file, capsys):
    words = ["plan", run_file, "--gpus-per-node", 1, "--memory-gib", 30, "--tflops", 100]
    data = json.loads(told(capsys, *words, "--json"), parse_constant=no_constant)
    assert data["device"]["node_gbs"] is data["device"]["memory_gbs"] is None
    assert data["estimates"]["as it is"]["limit"] == "arithmetic"
    text = told(capsys, *words, "engine.deepspeed=zero3_offload")
    assert "how fast the link to the host is is not in this plan" in " ".join(text.split())


@pytest.mark.parametrize("family", [*TRIED, "jamba", "gemma4_text", "phi", "opt"])
def test_places_for_a_prefix_are_told_without_weights(family):
    slots = slots_without_weights(skeleton(tiny_config(family), False), ModelKeys(name="here"))
    assert slots == list(PrefixLM(tiny(family)).slots)


def test_a_base_whose_layers_cannot_be_computed_again(tmp_path, capsys):
    tiny_config("ctrl").save_pretrained(tmp_path / "ctrl")
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path / "ctrl"))
    data = json.loads(told(capsys, "plan", path, "--json"))
    assert list(data["estimates"]) == ["as it is"]
    assert not [way for way in data["ways"] if "model.recompute=true" in way["overrides"]]
    with pytest.raises(ModelError, match=r"model\.recompute: true, but CTRLLMHeadModel has no layers"):
        told(capsys, "plan", path, "model.recompute=true")


OWN = ["--memory-gib", "30", "--tflops", "100", "--link-gbps", "100"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h100"], "--gpu: h100: expected one of a100-40gb.*did you mean h100-80gb"),
        (["--memory-gib", "30"], "--tflops and --link-gbps: missing"),
        (
            ["--memory-gib", "30", "--gpus-per-node", "1"],
            "--tflops: missing; .* all of --memory-gib, --tflops$",
        ),
        *(
            ([*OWN[:n], wrong, *OWN[n + 1 :]], f"{OWN[n - 1]}: {wrong}: expected a number above 0")
            for n in (1, 3, 5)
            for wrong in ("0", "-1", "nan", "inf")
        ),
        (["--gpu", "h100-80gb", "--tflops", "3"], "--gpu: h100-80gb: has its own figures"),
        (["--nodes", "0"], "--nodes: 0: expected at least 1"),
        (["--targets", "0"], "--targets: 0.0: expected a part of all tokens"),
        (["model.name=/nowhere"], "model.name: /nowhere: there is no such folder"),
        (["prefix.length="], "has no tokenizer that can be loaded"),
    ],
)
def test_mistakes_are_one_line(run_file, words, said):
    with pytest.raises((ConfigError, ModelError), match=said) as error:
        app(["plan", str(run_file), *words], standalone_mode=False)
    assert "\n" not in str(error.value)


def test_all_weights_and_new_bases(run_file, tmp_path, capsys):
    """The baseline needs gradients, float32 weights and moments of all weights, spread over the devices."""
    data = json.loads(told(capsys, "plan", run_file, "train.method=full", "--nodes", 4, "--json"))
    memory = data["estimates"]["as it is"]["memory"]
    assert memory["optimizer"] >= 12 * 70.55e9 / 32
    assert "prefix" not in memory
    sizes = {name: BIG[name] for name in ("model_type", "hidden_size", "num_attention_heads", "vocab_size")}
    config = parse_config(f"model: {{config: {json.dumps(sizes)}}}\ntrain: {{method: pretrain}}")
    (tmp_path / "new.yaml").write_text(config_text(config))
    assert "llama: 8 x" in told(capsys, "plan", tmp_path / "new.yaml")


def test_examples_are_spread_over_as_few_micro_batches_as_hold_them():
    text = "model: {name: x}\nprefix: {text: x}\ndata: {max_length: 500}\ntrain: {micro_batch_tokens: 500}"
    step = step_of(parse_config(text), Job(1, 4, example_tokens=100, target_part=0.5), 8)
    assert (step.shape, step.micro_batches) == (Shape(4, 100, 200, 8), 4)
    assert step.most_rows == 5
    assert step.tokens == 6400


def test_a_device_is_found_by_its_name():
    assert device_named(None, None, None, None) is DEVICES["h100-80gb"]
