"""The page of keys refuses what no run can be made of, in one line a key."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from prefix_ds.config import parse_config
from prefix_ds.config.listing import sections
from prefix_ds.errors import ConfigError

RUN = "model: {name: base}\nprefix: {text: x}"
KINDS = {
    f"{section}.{name}": set(get_args(info.annotation)) | {info.annotation}
    for section, fields in sections().items()
    for name, info in fields.items()
}
NUMBERS = [key for key, kinds in KINDS.items() if {int, float} & kinds]
WHOLE = [key for key in NUMBERS if int in KINDS[key]]


def refused(word):
    with pytest.raises(ConfigError) as caught:
        parse_config(RUN, [word])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{word!r}: {word.partition('=')[0]}"), line
    return line


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-1", "1.0e+30"])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_no_run_is_made_of(key, value):
    refused(f"{key}={value}")


@pytest.mark.parametrize("key", WHOLE)
def test_a_whole_number_that_no_word_of_memory_holds(key):
    refused(f"{key}={2**63}")


def test_the_page_has_numbers():
    assert {"train.lr", "train.seed", "prefix.length", "model.int8_outliers"} < set(NUMBERS)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("generate.temperature=1.0e-40", "generate.temperature: 1e-40: expected 0, or at least 1e-06"),
        ("train.epochs=.inf", "train.epochs: inf: expected a finite number"),
        ("train.lr=.nan", "train.lr: nan: expected a finite number"),
        ("train.betas=[1.5, 2.0]", "train.betas: [1.5, 2.0]: expected two numbers, from 0 and below 1"),
        ("train.betas=[0.9, 1]", "train.betas: [0.9, 1]: expected two numbers, from 0 and below 1"),
        ("train.betas=[-0.1, 0.9]", "train.betas: [-0.1, 0.9]: expected two numbers, from 0 and below 1"),
        ("train.betas=[0.9, .nan]", "train.betas.1: nan: expected a finite number"),
        (
            "train.seed=36893488147419103232",
            "train.seed: 36893488147419103232: expected less than 9223372036854775808",
        ),
    ],
)
def test_what_torch_and_numpy_would_break_at(word, said):
    assert said in refused(word)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        *(
            (key, "~/zz", "a home folder differs by machine; write the whole path, without ~")
            for key in ("run.folder", "model.name", "model.tokenizer", "engine.nvme_folder")
        ),
        ("run.folder", "", "expected some text"),
    ],
)
def test_a_place_that_would_be_another_than_was_meant(key, value, said):
    assert refused(f"{key}={value}").endswith(f"{key}: {value!r}: {said}")


SOURCE = "expected a file, a glob or a hub id, or a list of files"
LAYERS = "expected all, or a list of whole numbers"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prefix: {layers: 0}", f"prefix.layers: 0: {LAYERS}"),
        ("prefix: {layers: [0.5]}", f"prefix.layers: [0.5]: {LAYERS}"),
        ("data: {train: 5}", f"data.train: 5: {SOURCE}"),
        ("data: {valid: [a, 1]}", f"data.valid: ['a', 1]: {SOURCE}"),
        ("train: [a]", "train: ['a']: expected a section with keys"),
        ("train: {max_steps: 1e3}", "train.max_steps: '1e3': expected a whole number"),
        ("train: {max_steps: true}", "train.max_steps: True: expected a whole number"),
        ("train: {lr: true}", "train.lr: True: expected a number"),
        ("train: {lr: fast}", "train.lr: 'fast': expected a number"),
        ("train: {lr: -1}", "train.lr: -1: expected at least 0"),
        ("train: {betas: [0.9]}", "train.betas.1: [0.9]: expected two numbers"),
        ("generate: {top_p: 2}", "generate.top_p: 2: expected at most 1"),
        ("data: {chat: maybe}", "data.chat: 'maybe': expected true or false"),
        ("model: {in_16_bits: lm_head}", "model.in_16_bits: 'lm_head': expected a list, as [a, b]"),
        ("model: {config: llama}", "model.config: 'llama': expected keys with values, as {a: b}"),
        ("model: {bits: 4}", "model.bits: 4: expected 16 or 8"),
        ("mlflow: {tags: secret}", "mlflow.tags: expected keys with values, as {a: b}"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line_in_our_words(text, said):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert str(caught.value) == f"run.yaml:1: {said}"


def test_a_conversation_is_in_a_field_that_has_a_name():
    with pytest.raises(ConfigError, match=r":3: data\.messages: '': expected some text"):
        parse_config(f"{RUN}\ndata: {{messages: ''}}")


def test_a_section_of_which_every_key_is_a_comment_is_one_of_defaults():
    assert parse_config(f"{RUN}\nevaluate:\n  # every: 10\n") == parse_config(RUN)


@pytest.mark.parametrize(
    ("train", "words", "rate"),
    [
        ("{}", [], 1e-2),
        ("{method: full}", [], 1e-5),
        ("{method: full, lr: 0.1}", [], 0.1),
        ("{}", ["train.method=full"], 1e-5),
        ("{method: full}", ["train.lr=0.2"], 0.2),
        ("{lr: 0.3}", ["train.method=full"], 0.3),
    ],
)
def test_a_method_has_a_rate_of_its_own_where_none_is_given(train, words, rate):
    assert parse_config(f"{RUN}\ntrain: {train}", words).train.lr == rate


def test_a_new_base_has_its_own_rate_too():
    run = "model: {config: {model_type: llama}}\ntrain: {method: pretrain}"
    assert parse_config(run).train.lr == 1e-3


def test_the_readmes_baseline_is_its_run_with_all_weights_and_a_rate_of_its_own():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (file,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "runs/first" in block)
    (line,) = re.findall(r"^prefix-ds train run\.yaml (train\.method=full .*)", text, re.MULTILINE)
    prefix, full = parse_config(file), parse_config(file, shlex.split(line, comments=True))
    assert (full.train.method, full.run.folder) == ("full", "runs/full")
    assert full.train.lr < prefix.train.lr / 10
    assert full.model == prefix.model
    assert full.data == prefix.data
