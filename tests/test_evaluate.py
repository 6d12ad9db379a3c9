"""`prefix-ds evaluate`: its loss is that of training, its outputs are those of plain transformers, its scores
those of the libraries' command lines on the saved outputs; on any number of ranks, all there or not there.
"""

import functools
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from prefix_ds import evaluate as evaluating
from prefix_ds.checkpoint import latest, read_prefix, write_prefix
from prefix_ds.config import config_text, parse_config
from prefix_ds.errors import ConfigError
from prefix_ds.evaluation import Sample, sampled
from prefix_ds.model import PrefixLM
from prefix_ds.scores import KNOWN, values_of
from prefix_ds.verdicts import prefix_mark, present_verdicts, read_verdicts
from tests.disks import fill_before
from tests.ranks import command, on_ranks
from tests.refusals import refusal
from tests.test_generate import greedy_by_hand
from tests.test_laws import metrics, outcome, stop_after, strip_times, train_here
from tests.test_scores import by_rouge, by_sacrebleu
from tests.workshop import records, run_config, write_jsonl

KEYS = [
    "split",
    "step",
    "sha256",
    "data",
    "changed",
    "records",
    "targets",
    "loss",
    "perplexity",
    "scores",
    "signatures",
    "generate",
    "seconds",
]
RECORDS = [
    {"source": r["source"], "goal": r["goal"], "goals": [r["goal"], r["source"]]} for r in records(9, seed=3)
]
SCORES = "evaluate.scores=rouge,bleu,chrf,exact_match,f1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, whose data.test are `RECORDS`, with two references each."""
    folder = tmp_path_factory.mktemp("place")
    write_jsonl(folder / "test.jsonl", RECORDS)
    words = [f"data.test={folder}/test.jsonl", "train.lr=0.1", "generate.max_new_tokens=8", SCORES]
    (folder / "run.yaml").write_text(config_text(run_config(folder, *words)))
    (ended,) = command("train", folder / "run.yaml")
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.fixture
def evaluated(run, tmp_path):
    """What an evaluation leaves, of a copy of the run: the summary, the rows, and what was printed."""
    copies = iter(range(100))

    def evaluated(*words, size=1, name="test", run=run):
        copy = shutil.copytree(run, tmp_path / f"run{next(copies)}")
        first, *others = command("evaluate", copy, *words, size=size)
        assert first.code == 0, first.err
        assert not any(other.out for other in others), "said twice"
        assert "Traceback" not in first.err
        folder = copy / "evaluate"
        assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.jsonl"}
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads((folder / f"{name}.json").read_text()), [json.loads(x) for x in lines], first.out

    return evaluated


BOTH = "data.references= {goals}"


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """An evaluation with two references a record."""
    copy = shutil.copytree(run, tmp_path_factory.mktemp("whole") / "run")
    (ended,) = command("evaluate", copy, BOTH)
    assert ended.code == 0, ended.err
    lines = (copy / "evaluate" / "test.jsonl").read_text().splitlines()
    return (
        json.loads((copy / "evaluate" / "test.json").read_text()),
        [json.loads(x) for x in lines],
        ended.out,
    )


def test_the_summary_has_its_keys_and_its_sums(run, whole):
    summary, rows, said = whole
    assert list(summary) == KEYS
    assert summary["data"] == f"{run.parent}/test.jsonl"
    assert summary["changed"] == {"data.references": " {goals}"}
    assert (summary["split"], summary["records"]) == ("test", len(RECORDS))
    told = json.loads((run / "prefix" / "prefix.json").read_text())
    assert (summary["step"], summary["sha256"]) == (told["step"], told["sha256"])
    assert summary["targets"] == sum(row["num_targets"] for row in rows)
    assert summary["loss"] == pytest.approx(sum(row["nll"] for row in rows) / summary["targets"], abs=1e-9)
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    assert summary["generate"]["max_new_tokens"] == 8
    assert set(summary["scores"]) == set(summary["signatures"]) == set(KNOWN)
    for name, score in summary["scores"].items():
        assert score["low"] <= score["value"] <= score["high"], name
        assert f"{score['value']:.2f}" in said
    assert [row["prompt"] for row in rows] == [f"{r['source']} =" for r in RECORDS]
    assert [row["references"] for row in rows] == [[f" {text}" for text in r["goals"]] for r in RECORDS]


