"""The data room's laws: what is read, what the model sees of it, and in which batches."""

import csv
import itertools
import json
import math
import os
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prefix_ds import dist
from prefix_ds.config import DataKeys, TrainKeys
from prefix_ds.data import packing
from prefix_ds.data.ahead import Ahead, _thread
from prefix_ds.data.batch import Document, Share
from prefix_ds.data.collate import collate
from prefix_ds.data.encode import encoder_of
from prefix_ds.data.examples import Examples, check_ids, load_examples, tokenise_split
from prefix_ds.data.hub import HubId, parse_hub_id
from prefix_ds.data.order import Order
from prefix_ds.data.prompts import prompt_of_text, read_prompts
from prefix_ds.data.source import read_records
from prefix_ds.data.stream import Stream, Sweep
from prefix_ds.data.template import parse_template
from prefix_ds.data.tokenise import Recipe
from prefix_ds.errors import ConfigError, DataError, Stopped
from tests.ranks import on_ranks

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
WORDS = [
    "ein",
    "Hund",
    "läuft",
    "über",
    "die",
    "grüne",
    "Wiese",
    "and",
    "a",
    "child",
    "reads",
    "3",
    "books",
    "木",
]
RECORDS = [{"q": f"question {i} " + " ".join(WORDS[: i % 9]), "a": f"answer {i}"} for i in range(23)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def make_tokenizer(front=(), behind=(), **special):
    """A byte-level BPE that puts `front` and `behind` around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    names = ["<pad>", "<s>", "</s>", "[SEP]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if front or behind:
        model.post_processor = processors.TemplateProcessing(
            single=[*front, "$A", *behind], special_tokens=[(name, i) for i, name in enumerate(names)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(front=["<s>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def keys(tmp_path, records=RECORDS, **more):
    """Data keys whose training file holds the records."""
    train = write_jsonl(tmp_path / "train.jsonl", records)
    settings = {"prompt": "{q} =>", "target": " {a}", "max_length": 96}
    return DataKeys.model_validate({"train": train} | settings | more)


def world(rank=0, size=1):
    return dist.World(rank, size, rank, size, torch.device("cpu"))


def tokens_of(examples: Examples):
    """Each example as (prompt ids, target ids)."""
    ids = examples.ids(range(len(examples)))
    return [
        (tuple(i[: len(i) - n].tolist()), tuple(i[len(i) - n :].tolist()))
        for i, n in zip(ids, examples.num_targets, strict=True)
    ]


def random_records(rng, count):
    text = [" ".join(rng.choice(WORDS, size=rng.integers(0, 12))) for _ in range(2 * count)]
    return [{"q": f"{i} {text[2 * i]}", "a": f"{i} {text[2 * i + 1]}"} for i in range(count)]


# --- templates -----------------------------------------------------------------------------------------


def test_a_template_puts_fields_between_its_literal_text():
    template = parse_template("{{x}} {a b}/{n}{n}", "data.prompt")
    assert template.fields == ("a b", "n")
    assert template.text({"a b": "{n}", "n": 3}, "here") == "{x} {n}/33"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{a", "expected '}'"),
        ("a}", "Single '}'"),
        ("{}", "a field's name"),
        ("{a!r}", "a field's name"),
        ("{a:>3}", "a field's name"),
    ],
)
def test_braces_that_do_not_fit_are_told_with_their_key(text, said):
    with pytest.raises(DataError, match=r"data\.prompt: ") as error:
        parse_template(text, "data.prompt")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"b": "x"}, "data.target: f:1 has no field 'answer'; its fields: b"),
        ({"anser": "x"}, "did you mean {anser}?"),
        ({"answer": None}, "data.target: f:1: the field 'answer' is null; expected text or a number"),
        ({"answer": {}}, "'answer' is an object; expected text or a number"),
        ({"answer": {"text": ["x"]}}, "'answer' is an object; name one of its own, as {answer.text}"),
        ({"of": {"answr": "x"}}, "has no field 'answer'; its fields: of.answr"),
        ({"answer": []}, "'answer' is an empty list"),
        ({"answer": [["x"]]}, "'answer' is a list in a list"),
        ({"answer": "\ud800"}, "half of a character"),
    ],
)
def test_a_record_that_does_not_fit_its_template_is_told(record, said):
    with pytest.raises(DataError) as error:
        parse_template("{answer}", "data.target").texts(record, "f:1")
    assert said in str(error.value)


def test_one_list_makes_a_text_an_entry_and_only_where_lists_may_stand():
    template = parse_template("{a}: {b}", "data.target")
    assert template.texts({"a": "x", "b": ["1", 2]}, "f:1") == ["x: 1", "x: 2"]
    with pytest.raises(DataError, match="'a' and 'b' hold lists; expected one"):
        template.texts({"a": ["x"], "b": ["y"]}, "f:1")
    with pytest.raises(DataError, match="'b' holds a list; expected one text"):
        template.text({"a": "x", "b": ["y"]}, "f:1")


def test_a_dot_leads_into_an_object_unless_a_field_is_called_so():
    template = parse_template("{of.answer.en}", "data.target")
    assert template.texts({"of": {"answer": {"en": ["x", "y"]}}}, "f:1") == ["x", "y"]
    assert template.texts({"of": {"answer.en": "x"}}, "f:1") == ["x"]
    assert template.texts({"of.answer.en": "x", "of": {"answer": {"en": "y"}}}, "f:1") == ["x"]
    with pytest.raises(DataError, match=r"'of\.answer\.en'; its fields: of\.answer\.de; did you mean"):
        template.check({"of": {"answer": {"de": "x"}}}, "f:1")
    with pytest.raises(DataError, match=r"has no field 'of\.answer\.en'; its fields: of"):
        template.check({"of": "x"}, "f:1")


# --- sources -------------------------------------------------------------------------------------------


def write_as(path: Path, texts):
    """The texts as records of one field, `text`, in the format of the file's extension."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, [{"text": text} for text in texts])
    if path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts}), path)
    return str(path)


