"""Writing under ZeRO-3: the base in shards, gathered layer by layer or once, writes what it writes whole.

Token for token, greedy, in float32, on two ranks; families that differ in what a cache and a gathered base
must get right: shared heads, a window shorter than the text, soft caps, latent attention, Conv1D, experts.
"""

import json

import pytest
import torch

from prefix_ds.config import GenerateKeys, config_text, parse_config
from prefix_ds.data.prompts import prompt_of_text
from prefix_ds.dist import joined_world
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.engine.whole import bytes_to_gather, whole, whole_if_alone
from prefix_ds.errors import ConfigError
from prefix_ds.loading import load_base
from prefix_ds.model import PrefixLM, attention, steps
from prefix_ds.opening import open_trained
from prefix_ds.plan import writing
from prefix_ds.prefix import random_table
from prefix_ds.run_folder import open_run
from prefix_ds.writing import write_outputs
from tests.laws import seen_steps, tokens
from tests.planned import counted_gathers
from tests.ranks import command, on_ranks
from tests.resident import MIB, give_back_what_is_free, resident, settle
from tests.tiny_models import tiny, tiny_config
from tests.workshop import base_folder, records, write_jsonl

torch.set_num_threads(1)

WINDOW = 6  # shorter than the texts
FAMILIES = ["llama", "mistral", "gemma2", "deepseek_v3", "gpt2", "qwen3_moe"]
LENGTHS, NEW, FRONT = (9, 3, 14, 6), 10, 5


def prompts():
    return [tokens(length, seed=length).tolist() for length in LENGTHS]


def table_of(lm):
    return random_table(lm.slots, FRONT, std=1.0, seed=1)


def written(lm, ends=(), **options):
    """Greedy answers behind a random prefix."""
    told = {"max_new_tokens": NEW, "eos_ids": ends, "pad_id": 0} | options
    return lm.generate(prompts(), table_of(lm), lm.slots, **told)


def base_in_shards(folder, world, *words):
    """Everything of it is in shards."""
    run = f"model: {{name: {folder}, dtype: float32}}\nprefix: {{init: random, length: 3}}"
    config = parse_config(run, words)
    settings = deepspeed_settings(config, world.size)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    shards = sharded(in_shards(load_base(config.model), settings), settings)
    return shards, PrefixLM(shards.module, device=world.device)


