"""`prefix-ds generate`: what it writes depends on neither ranks nor batches; it is all there or not there."""

import functools
import json
import os
import shutil
import socket
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from prefix_ds import dist
from prefix_ds import generate as generating
from prefix_ds.checkpoint import read_prefix, write_prefix
from prefix_ds.config import config_text
from prefix_ds.errors import ConfigError, PrefixError, RunError
from prefix_ds.generate import Request, check_request
from prefix_ds.opening import open_trained
from prefix_ds.run_folder import open_run
from tests.disks import fill_before
from tests.ranks import command, on_ranks
from tests.refusals import refusal
from tests.workshop import records, run_config, write_jsonl

RECORDS = records(7, seed=3)
SAMPLED = ("generate.temperature=2.0", "generate.top_p=0.9")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, whose data.test are `RECORDS`."""
    folder = tmp_path_factory.mktemp("place")
    write_jsonl(folder / "test.jsonl", RECORDS)
    words = [f"data.test={folder}/test.jsonl", "train.lr=0.1", "generate.max_new_tokens=6"]
    (folder / "run.yaml").write_text(config_text(run_config(folder, *words)))
    (ended,) = command("train", folder / "run.yaml")
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.fixture
def written(run, tmp_path):
    """The rows of an output file."""

    def written(*words, size=1, run=run):
        output = tmp_path / "out.jsonl"
        output.unlink(missing_ok=True)
        for ended in command("generate", run, *words, "--output", output, size=size):
            assert ended.code == 0, ended.err
            assert not ended.out
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    return written


def outputs(rows):
    return [row["output"] for row in rows]


def refused_here(folder, run):
    """What a rank is told that has a run and an input of its own."""
    asked = Request(input_file=folder / f"{os.environ['RANK']}.jsonl")
    with pytest.raises(PrefixError) as caught:
        generating.generate(run, [], asked)
    return str(caught.value)


def refused_with_another_prefix(folder, run):
    with dist.joined_world() as world:
        mine = shutil.copytree(run, folder / f"run{world.rank}")
        if world.rank:
            kept = read_prefix(mine / "prefix")
            write_prefix(mine / "prefix", kept.slots, replace(kept.facts, step=9))
        opened, config = open_run(mine, [])
        with pytest.raises(RunError) as caught:
            open_trained(opened, config, world)
        return str(caught.value)


def test_ranks_with_other_prompts_or_another_prefix_do_not_write_together(run, tmp_path):
    for rank in range(2):
        write_jsonl(tmp_path / f"{rank}.jsonl", [{"source": r["source"]} for r in RECORDS[rank:]])
    for line in on_ranks(2, refused_here, tmp_path, run):
        assert line.startswith(f"{socket.gethostname()}: other prompts than on ")
    for line in on_ranks(2, refused_with_another_prefix, tmp_path, run):
        assert f"prefix.safetensors: {socket.gethostname()}: another prefix than on " in line


def test_every_record_has_its_row_in_order(written, tmp_path):
    rows = written("generate.batch_size=2")
    assert [row["prompt"] for row in rows] == [f"{r['source']} =" for r in RECORDS]
    assert [row["references"] for row in rows] == [[f" {r['goal']}"] for r in RECORDS]
    asked = write_jsonl(tmp_path / "in.jsonl", [{"source": r["source"]} for r in RECORDS])
    again = written("--input", asked)
    assert [row | {"references": []} for row in rows] == again


def greedy_by_hand(run, text, count):
    """What plain transformers write behind the saved keys and values, one token at a time."""
    base_path = run.parent / "base"
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    ids = tokenizer(text).input_ids
    start = len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        cache = DynamicCache()
        for layer, (key_NPH, value_NPH) in enumerate(read_prefix(run / "prefix").slots.values()):
            cache.update(key_NPH[None], value_NPH[None], layer)
        with torch.no_grad():
            ids.append(int(base(torch.tensor([ids]), past_key_values=cache).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_is_what_plain_transformers_write_behind_the_prefix(run, written):
    expected = [greedy_by_hand(run, f"{r['source']} =", 6) for r in RECORDS]
    assert len(set(expected)) > 1
    assert outputs(written()) == expected


@pytest.mark.parametrize("search", [(), ("generate.num_beams=3",), SAMPLED])
def test_two_ranks_write_what_one_writes(written, search):
    alone = written(*search, "generate.batch_size=2")
    assert written(*search, "generate.batch_size=2", size=2) == alone


@pytest.mark.parametrize("search", [(), ("generate.num_beams=3",)])
def test_prompts_beside_others_have_the_outputs_they_have_alone(written, search):
    assert written(*search, "generate.batch_size=1") == written(*search, "generate.batch_size=7")


def test_beams_and_samples_are_something_else_than_greedy(written):
    greedy = outputs(written())
    assert outputs(written("generate.num_beams=3")) != greedy
    assert outputs(written(*SAMPLED)) != greedy


def test_samples_follow_the_seed(written):
    first = written(*SAMPLED, "generate.seed=1")
    assert written(*SAMPLED, "generate.seed=1") == first
    assert written(*SAMPLED, "generate.seed=2") != first
    assert written("generate.seed=1") == written("generate.seed=2"), "greedy draws nothing"


def test_without_its_prefix_a_run_writes_something_else(run, written):
    assert outputs(written("--without-prefix")) != outputs(written())
    moved = shutil.copytree(run, run.parent / "moved")
    shutil.rmtree(moved / "prefix")
    assert written("--without-prefix", run=moved) == written("--without-prefix")


def test_one_prompt_goes_to_the_terminal(run, written):
    prompt, expected = "the cat sees =", {}
    for size in (1, 2):
        first, *others = command("generate", run, "--prompt", prompt, size=size)
        assert first.code == 0, first.err
        assert not any(other.out for other in others)
        expected[size] = first.out
    (row,) = written("--prompt", prompt)
    assert row["prompt"] == prompt
    assert expected[1] == expected[2] == row["output"] + "\n"


def test_prompts_that_lose_their_start_are_counted(run):
    words = ["data.max_length=6", "--prompt", "the cat likes the big red bird under the tree ="]
    first, other = command("generate", run, *words, size=2)
    assert first.code == 0, first.err
    assert "1 of 1 prompts have more than 6 tokens and lost their start" in first.err
    assert "lost their start" not in other.err
    line = refusal("generate", run, "data.too_long=error", *words, after_log=True)
    assert line == "the prompt is longer than 6 tokens, and data.too_long is error"


def test_what_reaches_further_than_the_base_was_made_for_is_told(run, monkeypatch, capfd):
    monkeypatch.setattr(generating, "write_outputs", lambda *_: [])
    for count in (200, 100000):
        generating.generate(run, [f"generate.max_new_tokens={count}"], Request(prompt="the cat sees ="))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "was made for" in line]
    assert "prompt, prefix and generate.max_new_tokens come to 1000" in line
    assert line.endswith(" positions; the base was made for 256")


def test_a_run_that_trained_all_weights_writes_with_its_own(run, written, tmp_path):
    words = [f"run.folder={tmp_path}/full", "train.method=full", "train.max_steps=2"]
    (ended,) = command("train", run.parent / "run.yaml", *words)
    assert ended.code == 0, ended.err
    full = outputs(written(run=tmp_path / "full"))
    assert len(full) == len(RECORDS)
    assert full != outputs(written("--without-prefix")), "the weights have changed"


def test_what_must_not_be_written_over(run, tmp_path):
    given = write_jsonl(tmp_path / "in.jsonl", RECORDS)
    text = given.read_text()
    assert "is what --input names; it would be lost" in refusal(
        "generate", run, "--input", given, "--output", given
    )
    assert given.read_text() == text
    os.mkfifo(tmp_path / "pipe")
    assert "expected a file" in refusal("generate", run, "--output", tmp_path / "pipe")


def test_a_link_leads_to_what_is_written(run, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there.jsonl")
    (ended,) = command("generate", run, "--output", tmp_path / "link.jsonl")
    assert ended.code == 0, ended.err
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len((tmp_path / "there.jsonl").read_text().splitlines()) == len(RECORDS)


def test_a_run_of_all_weights_has_no_prefix_to_leave_out(tmp_path):
    request = Request(prompt="x", without_prefix=True)
    with pytest.raises(ConfigError, match=r"train\.method: full: all weights were trained"):
        check_request(run_config(tmp_path, "train.method=full"), request)


@pytest.mark.parametrize("size", [1, 2])
def test_an_output_file_is_written_whole_or_not_at_all(run, disk, size):
    folder = disk()
    output = folder / "out.jsonl"
    output.write_text("of another day")
    full = functools.partial(fill_before, 1, "prefix_ds.generate", "write_text_atomically", folder)
    words = ["generate", run, "--output", output]
    line = refusal(*words, size=size, after_log=True, before=full)
    assert line == f"{output}: cannot be written: No space left on device"
    assert output.read_text() == "of another day"
    assert {path.name for path in folder.iterdir()} == {"out.jsonl", "full"}
