"""Conversations in the base's own chat template: the ids of the library's own way, and what is refused."""

import json
import re

import pytest
from tokenizers import AddedToken

from prefix_ds.config import config_text, parse_config
from prefix_ds.data.chat import chat_of, end_with_turns
from prefix_ds.data.examples import tokenise_split
from prefix_ds.data.prompts import prompt_of_text, read_prompts
from prefix_ds.errors import ConfigError, DataError
from tests.ranks import command
from tests.refusals import refusal
from tests.snippets import outcome, snippet_of
from tests.workshop import base_folder, records, run_config, tokenizer, write_jsonl

CHATML = """\
{{ bos_token }}{% for turn in messages %}<|im_start|>{{ turn['role'] }}
{{ turn['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if quick %}(quick){% endif %}{% endif %}"""
NO_SYSTEM = """\
{% for turn in messages %}
{% if turn['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
<|im_start|>{{ turn['role'] }}: {{ turn['content'] }}{{ eos_token if turn['role'] == 'assistant' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant: {% endif %}"""
TEMPLATES = {"its end is no end of text": CHATML, "system turns are refused": NO_SYSTEM}
TURNS = [
    [{"role": "user", "content": "the cat sees"}, {"role": "assistant", "content": "the red dog"}],
    [
        {"role": "user", "content": "the bird"},
        {"role": "assistant", "content": "sleeps"},
        {"role": "user", "content": "under"},
        {"role": "assistant", "content": "the tree in the garden"},
    ],
]


@pytest.fixture(params=TEMPLATES)
def words(request):
    return chatting(TEMPLATES[request.param])


def chatting(template):
    made = tokenizer()
    made.add_special_tokens({"bos_token": "<s>"})
    made.add_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    made.chat_template = template
    return made


def data_of(folder, turns, *more):
    """Keys for records that hold these conversations."""
    train = write_jsonl(folder / "train.jsonl", [{"turns": one} for one in turns])
    text = f"model: {{name: none}}\nprefix: {{text: x}}\ndata: {{train: {train}, messages: turns}}"
    return parse_config(text, more).data


def examples_of(data, words):
    examples = tokenise_split("train", data, words)
    ids = [one.tolist() for one in examples.ids(range(len(examples)))]
    return [(one[:-n], one[-n:]) for one, n in zip(ids, examples.num_targets, strict=True)]


def test_prompts_are_those_of_the_library_and_answers_end_with_the_turn(tmp_path, words):
    data = data_of(tmp_path, TURNS)
    end = chat_of(words, data).end_id
    found = examples_of(data, end_with_turns(words, data))
    for turns, (prompt, target) in zip(TURNS, found, strict=True):
        assert prompt == words.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        assert target == [*words(turns[-1]["content"], add_special_tokens=False).input_ids, end]
    is_chatml = "<|im_end|>" in words.chat_template
    assert words.convert_ids_to_tokens(end) == ("<|im_end|>" if is_chatml else "<|endoftext|>")
    assert [prompt.count(words.bos_token_id) for prompt, _ in found] == [int(is_chatml)] * 2


def test_a_prompt_and_a_target_are_two_turns(tmp_path, words):
    spoken = examples_of(data_of(tmp_path, TURNS[:1]), words)
    pair = write_jsonl(tmp_path / "pairs.jsonl", [{"q": "the cat sees", "a": "the red dog"}])
    data = data_of(tmp_path, TURNS).model_copy(
        update={"messages": None, "chat": True, "train": str(pair), "prompt": "{q}", "target": "{a}"}
    )
    assert examples_of(data, words) == spoken
    (prompt,) = read_prompts(data.train, "data.test", data, words, 64, references=True)
    assert (list(prompt.ids), prompt.references) == (spoken[0][0], ("the red dog",))
    assert list(prompt_of_text("the cat sees", data, words).ids) == spoken[0][0]


def test_what_the_template_is_told_is_part_of_the_ids(tmp_path):
    words = chatting(CHATML)
    quick = examples_of(data_of(tmp_path, TURNS, "data.chat_options={quick: true}"), words)
    slow = examples_of(data_of(tmp_path, TURNS), words)
    assert words.decode(quick[0][0]) == words.decode(slow[0][0]) + "(quick)"


def test_a_long_conversation_loses_what_comes_after_its_opening(tmp_path, words):
    data = data_of(tmp_path, TURNS)
    opening = words(chat_of(words, data).opening, add_special_tokens=False).input_ids
    whole, target = examples_of(data, words)[1]
    room = len(target) + len(opening) + 5
    cut, same = examples_of(data_of(tmp_path, TURNS, f"data.max_length={room}"), words)[1]
    assert (cut, same) == ([*whole[: len(opening)], *whole[-5:]], target)


def test_a_conversation_that_waits_for_an_answer_is_a_prompt(tmp_path, words):
    data = data_of(tmp_path, TURNS)
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"turns": TURNS[1]}, {"turns": TURNS[1][:3]}])
    whole, open_one = read_prompts(str(asked), "--input", data, words, 64, references=False)
    assert whole.ids == open_one.ids
    with pytest.raises(DataError, match=r":2: .*the last turn is of 'user'; expected 'assistant'"):
        read_prompts(str(asked), "data.test", data, words, 64, references=True)