HOSTILE = [
    "007",
    "NA",
    "null",
    "2020-01-01",
    "1.0",
    'say "no", twice',
    "a\u2028b\x0bc",
    "日本 😀",
    "  indented",
    "{text}",
]


def parquet_of(path, names, *columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_arrays([column(pa) for column in columns], names=names), path)
    return str(path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            [lambda pa: pa.array([b"a", b"a\xff"]).view(pa.string())],
            "after 0: 'utf-8' codec can't",
        ),
        ([lambda pa: pa.array([1, 2**60], pa.timestamp("us"))], "records after 0: "),
        ([lambda pa: pa.array(["a"])] * 2, "the column 'x' is there twice"),
    ],
)
def test_a_parquet_file_with_a_value_that_is_none(tmp_path, columns, said):
    path = parquet_of(tmp_path / "a.parquet", ["x"] * len(columns), *columns)
    with pytest.raises(DataError) as error:
        read_records(path, "data.train")
    assert str(error.value).startswith(f"data.train: {path}: ")
    assert said in str(error.value)


@pytest.mark.parametrize("extension", [".jsonl", ".csv", ".txt", ".parquet", ".JSONL"])
def test_every_format_gives_the_text_that_stands_in_the_file(tmp_path, extension):
    path = tmp_path / f"it's a [test] $HOME *?#::1{extension.lower()}"
    write_as(path, HOSTILE)
    records = read_records(str(path.rename(path.with_suffix(extension))), "data.train")
    assert [record["text"] for record in records] == HOSTILE


def test_json_values_keep_their_kind(tmp_path):
    record = {"day": "2020-01-01", "n": 1, "x": 1.5, "yes": True, "refs": ["a", "b"], "more": {"k": None}}
    path = write_jsonl(tmp_path / "a.jsonl", [record, {"day": "no day", "n": 0.5}])
    assert list(read_records(path, "data.train")) == [record, {"day": "no day", "n": 0.5}]


def test_lists_and_globs_keep_the_order_of_their_files_and_formats_mix(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "d.csv"):
        write_as(tmp_path / name, [name])
    sources = [str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl"), str(tmp_path / "d.csv")]
    found = [record["text"] for record in read_records(sources, "data.train")]
    assert found == ["c.txt", "a.jsonl", "b.jsonl", "d.csv"]


def test_blank_lines_are_no_records_and_lines_keep_their_numbers(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \ntwo")
    records = read_records(str(tmp_path / "a.txt"), "data.train")
    assert [record["text"] for record in records] == ["one", "two"]
    assert [records.place(i) for i in range(2)] == [f"{tmp_path}/a.txt:1", f"{tmp_path}/a.txt:4"]


def test_a_csv_row_is_named_by_the_line_it_starts_on(tmp_path):
    (tmp_path / "a.csv").write_text('q,a\n"two\nlines",1\n\nx,2\n')
    records = read_records(str(tmp_path / "a.csv"), "data.train")
    assert [records.place(i)[-2:] for i in range(2)] == [":2", ":5"]
    assert records[0] == {"q": "two\nlines", "a": "1"}


BROKEN = [
    ("a.jsonl", b"", "a.jsonl: the file is empty"),
    ("a.jsonl", b"\n \n", "a.jsonl: no records"),
    ("a.jsonl", b'{"a": 1}\n{oops}\n', "a.jsonl:2: not JSON: "),
    ("a.jsonl", b'{"a": 1}\n\n[1]\n', "a.jsonl:3: found [1]; expected an object"),
    ("a.jsonl", b'[{"a": 1}]\n', 'a.jsonl:1: found [{"a": 1}]; expected an object'),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: not UTF-8: byte 0xff"),
    ("a.txt", b"fine\n\xe4\n", "a.txt:2: not UTF-8: byte 0xe4"),
    ("a.csv", b"a,b\n1,2,3\n", "a.csv:2: 3 cells; the first row names 2 columns"),
    ("a.csv", b"a,b\n1\n", "a.csv:2: 1 cells"),
    ("a.csv", b"a,a\n1,2\n", "a.csv:1: the column 'a' is there twice"),
    ("a.csv", b'a\n"never closed\n', "a.csv:2: not CSV: "),
    ("a.csv", b"a\n\xff\n", "a.csv: not UTF-8: byte 0xff"),
    ("a.csv", b"a,b\n", "a.csv: no records"),
    ("a.parquet", b"PAR0 this is none", "a.parquet: not Parquet: "),
    ("a.json", b"{}", "unknown extension .json; known: .jsonl, .csv, .parquet, .txt"),
    ("a", b"{}", "unknown extension (none)"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN)
def test_a_file_that_cannot_be_used_is_one_line_with_its_place(tmp_path, capfd, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_records(str(tmp_path / name), "data.train")
    message = str(error.value)
    assert message.startswith(f"data.train: {tmp_path}/{name}")
    assert said in message
    assert "\n" not in message
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.jsonl", "data.train: missing.jsonl: no such file"),
        ("missing.json", "no such file"),
        ("no-extension", "no such file"),
        ("*.jsonl", "no file matches"),
        (".", "is a folder; name its files, for example ./*.jsonl"),
        ("there/gone", "no such file"),
        (["org/name", "org/other"], "a list may hold files only; a hub id stands alone"),
        (["one.txt", "./one.txt"], "data.train: one.txt: is named twice; its records would be read twice"),
        (["one.txt", "o*.txt"], "data.train: one.txt: is named twice; its records would be read twice"),
        ("*.txt", "data.train: two.txt: is named twice (also as one.txt); its records would be read twice"),
        ("org/name?splt=train", "unknown parameter splt; known: split, revision, config"),
        ("org/name?split=", "split is empty"),
        ("org/name?revision=main&config=de-en&x=1", "unknown parameter x"),
    ],
)
def test_a_source_that_names_nothing_or_a_file_twice_is_told(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "two.txt").symlink_to("one.txt")
    with pytest.raises(DataError) as error:
        read_records(source, "data.train")
    assert said in str(error.value)


def test_a_hub_id_is_read_from_its_address():
    full = parse_hub_id("org/name-v1.0?split=train[:10%]&revision=main&config=de-en", "data.train", "train")
    assert full == HubId("org/name-v1.0", "train[:10%]", "main", "de-en")
    assert parse_hub_id("org/name?split=train+test", "data.train", "train").split == "train+test"
    usual = {split: parse_hub_id("org/name", "data.x", split).split for split in ("train", "valid", "test")}
    assert usual == {"train": "train", "valid": "validation", "test": "test"}


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, capfd):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # a name that does not resolve takes 20 s
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"data\.train: org/name\?split=train: no such file here, nor can"
    ) as error:
        read_records("org/name", "data.train")
    assert "\n" not in str(error.value)
    assert "".join(capfd.readouterr()) == ""


