"""`prefix-ds export`: a card that is true and loads what it says, merging by its laws, one-line refusals."""

import errno
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefix_ds import importing
from prefix_ds.card import Part, card
from prefix_ds.checkpoint import read_prefix, write_prefix
from prefix_ds.config import config_text, parse_config
from prefix_ds.errors import RunError
from prefix_ds.export import export_prefix, read_peft
from prefix_ds.files import telling_disk_errors
from prefix_ds.merging import MEANING, merged
from prefix_ds.model import PrefixLM
from prefix_ds.result import window_of
from tests.laws import batch_of, distance, table_of, tokens
from tests.ranks import command
from tests.refusals import refusal
from tests.snippets import outcome, outcome_anew, snippet_of
from tests.test_export import FACTS, assert_same, random_slots
from tests.tiny_models import tiny, tiny_config
from tests.workshop import run_config

torch.set_num_threads(1)

PROMPT = "the cat sees ="
EVALUATION = {
    "split": "test",
    "data": "test.jsonl",
    "records": 7,
    "targets": 60,
    "loss": 2.5,
    "perplexity": 12.1825,
    "changed": {"data.references": " {goals}"},
    "scores": {"rougeL": {"value": 0.3125, "low": 0.25, "high": 0.375}},
    "signatures": {
        "rouge1": "rouge-score 0.1",
        "rougeL": "rouge-score 0.1",
        "bleu": "nrefs:1|case:mixed",
    },
    "generate": {"num_beams": 4, "max_new_tokens": 12, "temperature": 0.0},
    "seconds": 3.5,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, which was evaluated, and whose configuration has seen a password."""
    folder = tmp_path_factory.mktemp("place")
    words = ["train.lr=0.1", "generate.max_new_tokens=12"]
    (folder / "run.yaml").write_text(config_text(run_config(folder, *words)))
    (ended,) = command("train", folder / "run.yaml")
    assert ended.code == 0, ended.err
    (folder / "run" / "evaluate").mkdir()
    (folder / "run" / "evaluate" / "test.json").write_text(json.dumps(EVALUATION))
    return folder / "run"


def exported(out, *words):
    (ended,) = command("export", *words, out)
    assert ended.code == 0, ended.err
    return (out / "README.md").read_text(), ended


def test_the_card_says_what_the_run_says(run, tmp_path):
    card, _ = exported(tmp_path / "peft", run)
    facts = read_prefix(run / "prefix").facts
    for said in (
        f"base_model: {json.dumps(str(run.parent / 'base'))}",
        "library_name: peft",
        f"| training data | {run.parent}/train.jsonl |",
        "| started from | the keys and values of `turn the words around:` |",
        "| prompt | `{source} =` |",
        f"| steps | {facts.step} |",
        "| lr | 0.1 |",
        f"| validation loss | {facts.valid_loss:.4f} nats a target token |",
        "| test | 7 | loss | 2.5000 |",
        "| test | 7 | rougeL | 0.3125 (0.2500 to 0.3750) |",
        "- the trained prefix, test: data test.jsonl; with `data.references= {goals}`, not the run's own; "
        "outputs with num_beams 4, max_new_tokens 12; rouge1, rougeL: `rouge-score 0.1`; "
        "bleu: `nrefs:1|case:mixed`\n",
    ):
        assert said in card
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_card_says_of_what_a_score_is_and_the_prefixs_own_come_first(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for name, loss in (("valid", 2.25), ("test.bare", 4.5), ("test.instruction", 3.5)):
        told = EVALUATION | {"split": name.partition(".")[0], "loss": loss, "scores": {}}
        (copy / "evaluate" / f"{name}.json").write_text(json.dumps(told))
    card, _ = exported(tmp_path / "peft", copy)
    assert re.findall(r"\| (.*) \| (\w+) \| 7 \| loss \| (.*) \|", card) == [
        ("the trained prefix", "test", "2.5000"),
        ("the trained prefix", "valid", "2.2500"),
        ("the bare base", "test", "4.5000"),
        ("the instruction alone", "test", "3.5000"),
    ]


def written_by_us(run):
    (ended,) = command("generate", run, "--prompt", PROMPT)
    assert ended.code == 0, ended.err
    return ended.out


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_cards_snippet_writes_what_we_write(run, tmp_path, num_beams):
    copy = shutil.copytree(run, tmp_path / "run")
    config = (copy / "run.yaml").read_text().replace("num_beams: 1", f"num_beams: {num_beams}")
    (copy / "run.yaml").write_text(config)
    card, _ = exported(tmp_path / "peft", copy)
    code = snippet_of(card)
    assert '"{source} ="' in code
    ours = written_by_us(copy)
    assert outcome(code.replace("{source} =", PROMPT), tmp_path / "peft") == ours
    (without,) = command("generate", copy, "--prompt", PROMPT, "--without-prefix")
    assert without.out != ours


def card_of(*words):
    config = parse_config("{model: {name: acme/tiny}, prefix: {text: Say it}}", words)
    return card([Part(config, FACTS, 5, {})])


def imported_as(text):
    """The configuration that the card's import line comes to."""
    _, _, _, _, *words = shlex.split(re.search("`(prefix-ds import THIS_FOLDER RUN[^`]*)`", text)[1])
    return parse_config("{model: {name: acme/tiny}, prefix: {init: random, length: 5}}", words)


def test_a_card_imports_long_examples_as_they_were_read():
    words = ["data.max_length=9000", "train.micro_batch_tokens=20000"]
    assert imported_as(card_of(*words)).data.max_length == 9000


def test_a_card_opens_the_tokenizer_and_the_code_that_the_run_had():
    text = card_of("model.tokenizer=acme/words", "model.trust_remote_code=true")
    model = imported_as(text).model
    assert (model.tokenizer, model.trust_remote_code) == ("acme/words", True)
    assert snippet_of(text).count(", trust_remote_code=True") == 2


def test_a_card_imports_the_number_format_and_how_answers_are_written():
    keys = {"max_new_tokens": 96, "num_beams": 4, "temperature": 0.7, "top_p": 0.9}
    config = imported_as(
        card_of("model.dtype=float32", *(f"generate.{name}={v}" for name, v in keys.items()))
    )
    assert config.model.dtype == "float32"
    assert {name: getattr(config.generate, name) for name in keys} == keys
    assert "`prefix-ds import THIS_FOLDER RUN`" in card_of()


def test_a_card_samples_where_the_run_does():
    code = snippet_of(card_of("generate.temperature=0.7", "generate.top_p=0.9"))
    assert "do_sample=True, temperature=0.7, top_p=0.9, top_k=0)" in code
    assert "do_sample=False)" in snippet_of(card_of())


def test_a_card_loads_a_base_by_its_whole_path_and_leaves_its_authors_settings_out(run, tmp_path):
    """The base has a penalty in its generation_config.json, and run.yaml a path from where training began."""
    base = shutil.copytree(run.parent / "base", tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.5}))
    words = [f"model.name={os.path.relpath(base)}", f"run.folder={tmp_path}/run"]
    (ended,) = command("train", run.parent / "run.yaml", *words)
    assert ended.code == 0, ended.err
    card, _ = exported(tmp_path / "peft", tmp_path / "run")
    assert read_peft(tmp_path / "peft").base == str(base)
    code = snippet_of(card).replace("{source} =", PROMPT)
    assert outcome(code, tmp_path / "peft") == written_by_us(tmp_path / "run")


