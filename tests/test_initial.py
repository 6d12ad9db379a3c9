"""What a prefix starts from."""

import pytest
import torch

from prefix_ds.config import parse_config
from prefix_ds.dist import joined_world
from prefix_ds.errors import ConfigError
from prefix_ds.initial import initial_prefix, vocabulary_tokens
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import keys_values_of, table_of
from tests.ranks import on_ranks
from tests.tiny_models import tiny
from tests.workshop import tokenizer


def starts():
    """Of seeds 3, 3 and 4, and what the text of the first one's tokens gives."""
    config = parse_config("model: {name: none}\nprefix: {init: vocabulary, length: 6}")
    lm = PrefixLM(tiny("llama"))
    tokens = vocabulary_tokens(tokenizer(), 6, 3, lm.vocab_size)
    with joined_world() as world:
        tables = [initial_prefix(lm, config.prefix, tokenizer(), n, world.device).table() for n in (3, 3, 4)]
    tables.append(table_of(lm.keys_values_of(torch.tensor([tokens]), lm.slots)))
    return [table.detach().numpy() for table in tables]


def test_a_start_from_the_vocabulary_is_a_text_of_tokens_that_the_seed_draws():
    ((first, again, other, text),) = on_ranks(1, starts)
    assert len(first) == 6
    assert (first == again).all()
    assert (first == text).all()
    assert (first != other).any()


def noise():
    """Of a start that is given no size, and of one that is, with the vocabulary's, and where slots begin."""
    lm = PrefixLM(tiny("deepseek_v3"))  # whose values are narrower than its keys
    for number, module in enumerate(m for m in lm.base.modules() if hasattr(m, "o_proj")):
        module.kv_b_proj.weight *= 10.0**number
    with joined_world() as world:
        starts = [
            initial_prefix(
                lm,
                parse_config(f"model: {{name: none}}\nprefix: {words}").prefix,
                tokenizer(),
                3,
                world.device,
            )
            for words in (
                "{init: random, length: 200}",
                "{init: random, length: 200, init_std: 0.5}",
                "{init: vocabulary, length: 200}",
            )
        ]
    pairs = [keys_values_of(start.table().detach()[1:], lm.slots) for start in starts]
    return [[float(t.square().mean().sqrt()) for pair in each for t in pair] for each in pairs]


def test_noise_is_as_wide_in_each_layer_as_keys_and_values_of_the_vocabulary():
    ((as_wide, given, vocabulary),) = on_ranks(1, noise)
    assert as_wide == pytest.approx(vocabulary, rel=0.1)
    assert max(vocabulary) > 5 * min(vocabulary)
    assert given == pytest.approx([0.5] * len(given), rel=0.1)


def test_special_tokens_are_not_drawn_and_the_leading_one_stays_first():
    words = tokenizer()
    first, *drawn = vocabulary_tokens(words, 1000, 0, 60)
    assert first == words.bos_token_id
    assert max(drawn) < 60
    assert set(drawn).isdisjoint(words.all_special_ids)
    assert len(set(drawn)) > 20

    class Leading:
        all_special_ids, added_tokens_decoder = [0], {0: "<s>", 2: "<unused>"}

        def __call__(self, text):
            return type("Ids", (), {"input_ids": [0, 1]})

        def get_vocab(self):
            return {"<s>": 0, "a": 1, "<unused>": 2, "b": 3}

    lead, *rest = vocabulary_tokens(Leading(), 50, 0, 10)
    assert lead == 0
    assert set(rest) == {1, 3}
    with pytest.raises(ConfigError, match="special tokens only"):
        vocabulary_tokens(Leading(), 50, 0, 1)


def test_one_without_a_length_is_refused():
    with pytest.raises(ConfigError, match=r"prefix.length: missing; prefix.init: vocabulary has no text"):
        parse_config("model: {name: none}\nprefix: {init: vocabulary}")
