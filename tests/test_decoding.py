"""What must hold for answers to prompts behind a prefix.

Their logits are compared in test_families.py, for all families.
"""

import pytest
import torch
from transformers import GenerationConfig

from prefix_ds.model import PrefixLM
from tests.laws import answers, noisy_table, tokens
from tests.tiny_models import tiny


@pytest.fixture
def llama() -> PrefixLM:
    return PrefixLM(tiny("llama"))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "bart", "gemma2"])
def test_prompts_of_different_lengths_have_the_answers_they_have_alone(family: str, num_beams: int) -> None:
    lm = PrefixLM(tiny(family))
    prompts, table_PD = [tokens(length, seed=length).tolist() for length in (5, 2, 9)], noisy_table(lm)
    alone = [answers(lm, [prompt], table_PD, num_beams=num_beams)[0] for prompt in prompts]
    assert answers(lm, prompts, table_PD, num_beams=num_beams) == alone
    assert answers(lm, prompts, None, num_beams=num_beams) != alone


def test_an_answer_ends_before_its_end_token(llama: PrefixLM) -> None:
    table_PD, prompts = noisy_table(llama), [tokens(5).tolist(), tokens(7, seed=1).tolist()]
    whole = answers(llama, prompts, table_PD, max_new_tokens=8)
    end = whole[0][3]
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert answers(llama, prompts, table_PD, max_new_tokens=8, eos_ids=[99, end]) == cut
    assert len(cut[0]) <= 3


def test_sampling_follows_the_seed_and_the_temperature(llama: PrefixLM) -> None:
    prompts, table_PD = [tokens(5).tolist()], noisy_table(llama)

    def sampled(seed: int, **options: float) -> list[list[int]]:
        torch.manual_seed(seed)
        return answers(llama, prompts, table_PD, max_new_tokens=12, **options)

    assert sampled(1, temperature=2.0) == sampled(1, temperature=2.0) != sampled(2, temperature=2.0)
    assert sampled(1, temperature=2.0, top_p=1e-6) == sampled(2) == sampled(3, temperature=1e-6)


def test_a_bases_own_generation_settings_are_set_aside(llama: PrefixLM) -> None:
    prompts, table_PD = [tokens(5).tolist()], noisy_table(llama)
    plain = answers(llama, prompts, table_PD)
    own = GenerationConfig(forced_eos_token_id=7, repetition_penalty=9.0, max_length=3, do_sample=True)
    llama.base.generation_config = own
    assert answers(llama, prompts, table_PD) == plain
    assert llama.base.generation_config is own


def test_an_empty_prompt_is_refused(llama: PrefixLM) -> None:
    with pytest.raises(ValueError, match="without tokens"):
        answers(llama, [[5], []], None)