def test_words_that_do_not_go_together(run, tmp_path):
    out = tmp_path / "out"
    assert refusal("export", run, out, "--uri", "http://x") == "export: --uri goes with --mlflow NAME"
    line = refusal("export", run, "mlflow.uri=http://bob:hunter2@x")
    assert line == "export: mlflow.uri=...: keys to change go with --mlflow NAME; else OUT is named last"
    assert refusal("export", "--merge", run, out) == "export --merge: expected RUN RUN... OUT"


def test_the_readmes_script_writes_what_we_write(run, tmp_path):
    exported(tmp_path / "adapter", run)
    code = snippet_of((Path(__file__).parents[1] / "README.md").read_text())
    code = code.replace("runs/demo/base/model", str(run.parent / "base"))
    code, count = re.subn(r'^prompt = ".*"$', f'prompt = "{PROMPT}"', code, flags=re.MULTILINE)
    assert count == 1
    (ended,) = command("generate", run, "generate.max_new_tokens=128", "--prompt", PROMPT)
    assert outcome_anew(code, tmp_path) == ended.out


def full_before_the_configuration(_rank):
    def refused(folder, _config):
        with telling_disk_errors(folder.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    importing.write_config = refused


def test_an_imported_export_writes_the_same(run, tmp_path):
    exported(tmp_path / "peft", run)
    words = [tmp_path / "peft", tmp_path / "back", "model.dtype=float32"]
    (ended,) = command("import", *words, before=full_before_the_configuration)
    assert "cannot be written" in ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"peft"}, "a prefix alone is no run"
    (ended,) = command("import", *words)
    assert ended.code == 0, ended.err
    assert f"wrote {tmp_path}/back: prefix and run.yaml" in ended.err
    (again,) = command("generate", tmp_path / "back", "generate.max_new_tokens=12", "--prompt", PROMPT)
    assert again.out == written_by_us(run)
    card, _ = exported(tmp_path / "again", tmp_path / "back")
    assert "| training | not known: it was imported |" in card
    assert "| lr |" not in card