def test_a_hub_data_set_becomes_records(monkeypatch):
    import datasets

    asked = {}
    held = datasets.Dataset.from_dict({"id": [1, 2], "translation": [{"de": "Hund"}, {"de": "Kind"}]})

    def load(hub_id, **more):
        asked.update(more, id=hub_id)
        return held

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read_records("org/name?config=de-en", "data.valid")
    assert asked == {"id": "org/name", "name": "de-en", "revision": None, "split": "validation"}
    assert list(records) == [{"id": i, "translation": {"de": t}} for i, t in ((1, "Hund"), (2, "Kind"))]
    assert records.place(1) == "org/name?split=validation&config=de-en: record 2"
    monkeypatch.setattr("prefix_ds.data.source.code_fingerprint", lambda *_: "another version of ours")
    assert read_records("org/name?config=de-en", "data.valid").identity() == records.identity()


def test_a_changed_file_is_read_again_and_its_identity_changes(tmp_path):
    path = tmp_path / "a.txt"
    seen = []
    for text in ("old\n", "new\n"):
        path.write_text(text)
        os.utime(path, ns=(0, len(seen)))
        records = read_records(str(path), "data.train")
        seen.append((records[0]["text"], records.identity()))
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "a.txt"
    moved.write_text("new\n")
    assert [text for text, _ in seen] == ["old", "new"]
    assert seen[0][1] != seen[1][1] == read_records(str(moved), "data.train").identity()


# --- examples ------------------------------------------------------------------------------------------


def test_targets_are_what_the_template_says_and_prompts_too(tmp_path, tokenizer):
    records = random_records(np.random.default_rng(0), 40)
    examples = tokenise_split("train", keys(tmp_path, records), tokenizer)
    assert len(examples) == 40
    for (prompt, target), record in zip(tokens_of(examples), records, strict=True):
        assert prompt[0] == tokenizer.bos_token_id
        assert target[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt[1:]) == f"{record['q']} =>"
        assert tokenizer.decode(target[:-1]) == f" {record['a']}"


def test_a_list_in_the_target_makes_one_example_an_entry(tmp_path, tokenizer):
    records = [{"q": "x", "refs": ["one", "two"]}, {"q": "y", "refs": ["three"]}]
    data = keys(tmp_path, RECORDS).model_copy(
        update={"valid": write_jsonl(tmp_path / "v.jsonl", records), "references": " {refs}"}
    )
    examples = tokenise_split("valid", data, tokenizer)
    assert examples.record_of.tolist() == [0, 0, 1]
    assert [tokenizer.decode(t[:-1]) for _, t in tokens_of(examples)] == [" one", " two", " three"]


