"""Scores: those of the libraries' own command lines, with intervals that hold what they should."""

import csv
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from prefix_ds.scores import KNOWN, names_of, overlap, scored, values_of
from prefix_ds.scores.answers import normalised
from prefix_ds.scores.overlap import bleu, chrf
from prefix_ds.scores.table import _TABLE

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "Käfer",
    "sees,",
    "likes.",
    "under",
    "(tree)",
    "42",
    "it's",
    "big",
    ";",
    "...",
]
ALL = names_of(["rouge", "bleu", "chrf", "exact_match", "f1"])


def texts(count, seed):
    """Lines of some words; a few of them empty."""
    choice = random.Random(seed)
    return [" ".join(choice.choices(WORDS, k=choice.randint(0, 12))) for _ in range(count)]


def close_to(text, choice):
    """The text with some words lost and some put in."""
    words = [word for word in text.split() if choice.random() > 0.2]
    return " ".join(words + choice.choices(WORDS, k=choice.randint(0, 2)))


@pytest.fixture(scope="module")
def outputs():
    return texts(80, seed=1)


@pytest.fixture(scope="module")
def references(outputs):
    """Two a record: one near to the output, one that is not."""
    choice = random.Random(2)
    return [
        (close_to(output, choice) or "x", other or "y")
        for output, other in zip(outputs, texts(80, 3), strict=True)
    ]


def by_sacrebleu(folder, metric, outputs, references):
    """What `sacrebleu` says on files, with its signature."""
    streams = [list(stream) for stream in zip(*references, strict=True)]
    files = {"outputs.txt": outputs} | {f"ref{n}.txt": stream for n, stream in enumerate(streams)}
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    refs = [f"ref{n}.txt" for n in range(len(streams))]
    words = [sys.executable, "-m", "sacrebleu", *refs, "-i", "outputs.txt", "-m", metric, "-w", "9"]
    said = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout
    told = json.loads(said)
    return told["score"], told["signature"]


def by_rouge(folder, outputs, references):
    """For each record and kind the best F of `python -m rouge_score.rouge`, a run a reference."""
    runs = []
    for stream in zip(*references, strict=True):
        for name, lines in (("outputs.txt", outputs), ("target.txt", stream)):
            (folder / name).write_text("".join(f"{line}\n" for line in lines))
        files = {"target_filepattern": "target.txt", "prediction_filepattern": "outputs.txt"}
        options = [f"--{name}={value}" for name, value in files.items()]
        words = [sys.executable, "-m", "rouge_score.rouge", *options, "--output_filename=scores.csv"]
        subprocess.run([*words, "--noaggregate"], cwd=folder, capture_output=True, check=True)
        with (folder / "scores.csv").open() as file:
            runs.append(list(csv.DictReader(file)))
    kinds = ("rouge1", "rouge2", "rougeL")
    return [
        {kind: max(100 * float(row[f"{kind}-F"]) for row in rows) for kind in kinds}
        for rows in zip(*runs, strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_those_of_sacrebleu_s_command_line(tmp_path, outputs, references, name, count):
    some = [own[:count] for own in references]
    found = scored([name], outputs, some)
    score, signature = by_sacrebleu(tmp_path, name, outputs, some)
    assert 5 < score < 95, "equality of nothing with nothing would say little"
    assert found.scores[0].value == pytest.approx(score, abs=1e-8)
    assert found.signatures[name] == signature
    assert f"nrefs:{count}|" in signature


@pytest.mark.parametrize("count", [1, 2])
def test_rouge_is_that_of_rouge_score_s_command_line(tmp_path, outputs, references, count):
    some = [own[:count] for own in references]
    names = names_of(["rouge"])
    found, expected = scored(names, outputs, some), by_rouge(tmp_path, outputs, some)
    for score in found.scores:
        assert score.value == pytest.approx(np.mean([own[score.name] for own in expected]), abs=1e-4)
    for ours, theirs in zip(found.of_records, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)  # it writes six digits of a fraction


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The  Cat.", "cat"),
        ("an A-team", "ateam"),
        ("Theatre, then a the", "theatre then"),
        ("it's 42!", "its 42"),
        ("...", ""),
        ("«Käfer»", "«käfer»"),
    ],
)
def test_answers_are_compared_as_squad_does(text, same):
    assert normalised(text) == same


@pytest.mark.parametrize(
    ("output", "known", "exact", "shared"),
    [
        ("The cat", ["cat"], 100, 100),
        ("cat dog", ["cat"], 0, 200 / 3),
        ("cat cat", ["cat dog"], 0, 50),
        ("cat", ["dog", "a cat!"], 100, 100),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 100, 100),
        ("", [""], 100, 100),
    ],
)
def test_exact_match_and_f1(output, known, exact, shared):
    assert values_of(["exact_match", "f1"], [output], [known]) == pytest.approx(
        {"exact_match": exact, "f1": shared}
    )


