"""What `prefix-ds check` says of a run: all that is wrong, or what the model will see."""

import io
import json
import re

import pytest
from rich.console import Console
from safetensors.torch import save_file

from prefix_ds.check import check_run
from prefix_ds.config import parse_config
from prefix_ds.errors import PrefixError
from prefix_ds.new_tokenizer import END, trained_tokenizer

ROWS = [{"q": f"how many are {n} and [1]?", "a": f"exactly {n + 1}"} for n in range(12)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def run(tmp_path):
    """A run whose base is a tokenizer and files with no weights in them."""
    base = tmp_path / "base"
    trained_tokenizer([row["q"] for row in ROWS], 300).save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({}, base / "model.safetensors")
    for split, rows in (("train", ROWS), ("valid", ROWS[:3])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(*overrides):
        text = f"""
            model: {{name: {base}}}
            prefix: {{text: "Count:"}}
            data:
              train: {tmp_path}/train.jsonl
              valid: {tmp_path}/valid.jsonl
              prompt: "{{q}}"
              target: " {{a}}"
        """
        return parse_config(text, overrides)

    return made


def checked(config, **console):
    screen = io.StringIO()
    check_run(config, Console(file=screen, width=200, **console))
    return screen.getvalue()


def wrong(config):
    with pytest.raises(PrefixError) as error:
        checked(config)
    return str(error.value).splitlines()


def test_a_sound_run_shows_three_examples_and_the_lengths_of_all_splits(run, tmp_path):
    page = checked(run())
    for n in range(3):
        assert f"{tmp_path}/train.jsonl:{n + 1}: " in page
        assert f"how many are {n} and [1]?⟦ exactly {n + 1}{END}⟧" in page
    assert page.count("⟦") == 3
    assert "train: 12 examples" in page
    assert "valid: 3 examples" in page
    assert "Nothing is wrong." in page


def test_prompt_and_target_have_colours_of_their_own(run):
    page = checked(run(), force_terminal=True, color_system="standard")
    assert f"\x1b[36m{END}how many are 0 and [1]?\x1b[0m⟦\x1b[1;32m exactly 1" in page


def test_what_would_be_cut_or_dropped_is_told(run):
    assert "12 prompts cut" in checked(run("data.max_length=17"))
    page = checked(run("data.max_length=19", "data.too_long=drop"))
    assert "train: 11 examples" in page
    assert "1 dropped" in page


def test_everything_that_is_wrong_is_told_at_once(run, tmp_path):
    (tmp_path / "valid.jsonl").write_text('{"q": "x", "a": "y"}\n{"q": "x", "a": null}\n')
    lines = wrong(
        run(
            "model.tokenizer=./nowhere",
            "engine.deepspeed=zero9",
            "data.prompt={qq}",
            "data.target={a!r}",
            "data.references={a}",
            f"data.train=[{tmp_path}/gone.jsonl, {tmp_path}/valid.jsonl, {tmp_path}/train.tsv]",
            f"data.test={tmp_path}/valid.jsonl",
        )
    )
    assert lines[0] == f"{len(lines) - 1} to mend:"
    found = "\n".join(lines)
    for said in (
        "engine.deepspeed: 'zero9'",
        "model.tokenizer: ./nowhere",
        "data.train: " + str(tmp_path / "gone.jsonl") + ": no such file",
        "data.train: " + str(tmp_path / "train.tsv") + ": no such file",
        "data.target: '{a!r}'",
        f"data.prompt: {tmp_path}/valid.jsonl:1 has no field 'qq'",
    ):
        assert said in found
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.name=./nope", "model.name: ./nope: there is no such folder"),
        ("model.name={}", "model.name: {}: the folder has no config.json"),
        ("model.tokenizer=a/b/c", "model.tokenizer: a/b/c: there is no such folder"),
    ],
)
def test_one_mistake_is_told_once(run, tmp_path, word, said):
    assert wrong(run(word.format(tmp_path))) == ["1 to mend:", f"  {said.format(tmp_path)}"]


@pytest.mark.parametrize(
    ("rotary", "longest"),
    [
        ({}, 2048),
        ({"rope_type": "linear", "factor": 2.0}, 4096),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1500}, 3000),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}, 2048),
    ],
)
def test_that_texts_are_longer_than_the_base_was_made_for_is_told(run, tmp_path, rotary, longest):
    config = {"model_type": "llama", "rope_scaling": rotary or None, "max_position_embeddings": 2048}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    words = ["prefix.init=random", "prefix.length=8", f"data.max_length={longest - 8}"]
    assert "warning" not in checked(run(*words))
    page = checked(run(*words, "prefix.length=9"))
    said = f"prefix and text may take {longest + 1} positions; llama was made for {longest} (max_position"
    assert f"warning: data.max_length: {said}" in page
    assert "Nothing is wrong." in page


def test_a_prefix_that_could_not_start_is_told(run):
    text = "prefix.text=Count all of these, one after the other, and say the number:"
    lines = wrong(run(text, "prefix.length=10", "prefix.layers=[0, 99]"))
    assert lines[0] == "2 to mend:"
    assert lines[1] == "  prefix.layers: 99: the base has attention layers 0 to 31"
    assert re.match(r"  prefix.length: 10: prefix.text alone takes \d+ tokens", lines[2])
    assert "Nothing is wrong." in checked(run("prefix.layers=[0, -1]", "prefix.length=90"))


def test_a_bad_record_deep_in_a_file_is_found_even_without_a_tokenizer(run, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"q": "x", "a": "y"}\n' * 5 + '{"q": "x", "a": null}\n')
    for more in ([], ["model.tokenizer=./nowhere"]):
        assert any("train.jsonl:6: the field 'a' is null" in line for line in wrong(run(*more)))


def test_a_pretraining_without_a_tokenizer_is_measured_in_characters(run):
    page = checked(run("model.name=null", "model.config={model_type: llama}", "train.method=pretrain"))
    assert "The run will make its own tokenizer; until then lengths are in characters." in page
    assert "train: 12 examples; lengths 50% 33, 90% 35, 99% 35, longest 35 characters" in page
    assert "how many are 0 and [1]?⟦ exactly 1⟧" in page


def test_long_texts_are_shown_by_their_ends(run, tmp_path):
    rows = [{"q": "begin " + "x" * 5000 + " end", "a": "1"}]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    page = checked(run("data.max_length=8000", "train.micro_batch_tokens=8000"))
    assert "begin xxx" in page
    assert "xxx end⟦" in page
    assert len(page) < 2000
