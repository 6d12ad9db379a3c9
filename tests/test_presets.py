"""The presets of `ds_configs/`: DeepSpeed takes each, and each trains what `zero3` trains, to the last bit.

In the runs here every parameter is sharded, however small, so that there is something to offload. Devices are
CPUs: what is moved where on a GPU is not seen.
"""

import importlib.resources
import json
import shutil

import pytest

from prefix_ds.config import config_text, parse_config
from prefix_ds.engine.settings import deepspeed_settings, preset_names
from prefix_ds.engine.vetting import vet
from tests.ranks import command
from tests.test_laws import bytes_of, changed, outcome
from tests.workshop import run_config

OTHERS = [name for name in preset_names() if name != "zero3"]


@pytest.mark.parametrize("name", preset_names())
def test_deepspeed_takes_it(name):
    config = parse_config(f"model: {{name: x}}\nprefix: {{text: x}}\nengine: {{deepspeed: {name}}}")
    vet(deepspeed_settings(config, world_size=2), name)


@pytest.mark.parametrize("name", preset_names())
def test_it_is_short_and_every_key_has_a_line(name):
    folder = importlib.resources.files("ds_configs")
    text = folder.joinpath(f"{name}.json").read_text()
    assert len(text.splitlines()) <= 25
    for key in keys_of(json.loads(text)):
        assert f"| `{key}` |" in folder.joinpath("README.md").read_text(), key


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


def ended_well(*words):
    first, *others = command(*words, size=2)
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
@pytest.mark.parametrize("name", OTHERS)
def test_it_trains_what_zero3_trains(place, name, method):
    plain, plain_run = trained(place, method, "zero3")
    mine, run = trained(place, method, name)
    assert losses_of(run) == losses_of(plain_run)
    assert len(losses_of(run)) == 3
    if method == "prefix":
        assert bytes_of(mine) == bytes_of(plain)
    else:
        weights = "model/model.safetensors"
        assert (run / weights).read_bytes() == (plain_run / weights).read_bytes()


def losses_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("name", OTHERS)
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