def test_scores_are_those_of_the_command_lines_on_the_saved_outputs(whole, tmp_path):
    summary, rows, _ = whole
    outputs = [" ".join(row["output"].split()) for row in rows]
    references = [[text.strip() for text in row["references"]] for row in rows]
    for name in ("bleu", "chrf"):
        value, signature = by_sacrebleu(tmp_path, name, outputs, references)
        assert summary["scores"][name]["value"] == pytest.approx(value, abs=1e-8)
        assert summary["signatures"][name] == signature
    for row, expected in zip(rows, by_rouge(tmp_path, outputs, references), strict=True):
        assert {kind: row["scores"][kind] for kind in expected} == pytest.approx(expected, abs=1e-4)
    assert summary["scores"]["chrf"]["value"] > 1, "equality of nothing with nothing would say little"
    for name in ("rouge1", "exact_match", "f1"):
        mean = sum(row["scores"][name] for row in rows) / len(rows)
        assert summary["scores"][name]["value"] == pytest.approx(mean, abs=1e-6)


def test_outputs_are_what_plain_transformers_write_behind_the_prefix(run, whole):
    _, rows, _ = whole
    expected = [greedy_by_hand(run, row["prompt"], 8) for row in rows]
    assert [row["output"] for row in rows] == expected
    assert len(set(expected)) > 1


def nll_by_hand(run, prompt, references):
    """What plain transformers make of the references behind the saved keys and values, one at a time."""
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "base")
    read, total = tokenizer(prompt).input_ids, 0.0
    for text in references:
        learnt = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        cache = DynamicCache()
        for layer, (key_NPH, value_NPH) in enumerate(read_prefix(run / "prefix").slots.values()):
            cache.update(key_NPH[None], value_NPH[None], layer)
        with torch.no_grad():
            logits = base(torch.tensor([read + learnt]), past_key_values=cache).logits[0, len(read) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(learnt), reduction="sum"))
    return total


def test_the_loss_of_a_record_is_that_of_all_its_references(run, whole):
    for row in whole[1][:4]:
        assert row["nll"] == pytest.approx(nll_by_hand(run, row["prompt"], row["references"]), rel=1e-5)


def assert_same(one, two):
    """Equal tokens and scores; likelihoods but for rounding."""
    (summary, rows, _), (other, others, _) = one, two
    for mine, theirs in zip(rows, others, strict=True):
        assert mine == theirs | {"nll": pytest.approx(theirs["nll"], rel=1e-6)}
    assert summary["scores"] == other["scores"]
    assert summary["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert (summary["targets"], summary["records"]) == (other["targets"], other["records"])


def test_two_ranks_find_what_one_finds(whole, evaluated):
    assert_same(evaluated(BOTH, size=2), whole)


def test_micro_batches_change_nothing(whole, evaluated):
    assert_same(evaluated(BOTH, "train.micro_batch_tokens=64", "generate.batch_size=2"), whole)


def valid_losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row}


def test_the_loss_of_valid_is_the_validation_loss_of_the_best_step(run, evaluated):
    summary, rows, said = evaluated("--split", "valid", "evaluate.scores=[]", name="valid")
    assert summary["loss"] == pytest.approx(min(valid_losses(run).values()), rel=1e-6)
    assert summary["scores"] == summary["signatures"] == {}
    assert {row["output"] for row in rows} == {None}, "nothing asks for outputs"
    assert "perplexity" in said


def test_the_instruction_has_the_loss_that_training_started_with(run, evaluated):
    words = ["--split", "valid", "--instruction", "evaluate.scores=[]"]
    summary, _, _ = evaluated(*words, name="valid.instruction")
    assert summary["loss"] == pytest.approx(valid_losses(run)[0], rel=1e-6)
    assert (summary["step"], summary["sha256"]) == (None, None), "nothing was trained"
    words[2] = "--without-prefix"
    bare, _, _ = evaluated(*words, name="valid.bare")
    assert bare["loss"] != pytest.approx(summary["loss"], rel=1e-3)


def test_the_keys_that_numbers_come_from_are_kept_without_secrets(evaluated):
    words = ["prefix.text=use sk-abcdefghijklmnop", "data.packing=false", "generate.max_new_tokens=5"]
    for front, changed in (("--instruction", {"prefix.text": "use ***"}), ("--without-prefix", {})):
        name = "valid.instruction" if changed else "valid.bare"
        summary, _, _ = evaluated("--split", "valid", front, "evaluate.scores=[]", *words, name=name)
        assert summary["changed"] == changed


def test_the_bare_base_writes_what_generate_writes_without_a_prefix(run, evaluated, tmp_path):
    _, rows, _ = evaluated("--without-prefix", name="test.bare")
    (ended,) = command("generate", run, "--without-prefix", "--output", tmp_path / "out.jsonl")
    assert ended.code == 0, ended.err
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [row["output"] for row in rows] == [json.loads(line)["output"] for line in lines]