def test_no_secret_reaches_a_card(run, tmp_path):
    secret = shutil.copytree(run, tmp_path / "secret")
    config = (secret / "run.yaml").read_text()
    train = f"{run.parent}/train.jsonl"
    config = config.replace(train, f"https://bob:hunter2@host/{train}").replace(
        "turn the words around:", "use api_key=sk-abcdefghijklmnop"
    )
    (secret / "run.yaml").write_text(config)
    card, _ = exported(tmp_path / "peft", secret)
    assert "hunter2" not in card
    assert "abcdefghijklmnop" not in card
    assert "***" in card


def test_a_card_keeps_the_words_of_a_template():
    text = card_of("data.prompt=Token: {token} Tag:", "data.train=train.jsonl?token=hunter2")
    assert "| prompt | `Token: {token} Tag:` |" in text
    assert 'prompt = "Token: {token} Tag:"' in snippet_of(text)
    assert "| training data | train.jsonl?token=*** |" in text


@pytest.mark.parametrize(
    ("gone", "line"),
    [
        ("prefix", r"error: .*/prefix/prefix\.safetensors: no such file; a folder with a trained prefix was"),
        ("run.yaml", r"error: .*: is no run folder: it has no run\.yaml"),
    ],
)
def test_what_was_deleted_is_one_line(run, tmp_path, gone, line):
    broken = shutil.copytree(run, tmp_path / "broken")
    path = broken / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    told = refusal("export", broken, tmp_path / "peft")
    assert re.match(line, f"error: {told}")
    assert not (tmp_path / "peft").exists()


def test_an_evaluation_that_cannot_be_read_is_one_line(run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "evaluate" / "test.json").write_text('{"split": "test"}')
    assert "is no evaluation" in refusal("export", broken, tmp_path / "peft")


def test_an_adapter_that_lost_its_tensors_is_one_line(run, tmp_path):
    exported(tmp_path / "peft", run)
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal("import", tmp_path / "peft", tmp_path / "back")


# Merging.


def test_merging_is_all_positions_in_order(tmp_path):
    parts = []
    for name, length in (("a", 5), ("b", 3), ("c", 2)):
        write_prefix(tmp_path / name, random_slots(length=length), FACTS)
        parts.append(read_prefix(tmp_path / name))
    a, b, c = parts
    both = merged([a, b])
    assert both.length == 8
    for name, (key_NPH, value_NPH) in both.slots.items():
        for kind, whole in ((0, key_NPH), (1, value_NPH)):
            assert torch.equal(whole[:, :5], a.slots[name][kind])
            assert torch.equal(whole[:, 5:], b.slots[name][kind])
    assert both.facts.valid_loss is None, "nobody has measured it"
    assert_same(merged([both, c]).slots, merged([a, merged([b, c])]).slots)
    export_prefix(both, tmp_path / "peft")
    assert torch.equal(read_peft(tmp_path / "peft").layers[0][0], both.slots["model.layers.0.self_attn"][0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "acme/other"}, r"differ in base: acme/tiny \(main\), acme/other \(main\)"),
        ({"revision": "v2"}, r"differ in base: acme/tiny \(main\), acme/tiny \(v2\)"),
        ({"base_config_sha256": "cd34"}, "differ in configuration of the base: ab12, cd34"),
        ({}, "differ in attentions with a prefix: 12 from .* 2 heads.*, 11 from"),
    ],
)
def test_prefixes_of_different_bases_are_not_merged(tmp_path, change, words):
    facts = FACTS.__class__(**(vars(FACTS) | change))
    write_prefix(tmp_path / "a", random_slots(), FACTS)
    write_prefix(tmp_path / "b", random_slots(layers=12 if change else 11), facts)
    with pytest.raises(RunError, match=words):
        merged([read_prefix(tmp_path / "a"), read_prefix(tmp_path / "b")])


