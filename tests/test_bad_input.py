"""A user's mistake in run.yaml, a DeepSpeed file or data: one line that tells where, and no harm done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ranks import command
from tests.refusals import CONFIGURATION, contents, refusal


@pytest.fixture
def refused(place):
    """The line for a run with some keys changed, whose folder must then hold no results."""

    def refused(*overrides, size=1):
        shutil.rmtree(place / "run", ignore_errors=True)
        return refusal("train", place / "run.yaml", *overrides, size=size, run=place / "run")

    return refused


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epoch=3", "'train.epoch=3': unknown key train.epoch; did you mean train.epochs?"),
        ("trian.lr=3", "'trian.lr=...': unknown key trian; did you mean train?"),
        ("prefix.text=\udcff", "'prefix.text=\\udcff': not UTF-8"),
        ("lr=3", "'lr=3': expected section.key=value"),
        ("mflow.uri=http://u:secret@h/", "'mflow.uri=...': unknown key mflow; did you mean mlflow?"),
        ("mlflow.tags={day: 2024-02-30}", "mlflow.tags: expected keys with values"),
        ("train.lr=fast", "'train.lr=fast': train.lr: 'fast': expected a number"),
        ("train.lr=-1", "'train.lr=-1': train.lr: -1: expected at least 0"),
        ("model.recompute=0", "model.recompute: 0: expected true, false, a number of layers, or auto"),
        ("model.recompute=3", "model.recompute: 3, but LlamaForCausalLM has 2 layers that can be computed"),
        ("prefix.init=words", "prefix.init: 'words': expected 'text', 'vocabulary' or 'random'"),
        ("train.micro_batch_tokens=9", "train.micro_batch_tokens: 9 is less than data.max_length 64"),
        ("data.too_long=split", "data.too_long: split is for plain text; with a data.prompt choose"),
        ("prefix.text=null", "prefix.text: missing; write the instruction to start from"),
        ("train.method=pretrain", "model.name: a pretrained base is made from model.config"),
        ("engine.deepspeed=zero9", "engine.deepspeed: 'zero9' is neither a file nor a preset (zero3"),
        ("data.train=null", "data.train: missing; name a file or a hub id"),
        ("data.prompt={sauce}", "train.jsonl:1 has no field 'sauce'; its fields: source, goal; did you mean"),
        ("data.prompt={source", "data.prompt: '{source': expected '}' before end of string"),
        (
            "data.max_length=8",
            "the target has 8 tokens, which leaves no room for a prompt in data.max_length 8",
        ),
        ("prefix.length=2", "prefix.length: 2: prefix.text alone takes"),
        ("prefix.layers=[0, 2]", "prefix.layers: 2: the base has attention layers 0 to 1"),
    ],
)
def test_a_wrong_key(refused, override, said):
    assert said in refused(override)


def no_base(_rank):
    import prefix_ds.train as room

    def loaded(*_):
        raise AssertionError("the base is loaded")

    room.load_base = loaded


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prefix.length=2", "prefix.length: 2: prefix.text alone takes"),
        ("prefix.layers=[0, 2]", "prefix.layers: 2: the base has attention layers 0 to 1"),
        ("train.warmup_steps=2", "train.warmup_steps: 2, but the run has 1 steps, and would never reach"),
    ],
)
def test_what_cannot_succeed_is_refused_before_the_base_is_loaded(place, override, said):
    assert said in refusal("train", place / "run.yaml", override, before=no_base, size=2)


def test_a_wrong_key_names_file_and_line(place, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text((place / "run.yaml").read_text().replace("max_steps: 1", "max_stps: 1"))
    number = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if "max_stps" in line)
    assert refusal("train", path).startswith(f"{path}:{number}: unknown key train.max_stps; did you mean")
    path.write_text("model: {name: x\n")
    assert refusal("train", path).startswith(f"{path}:2: not YAML: ")
    path.write_text("run: {folder: 2024-31-12}\n")
    assert refusal("train", path) == f"{path}: not YAML: month must be in 1..12"
    path.write_text("data: &a {chat_options: *a}\n")
    assert refusal("train", path).startswith(f"{path}: not YAML: maximum recursion depth exceeded")
    assert refusal("train", tmp_path / "gone.yaml").startswith(f"{tmp_path}/gone.yaml: cannot be read")


@pytest.mark.parametrize(
    "key", ["model.name", "model.tokenizer", "data.train", "engine.deepspeed", "run.folder"]
)
def test_a_name_that_no_file_can_have(place, tmp_path, key):
    tree = yaml.safe_load((place / "run.yaml").read_text())
    section, own = key.split(".")
    tree[section][own] = "a\0b"
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(tree))
    line = refusal("train", tmp_path / "bad.yaml")
    assert line.endswith(f": {key}: 'a\\x00b': a text cannot hold the character NUL")


@pytest.mark.parametrize("key", ["data.train", "run.folder"])
def test_a_name_longer_than_any_file_has(place, key):
    name = "a" * 300
    line = refusal("train", place / "run.yaml", f"{key}={place / name}")
    assert line.endswith(": File name too long")


def test_every_wrong_key_has_a_line(place):
    (ended,) = command("train", place / "run.yaml", "train.lr=a", "data.max_length=b")
    assert ended.code == 2
    assert ended.err.startswith("error: 'data.max_length=b': ")
    assert ended.err.splitlines()[1].startswith("'train.lr=a': ")


STAGE = {"stage": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"zero_optimization": STAGE, "bf16": {}}, "bf16 is given twice: remove it, model.dtype of run.yaml"),
        ({"zero_optimization": STAGE | {"reduce_bucket_size": "auto"}}, '.reduce_bucket_size: "auto" stands'),
        ('{"zero_optimization": {}, "zero_optimization": {"stage": 3}}', "zero_optimization is given twice"),
        ('{"zero_optimization":', "cannot be read: Expecting value: line 1 column 22"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: 2: expected 3"),
        (
            {"zero_optimization": STAGE | {"zero_hpz_partition_size": 2}},
            "zero_optimization.zero_hpz_partition_size: not verified, leave it out",
        ),
        (
            {"zero_optimization": STAGE | {"zenflow": {}}},
            "zero_optimization.zenflow: not verified, leave it out",
        ),
        (
            {"zero_optimization": STAGE | {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer: not verified, leave it out",
        ),
        ({"zero_optimization": 3}, "zero_optimization.stage: None: expected 3"),
        ([3], "expected an object, found list"),
        (
            {"zero_optimization": STAGE | {"overlap_com": True}},
            "unknown key zero_optimization.overlap_com; did you mean overlap_comm?",
        ),
        (
            {"zero_optimization": STAGE, "wal_clock_breakdown": True},
            "unknown key wal_clock_breakdown; did you mean wall_clock_breakdown?",
        ),
        (
            {"zero_optimization": STAGE, "aio": {"queu_depth": 4}},
            "unknown key aio.queu_depth; did you mean queue_depth?",
        ),
        (
            {"zero_optimization": STAGE, "comms_logger": {"enabled": True, "verbos": True}},
            "unknown key comms_logger.verbos",
        ),
        ({"zero_optimization": STAGE, "aio": 3}, "aio: DeepSpeed does not take it: 'int' object has no"),
        (
            {"zero_optimization": STAGE, "wandb": {}},
            "wandb has no place here: metrics are written by the run",
        ),
        (
            {"zero_optimization": STAGE | {"overlap_comm": "maybe"}},
            "zero_optimization.overlap_comm: 'maybe': Input should be a valid boolean",
        ),
        (
            {"zero_optimization": STAGE | {"offload_param": {"device": "disk"}}},
            "zero_optimization.offload_param.device: 'disk': Input should be",
        ),
    ],
)
def test_a_wrong_deepspeed_file(refused, tmp_path, text, said):
    file = tmp_path / "ds.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    line = refused(f"engine.deepspeed={file}")
    assert line.startswith(f"engine.deepspeed: {file}: ")
    assert said in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"\n\n", "no records"),
        (b'{"source": "a", "goal": "b"}\n{"source": \n', ":2: not JSON: Expecting value"),
        (b'{"source": "a", "goal": "b"}\n[1]\n', ":2: found [1]; expected an object"),
        (b'{"source": "\xff"}\n', ":1: not UTF-8: byte 0xff"),
        (b'{"source": "a", "goal": "b"}\n{"source": "a"}\n', ":2 has no field 'goal'"),
        (b'{"source": "a", "goal": null}\n', ":1: the field 'goal' is null"),
    ],
)
def test_a_bad_data_file(refused, tmp_path, content, said):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    line = refused(f"data.train={file}")
    assert str(file) in line
    assert said in line


@pytest.mark.parametrize(
    "override", ["engine.deepspeed=zero9", "data.train=gone.jsonl", "data.prompt={x}", "prefix.layers=[7]"]
)
def test_two_ranks_say_it_once(refused, override):
    assert refused(override, size=2)


def test_a_corrected_start_goes_on_in_the_folder_of_the_failed_one(place, refused):
    refused("prefix.length=1", "train.lr=1.0")
    assert contents(place / "run") == CONFIGURATION - {"deepspeed.json"}  # it needs the base's sizes
    (ended,) = command("train", place / "run.yaml")
    assert ended.code == 0, ended.err
    assert yaml.safe_load((place / "run" / "run.yaml").read_text())["train"]["lr"] == 0.01


NAMES = ['it\'s "a" $HOME `id`', "grüße 漢字", "new\nline\tx", "-x=b, [c] {d} %s #h"]


@pytest.mark.parametrize("name", NAMES)
def test_strange_names_are_names_like_others(place, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(place / "train.jsonl", folder / f"{name}.jsonl")
    words = [f"data.train={folder}/{name}.jsonl", f"run.folder={folder}/run", f"mlflow.name={name}"]
    (ended,) = command("train", place / "run.yaml", *words, "data.valid=null")
    assert ended.code == 0, ended.err
    assert (folder / "run" / "prefix" / "prefix.safetensors").exists()
    assert json.loads((folder / "run" / "facts.json").read_text())["name"] == name
    for line in ended.err.splitlines():
        assert line[:2].isdigit(), f"no line of its own: {line!r}"
    assert "\n" not in refusal("train", place / "run.yaml", f"data.train={folder}/{name}.gone.jsonl")


def hurry(_):
    """The server of these tests never answers."""
    from prefix_ds.tracking import open_tracker

    open_tracker.__kwdefaults__["patience_seconds"] = 1


def test_secrets_are_in_no_file_and_no_line(place, tmp_path):
    run = tmp_path / "run"
    secrets = [
        "mlflow.uri=http://ann:hunter2secret@127.0.0.1:9",
        "mlflow.tags={api_key: tagged5ecret, note: token=noted5ecret}",
        f"run.folder={run}",
    ]
    (ended,) = command("train", place / "run.yaml", *secrets, before=hurry)
    assert ended.code == 0, ended.err
    words = [b"hunter2secret", b"tagged5ecret", b"noted5ecret"]
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert b"127.0.0.1:9" in written[run / "run.yaml"], "only the secrets go"
    for content in (*written.values(), ended.err.encode(), ended.out.encode()):
        assert not any(word in content for word in words)
    mistake = refusal("train", place / "run.yaml", "mlflow.url=http://ann:hunter2secret@host")
    assert "mlflow.url" in mistake
    assert "hunter2secret" not in mistake


def test_log_files_hold_no_bars_of_libraries_and_no_warnings(place, tmp_path):
    words = [sys.executable, "-m", "prefix_ds", "train", place / "run.yaml", f"run.folder={tmp_path}/run"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert ended.returncode == 0, ended.stderr
    assert not ended.stdout
    for line in ended.stderr.splitlines():
        assert line[:2].isdigit(), f"not ours: {line!r}"