def test_prompts_that_lose_their_start_are_counted(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    records = [{"source": "the cat sees the dog under the tree", "goal": "the"}] * 2
    records.append({"source": "cat", "goal": "the"})
    words = [f"data.test={write_jsonl(tmp_path / 'in.jsonl', records)}", "evaluate.scores=[]"]
    (ended,) = command("evaluate", copy, *words, "data.max_length=8")
    assert ended.code == 0, ended.err
    assert "2 of 3 prompts have more than 8 tokens and lost their start" in ended.err
    assert "; 2 prompts cut" in ended.err
    (ended,) = command("evaluate", copy, *words)
    assert "lost their start" not in ended.err


def test_train_can_be_evaluated_too(evaluated):
    summary, _, _ = evaluated(
        "--split", "train", "evaluate.scores=[]", "data.references={gone}", name="train"
    )
    assert summary["records"] == 40


# what cannot be evaluated


def test_a_mistake_is_one_line(run, tmp_path):
    def refused(*words, **options):
        return refusal("evaluate", run, *words, **options)

    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    empty, blank = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl"
    assert refused(f"data.test={empty}") == f"data.test: {empty}: the file is empty"
    assert refused(f"data.test={blank}") == f"data.test: {blank}: no records"
    assert refused("data.test=null") == "data.test: missing; name a file or a hub id"
    line = refused("evaluate.scores=[rouge, rogue]")
    assert "evaluate.scores.1: 'rogue': expected 'rouge', 'rouge1', 'rouge2', 'rougeL', 'bleu'" in line
    assert refused("--without-prefix", "--instruction").startswith("--without-prefix and --instruction: one")
    words = ["prefix.init=random", "prefix.length=3", "--instruction"]
    assert refused(*words) == "prefix.init: random: this run did not start from an instruction"
    line = refused("train.method=full", "--without-prefix")
    assert line == "train.method: full: all weights were trained; there is no prefix to leave out"
    assert not (run / "evaluate").exists()


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        (["data.prompt="], True),
        (["data.prompt=", "data.chat=true"], True),
        (["data.prompt=", "evaluate.scores=[]"], False),
        (["data.prompt=", "data.messages=turns"], False),
    ],
)
def test_there_must_be_a_prompt_to_write_for(tmp_path, words, is_refused):
    config = run_config(tmp_path, SCORES, f"data.test={tmp_path}/valid.jsonl", *words)
    refused = pytest.raises(ConfigError, match=r"^evaluate\.scores: there is no data\.prompt to write for")
    with refused if is_refused else nullcontext():
        evaluating.check_request(config, evaluating.Request())


@pytest.mark.parametrize("size", [1, 2])
def test_references_that_are_missing(run, tmp_path, size):
    asked = write_jsonl(tmp_path / "in.jsonl", [{"source": r["source"]} for r in RECORDS])
    line = refusal("evaluate", run, f"data.test={asked}", size=size)
    assert line == f"data.target: {asked}:1 has no field 'goal'; its fields: source"
    nothing = write_jsonl(tmp_path / "none.jsonl", [{"source": "the cat", "goal": []}])
    line = refusal("evaluate", run, f"data.test={nothing}", size=size)
    assert line == f"data.target: {nothing}:1: the field 'goal' is an empty list"


def test_a_split_that_is_unknown_is_told_with_those_there_are(run):
    (ended,) = command("evaluate", run, "--split", "dev")
    assert ended.code == 2
    assert all(word in ended.err for word in ("dev", "train", "valid", "test"))


@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_is_written_whole_or_not_at_all(run, disk, size):
    folder = disk()
    copy = shutil.copytree(run, folder / "run")
    (ended,) = command("evaluate", copy, "evaluate.scores=[]")
    assert ended.code == 0, ended.err
    before = {path.name: path.read_bytes() for path in (copy / "evaluate").iterdir()}
    full = functools.partial(fill_before, 1, "prefix_ds.evaluation.found", "whole_file", folder)
    line = refusal("evaluate", copy, size=size, after_log=True, before=full)
    assert line.endswith("cannot be written: No space left on device")
    assert {path.name: path.read_bytes() for path in (copy / "evaluate").iterdir()} == before


# numbers of a run