@pytest.mark.parametrize("behind", [[], ["[SEP]"], ["</s>"]])
def test_special_tokens_behind_a_prompt_are_left_out(behind):
    tokenizer = make_tokenizer(front=["<s>"], behind=behind, bos_token="<s>", eos_token="</s>")
    encoder = encoder_of(tokenizer, None)
    (prompt,) = encoder.prompts(["books </s>"])
    assert tokenizer.decode(prompt.ids) == "<s>books </s>"  # the last one is the user's own text
    assert encoder.targets(["a"])[0][-1] == tokenizer.eos_token_id


def test_an_empty_prompt_starts_with_bos_or_eos_or_is_refused():
    for special, start in (
        ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
        ({"eos_token": "</s>"}, "</s>"),
    ):
        tokenizer = make_tokenizer(**special)
        assert tokenizer.convert_ids_to_tokens(encoder_of(tokenizer, None).prompts([""])[0].ids) == [start]
    bare = encoder_of(make_tokenizer(), None)
    assert bare.prompts(["a"])[0].ids
    with pytest.raises(DataError, match="neither a bos nor an eos token"):
        bare.prompts([""])
    with pytest.raises(DataError, match="nothing is to be learnt"):
        bare.fit(bare.prompts(["a"])[0], bare.targets([""])[0], 10, "drop")


@pytest.mark.parametrize("front", [0, 1])
def test_cutting_keeps_bos_the_prompts_end_and_the_whole_target(front):
    tokenizer = make_tokenizer(front=["<s>"] * front, bos_token="<s>", eos_token="</s>")
    encoder = encoder_of(tokenizer, None)
    read, target = encoder.prompts(["abcdefghij"])[0], [7, 8, 9]
    prompt = read.ids
    for max_length in range(front + 3, 16):
        if max_length - 3 < 1:
            continue
        (example,) = encoder.fit(read, target, max_length, "cut_prompt")
        kept = example.ids[: example.prompt_length]
        assert len(example.ids) == min(max_length, len(prompt) + 3)
        assert example.ids[example.prompt_length :] == target
        assert kept[:front] == prompt[:front]
        assert kept[front:] == prompt[len(prompt) - len(kept) + front :]


LONG = [RECORDS[0], {"q": "a" * 200, "a": "b"}, {"q": "q", "a": "b" * 200}, RECORDS[1]]


@pytest.mark.parametrize(
    "case",
    [
        ("error", LONG, r"train.jsonl:2: \d+ tokens, more than data.max_length 96; raise it, or set"),
        ("cut_prompt", LONG, r"train.jsonl:3: the target has \d+ tokens, which leaves no room"),
        ("drop", LONG[1:3], r"data.train: all 2 examples are longer than data.max_length"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_made_to_fit_is_told(tmp_path, tokenizer, case, workers):
    policy, records, said = case
    data = keys(tmp_path, records, too_long=policy, workers=workers)
    with pytest.raises(DataError, match=said) as error:
        tokenise_split("train", data, tokenizer)
    assert error.value.__cause__ is None


def test_the_report_counts_what_was_cut_and_dropped(tmp_path, tokenizer):
    dropped = tokenise_split("train", keys(tmp_path, LONG, too_long="drop"), tokenizer)
    assert dropped.record_of.tolist() == [0, 3]
    assert dropped.report.dropped == 2
    cut = tokenise_split("train", keys(tmp_path, LONG[:2]), tokenizer).report
    assert (cut.examples, cut.cut, cut.dropped, cut.lengths[-1]) == (2, 1, 0, 96)
    assert cut.line() == (
        f"train: 2 examples, {cut.tokens:,} tokens ({cut.targets:,} targets); lengths 50% {cut.lengths[0]}, "
        "90% 96, 99% 96, longest 96; 1 prompts cut"
    )


def test_split_loses_nothing_and_every_piece_has_a_start(tmp_path, tokenizer):
    text = " ".join(WORDS * 20)
    records = [{"text": text}, {"text": "short"}]
    data = keys(tmp_path, records, prompt="", target="{text}", too_long="split", max_length=32)
    examples = tokenise_split("train", data, tokenizer)
    pieces = tokens_of(examples)
    joined = [token for _, target in pieces[:-1] for token in target]
    assert tokenizer.decode(joined) == text + "</s>"
    assert {prompt for prompt, _ in pieces} == {(tokenizer.bos_token_id,)}
    assert set(examples.lengths[:-2].tolist()) == {32}
    assert examples.report.pieces == len(pieces) - 1 == math.ceil(len(joined) / 31)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"prompt": "{qq}"},
            r"data\.prompt: .*train\.jsonl:1 has no field 'qq'; its fields: q, a; did you mean {q}",
        ),
        ({"target": "{b}"}, r"data\.target: .*train\.jsonl:1 has no field 'b'"),
    ],
)
def test_a_template_that_does_not_fit_the_data_is_told(tmp_path, tokenizer, change, said):
    with pytest.raises(DataError, match=said):
        tokenise_split("train", keys(tmp_path, **change), tokenizer)


def test_a_record_that_disagrees_is_told_with_its_line(tmp_path, tokenizer):
    records = [*RECORDS, {"q": "x", "answer": "y"}]
    with pytest.raises(
        DataError, match=r"data\.target: .*train\.jsonl:24 has no field 'a'; its fields: q, answer"
    ):
        tokenise_split("train", keys(tmp_path, records), tokenizer)