def test_a_template_that_asks_for_the_day_is_told_one_day(tmp_path):
    dated = chatting("{{ strftime_now('%d %b %Y') }} / {{ strftime_now(\"%Y\") }}\n" + CHATML)
    fixed = chatting("01 Jan 2026 / 2026\n" + CHATML)
    data = data_of(tmp_path, TURNS)
    assert examples_of(data, dated) == examples_of(data, fixed)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ("text", "expected a list of turns"),
        (TURNS[0][:1], "the last turn is of 'user'; expected 'assistant', to learn"),
        (TURNS[1][:3], "the last turn is of 'user'; expected 'assistant', to learn"),
        ([TURNS[0][0], "text"], "turn 2: expected an object with texts `role` and `content`"),
        (
            [{"role": "user", "content": [{"text": "a"}]}, TURNS[0][1]],
            "turn 1: expected an object with texts",
        ),
        ([{"role": "user", "content": "\ud800"}, TURNS[0][1]], "turn 1: expected an object with texts"),
        (
            [{"role": "system", "content": "a"}, *TURNS[0]],
            "the chat template cannot write it: System role not",
        ),
    ],
)
def test_what_is_no_conversation_is_told_with_its_place(tmp_path, turns, said):
    words = chatting(NO_SYSTEM)
    data = data_of(tmp_path, [TURNS[0], turns])
    with pytest.raises(DataError) as caught:
        tokenise_split("train", data, words)
    (line,) = str(caught.value).splitlines()
    assert f"{tmp_path}/train.jsonl:2" in line
    assert said in line


def test_a_field_that_is_missing_and_keys_that_contradict(tmp_path):
    words = chatting(NO_SYSTEM)
    with pytest.raises(
        DataError, match=r"data.messages: .* has no field 'turnz'; its fields: turns; did you mean"
    ):
        tokenise_split("train", data_of(tmp_path, TURNS, "data.messages=turnz"), words)
    for word, said in [
        ("data.prompt=a", "data.prompt: the turns are in data.messages"),
        ("data.references=a", "data.references: the turns are in data.messages"),
        ("data.too_long=split", "data.chat: is for prompts and answers"),
    ]:
        with pytest.raises(ConfigError, match=said):
            data_of(tmp_path, TURNS, word)
    with pytest.raises(ConfigError, match=r"data.chat_options: needs data.chat"):
        data_of(tmp_path, TURNS, "data.messages=null", "data.chat_options={quick: true}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base that was taught to chat, and a run file of it."""
    folder, words = tmp_path_factory.mktemp("place"), chatting(CHATML)
    base_folder(folder / "base", vocab_size=len(words))
    words.save_pretrained(folder / "base")
    rows = [
        {"turns": [{"role": "user", "content": r["source"]}, {"role": "assistant", "content": "the cat"}]}
        for r in records(40)
    ]
    write_jsonl(folder / "chats.jsonl", rows)
    keys = [f"data.{split}={folder}/chats.jsonl" for split in ("train", "valid", "test")]
    more = ["data.messages=turns", "data.prompt=", "data.target={text}", "train.max_steps=30", "train.lr=0.3"]
    config = run_config(
        folder,
        *keys,
        *more,
        "run.valid_every=0",
        "evaluate.scores=[exact_match]",
        "generate.max_new_tokens=8",
    )
    (folder / "run.yaml").write_text(config_text(config))
    return folder


def test_a_run_learns_to_answer_and_to_stop(place):
    for words in (["check"], ["train"]):
        (ended,) = command(*words, place / "run.yaml")
        assert ended.code == 0, ended.err
    (ended,) = command("generate", place / "run", "--prompt", "the dog sees the bird")
    assert ended.out == "the cat\n", "it stops where the turn ends"
    (ended,) = command("evaluate", place / "run")
    assert ended.code == 0, ended.err
    found = json.loads((place / "run" / "evaluate" / "test.json").read_text())
    assert found["scores"]["exact_match"]["value"] == 100


def test_the_exported_card_asks_as_training_did(place, tmp_path):
    (ended,) = command("export", place / "run", tmp_path / "adapter")
    assert ended.code == 0, ended.err
    code = snippet_of((tmp_path / "adapter" / "README.md").read_text())
    code, count = re.subn('"content": ".*?"', '"content": "the dog sees the bird"', code)
    assert count == 1
    assert outcome(code, tmp_path / "adapter") == "the cat\n"


def test_a_base_that_was_never_taught_to_chat(tmp_path):
    (tmp_path / "run.yaml").write_text(config_text(run_config(tmp_path, "data.chat=true")))
    said = "data.chat: the tokenizer has no chat template; take a base that was taught to chat"
    assert refusal("train", tmp_path / "run.yaml") == said
    (checked,) = command("check", tmp_path / "run.yaml")
    assert (checked.code, said in checked.err) == (2, True)