def test_the_numbers_join_those_of_the_run(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for words in ((), ("--instruction",)):
        (ended,) = command("evaluate", copy, *words)
        assert ended.code == 0, ended.err
    *_, trained, untrained = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((copy / "evaluate" / "test.json").read_text())
    assert trained["step"] == read_prefix(copy / "prefix").facts.step
    assert trained["evaluate/test/loss"] == summary["loss"]
    assert trained["evaluate/test/chrf/low"] == summary["scores"]["chrf"]["low"]
    assert untrained["step"] == 0
    assert "evaluate/test.instruction/chrf" in untrained


def test_a_prefix_that_is_replaced_meanwhile_is_not_what_was_evaluated(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    read = prefix_mark(copy)
    (ended,) = command(
        "evaluate", copy, "evaluate.scores=[]", before=functools.partial(trained_on_beside, copy)
    )
    assert ended.code == 0, ended.err
    verdict = read_verdicts(copy)["test"]
    assert prefix_mark(copy).step == read.step + 5
    assert verdict.mark == read
    assert present_verdicts(copy) == {}


def trained_on_beside(run, _rank):
    """A prefix of five steps more takes the place of the run's once it has been read."""
    losses_of = evaluating.record_losses

    def late(*arguments):
        saved = read_prefix(run / "prefix")
        write_prefix(run / "prefix", saved.slots, replace(saved.facts, step=saved.facts.step + 5))
        return losses_of(*arguments)

    evaluating.record_losses = late


def test_mlflow_has_them_and_may_be_away(run, tmp_path):
    """A database that is there, and then the address of a server that is not."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = [f"mlflow.uri={uri}", f"run.folder={tmp_path}/run", "train.max_steps=1"]
    (ended,) = command("train", run.parent / "run.yaml", *words)
    assert ended.code == 0, ended.err
    (ended,) = command("evaluate", tmp_path / "run", "evaluate.scores=chrf")
    assert ended.code == 0, ended.err
    client = MlflowClient(uri)
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    summary = json.loads((tmp_path / "run" / "evaluate" / "test.json").read_text())
    assert found.data.metrics["evaluate/test/chrf"] == summary["scores"]["chrf"]["value"]
    assert found.data.metrics["evaluate/test/chrf/high"] == summary["scores"]["chrf"]["high"]
    assert found.info.status == "FINISHED"

    assert found.data.tags["evaluate.test.data"] == summary["data"]

    other = f"sqlite:///{tmp_path}/other.db"
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "other.db")
    words = [f"mlflow.uri={other}", "evaluate.scores=[]", "--instruction"]
    (ended,) = command("evaluate", tmp_path / "run", *words)
    assert ended.code == 0, ended.err
    client, name = MlflowClient(other), "evaluate/test.instruction/loss"
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [run for run in runs if name in run.data.metrics], "the server that an override names is told"

    state = tmp_path / "run" / "mlflow.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"uri": "http://127.0.0.1:9"}))
    (ended,) = command("evaluate", tmp_path / "run", "evaluate.scores=chrf", "--split", "valid")
    assert ended.code == 0, ended.err
    assert "MLflow has not got this evaluation" in ended.err
    assert (tmp_path / "run" / "evaluate" / "valid.json").exists()


# while training


def test_what_is_too_long_to_write_is_told_before_anything_is_read(run, tmp_path, monkeypatch):
    def longest(lm, num_positions, key):
        if num_positions > 100:
            raise ConfigError(f"{key}: {num_positions}")

    monkeypatch.setattr(PrefixLM, "check_length", longest)
    monkeypatch.setattr(evaluating, "record_losses", lambda *_: pytest.fail("the records were read"))
    copy = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^generate\.max_new_tokens: 1\d\d$"):
        evaluating.evaluate(copy, ["generate.max_new_tokens=99"], evaluating.Request())


EVERY = ["evaluate.every=2", "evaluate.sample=6", "generate.max_new_tokens=8", "train.lr=0.1"]


def scores_of(config, name):
    return {row["step"]: row[f"valid/{name}"] for row in metrics(config) if f"valid/{name}" in row}


@pytest.mark.parametrize("size", [1, 2])
def test_the_best_prefix_is_the_one_of_the_best_score(tmp_path, size):
    words = [*EVERY, "evaluate.best_by=chrf", "evaluate.every=1", "train.max_steps=5"]
    config = run_config(tmp_path, *words)
    on_ranks(size, train_here, config)
    scores = scores_of(config, "chrf")
    assert sorted(scores) == [0, 1, 2, 3, 4, 5]
    best = max(scores, key=scores.get)
    assert read_prefix(tmp_path / "run" / "prefix").facts.step == best
    progress = latest(tmp_path / "run").state["progress"]
    assert (progress["best_score"], progress["best_step"]) == (scores[best], best)
    assert progress["best_loss"] is None
    losses = {row["step"]: row["valid/loss"] for row in metrics(config) if "valid/loss" in row}
    assert read_prefix(tmp_path / "run" / "prefix").facts.valid_loss == losses.get(best)


def test_two_ranks_score_while_training_what_one_does(tmp_path):
    found = []
    for size in (1, 2):
        words = [
            *EVERY,
            "evaluate.scores=chrf,rouge",
            f"run.folder={tmp_path}/run{size}",
            "train.max_steps=4",
        ]
        config = run_config(tmp_path, *words)
        on_ranks(size, train_here, config)
        found.append([scores_of(config, name) for name in ("chrf", "rougeL")])
    assert found[0] == found[1]
    assert sorted(found[0][0]) == [0, 2, 4]


def test_scores_while_training_are_those_of_evaluate(tmp_path):
    """With all of valid in the sample, and the last prefix."""
    words = [*EVERY, "evaluate.sample=100", "evaluate.best_by=chrf", "evaluate.every=6"]
    config = run_config(tmp_path, *words, f"data.test={tmp_path}/valid.jsonl")
    on_ranks(1, train_here, config)
    (ended,) = command("evaluate", tmp_path / "run", "evaluate.scores=chrf")
    assert ended.code == 0, ended.err
    summary = json.loads((tmp_path / "run" / "evaluate" / "test.json").read_text())
    assert summary["scores"]["chrf"]["value"] == max(scores_of(config, "chrf").values())


def test_evaluating_changes_nothing_of_what_is_learnt(tmp_path):
    plain = run_config(tmp_path, "train.lr=0.1")
    watched = run_config(tmp_path, *EVERY, "evaluate.scores=f1", f"run.folder={tmp_path}/watched")
    on_ranks(2, train_here, plain)
    on_ranks(2, train_here, watched)
    assert outcome(plain)[:2] == outcome(watched)[:2]
    assert torch.equal(outcome(plain)[2], outcome(watched)[2])


def test_a_run_that_was_stopped_ends_as_if_it_never_was(tmp_path):
    words = [*EVERY, "evaluate.best_by=chrf", "evaluate.scores=rouge"]
    config = run_config(tmp_path, *words)
    stopped = run_config(tmp_path, *words, f"run.folder={tmp_path}/stopped")
    on_ranks(2, train_here, config)
    on_ranks(2, stop_after, stopped, 4)
    assert sorted(scores_of(stopped, "chrf")) == [0, 2], "what is due at 4 waits"
    on_ranks(2, train_here, stopped)
    assert strip_times(metrics(stopped)) == strip_times(metrics(config))
    states = [latest(tmp_path / name).state for name in ("run", "stopped")]
    assert states[0] == states[1]
    kept = [read_prefix(tmp_path / name / "prefix") for name in ("run", "stopped")]
    assert kept[0].facts == kept[1].facts
    for one, two in zip(kept[0].slots.values(), kept[1].slots.values(), strict=True):
        assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_of_all_weights_is_scored_as_well(tmp_path, size):
    words = [*EVERY, "train.method=full", "evaluate.best_by=chrf", "train.lr=0.01", "train.max_steps=4"]
    config = run_config(tmp_path, *words, f"data.test={tmp_path}/valid.jsonl")
    on_ranks(size, train_here, config)
    assert sorted(scores_of(config, "chrf")) == [0, 2, 4]
    for ended in command("evaluate", tmp_path / "run", "evaluate.scores=chrf", size=size):
        assert ended.code == 0, ended.err
    summary, scores = (
        json.loads((tmp_path / "run" / "evaluate" / "test.json").read_text()),
        scores_of(config, "chrf"),
    )
    assert summary["scores"]["chrf"]
    assert summary["step"] == max(scores, key=scores.get), "model/ is that of the best score"


def test_the_sample_is_drawn_by_the_seed():
    def drawn(*words):
        text = "{model: {name: b}, prefix: {text: x}, data: {valid: v}, evaluate: {every: 1, sample: 5}}"
        config = parse_config(text, ["evaluate.scores=[f1]", *words])
        return sampled(config, 100)

    assert drawn() == drawn()
    assert len(set(drawn())) == 5
    assert drawn() != drawn("train.seed=1")
    assert drawn("evaluate.sample=1000") != list(range(100)) == sorted(drawn("evaluate.sample=1000"))


def test_the_best_by_a_score_needs_that_score():
    text = "{model: {name: b}, prefix: {text: x}, data: {valid: v}, evaluate: {every: 1, scores: [f1]}}"
    config = parse_config(text, ["evaluate.best_by=chrf"])
    assert Sample([], config, lambda: None, None).names == ("f1", "chrf")


def test_a_score_of_nothing_is_a_score():
    assert values_of(["chrf", "f1"], [""], [["cat"]]) == {"chrf": 0, "f1": 0}
