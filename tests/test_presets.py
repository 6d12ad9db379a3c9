"""The presets of `ds_configs/`: DeepSpeed takes each, and each trains what `zero3` trains, to the last bit.

In the runs here every parameter is sharded, however small, so that there is something to offload. Devices are
CPUs: what is moved where on a GPU is not seen.
"""

import errno
import importlib.resources
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from prefix_ds.config import config_text, parse_config
from prefix_ds.dist import joined_world
from prefix_ds.engine import pinned
from prefix_ds.engine.disk import _own_folder, check_space, with_own_folder
from prefix_ds.engine.pinned import PinnedBlocks
from prefix_ds.engine.settings import deepspeed_settings, preset_names
from prefix_ds.engine.sizing import Sizes, sized, sizes_of
from prefix_ds.engine.vetting import vet
from prefix_ds.errors import ConfigError
from prefix_ds.model.skeleton import skeleton
from tests.ranks import command, on_ranks
from tests.test_laws import bytes_of, changed, outcome
from tests.workshop import base_folder, run_config

IN_MEMORY = ["zero3_offload"]
OTHERS = [*IN_MEMORY, "zero3_nvme"]
ON_DISK = ["engine.deepspeed=zero3_nvme", "engine.nvme_folder=/x"]
COMPILED = Path.home() / ".cache" / "torch_extensions"


def no_disk():
    """Why no base can lie on a disk here; an empty text if it can."""
    if os.environ.get("CI") == "true":
        return "DeepSpeed may compile its part for disks first, for ten minutes: too long for every change"
    return "" if list(COMPILED.glob("*/async_io/*.so")) else "async_io is not compiled here"


def test_every_preset_is_tried_here():
    assert set(preset_names()) == {"zero3", *OTHERS}


@pytest.mark.parametrize("name", preset_names())
def test_deepspeed_takes_it(name):
    words = ["engine.nvme_folder=/x"] if name == "zero3_nvme" else []
    config = parse_config(f"model: {{name: x}}\nprefix: {{text: x}}\nengine: {{deepspeed: {name}}}", words)
    vet(deepspeed_settings(config, world_size=2), name)


@pytest.mark.parametrize("name", preset_names())
def test_it_is_short_and_every_key_has_a_line(name):
    folder = importlib.resources.files("ds_configs")
    text = folder.joinpath(f"{name}.json").read_text()
    assert len(text.splitlines()) <= 25
    for key in keys_of(json.loads(text)):
        assert f"| `{key}` |" in folder.joinpath("README.md").read_text(), key


def test_what_a_file_leaves_out_follows_from_the_models_sizes():
    sizes = Sizes(parameters=(500, 500, 4096, 10**6, 10**6, 10**8), layers=(4 * 10**6, 4 * 10**7))
    settings = sized({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7}}, sizes)
    assert settings["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 4 * 10**7,
        "stage3_prefetch_bucket_size": 10**7,
        "stage3_param_persistence_threshold": 10**6,  # 2,005,096 numbers in all
        "stage3_max_live_parameters": 7,
    }


def test_a_disk_has_a_buffer_for_each_weight_that_comes_at_once():
    base = skeleton(
        transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336), False, torch.bfloat16
    )

    def count(**disk):
        zero = {"offload_param": {"device": "nvme"} | disk}
        return sized({"zero_optimization": zero}, sizes_of(base))["zero_optimization"]["offload_param"][
            "buffer_count"
        ]

    assert count() == 7 + 1  # its norms are whole on every rank
    assert count(buffer_count=5) == 5


def derived(sizes):
    zero = sized({"zero_optimization": {}}, sizes)["zero_optimization"]
    return {key.removeprefix("stage3_"): value for key, value in zero.items()}


def test_of_a_large_base_norms_stay_whole_and_no_matrix():
    """As large as Llama 70B; its smallest matrices have 8.4 million numbers."""
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    assert derived(sizes_of(skeleton(config, False, torch.bfloat16))) == {
        "reduce_bucket_size": 50_000_000,
        "prefetch_bucket_size": 50_000_000,
        "param_persistence_threshold": 8192,
        "max_live_parameters": 1_000_000_000,
    }