def test_a_split_that_is_not_named_is_told(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.valid: missing"):
        tokenise_split("valid", keys(tmp_path), tokenizer)


def test_tokens_are_made_once_and_again_when_anything_they_depend_on_changes(
    tmp_path, tokenizer, monkeypatch
):
    data = keys(tmp_path)
    before = tokens_of(tokenise_split("train", data, tokenizer))

    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(Recipe, "__call__", refuse)
    again = make_tokenizer(front=["<s>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    again(["what it was used for", "before"], padding=True, truncation=True, max_length=3)
    for same in (data, data.model_copy(update={"packing": False})):
        assert tokens_of(tokenise_split("train", same, again)) == before
    changes = ({"prompt": "{q}"}, {"target": "{a}"}, {"max_length": 95}, {"too_long": "drop"})
    for change in changes:
        with pytest.raises(AssertionError):
            tokenise_split("train", data.model_copy(update=change), tokenizer)
    with pytest.raises(AssertionError):
        tokenise_split("train", data, make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>"))
    write_jsonl(tmp_path / "train.jsonl", RECORDS[1:])
    with pytest.raises(AssertionError):
        tokenise_split("train", data, tokenizer)


def test_workers_change_nothing(tmp_path, tokenizer):
    one = tokenise_split("train", keys(tmp_path, workers=1), tokenizer)
    other = tmp_path / "other"
    other.mkdir()
    two = tokenise_split("train", keys(other, workers=2), tokenizer)
    assert tokens_of(one) == tokens_of(two)


def test_ids_are_mapped_from_disk_not_held(tmp_path, tokenizer):
    examples = tokenise_split("train", keys(tmp_path), tokenizer)
    import pyarrow as pa

    held = pa.total_allocated_bytes()
    view = examples._table.data.column("ids").chunks[0].values
    assert len(view.to_numpy()) == examples.report.tokens
    assert pa.total_allocated_bytes() == held


def examples_of_a_node(train, cache):
    """The rank, how many examples it has made, how many there are, and their tokens."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(cache)
    datasets.disable_progress_bars()
    made, recipe = [], Recipe.__call__
    Recipe.__call__ = lambda self, *a, **k: made.append(1) or recipe(self, *a, **k)
    with dist.joined_world() as world:
        data = DataKeys(train=train, prompt="{q}", target="{a}")
        examples = load_examples("train", data, make_tokenizer(eos_token="</s>"), world)
        return world.rank, len(made), len(examples), int(examples.lengths.sum())


def test_only_the_first_rank_of_a_node_tokenises(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", RECORDS)
    first, second = on_ranks(2, examples_of_a_node, train, tmp_path / "cache")
    assert (first[:3], second[:3]) == ((0, 1, 23), (1, 0, 23))
    assert first[3] == second[3]


# --- order ---------------------------------------------------------------------------------------------


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
    rng = np.random.default_rng(1)
    for _ in range(30):
        n, size, epochs = int(rng.integers(1, 50)), int(rng.integers(1, 60)), int(rng.integers(1, 5))
        order = Order(n, TrainKeys(epochs=epochs, global_batch_size=size, seed=int(rng.integers(9))))
        stream = np.concatenate([order.batch(step) for step in range(order.num_steps)])
        assert len(stream) == epochs * n
        for epoch in stream.reshape(epochs, n):
            assert sorted(epoch.tolist()) == list(range(n))


def test_seeds_and_epochs_have_different_orders_and_a_step_has_no_history():
    def batch(seed, step, n=100):
        return Order(n, TrainKeys(epochs=9, global_batch_size=10, seed=seed)).batch(step).tolist()

    orders = [tuple(batch(seed, 10 * epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    walked = Order(100, TrainKeys(epochs=9, global_batch_size=10))
    assert [walked.batch(step).tolist() for step in range(60)][57] == batch(0, 57)
    assert batch(0, 0) == [
        97,
        14,
        7,
        62,
        90,
        44,
        69,
        98,
        65,
        68,
    ]  # what older versions drew: their runs can go on


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps", "last"),
    [
        (1, None, 8, 2),
        (0.5, None, 4, 3),
        (0.1, None, 1, 3),
        (1e-300, None, 1, 1),
        (2, None, 15, 4),
        (1, 3, 3, 4),
        (1, 0, 0, 0),
        (1, 9, 9, 4),
    ],
)
def test_the_last_step_is_where_the_epochs_end(epochs, max_steps, steps, last):
    order = Order(30, TrainKeys(epochs=epochs, max_steps=max_steps, global_batch_size=4))
    assert order.num_steps == steps
    assert steps == 0 or len(order.batch(steps - 1)) == last
    with pytest.raises(IndexError):
        order.batch(steps)


# --- packing -------------------------------------------------------------------------------------------


def random_lengths(rng):
    max_length = int(rng.integers(2, 300))
    count = int(rng.integers(1, 120))
    return rng.integers(2, max_length + 1, size=count).tolist(), max_length


def test_plans_hold_every_example_once_within_all_limits():
    rng = np.random.default_rng(2)
    for _ in range(150):
        lengths, max_length = random_lengths(rng)
        most = max_length + int(rng.integers(0, 900))
        limits = packing.Limits([None, max_length, most][rng.integers(3)], most)
        shares = packing.plan(lengths, limits, int(rng.integers(1, 9)))
        rows = [row for share in shares for batch in share for row in batch]
        assert sorted(e for row in rows for e in row) == list(range(len(lengths)))
        if limits.row_tokens is None:
            assert all(len(row) == 1 for row in rows)
        else:
            assert all(sum(lengths[e] for e in row) <= limits.row_tokens for row in rows)
        assert len({len(share) for share in shares}) == 1
        for batch in (batch for share in shares for batch in share if batch):
            widest = max(sum(lengths[e] for e in row) for row in batch)
            assert len(batch) * widest <= limits.micro_batch_tokens


def test_ranks_have_nearly_the_same_number_of_tokens():
    rng = np.random.default_rng(3)
    for _ in range(100):
        lengths, max_length = random_lengths(rng)
        shares = packing.plan(lengths, packing.Limits(max_length, 4 * max_length), int(rng.integers(1, 9)))
        rows = [[sum(lengths[e] for e in row) for batch in share for row in batch] for share in shares]
        loads = [sum(each) for each in rows]
        assert max(loads) - min(loads) <= max(max(each, default=0) for each in rows)


def test_a_row_as_long_as_a_micro_batch_needs_no_padding():
    rng = np.random.default_rng(7)
    lengths = rng.integers(10, 200, size=300).tolist()
    for share in packing.plan(lengths, packing.Limits(2048, 2048), 2):
        assert all(len(batch) == 1 for batch in share)
        tokens = [sum(lengths[e] for e in batch[0]) for batch in share]
        assert max(tokens) - min(tokens) < 200
        assert len(tokens) <= -(-sum(tokens) // 2048) + 1


def test_rows_are_as_few_as_best_fit_and_hardly_padded():
    rng = np.random.default_rng(4)
    lengths = rng.integers(10, 200, size=1000).tolist()
    ((batch,),) = packing.plan(lengths, packing.Limits(512, 10**9), 1)
    widths = [sum(lengths[e] for e in row) for row in batch]
    assert len(batch) <= 1.02 * sum(lengths) / 512 + 1
    assert sum(widths) / (len(widths) * max(widths)) > 0.98


# --- batches -------------------------------------------------------------------------------------------


def limits(data, train):
    return packing.Limits(data.max_length if data.packing else None, train.micro_batch_tokens)


def documents(share: Share):
    """The (ids, target positions) of every document with a target, and all of the batch's laws on the way."""
    found = []
    for batch in share.micro_batches:
        B, T = batch.ids_BT.shape
        flat, positions = batch.ids_BT.flatten().tolist(), batch.positions_BT.flatten().tolist()
        targets = dict(zip(batch.target_index_M.tolist(), batch.target_ids_M.tolist(), strict=True))
        assert all(flat[place + 1] == token for place, token in targets.items())
        assert all(positions[row * T] == 0 for row in range(B))
        starts = [*(p for p, position in enumerate(positions) if position == 0), B * T]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end] == list(range(end - start))
            inside = [place + 1 - start for place in range(start, end) if place in targets]
            assert all(0 < place < end - start for place in inside)
            if inside:
                found.append((tuple(flat[start:end]), tuple(inside)))
        assert batch.num_tokens == sum(len(ids) for ids, _ in found) or len(share.micro_batches) > 1
    return found


@pytest.mark.parametrize("packing_on", [True, False])
def test_a_global_batch_is_the_same_at_any_world_size(tmp_path, tokenizer, packing_on):
    data = keys(tmp_path, random_records(np.random.default_rng(5), 60), packing=packing_on)
    examples = tokenise_split("train", data, tokenizer)
    train = TrainKeys(epochs=2, global_batch_size=25, micro_batch_tokens=200)
    expected = [
        (prompt + target, tuple(range(len(prompt), len(prompt + target))))
        for prompt, target in tokens_of(examples)
    ]
    for step in range(Stream(examples, limits(data, train), train, world()).num_steps):
        wanted = Counter(expected[i] for i in Order(60, train).batch(step))
        for size in (1, 2, 4, 8):
            shares = [
                Stream(examples, limits(data, train), train, world(rank, size)).share(step)
                for rank in range(size)
            ]
            assert sum((Counter(documents(share)) for share in shares), Counter()) == wanted
            assert len({len(share.micro_batches) for share in shares}) == 1
            assert {share.global_targets for share in shares} == {
                sum(len(t) * n for (_, t), n in wanted.items())
            }
            assert {share.global_tokens for share in shares} == {
                sum(len(i) * n for (i, _), n in wanted.items())
            }
            tokens = sum(batch.num_tokens for share in shares for batch in share.micro_batches)
            assert tokens == shares[0].global_tokens
            squares = sum(len(i) ** 2 * n for (i, _), n in wanted.items())
            assert {share.global_squares for share in shares} == {squares}


def test_a_share_depends_on_its_step_alone(tmp_path, tokenizer):
    examples = tokenise_split("train", keys(tmp_path), tokenizer)
    train = TrainKeys(epochs=3, global_batch_size=7, micro_batch_tokens=200)
    walked = Stream(examples, limits(keys(tmp_path), train), train, world(1, 2))
    for step in range(walked.num_steps):
        fresh = Stream(examples, limits(keys(tmp_path), train), train, world(1, 2)).share(step)
        for ours, theirs in zip(walked.share(step).micro_batches, fresh.micro_batches, strict=True):
            for name in ("ids_BT", "positions_BT", "target_index_M", "target_ids_M"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))


def same_batches(ours, theirs):
    names = ("ids_BT", "positions_BT", "target_index_M", "target_ids_M")
    return len(ours.micro_batches) == len(theirs.micro_batches) and all(
        torch.equal(getattr(one, name), getattr(other, name))
        for one, other in zip(ours.micro_batches, theirs.micro_batches, strict=True)
        for name in names
    )


def threads_ahead():
    return [thread for thread in threading.enumerate() if thread.name.startswith("shares ahead")]


CPU = torch.device("cpu")


def test_shares_made_ahead_are_those_of_the_stream_in_any_order(tmp_path, tokenizer):
    data, train = keys(tmp_path), TrainKeys(epochs=3)
    stream = Stream(tokenise_split("train", data, tokenizer), limits(data, train), train, world(1, 2))
    stream.order.batch_size = 7
    with Ahead(stream.share, stream.num_steps, CPU) as ahead:
        for step in [*range(stream.num_steps), 4, 5, 6, 2, 2, 9]:
            assert same_batches(ahead.share(step), stream.share(step))
        with pytest.raises(IndexError, match=f"step {stream.num_steps} of"):
            ahead.share(stream.num_steps)
        assert all(map(same_batches, ahead, map(stream.share, range(stream.num_steps))))


def test_the_next_shares_are_made_while_one_is_used_and_no_more_than_that():
    made = []

    def make(step):
        time.sleep(0.1)
        made.append(step)
        return step

    with Ahead(make, 100, CPU) as ahead:
        ahead.share(0)
        time.sleep(1)
        assert made == [0, 1, 2, 3]
        began = time.perf_counter()
        assert [ahead.share(step) for step in (1, 2, 3)] == [1, 2, 3]
        assert time.perf_counter() - began < 0.1


def test_an_error_while_a_share_is_made_is_raised_where_it_is_asked_for():
    error = DataError("a file has shrunk")

    def make(step):
        if step == 2:
            raise error
        return step

    seen = []
    with pytest.raises(DataError) as caught, Ahead(make, 100, CPU) as ahead:
        seen.extend(ahead)
    assert seen == [0, 1]
    assert caught.value is error
    assert not threads_ahead()


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_whatever_ends_a_run_ends_the_thread(error):
    def run():
        with Ahead(lambda step: step, 100, CPU) as ahead:
            ahead.share(0)
            assert threads_ahead()
            raise error

    with pytest.raises(error):
        run()
    assert not threads_ahead()


def test_the_thread_works_with_the_gpu_of_its_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: chosen.append((d, threading.get_ident())))
    for device in (torch.device("cuda", 3), CPU):
        thread = _thread(device)
        working = thread.submit(threading.get_ident).result()
        thread.shutdown()
        assert chosen == ([(device, working)] if device.type == "cuda" else [])
        chosen.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shares_made_ahead_lie_on_the_gpu(tmp_path, tokenizer):
    device, data = torch.device("cuda", 0), keys(tmp_path)
    train = TrainKeys(epochs=3)
    stream = Stream(tokenise_split("train", data, tokenizer), limits(data, train), train, world())
    with Ahead(stream.share, stream.num_steps, device) as ahead:
        for step in range(stream.num_steps):
            here = [batch.to(CPU) for batch in ahead.share(step).micro_batches]
            assert all(batch.ids_BT.is_cuda for batch in ahead.share(step).micro_batches)
            torch.cuda.synchronize()
            assert same_batches(replace(stream.share(step), micro_batches=tuple(here)), stream.share(step))


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    from prefix_ds.data import formats

    def refused(path):
        raise PermissionError(13, "Permission denied", path)
        yield

    monkeypatch.setitem(formats.FORMATS, ".txt", refused)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"data\.train: \[Errno 13\] Permission denied: .*a\.txt"):
        read_records(str(tmp_path / "a.txt"), "data.train")