def test_prefixes_of_different_layers_are_not_merged(tmp_path):
    for name, layers in (("a", (0, 1, 3)), ("b", (0, 2, 3))):
        found = random_slots(layers=3).values()
        slots = dict(zip((f"model.layers.{n}.self_attn" for n in layers), found, strict=True))
        write_prefix(tmp_path / name, slots, FACTS)
    with pytest.raises(RunError, match=r"only one of them has model\.layers\.[12]\.self_attn"):
        merged([read_prefix(tmp_path / "a"), read_prefix(tmp_path / "b")])


def test_a_window_behind_which_peft_loses_the_prefix_is_told(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    saved = read_prefix(run / "prefix")
    write_prefix(copy / "prefix", saved.slots, replace(saved.facts, window=7))
    card, ended = exported(tmp_path / "peft", copy)
    told = "some layers of this base attend within 7 tokens: there PEFT loses the prefix"
    assert told in card
    assert told in ended.err
    assert "PEFT loses" not in exported(tmp_path / "other", run)[0]


def test_a_best_prefix_of_no_step_was_not_imported(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    saved = read_prefix(run / "prefix")
    write_prefix(copy / "prefix", saved.slots, replace(saved.facts, step=0))
    assert "| training data |" in exported(tmp_path / "peft", copy)[0]


@pytest.mark.parametrize(
    ("family", "window"), [("llama", None), ("mistral", 64), ("gemma2", 64), ("gpt_oss", 64), ("qwen2", None)]
)
def test_the_window_of_a_base_is_known(family, window):
    assert window_of(tiny_config(family)) == window


def side_by_side(base, one, other, text):
    """The logits of a text behind two others, neither of which sees the other, each at positions from 0."""
    lengths = len(one), len(other), len(text)
    positions = torch.cat(
        [torch.arange(n) for n in lengths[:2]] + [torch.arange(len(text)) + sum(lengths[:2])]
    )
    owner = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)])
    seen = torch.ones(len(owner), len(owner)).tril().bool()
    seen &= (owner[:, None] == owner) | (owner[:, None] == 2)
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, torch.finfo(torch.float64).min)
    with torch.no_grad():
        found = base(
            input_ids=torch.cat([one, other, text])[None],
            position_ids=positions[None],
            attention_mask=mask[None, None],
            use_cache=False,
        )
    return found.logits[0, -len(text) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi", "olmo2"])
def test_a_merged_prefix_of_two_texts_is_the_two_side_by_side(family):
    base = tiny(family)
    one, other, text = tokens(5, 1), tokens(3, 2), tokens(7, 3)
    expected = side_by_side(base, one, other, text)
    lm = PrefixLM(base)

    def table(*texts):
        return table_of(lm.keys_values_of(torch.cat(texts)[None], lm.slots))

    def logits(*tables):
        with torch.no_grad():
            return lm.logits(batch_of([text]), torch.cat(tables), lm.slots)

    a, b = table(one), table(other)
    assert distance(logits(a, b), expected) < 1e-12
    assert distance(logits(b, a), expected) < 1e-12, "order does not matter"
    assert distance(logits(table(one, other)), expected) > 1e-4, "it is not one text after the other"
    assert distance(logits(a, torch.zeros_like(b)), logits(a)) > 1e-4, "no prefix is neutral"


def test_the_command_says_what_merging_means(run, tmp_path):
    card, ended = exported(tmp_path / "both", "--merge", run, run)
    assert MEANING in ended.err
    assert f"wrote {tmp_path}/both: adapter and card (README.md)" in ended.err
    assert MEANING[1:] in card
    assert "## Where it comes from 2" in card
    length = read_prefix(run / "prefix").length
    assert read_peft(tmp_path / "both").layers[0][0].shape[1] == 2 * length
    assert "RUN OUT" in refusal("export", run, run, tmp_path / "more")
