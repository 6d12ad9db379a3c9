"""The meaning of a prefix, in every family of causal language models that transformers knows.

Keys and values of real tokens, as a prefix, *are* those tokens: the text behind them has the same logits.
That must hold for rows side by side, padded and packed, for layers that are computed again, and for
generation with a cache.

The list of families is the registry's own, minus those named here with a reason: a family that a new version
of transformers brings is taken to work, and fails here until it does or is named.

All is computed in float64, and what a family would compute in float32 (norms, softmax, rotary angles) too,
since float64 goes by that name here. So there is one tolerance, and it is rounding's.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_ds.config import ModelKeys
from prefix_ds.errors import ModelError
from prefix_ds.model import PrefixLM
from prefix_ds.model.families import REFUSED
from prefix_ds.model.likelihood import summed_nll
from prefix_ds.model.skeleton import skeleton
from prefix_ds.suitability import slots_without_weights
from tests.laws import batch_of, calls_of, distance, seen_steps, table_of
from tests.tiny_models import FAMILIES, tiny, tiny_config

UNKNOWN_FINISH: set[str] = set()  # what becomes of the logits there is done to all of them at once

TOLERANCE = 1e-12  # relative to the largest logit
WRONG = 1e-2  # what a missing or misplaced prefix exceeds by far
PREFIX, TEXT, NEW = 5, 7, 4


def _families(names: str) -> list[str]:
    return names.split()


# Attention code of their own, or no attention: the functions that others may register are never called.
NEVER_CALLED = _families("""
    big_bird bloom codegen cpmant falcon falcon_mamba git gpt_neo gpt_neox_japanese gptj mamba mamba2
    megatron-bert mpt mvp openai-gpt prophetnet reformer rembert roformer rwkv trocr xglm xlm xlnet
    xlstm
""")

# Attention in some layers, or beside something else in all: the rest has a state that never sees the prefix.
HYBRID = _families("""
    bailing_hybrid bamba falcon_h1 granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 minimax
    nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp
    qwen4_exp_text zamba zamba2
""")

# Adds to each key a number made from its token inside the layer: a prefix has none.
INEXACT = ["doge"]

# Refused by name, with what the refusal must say.
REFUSED_BY_NAME = {
    "blt": "patches of bytes",
    "deepseek_v4": "keys in memory by their position",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "inkling2_text": "convolutions mix its keys",
    "inkling_text": "convolutions mix its keys",
    "minimax_m3_vl_text": "keys in memory by their position",
    "musicgen": "audio codes",
    "musicgen_melody": "audio codes",
    "recurrent_gemma": "reset only by a token at position 0",
    "zaya": "convolutions mix its keys",
}
NO_TINY_MODEL = {"gemma4_assistant", "gemma4_unified_assistant"}  # their configurations need the main model's

NAMED = [*NEVER_CALLED, *HYBRID, *INEXACT, *REFUSED_BY_NAME]
EXACT = [family for family in FAMILIES if family not in NAMED]

NO_RECOMPUTATION = {"ctrl"}  # its layers lack the switch
NEEDS = {"gemma3n": "timm"}  # for the eyes of a model that also sees; gemma3n_text is its text half

# Scans of the states of these differ with and without a cache, behind a prefix or not.
STEPWISE_TOLERANCE = {"nemotron_h": 1e-3, "zamba2": 1e-3}

# Those whose text outgrows a window of 4 in some layers.
WINDOWED = _families("""
    afmoe beam cohere2 cohere2_moe cohere_compass_text cwm dots3_note dots3_note_text exaone4 exaone_moe
    flint gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text
    gpt_oss granite_swa granitemoe_swa kolibri1 llama4 llama4_text mimo_v2_flash ministral mistral
    modernbert-decoder olmo3 vaultgemma
""")


# Chunks instead of a window. Documents longer than one meet other borders when packed: told in the limits.
CHUNKED = {"llama4", "llama4_text"}


@pytest.fixture(scope="module", autouse=True)
def everything_in_float64() -> Iterator[None]:
    """float32 is another name for float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(usual)