def test_a_rank_without_work_runs_empty_micro_batches(tmp_path, tokenizer):
    data = keys(tmp_path, RECORDS[:3])
    examples = tokenise_split("train", data, tokenizer)
    train = TrainKeys(epochs=1, global_batch_size=8, micro_batch_tokens=96)
    shares = [Stream(examples, limits(data, train), train, world(rank, 8)).share(0) for rank in range(8)]
    idle = [share for share in shares if not documents(share)]
    assert len(idle) == 5
    for share in idle:
        (batch,) = share.micro_batches
        assert (batch.ids_BT.shape, len(batch.target_ids_M), batch.num_tokens) == ((1, 2), 0, 0)


def test_padding_belongs_to_no_document_and_stands_at_position_0():
    ids = {0: np.array([5, 6, 7], np.int32), 1: np.array([8, 9], np.int32), 2: np.array([4, 3], np.int32)}
    batch = collate([[0, 1], [2]], ids, [2, 1, 1])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.target_index_M.tolist() == [0, 1, 3, 5]
    assert batch.target_ids_M.tolist() == [6, 7, 9, 3]
    assert batch.num_tokens == 7
    assert batch.documents == (Document(0, 0, 3), Document(0, 3, 5), Document(1, 0, 2))


def test_rows_have_few_widths_and_are_hardly_padded():
    widths = [len(collate([[0]], {0: np.zeros(n, np.int32)}, [1]).ids_BT[0]) for n in range(1, 8193)]
    assert all(n <= width < n * (1 + 1 / 32) for n, width in enumerate(widths, start=1))
    assert len(set(widths[2047:4096])) <= 33, "an octave has no more than 33"