def test_what_was_to_be_written_scores_100_and_nothing_at_all_0(references):
    first = [own[0] for own in references if len(own[0].split()) > 4]
    known = [[text] for text in first]
    assert set(values_of(ALL, first, known).values()) == {100.0}
    assert set(values_of(ALL, [""] * len(first), known).values()) == {0.0}
    assert scored(ALL, ["", "  "], [["x"], ["y"]]).scores[0].high == 0


def test_space_around_a_text_is_no_part_of_it(outputs, references):
    padded = [f"  {output}\n" for output in outputs]
    around = [[f" {reference} " for reference in own] for own in references]
    assert scored(ALL, padded, around) == scored(ALL, outputs, references)


def test_the_order_of_references_does_not_matter_and_another_is_no_loss(outputs, references):
    """But for chrF, which takes the first of references that have nothing in common with the output."""
    names = [name for name in ALL if name != "chrf"]
    both = scored(names, outputs, references)
    turned = scored(names, outputs, [own[::-1] for own in references])
    assert (both.scores, both.of_records) == (turned.scores, turned.of_records)
    alone = scored(names, outputs, [own[1:] for own in references])
    for name in ("rouge1", "rouge2", "rougeL", "exact_match", "f1"):
        pairs = zip(both.of_records, alone.of_records, strict=True)
        assert all(mine[name] >= theirs[name] for mine, theirs in pairs)


def test_records_may_have_different_numbers_of_references(outputs, references):
    mixed = [own[: 1 + n % 2] for n, own in enumerate(references)]
    found = scored(ALL, outputs, mixed)
    assert "nrefs:var|" in found.signatures["bleu"]
    last = len(outputs) - 1
    doubled = [own * (2 // len(own)) for own in mixed]
    assert values_of(ALL, outputs, doubled) == {score.name: score.value for score in found.scores}
    assert found.of_records[last] == scored(ALL, outputs[last:], mixed[last:]).of_records[0]


def test_a_draw_scores_what_the_drawn_texts_score(outputs, references):
    (counts_R,) = bleu(outputs, references)._drawn(1, seed=7)
    drawn = [n for n, count in enumerate(counts_R) for _ in range(count)]
    for make in (bleu, chrf):
        whole = make(outputs, references)
        again = make([outputs[n] for n in drawn], [references[n] for n in drawn])
        found = whole.of_all((counts_R @ whole.stats_RS).tolist())
        assert found == pytest.approx(again.value(), abs=1e-9)


def test_intervals_hold_the_score_and_follow_the_seed(outputs, references):
    first, same, other = (scored(ALL, outputs, references, seed=seed).scores for seed in (0, 0, 1))
    assert first == same
    assert first != other
    for score in first:
        assert 0 <= score.low <= score.value <= score.high <= 100
        assert score.low < score.high


@pytest.mark.parametrize("score", [bleu, chrf])
def test_texts_are_counted_some_at_a_time(outputs, references, score, monkeypatch):
    several = [own[: 1 + number % 2] for number, own in enumerate(references)]
    for known in (references, several):
        at_once = score(outputs, known)
        with monkeypatch.context() as patched:
            patched.setattr(overlap, "_AT_ONCE", 7)
            found = score(outputs, known)
        assert (found.stats_RS == at_once.stats_RS).all()
        assert found.signature == at_once.signature


def test_the_interval_of_a_mean_is_that_of_statistics():
    hits = ["x"] * 120 + ["y"] * 280
    (score,) = scored(["exact_match"], hits, [["x"]] * 400).scores
    half = 1.96 * 100 * (0.3 * 0.7 / 400) ** 0.5
    assert (score.low, score.high) == pytest.approx((30 - half, 30 + half), abs=0.6)


def test_one_record_or_equal_ones_leave_no_doubt():
    for count in (1, 7):
        for score in scored(
            ALL, ["a cat sees the dog under it"] * count, [["the cat sees dogs"]] * count
        ).scores:
            assert score.low == score.value == score.high


def test_the_names_of_the_configuration_are_those_there_are():
    assert set(KNOWN) == set(_TABLE) == set(ALL)
    assert names_of(["rougeL", "rouge", "bleu", "rougeL"]) == ("rougeL", "rouge1", "rouge2", "bleu")


def test_no_library_speaks_while_a_run_trains(outputs, references, caplog, capfd):
    with caplog.at_level("INFO"):
        values_of(ALL, [f"{output} ." for output in outputs * 2], references * 2)
    assert not caplog.messages
    assert capfd.readouterr() == ("", "")


def test_every_score_of_every_record_is_there(outputs, references):
    found = scored(ALL, outputs, references)
    assert [tuple(own) for own in found.of_records] == [ALL] * len(outputs)
    assert all(0 <= value <= 100 for value in itertools.chain(*(own.values() for own in found.of_records)))
    assert set(found.signatures) == set(ALL)
