"""Run folders, disks and prefixes that cannot be used: one line, and nothing that was good is lost."""

import functools
import math
import shutil
from pathlib import Path

import pytest

from prefix_ds.checkpoint import latest, read_prefix, save_checkpoint
from prefix_ds.config import config_text, read_config
from tests.disks import fill_before
from tests.ranks import command
from tests.refusals import CONFIGURATION, contents, refusal
from tests.test_laws import bytes_of
from tests.tiny_models import tiny
from tests.workshop import base_folder, run_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a sound run.yaml, its base and its data, and its run in `run`."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "run.yaml").write_text(config_text(run_config(folder)))
    (ended,) = command("train", folder / "run.yaml")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def run(place, tmp_path):
    """A copy of the run."""
    return shutil.copytree(place / "run", tmp_path / "run")


@pytest.mark.parametrize("size", [1, 2])
def test_the_folder_of_another_run(place, run, size):
    before = read_config(run / "run.yaml")
    words = [f"run.folder={run}", "train.lr=0.5", "data.max_length=32", "run.log_every=3"]
    line = refusal("train", place / "run.yaml", *words, size=size)
    assert line.startswith(
        f"run.folder: {run}: belongs to another run: data.max_length: 64 -> 32; train.lr: 0.01 -> 0.5. "
    )
    assert read_config(run / "run.yaml") == before
    (ended,) = command("train", place / "run.yaml", f"run.folder={run}", "run.log_every=3")
    assert ended.code == 0, "a key that says how the work is shown may differ"


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_started_from_its_own_file_that_was_edited(run, size):
    file = run / "run.yaml"
    words = [f"run.folder={run}", "data.test=null"]
    line = "turn the words around:"
    for old, new, said in [
        ("lr: 0.01", "lr: 0.02", "train.lr: 0.01 -> 0.02. "),
        ("max_steps: 6", "max_steps: 8", "train.max_steps: 6 -> 8. "),
        (line, "turn them", f"prefix.text: {line!r} -> 'turn them'. "),
    ]:
        before = file.read_text()
        file.write_text(before.replace(old, new))
        refused = refusal("train", file, *words, size=size, after_log=True)
        assert refused.startswith(f"run.folder: {run}: belongs to another run: {said}")
        file.write_text(before)
    older_run(run)
    (ended,) = command("train", file, *words)
    assert ended.code == 0, ended.err
    assert "medians" not in ended.err, "there was nothing left to do"


def older_run(run):
    """Its checkpoints do not say what they are of, nor its run.yaml whose it is."""
    (run / "run.yaml").write_text(config_text(read_config(run / "run.yaml")))
    found = latest(run)
    state = {name: part for name, part in found.state.items() if name != "keys"}
    save_checkpoint(run, found.step, found.tensors(), state)


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_does_not_go_on_with_other_data(place, run, tmp_path, size):
    lines = Path(read_config(run / "run.yaml").data.train).read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    words = [f"data.train={tmp_path}/train.jsonl", f"run.folder={tmp_path}/again"]
    for ended in command("train", place / "run.yaml", *words, size=size):
        assert ended.code == 0, ended.err
    before = {path: path.read_bytes() for path in (tmp_path / "again").rglob("*.safetensors")}
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, lines[0]]))
    line = refusal("train", place / "run.yaml", *words, size=size, after_log=True)
    assert "data.train has other examples now than this run was trained on" in line
    assert before == {path: path.read_bytes() for path in (tmp_path / "again").rglob("*.safetensors")}