def test_a_sweep_shows_every_example_once_at_any_world_size(tmp_path, tokenizer):
    data = keys(tmp_path, random_records(np.random.default_rng(6), 200))
    examples = tokenise_split("train", data, tokenizer)
    train = TrainKeys(micro_batch_tokens=96)
    wanted = Counter(prompt + target for prompt, target in tokens_of(examples))
    for size in (1, 2, 3):
        sweeps = [list(Sweep(examples, limits(data, train), world(rank, size))) for rank in range(size)]
        assert len(sweeps[0]) == len(Sweep(examples, limits(data, train), world(0, size))) > 1
        for shares in zip(*sweeps, strict=True):
            assert len({len(share.micro_batches) for share in shares}) == 1
        seen = Counter(ids for sweep in sweeps for share in sweep for ids, _ in documents(share))
        assert seen == wanted
        assert sum(share.global_targets for share in sweeps[0]) == examples.report.targets


# --- prompts -------------------------------------------------------------------------------------------


def test_prompts_are_what_training_put_in_front_of_the_targets(tmp_path, tokenizer):
    data = keys(tmp_path)
    trained = [prompt for prompt, _ in tokens_of(tokenise_split("train", data, tokenizer))]
    prompts = read_prompts(data.train, "data.test", data, tokenizer, 96, references=True)
    assert [prompt.ids for prompt in prompts] == trained
    assert [prompt.references for prompt in prompts] == [(f" {record['a']}",) for record in RECORDS]
    assert [prompt.record for prompt in prompts] == RECORDS
    assert prompt_of_text(prompts[3].text, data, tokenizer).ids == trained[3]