def test_of_equal_parameters_all_stay_whole_or_none():
    few, many = (Sizes((100, *[10**6] * number), (10**6,)) for number in (4, 5))
    assert derived(few)["param_persistence_threshold"] == 10**6
    assert derived(many)["param_persistence_threshold"] == 100


def keys_of(tree):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from keys_of(value)
        else:
            yield key


def all_in_shards(folder, name):
    """The preset as a file of the user's, under which no parameter is too small to be sharded."""
    settings = json.loads(importlib.resources.files("ds_configs").joinpath(f"{name}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = folder / f"{name}.json"
    file.write_text(json.dumps(settings))
    return file


def ended_well(*words, timeout_seconds=240):
    first, *others = command(*words, size=2, timeout_seconds=timeout_seconds)
    assert [first.code, *(other.code for other in others)] == [0, 0], first.err
    return first


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data and the base of a run, and its configuration in `run.yaml`."""
    folder = tmp_path_factory.mktemp("presets")
    words = ["train.max_steps=3", "run.valid_every=3", "train.schedule=constant"]
    config = run_config(folder, *words, f"engine.deepspeed={all_in_shards(folder, 'zero3')}")
    return folder, config


def trained(place, method, name):
    """The configuration and the folder of a run of three steps under a preset."""
    folder, config = place
    run = folder / f"{name}-{method}"
    mine = changed(
        config,
        f"run.folder={run}",
        f"train.method={method}",
        f"engine.deepspeed={all_in_shards(folder, name)}",
    )
    (folder / f"{run.name}.yaml").write_text(config_text(mine))
    if not run.exists():
        ended_well("train", f"{run}.yaml")
    return mine, run


@pytest.mark.parametrize("method", ["prefix", "full"])
@pytest.mark.parametrize("name", IN_MEMORY)
def test_it_trains_what_zero3_trains(place, name, method):
    plain, plain_run = trained(place, method, "zero3")
    mine, run = trained(place, method, name)
    assert losses_of(run) == losses_of(plain_run)
    assert len(losses_of(run)) == 3
    assert resolved(run).keys() >= derived(Sizes((1,), ())).keys()
    if method == "prefix":
        assert bytes_of(mine) == bytes_of(plain)
    else:
        weights = "model/model.safetensors"
        assert (run / weights).read_bytes() == (plain_run / weights).read_bytes()


def resolved(run):
    zero = json.loads((run / "deepspeed.json").read_text())["zero_optimization"]
    return {key.removeprefix("stage3_"): value for key, value in zero.items()}


def losses_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("name", IN_MEMORY)
def test_it_goes_on_and_generates(place, name):
    config, run = trained(place, "prefix", name)
    before = outcome(config)
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    assert "going on after step 2" in ended_well("train", f"{run}.yaml").err
    after = outcome(config)
    assert after[0] == before[0]
    assert (after[2] == before[2]).all()
    words = ["--prompt", "the cat", "generate.max_new_tokens=6"]
    zero3 = f"engine.deepspeed={place[0] / 'zero3.json'}"
    assert ended_well("generate", run, *words).out == ended_well("generate", run, *words, zero3).out


@pytest.mark.skipif(bool(no_disk()), reason=no_disk())
def test_a_base_on_a_disk_trains_as_in_memory(tmp_path):
    """Its shards lie in folders of the ranks, which are gone in the end, as is one of a killed run."""
    disk = tmp_path / "disk"
    left = disk / "prefix-ds-left"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    base = base_folder(tmp_path / "base", hidden_size=512, intermediate_size=1376, num_hidden_layers=2)
    config = run_config(tmp_path, "train.max_steps=3", "run.valid_every=2", base=base)
    outcomes = []
    for words in (["engine.deepspeed=zero3"], ["engine.deepspeed=zero3_nvme", f"engine.nvme_folder={disk}"]):
        mine = changed(config, *words, f"run.folder={tmp_path}/run{len(outcomes)}")
        (tmp_path / "run.yaml").write_text(config_text(mine))
        log = ended_well("train", tmp_path / "run.yaml", timeout_seconds=900).err  # it may compile
        outcomes.append((losses_of(Path(mine.run.folder)), bytes_of(mine)))
    assert outcomes[0] == outcomes[1]
    assert re.search(r"; [0-9.]+ MiB resident on each rank, [0-9.]+ MiB on its disk\n", log)
    assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["engine.deepspeed=zero3_nvme"], "engine.nvme_folder: missing; zero3_nvme keeps the base on a disk"),
        (["engine.nvme_folder=/x"], "engine.nvme_folder: /x: zero3 keeps nothing on a disk; zero3_nvme does"),
        ([*ON_DISK, "model.bits=8"], "model.bits: 8: zero3_nvme keeps the base on a disk, through buffers"),
        ([*ON_DISK, "train.method=full"], "train.method: full: zero3_nvme is for a base that stays as it is"),
    ],
)
def test_what_does_not_go_with_a_disk(words, said):
    with pytest.raises(ConfigError, match=said):
        deepspeed_settings(parse_config("model: {name: x}\nprefix: {text: x}", words), world_size=2)


def test_a_disk_that_cannot_be_used(tmp_path, monkeypatch):
    def told(folder):
        settings = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": str(folder)}}}
        with pytest.raises(ConfigError) as error:
            with_own_folder(settings)
        return str(error.value)

    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_, **__: True)
    assert told(tmp_path / "gone") == f"engine.nvme_folder: {tmp_path}/gone: No such file or directory"
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_, **__: False)
    assert "needs libaio" in told(tmp_path)
    for error in on_ranks(2, too_much_for, tmp_path):
        assert "GiB free; the shards of this host's ranks take " in error


def test_beside_gpus_a_disk_needs_cudas_toolkit(tmp_path, monkeypatch):
    """DeepSpeed's builder for GPUs, as it is where torch was installed and nothing else of CUDA was."""
    from deepspeed.ops.op_builder.async_io import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder", AsyncIOBuilder)
    monkeypatch.setattr("deepspeed.ops.op_builder.pin_memory.PinMemoryBuilder.load", lambda *_, **__: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    settings = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    with pytest.raises(ConfigError, match="beside GPUs, CUDA's toolkit of torch's version"):
        with_own_folder(settings)


def too_much_for(folder):
    """Two ranks that want three quarters of what is free, each."""
    with joined_world(), pytest.raises(ConfigError) as error:
        check_space(folder, shutil.disk_usage(folder).free // 4 * 3)
    return str(error.value)


@pytest.mark.parametrize("has_locks", [True, False])
def test_shards_of_a_job_that_runs_stay(tmp_path, monkeypatch, has_locks):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    if not has_locks:
        monkeypatch.setattr("fcntl.flock", no_locks)
    running = _own_folder(tmp_path)
    os.utime(running, (0, 0))
    assert _own_folder(tmp_path) != running
    assert running.is_dir()


def test_what_is_left_of_a_block_of_pinned_memory_is_filled_later(monkeypatch):
    monkeypatch.setattr(pinned, "_BLOCK_BYTES", 1024)
    blocks, made, empty = PinnedBlocks(10_000, pin=False), [], torch.empty

    def counted(size, **options):
        made.append(size)
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    for size in (640, 640, 384, 384, 2048, 1024):
        blocks.empty(size, torch.int8)
    assert made == [1024, 1024, 2048, 1024]


def test_pieces_of_pinned_memory_lie_side_by_side():
    sizes = [(300, torch.int8), (7, torch.float32), (2**20, torch.bfloat16), (1000, torch.int8)] * 3
    total = sum(size * dtype.itemsize for size, dtype in sizes)
    blocks = PinnedBlocks(total, pin=False)
    pieces = [blocks.empty(*size) for size in sizes]
    for number, piece in enumerate(pieces):
        assert (len(piece), piece.dtype) == sizes[number]
        assert piece.data_ptr() % 64 == 0
        piece.fill_(number)
    assert all((piece == number).all() for number, piece in enumerate(pieces))