class Subject:
    """A base behind a prefix: two texts that begin alike, and the keys and values of that beginning."""

    def __init__(self, family: str, *, window: int = 64, attention: Any = "auto") -> None:
        if family in NEEDS and find_spec(NEEDS[family]) is None:
            pytest.skip(f"{family} needs {NEEDS[family]}")
        base = tiny(family, window)
        ids_BT = torch.randint(20, 100, (2, PREFIX + TEXT), generator=torch.Generator().manual_seed(1))
        self.family, self.before, (self.one, self.other) = family, ids_BT[0, :PREFIX], ids_BT[:, PREFIX:]
        self.wholes = [torch.cat([self.before, text]) for text in (self.one, self.other)]
        with torch.no_grad():  # the base as it came, before anything is done to it
            self.stock_BTV = base(input_ids=torch.stack(self.wholes), use_cache=False).logits
        self.one_TV, self.other_TV = self.stock_BTV[:, PREFIX:]
        self.lm = PrefixLM(base, attention=attention)
        self.table_PD = table_of(self.lm.keys_values_of(self.before[None], self.lm.slots))

    @torch.no_grad()
    def logits(self, *rows: list[Tensor], prefixed: bool = True) -> Tensor:
        """The logits [B * T, V] at every place of rows of documents."""
        table_PD, slots = (self.table_PD, self.lm.slots) if prefixed else (None, ())
        return self.lm.logits(batch_of(*rows), table_PD, slots)

    def loss(self) -> tuple[Tensor, Tensor]:
        """The loss of a packed and an unpacked row, and the table it came from."""
        table_PD = self.table_PD.clone().requires_grad_()
        batch = batch_of([self.other[:3], self.one[:4]], [self.other])
        return self.lm.loss(batch, table_PD, self.lm.slots), table_PD

    def steps(self, prompts: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Each prompt with its greedy answer, and the logits [B, N, V] that chose the answer's tokens."""
        ids = [prompt.tolist() for prompt in prompts]
        options: dict[str, Any] = {"max_new_tokens": NEW, "eos_ids": [], "pad_id": 0}
        with seen_steps(self.lm) as steps:
            answers = self.lm.generate(ids, self.table_PD, self.lm.slots, **options)
        return [torch.tensor(i + answer) for i, answer in zip(ids, answers, strict=True)], torch.stack(
            steps, 1
        )


@pytest.fixture(scope="module", params=EXACT)
def exact(request: pytest.FixtureRequest) -> Subject:
    """A family for which a prefix of tokens is those tokens."""
    return Subject(request.param)


@pytest.fixture(scope="module", params=[*HYBRID, *INEXACT])
def limited(request: pytest.FixtureRequest) -> Subject:
    """A family that takes a prefix, with limits."""
    return Subject(request.param)


@pytest.fixture(scope="module", params=WINDOWED)
def windowed(request: pytest.FixtureRequest) -> Subject:
    """A family some of whose layers see four tokens back, and the prefix."""
    return Subject(request.param, window=4)


def test_most_families_take_an_exact_prefix() -> None:
    assert len(EXACT) >= 120
    assert len(NAMED) == len(set(NAMED))
    assert set(NAMED) <= set(FAMILIES), "a family is gone from the registry"


def test_nothing_limits_it(exact: Subject) -> None:
    assert exact.lm.can_pack
    assert [limit for limit in exact.lm.limits if "chunks of" not in limit] == []
    assert bool(exact.lm.limits) == (exact.family in CHUNKED)


def test_without_a_prefix_the_base_is_untouched(exact: Subject) -> None:
    ours = exact.logits(*([whole] for whole in exact.wholes), prefixed=False)
    assert distance(ours, exact.stock_BTV.flatten(0, 1)) < TOLERANCE


def test_a_prefix_of_tokens_is_those_tokens(exact: Subject) -> None:
    theirs = torch.cat([exact.one_TV, exact.other_TV])
    assert distance(exact.logits([exact.one], [exact.other]), theirs) < TOLERANCE
    assert distance(exact.logits([exact.one], [exact.other], prefixed=False), theirs) > WRONG


def test_the_loss_is_that_of_its_logits(exact: Subject) -> None:
    assert (exact.lm._findings.finish is None) == (exact.family in UNKNOWN_FINISH)
    loss, _ = exact.loss()
    logits_MV = exact.logits([exact.other[:3], exact.one[:4]], [exact.other])
    ids_M = batch_of([exact.other[:3], exact.one[:4]], [exact.other]).target_ids_M
    assert distance(loss, summed_nll(logits_MV, ids_M)) < TOLERANCE


def test_padded(exact: Subject) -> None:
    padding = torch.zeros(TEXT - 3, dtype=torch.long)
    ours = exact.logits([exact.one], [exact.other[:3], padding])[: TEXT + 3]
    assert distance(ours, torch.cat([exact.one_TV, exact.other_TV[:3]])) < TOLERANCE


def test_packed(exact: Subject) -> None:
    documents = [exact.other[:3], exact.one, exact.other]
    theirs = torch.cat([exact.other_TV[:3], exact.one_TV, exact.other_TV])
    assert distance(exact.logits(documents), theirs) < TOLERANCE
    assert distance(exact.logits([torch.cat(documents)]), theirs) > WRONG


def test_generated(exact: Subject) -> None:
    prompts = [exact.one, exact.other[:3]]  # of two lengths: one is padded on the left
    answered, steps_BNV = exact.steps(prompts)
    for prompt, text, ours_NV in zip(prompts, answered, steps_BNV, strict=True):
        whole_TV = exact.logits([torch.cat([exact.before, text])], prefixed=False)[PREFIX:]
        bare_TV = exact.logits([text], prefixed=False)
        chosen = slice(len(prompt) - 1, -1)
        assert distance(ours_NV, whole_TV[chosen]) < TOLERANCE
        assert distance(ours_NV, bare_TV[chosen]) > WRONG


def test_recomputed(exact: Subject) -> None:
    if exact.family in NO_RECOMPUTATION:
        with pytest.raises(ModelError, match="no layers that can be computed again"):
            PrefixLM(exact.lm.base, recompute=True)
    else:
        check_recomputation(exact)


def check_recomputation(subject: Subject) -> None:
    """The last layer attends again in the backward pass, and the gradient stays what it was."""
    kept, kept_PD = subject.loss()
    kept.backward()
    subject.lm = PrefixLM(subject.lm.base, recompute=True)
    attention = subject.lm.base.get_submodule(subject.lm.slots[-1].name.partition("#")[0])
    with calls_of(attention) as calls:
        again, again_PD = subject.loss()
        forward_calls = len(calls)
        again.backward()
    assert len(calls) > forward_calls > 0
    assert distance(again, kept) < TOLERANCE
    assert kept_PD.grad is not None
    assert again_PD.grad is not None
    assert kept_PD.grad.abs().max() > 0
    assert distance(again_PD.grad, kept_PD.grad) < TOLERANCE


def test_over_the_models_own_attention(exact: Subject) -> None:
    own = Subject(exact.family, attention="eager")
    assert (
        distance(own.logits([own.one, own.other[:3]]), torch.cat([own.one_TV, own.other_TV[:3]])) < TOLERANCE
    )


def test_limits_are_told(limited: Subject) -> None:
    assert f"{len(limited.lm.slots)} places for a prefix in" in limited.lm.limits[0]
    assert limited.lm.can_pack == (limited.family in INEXACT)
    assert len(limited.lm.limits) == 1 + (not limited.lm.can_pack)


def test_within_limits_a_prefix_is_seen(limited: Subject) -> None:
    ours = limited.logits([limited.one], [limited.other])
    bare = limited.logits([limited.one], [limited.other], prefixed=False)
    assert distance(ours, bare) > WRONG


def test_within_limits_generation_is_consistent(limited: Subject) -> None:
    check_generation(limited, [limited.one], STEPWISE_TOLERANCE.get(limited.family, TOLERANCE))


def check_generation(subject: Subject, prompts: list[Tensor], tolerance: float) -> None:
    """Token by token with a cache, the logits are those of the whole text at once, behind the prefix."""
    answered, steps_BNV = subject.steps(prompts)
    for prompt, text, ours_NV in zip(prompts, answered, steps_BNV, strict=True):
        assert distance(ours_NV, subject.logits([text])[len(prompt) - 1 : -1]) < tolerance


def test_within_limits_recomputed(limited: Subject) -> None:
    check_recomputation(limited)


def test_generation_beyond_a_window_is_consistent(windowed: Subject) -> None:
    check_generation(windowed, [windowed.one, windowed.other[:3]], TOLERANCE)


def test_packed_with_windows(windowed: Subject) -> None:
    alone = torch.cat([windowed.logits([document]) for document in (windowed.other, windowed.one)])
    is_alike = distance(windowed.logits([windowed.other, windowed.one]), alone) < TOLERANCE
    assert is_alike == (windowed.family not in CHUNKED)


@pytest.mark.parametrize("family", NEVER_CALLED)
def test_attention_of_another_kind_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="never call the attention functions that transformers"):
        PrefixLM(tiny(family))


@pytest.mark.parametrize("family", [*NEVER_CALLED, *EXACT, *HYBRID, *INEXACT])
def test_without_weights_the_same_families_are_refused(family: str) -> None:
    try:
        base = skeleton(tiny_config(family), False)
    except (ImportError, ValueError):
        pytest.skip("no AutoModelForCausalLM is made of its configuration here; loading says why")
    is_refused = family in NEVER_CALLED
    with pytest.raises(ModelError, match="never call") if is_refused else nullcontext():
        slots_without_weights(base, ModelKeys(name="here"))


def named(family: str) -> Any:
    """What little of a base is looked at before it is refused."""
    config = SimpleNamespace(model_type=family)
    config.get_text_config = lambda decoder: config
    return SimpleNamespace(config=config)


@pytest.mark.parametrize("family", REFUSED_BY_NAME)
def test_what_a_trial_would_not_show_is_refused_by_name(family: str) -> None:
    base: Any = named(family) if family in NO_TINY_MODEL else tiny(family)
    assert base.config.model_type in REFUSED
    with pytest.raises(ModelError, match=REFUSED_BY_NAME[family]):
        PrefixLM(base)
