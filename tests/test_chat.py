"""Conversations in the base's own chat template: the ids of the library's own way, and what is refused."""

import json
import re
import shlex

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


def prompt_in(room, folder, words, turns):
    """The prompt of a conversation in an example that has so much room for it."""
    answer = [*words(turns[-1]["content"], add_special_tokens=False).input_ids, words.eos_token_id]
    data = data_of(folder, [turns], f"data.max_length={room + len(answer)}")
    ((prompt, target),) = examples_of(data, words)
    assert target == answer
    return prompt


def library_ids(words, turns):
    return words.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def test_a_long_conversation_loses_its_oldest_turns_and_stays_a_conversation(tmp_path, words):
    contents = ["the cat", "sees the dog", "the bird", "sleeps", "under the tree", "the red house", "big"]
    turns = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 4, [*contents, "blue"], strict=True)
    ]
    left = [library_ids(words, turns[start:-1]) for start in (0, 2, 4, 6)]
    for room in range(len(left[-1]), len(left[0]) + 1):
        assert prompt_in(room, tmp_path, words, turns) == next(ids for ids in left if len(ids) <= room)


@pytest.mark.parametrize("roles", [["system"], []])
def test_the_system_turn_stays_and_a_long_last_question_loses_its_beginning(tmp_path, roles):
    words = chatting(CHATML)
    first = [{"role": role, "content": "the big dog"} for role in roles]
    older = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sleeps " * 9}]
    last = {"role": "user", "content": "the bird sees the blue house under the red tree"}
    least, whole = (
        len(library_ids(words, [*first, {**last, "content": text}])) for text in ("e", last["content"])
    )
    for room in range(least, whole + 9):
        prompt = words.decode(prompt_in(room, tmp_path, words, [*first, *older, last, TURNS[0][1]]))
        content = prompt.rpartition("user\n")[2].partition("<|im_end|>")[0]
        cut = {**last, "content": content}
        assert prompt == words.apply_chat_template([*first, cut], add_generation_prompt=True, tokenize=False)
        assert last["content"].endswith(content)
        assert (
            content == last["content"] if room >= whole else len(library_ids(words, [*first, cut])) > room - 5
        )


def test_turns_behind_the_last_question_stay(tmp_path):
    words = chatting(CHATML)
    tools = [{"role": "assistant", "content": "sees"}, {"role": "tool", "content": "the tree"}]
    turns = [*TURNS[0], {"role": "user", "content": "the red house"}, *tools, TURNS[0][1]]
    room = len(library_ids(words, turns[2:-1]))
    assert prompt_in(room, tmp_path, words, turns) == library_ids(words, turns[2:-1])
    (prompt,) = {words.decode(prompt_in(room - 2, tmp_path, words, turns))}
    assert prompt.endswith(
        "house<|im_end|>\n" + words.apply_chat_template(tools, add_generation_prompt=True, tokenize=False)[3:]
    )


def test_what_a_user_says_is_cut_alike_wherever_it_comes_from(tmp_path, words):
    said = "the bird sees the blue house under the red tree"
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"q": said, "a": "the red dog"}])
    target = [*words("the red dog", add_special_tokens=False).input_ids, words.eos_token_id]
    shorter = [library_ids(words, [{"role": "user", "content": said[n:]}]) for n in range(len(said))]
    room = len(shorter[-1]) + 4
    data = data_of(tmp_path, TURNS).model_copy(
        update={"messages": None, "chat": True, "train": str(pairs), "prompt": "{q}", "target": "{a}"}
    )
    in_training = data.model_copy(update={"max_length": room + len(target)})
    ((expected, answer),) = examples_of(in_training, words)
    assert (expected in shorter, answer) == (True, target)
    assert room - 3 < len(expected) <= room
    in_use = data.model_copy(update={"max_length": room})
    (prompt,) = read_prompts(str(pairs), "data.test", in_use, words, room, references=True)
    for found in (prompt, prompt_of_text(said, in_use, words)):
        assert (list(found.ids), found.was_cut) == (expected, True)


def test_a_conversation_that_cannot_be_cut_is_told_with_its_place(tmp_path):
    words = chatting(CHATML)
    turns = [{"role": "system", "content": "the red dog " * 20}, *TURNS[0]]
    with pytest.raises(DataError, match=r"train.jsonl:2: .*no room for the system turn and the user's last"):
        tokenise_split("train", data_of(tmp_path, [TURNS[0], turns], "data.max_length=40"), words)
    data = data_of(tmp_path, [TURNS[0], turns])
    with pytest.raises(DataError, match=r"train.jsonl:2: .*no room for the system turn and the user's last"):
        read_prompts(data.train, "data.test", data, words, 40, references=True)


def test_a_thousand_turns_are_not_written_a_thousand_times(tmp_path, monkeypatch):
    words, written = chatting(CHATML), []
    turns = [turn for _ in range(500) for turn in TURNS[0]]
    ours = words.apply_chat_template

    def counted(turns, **told):
        written.append(len(turns))
        return ours(turns, **told)

    monkeypatch.setattr(words, "apply_chat_template", counted)
    prompt_in(60, tmp_path, words, turns)
    assert sum(written) < 3 * len(turns)


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
    with pytest.raises(DataError, match=r"has no field 'turns\.all'; its fields: turns"):
        tokenise_split("train", data_of(tmp_path, TURNS, "data.messages=turns.all"), words)
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


def test_the_exported_card_says_how_to_import_it_as_a_chat(place, tmp_path):
    (ended,) = command("export", place / "run", tmp_path / "adapter")
    assert ended.code == 0, ended.err
    line = re.search(
        "`(prefix-ds import THIS_FOLDER RUN[^`]*)`", (tmp_path / "adapter" / "README.md").read_text()
    )[1]
    names = {"THIS_FOLDER": tmp_path / "adapter", "RUN": tmp_path / "back"}
    words = [names.get(word, word) for word in shlex.split(line)[1:]]
    (ended,) = command(*words, "model.dtype=float32")
    assert ended.code == 0, ended.err
    (ended,) = command("generate", tmp_path / "back", "--prompt", "the dog sees the bird")
    assert ended.out == "the cat\n"


def test_a_base_that_was_never_taught_to_chat(tmp_path):
    (tmp_path / "run.yaml").write_text(config_text(run_config(tmp_path, "data.chat=true")))
    said = "data.chat: the tokenizer has no chat template; take a base that was taught to chat"
    assert refusal("train", tmp_path / "run.yaml") == said
    (checked,) = command("check", tmp_path / "run.yaml")
    assert (checked.code, said in checked.err) == (2, True)