def both_ways(folder, families, ends, words):
    """Of each family: answers gathered layer by layer, answers gathered once, what was gathered for each."""
    found = {}
    with joined_world() as world:
        for family in families:
            shards, lm = base_in_shards(folder / family, world, *words)
            synced = {"synced": world.size > 1}
            with counted_gathers() as first:
                layers = written(lm, ends[family], **synced)
            with counted_gathers() as second, whole(shards):
                num_gathered = len(second)
                once = written(lm, ends[family])
            is_empty = all(p.numel() == 0 for p in shards.module.parameters())
            with counted_gathers() as third:
                again = written(lm, ends[family], **synced)
            assert is_empty
            assert again == layers
            calls = num_gathered, len(second), len(list(shards.module.parameters()))
            found[family] = layers, once, calls, (sum(first), sum(second), sum(third))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny bases, what they write whole, and tokens that end some answers early."""
    folder, expected, ends = tmp_path_factory.mktemp("bases"), {}, {}
    for family in FAMILIES:
        base = tiny(family, WINDOW)
        base.save_pretrained(folder / family)
        lm = PrefixLM(base.float())
        answers = written(lm)
        ends[family] = [answers[0][4], answers[1][2]]
        expected[family] = written(lm, ends[family])
        assert len({len(answer) for answer in expected[family]}) > 1, "some end early"
    return folder, expected, ends


def test_in_shards_and_gathered_once_a_base_writes_what_it_writes_whole(folders):
    folder, expected, ends = folders
    for found in on_ranks(2, both_ways, folder, FAMILIES, ends, ()):
        for family in FAMILIES:
            layers, once, (before, in_all, num_parameters), (every_token, whole_base, again) = found[family]
            assert layers == expected[family], family
            assert once == expected[family], family
            assert before == in_all == num_parameters, (
                "each parameter is gathered once, and none while writing"
            )
            assert every_token > 5 * whole_base
            assert again > 5 * whole_base, "shards again, gathered by DeepSpeed's hooks"


@pytest.mark.parametrize("size", [1, 2])
def test_in_8_bits_too(folders, size):
    folder, _, ends = folders
    families = ["llama", "gpt2", "qwen3_moe"]
    for found in on_ranks(size, both_ways, folder, families, ends, ("model.bits=8",)):
        for family in families:
            layers, once, (before, in_all, num_parameters), _ = found[family]
            assert layers == once
            assert before == in_all == (0 if size == 1 else num_parameters)


SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8192}


def memory_around(folder):
    """MiB of this rank before, inside and after, and those of the whole base."""
    settle()
    with joined_world() as world:
        shards, lm = base_in_shards(folder, world)
        written(lm, synced=True)
        seen = []
        for _ in range(2):
            give_back_what_is_free()
            seen.append(resident())
            with whole(shards):
                written(lm)
                seen.append(resident())
            give_back_what_is_free()
            seen.append(resident())
        return seen, bytes_to_gather(shards, world.device) / MIB


def test_memory_is_let_go_of_afterwards(tmp_path):
    base_folder(tmp_path / "base", **SIZES)
    for seen, size in on_ranks(2, memory_around, tmp_path / "base"):
        for before, inside, after in (seen[:3], seen[3:]):
            assert inside - before == pytest.approx(size, rel=0.1, abs=4)
            assert after - before < size / 10


def test_a_rank_alone_copies_nothing(tmp_path):
    base_folder(tmp_path / "base", **SIZES)
    (found,) = on_ranks(1, pointers_while_whole, tmp_path / "base")
    assert found == (True, 0)


def pointers_while_whole(folder):
    with joined_world() as world:
        shards, _ = base_in_shards(folder, world)
        with whole(shards):
            same = [p.data_ptr() == p.ds_tensor.data_ptr() for p in shards.module.parameters()]
        return all(same), bytes_to_gather(shards, world.device)


def test_a_rank_alone_needs_no_hooks_to_train(tmp_path):
    base_folder(tmp_path / "base")
    ((outside, alone, inner, after),) = on_ranks(1, hooks_alone, tmp_path / "base")
    assert alone == inner < outside == after


def hooks_alone(folder):
    with joined_world() as world:
        shards, _ = base_in_shards(folder, world)
        counts = [num_hooks(shards)]
        with whole_if_alone(shards, world):
            counts.append(num_hooks(shards))
            with whole(shards):  # to write something meanwhile
                pass
            counts.append(num_hooks(shards))
        return (*counts, num_hooks(shards))


def test_of_two_ranks_each_needs_its_hooks(tmp_path):
    base_folder(tmp_path / "base")
    for outside, alone, *_ in on_ranks(2, hooks_alone, tmp_path / "base"):
        assert alone == outside


def test_hooks_are_where_they_were(tmp_path):
    base_folder(tmp_path / "base")
    ((before, inside, after),) = on_ranks(1, hooks_around, tmp_path / "base")
    assert inside < before == after


def hooks_around(folder):
    with joined_world() as world:
        shards, _ = base_in_shards(folder, world)
        before = num_hooks(shards)
        with whole(shards):
            inside = num_hooks(shards)
        return before, inside, num_hooks(shards)


def num_hooks(shards):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in shards.module.modules())


def rows_of_steps(lm, ends):
    """The rows of every forward pass, and the answers."""
    sizes = []
    hook = lm.base.register_forward_hook(lambda _, __, output: sizes.append(len(output.logits)))
    answers = written(lm, ends)
    hook.remove()
    return sizes, answers


@pytest.mark.parametrize("family", ["llama", "bart", "mistral", "gemma2", "gemma3n_text", "deepseek_v3"])
def test_rows_that_end_leave_and_the_others_write_on(family):
    lm = PrefixLM(tiny(family, WINDOW))
    answers = written(lm)
    ends = [answers[0][4], answers[1][2]]
    sizes, found = rows_of_steps(lm, ends)
    lengths = [len(answer) for answer in found]
    assert found == [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
    assert (
        sizes == [sum(step <= length for length in lengths) for step in range(max(lengths) + 1)][: len(sizes)]
    )
    assert len(sizes) == min(NEW, max(lengths) + 1)


def test_rows_with_a_recurrent_state_stay():
    lm = PrefixLM(tiny("falcon_h1"))
    answers = written(lm)
    sizes, found = rows_of_steps(lm, [answers[0][4]])
    assert set(sizes) == {len(LENGTHS)}
    assert found[0] == answers[0][: answers[0].index(answers[0][4])]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma2"])
def test_a_prefix_in_front_of_the_cache_gives_the_same_numbers_as_a_copy(family, monkeypatch):
    lm = PrefixLM(tiny(family, WINDOW).float())
    views, real = [], attention.joined_in_place

    def seen(front, text):
        views.append(real(front, text))
        return views[-1]

    monkeypatch.setattr(attention, "joined_in_place", seen)
    with seen_steps(lm) as with_room:
        answers = written(lm)
    assert any(view is not None for view in views), "the fast path is taken"
    if family != "gemma2":  # whose every other layer has a window
        assert all(view is not None for view in views)
    monkeypatch.setattr(steps, "make_room", lambda *_: None)
    with seen_steps(lm) as copied:
        assert written(lm) == answers
    for mine, theirs in zip(with_room, copied, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_cache_that_grows_keeps_what_is_in_it():
    lm = PrefixLM(tiny("llama").float())
    told = {"max_new_tokens": 90}  # of positions behind the front, 64 are there at first
    alone = [
        lm.generate([prompt], table_of(lm), lm.slots, eos_ids=[], pad_id=0, **told)[0] for prompt in prompts()
    ]
    assert written(lm, **told) == alone


def test_what_is_drawn_for_a_prompt_depends_on_nothing_else():
    lm = PrefixLM(tiny("llama"))
    told = {"max_new_tokens": NEW, "eos_ids": [], "pad_id": 0, "temperature": 2.0, "top_p": 0.95}
    together = lm.generate(prompts(), table_of(lm), lm.slots, seeds=[7, 8, 9, 10], **told)
    (alone,) = lm.generate(prompts()[2:3], table_of(lm), lm.slots, seeds=[9], **told)
    assert together[2] == alone


class Left:
    """A base that is written with, where so many bytes are left."""

    def __init__(self, left, once=1000, position=10, row=100):
        self.footprint = writing.Footprint(left, once, once // 4, position, row, square=0)

    def is_whole(self, wish, longest=20, is_on_disk=False):
        fits = self.footprint.rows(longest, is_whole=True) > 0
        return writing._is_whole(wish, is_on_disk, fits, self.footprint)

    def batches(self, is_whole, lengths=(5, 40, 10, 15), beams=1):
        manner = writing.Manner(is_whole, self.footprint, beams, 3)
        return writing.batches_of(lengths, 10, manner)


def test_the_base_is_gathered_once_where_it_fits_with_a_row():
    assert Left(1300).is_whole("auto")
    assert not Left(1299).is_whole("auto")
    assert not Left(10**9).is_whole("each_layer")
    assert not Left(10**9).is_whole("auto", is_on_disk=True)
    with pytest.raises(ConfigError, match=r"generate\.gather: once: the whole base takes"):
        Left(1299).is_whole("once")
    with pytest.raises(ConfigError, match="lies on a disk"):
        Left(10**9).is_whole("once", is_on_disk=True)


def test_batches_are_split_where_keys_and_values_do_not_fit():
    assert Left(10**9).batches(is_whole=True) == [[1, 3, 2], [0]]
    assert Left(1000 + 2 * 350).batches(is_whole=True) == [[1], [3, 2], [0]]
    assert Left(250 + 2 * 600).batches(is_whole=False, beams=2) == [[1], [3], [2, 0]]
    with pytest.raises(ConfigError, match=r"generate\.max_new_tokens: .*\(50 positions, 2 beams\)"):
        Left(1000 + 600).batches(is_whole=True, beams=2)


def test_products_that_are_written_down_count_with_the_square_of_a_prompt():
    told = {"left": 10**6, "once": 0, "each_layer": 0, "position": 10, "row": 100}
    assert writing.Footprint(**told, square=0).rows(100, is_whole=True) == 10**6 // 1100
    assert writing.Footprint(**told, square=3).rows(100, is_whole=True) == 10**6 // 31100
    assert PrefixLM(tiny("llama")).num_products == 0
    assert PrefixLM(tiny("gpt_oss")).num_products == tiny_config("gpt_oss").num_attention_heads


@pytest.fixture(scope="module")
def run(place):
    """A trained run."""
    (ended,) = command("train", place / "run.yaml")
    assert ended.code == 0, ended.err
    return place / "run"


@pytest.mark.parametrize("words", [(), ("generate.temperature=2.0",), ("generate.num_beams=2",)])
def test_ways_of_gathering_write_the_same(run, tmp_path, words):
    asked = write_jsonl(tmp_path / "in.jsonl", [{"source": r["source"]} for r in records(9, seed=5)])
    texts = {}
    for way in ("once", "each_layer"):
        keys = [*words, f"generate.gather={way}", "generate.max_new_tokens=6", "generate.batch_size=2"]
        output = tmp_path / f"{way}.jsonl"
        for ended in command("generate", run, *keys, "--input", asked, "--output", output, size=2):
            assert ended.code == 0, ended.err
        texts[way] = output.read_text()
    assert texts["once"] == texts["each_layer"]


def test_auto_gathers_once_where_there_is_room(run, tmp_path):
    """Bytes are counted at the collective calls of ranks that write, beside those of the base."""
    settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    for way, is_once in (("auto", True), ("once", True), ("each_layer", False)):
        for gathered, whole_base in on_ranks(2, bytes_of_writing, run, tmp_path / "zero.json", way):
            assert (gathered < 1.1 * whole_base) == is_once
            assert gathered > 0.9 * whole_base


def bytes_of_writing(run, settings, way):
    with joined_world() as world:
        folder, config = open_run(run)
        opened = open_trained(
            folder, parse_config(config_text(config), [f"engine.deepspeed={settings}"]), world
        )
        asked = [
            prompt_of_text(text, config.data, opened.tokenizer) for text in ("the cat =", "a dog sees =")
        ]
        with counted_gathers() as gathers:
            write_outputs(opened, asked, GenerateKeys(gather=way, max_new_tokens=8), world)
        return sum(gathers), bytes_to_gather(opened.sharded, world.device)