def test_folders_that_cannot_be_a_run(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for folder, said in [
        (tmp_path / "mine", "the folder has files in it and no run.yaml; choose another"),
        (tmp_path / "mine" / "thesis.txt", "cannot be written: File exists"),
        (tmp_path / "mine" / "thesis.txt" / "run", "cannot be written: Not a directory"),
    ]:
        line = refusal("train", place / "run.yaml", f"run.folder={folder}")
        assert line == f"run.folder: {folder}: {said}"
    assert contents(tmp_path / "mine") == {"thesis.txt"}
    (tmp_path / "task").mkdir()
    shutil.copyfile(place / "run.yaml", mine := tmp_path / "task" / "run.yaml")
    for start, size in [(mine, 1), (place / "run.yaml", 2)]:
        line = refusal("train", start, f"run.folder={mine.parent}", size=size)
        assert "its run.yaml is not the copy that a run keeps, and would be written over; choose" in line
        assert line.endswith(f"such as {mine.parent}/run")
    assert mine.read_bytes() == (place / "run.yaml").read_bytes()
    assert contents(mine.parent) == {"run.yaml"}
    line = refusal("generate", tmp_path / "mine", "--prompt", "x")
    assert line == f"{tmp_path}/mine: is no run folder: it has no run.yaml"


def test_that_texts_are_longer_than_the_base_was_made_for_is_told_once(place, tmp_path):
    words = [f"run.folder={tmp_path}/run", "data.max_length=256", "train.micro_batch_tokens=256"]
    first, second = command("train", place / "run.yaml", *words, "train.max_steps=1", size=2)
    assert (first.code, second.code) == (0, 0), first.err
    assert first.err.count("data.max_length: prefix and text may take ") == 1
    assert not second.err


def losing_numbers(rank):
    """Norms bring back most of what a rate can do, so the loss itself is made what it would become."""
    from prefix_ds.model import PrefixLM

    loss = PrefixLM.loss
    PrefixLM.loss = lambda *arguments: loss(*arguments) * float("nan")


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_diverges_is_stopped(place, tmp_path, size):
    words = [f"run.folder={tmp_path}/run", "run.valid_every=0"]
    line = refusal("train", place / "run.yaml", *words, size=size, after_log=True, before=losing_numbers)
    assert line.startswith("the loss is ")
    assert "training has diverged; lower train.lr, or raise train.warmup_steps" in line


def damage(checkpoint):
    file = checkpoint / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def test_a_damaged_checkpoint_is_passed_over(place, run):
    older, newest = sorted((run / "checkpoints").iterdir())
    damage(newest)
    (ended,) = command("train", place / "run.yaml", f"run.folder={run}")
    assert ended.code == 0, ended.err
    assert f"{newest} is damaged and skipped: tensors.safetensors has 100 bytes" in ended.err
    assert f"going on after step {int(older.name.removeprefix('step-'))}" in ended.err
    for checkpoint in (run / "checkpoints").iterdir():
        damage(checkpoint)
    for size in (1, 2):
        line = refusal("train", place / "run.yaml", f"run.folder={run}", size=size, after_log=True)
        assert line.startswith(f"{run}/checkpoints: every checkpoint is damaged; remove the folder to start")


@pytest.mark.parametrize("size", [1, 2])
def test_a_read_only_disk(place, disk, size):
    folder = disk("ro")
    line = refusal("train", place / "run.yaml", f"run.folder={folder}/run", size=size)
    assert line == f"run.folder: {folder}/run: cannot be written: Read-only file system"


MOMENTS = {
    "configuration": (1, "prefix_ds.train", "write_text_atomically"),
    "tracker": (1, "prefix_ds.tracking.tracker", "write_facts"),
    "checkpoint": (2, "prefix_ds.memory", "save_checkpoint"),
    "prefix": (2, "prefix_ds.result", "write_prefix"),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_becomes_full(place, disk, moment, size):
    folder = disk()
    words = ["train", place / "run.yaml", f"run.folder={folder}/run"]
    full = functools.partial(fill_before, *MOMENTS[moment], folder)
    line = refusal(*words, size=size, after_log=True, before=full)
    assert "cannot be written: " in line
    assert "No space left on device" in line
    if moment in ("checkpoint", "prefix"):
        assert latest(folder / "run").step == 2
        read_prefix(folder / "run" / "prefix")
    else:
        assert contents(folder / "run") <= CONFIGURATION | {"facts.json"}
    (folder / "full").unlink()
    for ended in command(*words, size=size):
        assert ended.code == 0, ended.err
    if size == 1:
        assert bytes_of(read_config(folder / "run" / "run.yaml")) == bytes_of(read_config(place / "run.yaml"))


def cache_at(folder, _rank):
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(folder)


def test_a_cache_that_cannot_be_written(place, disk, tmp_path):
    folder = disk("ro")
    words = ["train", place / "run.yaml", f"run.folder={tmp_path}/run"]
    for size in (1, 2):
        line = refusal(*words, size=size, before=functools.partial(cache_at, folder))
        assert line.startswith(f"data.train: the cache {folder} cannot be written: Read-only file system; ")


def test_a_disk_that_becomes_full_while_a_whole_model_is_written(place, disk):
    folder = disk()
    words = ["train", place / "run.yaml", f"run.folder={folder}/run", "train.method=full"]
    full = functools.partial(fill_before, 1, "prefix_ds.engine.full_engine", "whole_folder", folder)
    line = refusal(*words, size=2, after_log=True, before=full)
    assert line.startswith(f"{folder}/run/model: cannot be written: ")
    assert not (folder / "run" / "model").exists()


def test_a_tokenizer_of_a_start_that_failed_is_made_anew(place, tmp_path):
    sizes = "model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1"
    words = ["train", place / "run.yaml", f"run.folder={tmp_path}/run", "model.name=null", "data.prompt="]
    words += ["train.method=pretrain", "train.max_steps=1", "data.target={source}"]
    large, small = (f"model.config={{{sizes}, num_attention_heads: 2, vocab_size: {n}}}" for n in (290, 270))
    refusal(*words, large, "data.valid=gone.jsonl", after_log=True)
    (ended,) = command(*words, small)
    assert ended.code == 0, ended.err
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")) == 270


def test_a_request_to_generate_that_makes_no_sense(place, tmp_path):
    def refused(*words, **options):
        return refusal("generate", place / "run", *words, **options)

    assert refused() == "nothing to write for: give --prompt, --input, or data.test"
    assert refused("--prompt", "a", "--input", "b").startswith("--prompt and --input: one of them says")
    assert refused("--prompt", "a\udcff") == "'a\\udcff': not UTF-8"
    output = tmp_path / "no" / "out.jsonl"
    line = f"--output: {output}: expected a file in a folder that exists"
    assert refused("--prompt", "a", "--output", output) == line
    assert refused("generate.beams=2").startswith("'generate.beams=2': unknown key generate.beams; did you")
    for size in (1, 2):
        line = refused("--input", tmp_path / "gone.jsonl", size=size)
        assert line.startswith(f"--input: {tmp_path}/gone.jsonl: no such file")


def other_bases(folder):
    """Bases that differ from the run's in one thing, and what is said of it."""
    tiny("gpt2").float().save_pretrained(folder / "gpt2")
    yield "gpt2", "the base is of the family gpt2"
    base_folder(folder / "deeper", num_hidden_layers=3)
    yield "deeper", "it was made for 2 layers, the base has 3"
    base_folder(folder / "wider", num_key_value_heads=4)
    yield (
        "wider",
        "self_attn with 2 heads, keys of 8 and values of 8, the base asks for model.layers.0.self_attn",
    )


def test_a_prefix_of_another_base(place, tmp_path):
    for name, said in other_bases(tmp_path):
        tokenizer = f"model.tokenizer={place}/base"
        line = refusal("generate", place / "run", f"model.name={tmp_path}/{name}", tokenizer, "--prompt", "x")
        made_for = f"this prefix was trained for {place}/base (llama): "
        assert line.startswith(f"{place}/run/prefix/prefix.safetensors: {made_for}")
        assert said in line


def test_a_base_of_the_same_sizes_is_taken_with_a_warning(place, tmp_path):
    base_folder(tmp_path / "other", rms_norm_eps=0.1)
    words = ["--prompt", "x", "generate.max_new_tokens=1"]
    for base, is_other in ((place / "base", False), (tmp_path / "other", True)):
        (ended,) = command("generate", place / "run", f"model.name={base}", *words)
        assert ended.code == 0, ended.err
        assert ("is not the one this prefix was trained with" in ended.err) == is_other


def test_a_damaged_prefix(run):
    file = run / "prefix" / "prefix.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert refusal("generate", run, "--prompt", "x").startswith(
        f"{file}: damaged: it is not what was written"
    )
    Path(file).unlink()
    assert refusal("generate", run, "--prompt", "x").startswith(f"{file}: no such file")


def test_a_validation_that_is_no_number_is_never_the_best(place, tmp_path):
    words = [f"run.folder={tmp_path}/run", "run.valid_every=1", "train.max_steps=2"]
    (ended,) = command("train", place / "run.yaml", *words, before=first_validation_fails)
    assert ended.code == 0, ended.err
    assert read_prefix(tmp_path / "run" / "prefix").facts.step > 0


def first_validation_fails(_rank):
    """As of a base that overflows on the text it starts from."""
    from prefix_ds.engine.prefix_engine import PrefixEngine

    validate, losses = PrefixEngine.validate, iter([math.nan])
    PrefixEngine.validate = lambda *arguments: next(losses, None) or validate(*arguments)