def test_prompts_need_no_references_and_lose_their_start_when_long(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "in.jsonl", [{"q": "abc" * 50}])
    (prompt,) = read_prompts(path, "--input", keys(tmp_path), tokenizer, 20, references=False)
    assert (len(prompt.ids), prompt.ids[0], prompt.was_cut) == (20, tokenizer.bos_token_id, True)
    assert prompt.references == ()
    with pytest.raises(DataError, match=r"in\.jsonl:1: the prompt is longer than 20 tokens"):
        read_prompts(path, "--input", keys(tmp_path, too_long="error"), tokenizer, 20, references=False)
    with pytest.raises(DataError, match=r"data\.target: .*in\.jsonl:1 has no field 'a'"):
        read_prompts(path, "--input", keys(tmp_path), tokenizer, 20, references=True)


# --- real data -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "e2e").exists(), reason="needs ../shared/data/e2e")
def test_the_e2e_data_set_becomes_examples(tokenizer):
    data = DataKeys.model_validate(
        {
            "train": str(SHARED / "e2e" / "train.jsonl"),
            "valid": str(SHARED / "e2e" / "valid.jsonl"),
            "prompt": "{mr}\n",
            "target": " {ref}",
            "references": " {refs}",
            "max_length": 512,
        }
    )
    train, valid = (tokenise_split(split, data, tokenizer) for split in ("train", "valid"))
    assert (len(train), train.report.cut) == (4298, 0)
    prompts = read_prompts(data.valid, "data.valid", data, tokenizer, 512, references=True)
    assert len(prompts) == 47
    assert sum(len(prompt.references) for prompt in prompts) == len(valid) > 300


def test_load_examples_is_the_same_in_a_group_of_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    data = keys(tmp_path)
    with dist.joined_world() as alone:
        loaded = load_examples("train", data, tokenizer, alone)
    assert tokens_of(loaded) == tokens_of(tokenise_split("train", data, tokenizer))


def test_a_world_of_one_can_be_joined_again_after_an_error(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for _ in range(2):
        with pytest.raises(DataError, match="a mistake"), dist.joined_world():
            raise DataError("a mistake")


def test_a_token_that_the_base_has_not_is_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    data, tokenizer = DataKeys(train=str(path), prompt="{q}", target="{a}"), make_tokenizer()
    examples = tokenise_split("train", data, tokenizer)
    largest = max(max(ids) for ids in examples.ids(range(len(examples))))
    assert largest < len(tokenizer)
    check_ids([examples], tokenizer, largest + 1)
    with pytest.raises(
        DataError, match=rf"^data\.train: has token {largest}, and the base has {largest}: is"
    ):
        check_ids([examples], tokenizer, largest)


def examples_of_two_machines(folder):
    with dist.joined_world() as world:
        path = write_jsonl(folder / f"{world.rank}.jsonl", RECORDS[world.rank :])
        data = DataKeys(train=str(path), prompt="{q}", target="{a}")
        with pytest.raises(DataError) as caught:
            load_examples("train", data, make_tokenizer(), replace(world, local_rank=0))
        return str(caught.value)


def test_machines_with_other_data_do_not_train_together(tmp_path):
    for line in on_ranks(2, examples_of_two_machines, tmp_path):
        assert line.startswith(f"data.train: {socket.gethostname()}: other examples than on ")
