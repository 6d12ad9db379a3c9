"""What must hold for a base behind a prefix, on a few families.

The meaning law, for all families, is in test_families.py.
"""

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, masking_utils
from transformers.models.llama import modeling_llama

from prefix_ds.data.batch import Batch, Document, documents_of
from prefix_ds.errors import ModelError
from prefix_ds.model import PrefixLM, apart, attention, blocks, gates, likelihood, norms, varlen
from prefix_ds.model.attention import widened
from prefix_ds.model.finish import finish_of
from prefix_ds.model.likelihood import summed_nll
from prefix_ds.model.masks import Causal, Rule, pattern_of
from prefix_ds.model.recompute import repeatable_layers
from prefix_ds.model.standing import meta_stands_for
from prefix_ds.prefix import keys_values_of
from prefix_ds.prefix import table_of as float32_table_of
from tests.laws import answers, batch_of, calls_of, distance, noisy_table, table_of, tokens
from tests.tiny_models import tiny, tiny_config

EXACT = 1e-12


@pytest.fixture
def llama() -> PrefixLM:
    return PrefixLM(tiny("llama"))


def grad_of(lm: PrefixLM, batch: Batch, table_PD: Tensor, slots: Any = None) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient to the table."""
    table_PD = table_PD.detach().clone().requires_grad_()
    loss = lm.loss(batch, table_PD, lm.slots if slots is None else slots)
    loss.backward()
    assert table_PD.grad is not None
    return loss.detach(), table_PD.grad


# -------------------------------------------------------------------------------------------------- places


def shapes(family: str) -> list[tuple[int, int, int]]:
    return [(slot.num_heads, slot.key_dim, slot.value_dim) for slot in PrefixLM(tiny(family)).slots]


def test_slots_are_the_shapes_that_attention_sees() -> None:
    assert shapes("gpt2") == [(4, 16, 16)] * 4
    assert shapes("llama") == [(2, 16, 16)] * 4  # grouped queries
    assert shapes("deepseek_v3") == [(4, 24, 12)] * 4  # latent attention
    assert shapes("gemma4_text") == [(2, 16, 16), (2, 32, 32)] * 3  # layers that differ


def test_slots_are_named_by_module_and_call() -> None:
    assert [slot.name for slot in PrefixLM(tiny("llama")).slots][:2] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    names = [slot.name for slot in PrefixLM(tiny("diffllama")).slots]  # attends twice a layer
    assert names[:3] == [
        "model.layers.0.self_attn",
        "model.layers.0.self_attn#1",
        "model.layers.1.self_attn",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("family", "means_text", "can_pack"),
    [
        ("llama", True, True),
        ("mixtral", True, True),
        ("gpt_oss", True, True),
        ("doge", False, True),
        ("falcon_h1", False, False),
        ("qwen3_next", False, False),
    ],
)
def test_a_trial_in_any_precision_finds_the_same(
    family: str, means_text: bool, can_pack: bool, dtype: torch.dtype
) -> None:
    lm = PrefixLM(tiny(family).to(dtype))
    assert lm.can_pack == can_pack
    assert any("not quite a text" in limit for limit in lm.limits) != means_text


def test_a_table_of_the_wrong_width_is_refused(llama: PrefixLM) -> None:
    with pytest.raises(ValueError, match="for slots that need"):
        llama.loss(batch_of([tokens(4)]), torch.zeros(3, 7), llama.slots)


# ----------------------------------------------------------------------------------------- text and layers


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_prefix_started_from_text_is_that_text_in_float32(family: str) -> None:
    lm = PrefixLM(tiny(family).float())
    before, text = tokens(5), tokens(9, seed=1)
    table_PD = float32_table_of(lm.keys_values_of(before[None], lm.slots))
    behind = lm.loss(batch_of([text[:-1]]), table_PD, lm.slots)
    whole = batch_of([torch.cat([before, text[:-1]])])
    last = slice(len(before), None)
    whole = replace(
        whole, target_index_M=whole.target_index_M[last], target_ids_M=batch_of([text[:-1]]).target_ids_M
    )
    assert behind.item() == pytest.approx(lm.loss(whole, None, ()).item(), rel=1e-5)


def test_some_layers_alone_have_a_prefix(llama: PrefixLM) -> None:
    batch, some = batch_of([tokens(8)]), llama.slots[2:]
    full_PD = noisy_table(llama)
    some_PD = full_PD[:, -sum(slot.width for slot in some) :]
    loss, grad_PD = grad_of(llama, batch, some_PD, some)
    assert grad_PD.abs().sum(dim=1).min() > 0
    for other in (llama.loss(batch, full_PD, llama.slots), llama.loss(batch, None, ())):
        assert abs(other.item() - loss.item()) > 1e-3


def test_slots_may_come_in_any_order(llama: PrefixLM) -> None:
    batch, table_PD, mixed = batch_of([tokens(8)]), noisy_table(llama), llama.slots[::-1]
    mixed_PD = table_of(keys_values_of(table_PD, llama.slots)[::-1])
    assert distance(llama.loss(batch, mixed_PD, mixed), llama.loss(batch, table_PD, llama.slots)) == 0


def test_nothing_is_differentiated_below_the_first_layer_with_a_prefix(llama: PrefixLM) -> None:
    some, seen = llama.slots[2:], []
    for layer in llama.base.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    llama.loss(batch_of([tokens(8)]), noisy_table(llama, slots=some), some)
    assert seen == [False, False, False, True]


def test_the_base_gets_no_gradient(llama: PrefixLM) -> None:
    grad_of(llama, batch_of([tokens(8)]), noisy_table(llama))
    assert all(parameter.grad is None for parameter in llama.base.parameters())


# ------------------------------------------------------------------------------------------ rows and masks


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "bart"])
@pytest.mark.parametrize("recompute", [False, True])
def test_documents_packed_into_a_row_have_the_loss_and_gradient_they_have_alone(
    family: str, recompute: bool
) -> None:
    lm = PrefixLM(tiny(family, window=4), recompute=recompute)
    documents, table_PD = [tokens(length, seed=length) for length in (6, 3, 8, 2)], noisy_table(lm)
    alone = [grad_of(lm, batch_of([document]), table_PD) for document in documents]
    targets = torch.cat([batch_of([document]).target_ids_M for document in documents])
    loss, grad_PD = grad_of(lm, replace(batch_of(documents), target_ids_M=targets), table_PD)
    assert loss.item() == pytest.approx(sum(one.item() for one, _ in alone), rel=1e-6)
    assert distance(grad_PD, torch.stack([grad for _, grad in alone]).sum(0)) < 1e-6


def test_an_indexer_that_picks_few_keys_picks_them_from_the_document() -> None:
    base = tiny("deepseek_v32")
    for module in base.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 3
    one, other = tokens(8), tokens(6, seed=1)
    stock_TV = base(input_ids=one[None], use_cache=False).logits[0]
    lm = PrefixLM(base)
    table_PD = noisy_table(lm)
    alone = [lm.logits(batch_of([document]), table_PD, lm.slots) for document in (one, other)]
    assert distance(lm.logits(batch_of([one]), None, ()), stock_TV) < EXACT
    assert distance(lm.logits(batch_of([one, other]), table_PD, lm.slots), torch.cat(alone)) < EXACT


def test_a_window_never_hides_the_prefix() -> None:
    config = tiny_config("mistral", window=2)
    config.num_hidden_layers = 1  # so that a place sees only what its own window shows
    lm = PrefixLM(AutoModelForCausalLM.from_config(config).double().requires_grad_(False))
    table_PD, batch = noisy_table(lm), batch_of([tokens(9)])
    for place in (0, 8):
        last = replace(batch, target_index_M=batch.target_index_M[place : place + 1])
        (grad_PD,) = torch.autograd.grad(lm.logits(last, table_PD, lm.slots).pow(2).sum(), table_PD)
        assert (grad_PD.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_keep_their_kind_and_show_the_prefix(dtype: torch.dtype) -> None:
    causal = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    low = torch.finfo(torch.float32 if dtype == torch.bool else dtype).min
    mask = causal if dtype == torch.bool else torch.zeros(causal.shape, dtype=dtype).masked_fill(~causal, low)
    documents = documents_of(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]) + 7)
    wide = widened(mask, 3, documents, None)
    seen = wide if dtype == torch.bool else wide == 0
    assert wide.dtype == dtype
    assert seen[..., :3].all()
    assert seen[0, 0, :, 3:].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert seen[1, 0, :, 3:].equal(causal[1, 0])


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma2", 2)])
def test_one_mask_serves_all_layers_of_a_kind(
    family: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, made = PrefixLM(tiny(family, window=4)), []

    def spy(*args: Any) -> Tensor:
        made.append(widened(*args))
        return made[-1]

    monkeypatch.setattr(attention, "widened", spy)
    with lm.prefixed(noisy_table(lm), lm.slots):
        lm.base(input_ids=tokens(9)[None])
    assert len(made) == kinds


@pytest.fixture
def made_whole(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for every mask that is written out."""
    calls: list[None] = []
    whole = Rule.whole
    monkeypatch.setattr(Rule, "whole", lambda mask: (calls.append(None), whole(mask))[1])
    return calls


@pytest.mark.parametrize(
    ("family", "by_ours"),
    [
        ("llama", 4),
        ("mistral", 4),
        ("gpt2", 4),
        ("gemma2", 4),
        ("gpt_oss", 4),
        ("llama4_text", 1),
        ("deepseek_v3", 4),
    ],
)
def test_packed_rows_are_attended_without_a_mask_of_theirs(
    family: str, by_ours: int, made_whole: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, layouts = PrefixLM(tiny(family, window=4)), []
    attended = apart.attended
    monkeypatch.setattr(apart, "attended", lambda *a: (layouts.append(a[-1]), attended(*a))[1])
    grad_of(lm, batch_of([tokens(9), tokens(3)]), noisy_table(lm))
    assert made_whole == []
    assert len(layouts) == by_ours
    windows = {"mistral": {4}, "gemma2": {4, None}, "gpt_oss": {4, None}}.get(family, {None})
    assert {layout.pattern.window for layout in layouts} == windows


@pytest.mark.parametrize(
    "family",
    ["gemma2", "vaultgemma", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "flint"],
)
def test_caps_and_sinks_are_those_of_the_models_own_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are made so large that one who forgets them is seen. Some models' own softmax is of float32."""
    base = tiny(family, window=4)
    has_any = False
    for module in base.modules():
        if getattr(module, "attn_logit_softcapping", None) is not None:
            module.attn_logit_softcapping, has_any = 0.02, True
        if getattr(module, "sinks", None) is not None:
            torch.nn.init.normal_(module.sinks, std=2.0)
            has_any = True
    assert has_any
    lm, batch, layouts = PrefixLM(base), batch_of([tokens(9), tokens(3)], [tokens(12)]), []
    attended, table_PD = apart.attended, noisy_table(lm)
    monkeypatch.setattr(apart, "attended", lambda *a: (layouts.append(a[-1]), attended(*a))[1])
    found = grad_of(lm, batch, table_PD)
    assert any(layout.softcap or layout.sinks_N is not None for layout in layouts)
    monkeypatch.setattr(attention, "_is_known", lambda *_: False)
    want = grad_of(lm, batch, table_PD)
    assert all(distance(mine, theirs) < 1e-5 for mine, theirs in zip(found, want, strict=True))


def test_sinks_that_are_trained_get_their_gradient() -> None:
    base = tiny("gpt_oss").requires_grad_(True)
    lm = PrefixLM(base)
    lm.loss(batch_of([tokens(5), tokens(3)]), None, ()).backward()
    assert all(m.sinks.grad.abs().min() > 0 for m in base.modules() if hasattr(m, "sinks"))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("block", "cached", "most"), [(128, 2**20, 2**24), (3, 2**20, 2**24), (2, 1, 2**24), (8, 2**20, 1)]
)
def test_attention_in_pieces_is_that_of_whole_documents(
    window: int | None, block: int, cached: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_BLOCK": block, "_CACHED_SCORES": cached, "_MOST_SCORES": most}.items():
        monkeypatch.setattr(apart, name, value)
    documents, rows = (Document(0, 0, 9), Document(1, 0, 4), Document(1, 4, 11)), frozenset([1])
    text = [torch.randn(2, heads, 12, 5, dtype=torch.float64).requires_grad_() for heads in (6, 3, 3)]
    front = [torch.randn(3, 2, 5, dtype=torch.float64).requires_grad_() for _ in range(2)]
    layout = apart.Layout(documents, Causal(window), rows, 0.3)
    seen_BTNV = apart.attended(text[0], text[1], text[2], (front[0], front[1]), layout)
    plain_BTNV = torch.zeros_like(seen_BTNV)
    for document in documents:
        places = slice(document.start, document.stop)
        query, key, value = (t[document.row, :, places] for t in text)
        if document.row in rows:
            key, value = torch.cat([front[0], key], 1), torch.cat([front[1], value], 1)
        shown = layout.pattern.seen(document.length, document.length, torch.device("cpu"))
        shown = torch.nn.functional.pad(shown, (key.shape[1] - document.length, 0), value=True)
        score = 0.3 * query @ key.repeat_interleave(2, 0).mT
        probability = score.masked_fill(~shown, float("-inf")).softmax(-1)
        plain_BTNV[document.row, places] = (probability @ value.repeat_interleave(2, 0)).transpose(0, 1)
    assert distance(seen_BTNV, plain_BTNV) < EXACT
    weight = torch.randn_like(seen_BTNV)
    for ours, plain in zip(
        *(torch.autograd.grad(s, [*text, *front], weight) for s in (seen_BTNV, plain_BTNV)), strict=True
    ):
        assert distance(ours, plain) < EXACT


@pytest.mark.parametrize("window", [None, 40, 300])
def test_masks_are_few_and_small_whatever_the_lengths(window: int | None) -> None:
    apart._hidden.cache_clear()
    nothing = torch.zeros(1, 0, 2)
    for length in range(200, 1000, 23):
        text = [torch.randn(1, 1, length, 2) for _ in range(3)]
        layout = apart.Layout([Document(0, 0, length)], Causal(window), frozenset(), 1.0)
        apart.attended(text[0], text[1], text[2], (nothing, nothing), layout)
    sizes = apart._BLOCK.bit_length()  # 1, 2, 4, ... up to it
    assert apart._hidden.cache_info().currsize <= sizes * (1 if window is None else 2)
    mask_QC = apart._hidden(window, apart._BLOCK, torch.float32, torch.device("cpu"))
    assert mask_QC.shape == (apart._BLOCK, apart._BLOCK + (window - 1 if window else 0))


def test_a_model_that_reads_its_mask_gets_one(made_whole: list[None]) -> None:
    lm = PrefixLM(tiny("deepseek_v32"))
    made_whole.clear()
    grad_of(lm, batch_of([tokens(9), tokens(3)]), noisy_table(lm))
    assert made_whole


@pytest.mark.parametrize(
    ("family", "choice", "masks"),
    [("mistral", "eager", 2), ("llama4_text", "auto", 4)],  # where a chunk ends depends on the place
)
def test_documents_of_one_length_share_a_mask(
    family: str, choice: Literal["eager", "auto"], masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, lengths = PrefixLM(tiny(family, window=4), attention=choice), []
    seen = Rule.seen_in
    monkeypatch.setattr(Rule, "seen_in", lambda mask, d: (lengths.append(d.length), seen(mask, d))[1])
    grad_of(lm, batch_of([tokens(9), tokens(3), tokens(9), tokens(3)]), noisy_table(lm))
    assert len(lengths) == masks


def sequences_of(part):
    """Slices of queries and of keys, and which of the keys each query sees."""
    for q, k in zip(pairwise(part.query_borders.tolist()), pairwise(part.key_borders.tolist()), strict=True):
        num_queries, num_keys = q[1] - q[0], k[1] - k[0]
        assert num_queries <= part.longest_query
        assert num_keys <= part.longest_key
        after = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
        before, behind = part.window
        seen = (after >= -before if before >= 0 else True) & (
            after <= behind if behind >= 0 else after < 2**30
        )
        yield slice(*q), slice(*k), seen


def scores_of(query_TNH, key_SNH, seen, scale):
    return (torch.einsum("tnh,snh->nts", query_TNH, key_SNH) * scale).masked_fill(~seen, -torch.inf)


def kernel_by_reference(query, key, value, part, scale):
    """In place of a kernel that GPUs have: sequence by sequence, causality lined up at their ends."""
    seen, sums = [], []
    group = query.shape[1] // key.shape[1]
    for q, k, shown in sequences_of(part):
        key_SNH, value_SNH = (t[k].repeat_interleave(group, 1) for t in (key, value))
        scores_NTS = scores_of(query[q], key_SNH, shown, scale)
        seen.append(torch.einsum("nts,snh->tnh", scores_NTS.softmax(-1), value_SNH))
        sums.append(scores_NTS.logsumexp(-1))
    return torch.cat(seen), torch.cat(sums, dim=1)


def kernel_backwards_by_reference(query, key, value, outcome, part, scale):
    """What the kernel's backward pass computes, from the result and the sums that it is given."""
    to_query, to_key, to_value = (torch.zeros_like(t) for t in (query, key, value))
    group = query.shape[1] // key.shape[1]
    products_NT = (outcome.grad_TNH * outcome.seen_TNH).sum(-1).t()
    for q, k, shown in sequences_of(part):
        key_SNH, value_SNH = (t[k].repeat_interleave(group, 1) for t in (key, value))
        part_NTS = (scores_of(query[q], key_SNH, shown, scale) - outcome.sums_NT[:, q, None]).exp()
        grad_NTS = torch.einsum("tnh,snh->nts", outcome.grad_TNH[q], value_SNH)
        to_scores = part_NTS * (grad_NTS - products_NT[:, q, None]) * scale
        to_query[q] = torch.einsum("nts,snh->tnh", to_scores, key_SNH)
        to_keys = torch.einsum("nts,tnh->snh", to_scores, query[q])
        to_values = torch.einsum("nts,tnh->snh", part_NTS, outcome.grad_TNH[q])
        to_key[k] = to_keys.unflatten(1, (-1, group)).sum(2)
        to_value[k] = to_values.unflatten(1, (-1, group)).sum(2)
    return to_query, to_key, to_value


@pytest.fixture
def kernel_calls(monkeypatch):
    """The parts that a reference in the kernel's place was called for."""
    calls = []

    def kernel(*asked):
        calls.append(asked[3])
        return kernel_by_reference(*asked)

    monkeypatch.setattr(varlen, "_kernel", kernel)
    monkeypatch.setattr(varlen, "_kernel_backwards", kernel_backwards_by_reference)
    return calls


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("llama", None),
        ("gpt2", None),
        ("mistral", None),
        ("deepseek_v3", None),
        ("mistral", 4),
        ("gemma3_text", 4),
        ("gpt_oss", 4),
    ],
)
def test_a_kernel_for_gpus_is_given_what_it_needs(
    family: str, window: int | None, kernel_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is none of a CPU's: what is handed to it is tested, by a reference in its place."""
    lm = PrefixLM(tiny(family, window=window) if window else tiny(family))
    batch, table_PD = batch_of([tokens(6), tokens(3)], [tokens(2), tokens(7)]), noisy_table(lm)
    padded = replace(batch, documents=batch.documents[:3])  # the last is padding
    batches = batch, lacking_last_targets(padded, 7)
    want = [grad_of(lm, one, table_PD) for one in batches]
    monkeypatch.setattr(varlen, "is_for", lambda *_: True)
    monkeypatch.setattr(varlen, "_A_COPY", 5)
    found = [grad_of(lm, one, table_PD) for one in batches]
    windows = {part.window for part in kernel_calls}
    in_windows = {(3, 0), (-1, -1)} if window else set()
    assert windows == in_windows | (set() if window and family == "mistral" else {(-1, 0)})
    assert sum(part.window != (-1, -1) for part in kernel_calls) == 2 * len(lm.slots)
    for (loss, grad_PD), (true_loss, true_PD) in zip(found, want, strict=True):
        assert distance(loss, true_loss) < EXACT
        assert distance(grad_PD, true_PD) < EXACT


@pytest.mark.parametrize("way", ["kernel", "its own"])
def test_what_documents_ask_of_a_prefix_is_summed_in_float32(way: str, kernel_calls: list[Any]) -> None:
    """A thousand times the same: in bfloat16 such a sum stands still from 256 on."""
    many, size = 1000, 4
    text = [torch.ones(1, 1, many, size, dtype=torch.bfloat16) for _ in range(3)]
    front = [torch.ones(1, 1, size, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    documents = [Document(0, n, n + 1) for n in range(many)]
    if way == "kernel":
        layout = apart.Layout(documents, Causal(), frozenset({0}), 1.0)
        seen = varlen.attended(*text, (front[0], front[1]), layout)
    else:

        def alone(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            return value.mean(dim=2, keepdim=True).transpose(1, 2)

        rule = Rule(masking_utils.causal_mask_function, torch.Tensor, torch.bool, torch.device("cpu"))
        seen = attention._one_by_one(alone, text, rule, attention.Front(front[0], front[1]), documents)
    seen.float().sum().backward()
    assert front[1].grad is not None
    assert distance(front[1].grad.double(), torch.full((1, 1, size), many / 2).double()) < 0.01


@pytest.mark.parametrize(
    ("size", "dtype", "length", "window", "takes"),
    [
        (128, torch.bfloat16, 9, None, True),
        (64, torch.float16, 9, 9, True),
        (64, torch.bfloat16, 9, 8, True),
        (100, torch.bfloat16, 9, None, False),  # open_llama_3b's
        (320, torch.bfloat16, 9, None, False),
        (64, torch.float32, 9, None, False),
    ],
)
def test_a_kernel_for_gpus_is_given_only_what_it_takes(
    size: int, dtype: torch.dtype, length: int, window: int | None, takes: bool
) -> None:
    text = [torch.empty(1, 2, length, size, dtype=dtype, device="meta")] * 3
    layout = apart.Layout([Document(0, 0, length)], Causal(window), frozenset(), 1.0)
    assert not varlen.is_for(*text, layout), "the meta device stands for itself"
    with meta_stands_for("cuda"):
        assert varlen.is_for(*text, layout) == takes


def test_a_kernel_is_given_all_of_the_rows_and_padding_in_short_pieces() -> None:
    documents = [Document(0, 0, 5), Document(0, 5, 7), Document(2, 3, 300)]
    found = varlen._sequences(documents, frozenset({2}), (3, 300))
    told = [(d.row, d.start, d.stop, has_front) for d, has_front in found]
    assert told[:5] == [
        (0, 0, 5, False),
        (0, 5, 7, False),
        (0, 7, 135, False),
        (0, 135, 263, False),
        (0, 263, 300, False),
    ]
    assert told[5:8] == [(1, 0, 128, False), (1, 128, 256, False), (1, 256, 300, False)]
    assert told[8:] == [(2, 0, 3, False), (2, 3, 300, True)]


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("has_windows", [False, True])
def test_a_kernel_is_taken_only_where_it_agrees(
    has_windows: bool, has_sinks: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's own refuses on a CPU."""
    tried = torch.device("cpu"), torch.bfloat16, 64, has_windows, has_sinks
    kernels: list[tuple[Any, Any]] = [
        (varlen._kernel, varlen._kernel_backwards),
        (lambda *asked: kernel_by_reference(*asked[:-1], 2 * asked[-1]), kernel_backwards_by_reference),
        (kernel_by_reference, lambda *asked: [2 * grad for grad in kernel_backwards_by_reference(*asked)]),
        (kernel_by_reference, lambda *asked: [g * math.nan for g in kernel_backwards_by_reference(*asked)]),
        (kernel_by_reference, kernel_backwards_by_reference),
    ]
    answers = []
    for forwards, backwards in kernels:
        varlen._agrees.cache_clear()
        monkeypatch.setattr(varlen, "_kernel", forwards)
        monkeypatch.setattr(varlen, "_kernel_backwards", backwards)
        answers += [varlen._agrees(*tried), varlen._agrees(*tried)]
    varlen._agrees.cache_clear()
    assert answers == [False] * 8 + [True] * 2
    assert len(caplog.messages) == 4  # each said once
    assert all(m.startswith("attention's kernel for packed rows is not used: ") for m in caplog.messages)


def test_a_kernel_is_tried_inside_a_layer_that_is_computed_again(kernel_calls: list[Any]) -> None:
    """Once, in the forward pass: what trying it keeps is none of the layer's."""
    varlen._agrees.cache_clear()

    def layer(x: Tensor) -> Tensor:
        assert varlen._agrees(torch.device("cpu"), torch.bfloat16, 64, True, False)
        return x.sin().cos()

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    varlen._agrees.cache_clear()
    assert x.grad is not None


def test_values_narrower_than_keys_are_filled_up_for_a_kernel() -> None:
    layout = apart.Layout([Document(0, 0, 9)], Causal(), frozenset(), 1.0)

    def taken(query: int, key: int, value: int) -> bool:
        sizes = (query, key, value)
        text = [torch.empty(1, 2, 9, size, dtype=torch.bfloat16, device="meta") for size in sizes]
        with meta_stands_for("cuda"):
            return varlen.is_for(text[0], text[1], text[2], layout)

    assert taken(192, 192, 128)
    assert not taken(128, 128, 192)
    assert not taken(192, 128, 128)


def lacking_last_targets(batch: Batch, count: int) -> Batch:
    return replace(
        batch, target_index_M=batch.target_index_M[:-count], target_ids_M=batch.target_ids_M[:-count]
    )


RULES: list[tuple[Any, Causal | None]] = [
    (masking_utils.causal_mask_function, Causal()),
    (masking_utils.sliding_window_causal_mask_function(7), Causal(7)),
    (masking_utils.chunked_causal_mask_function(7, torch.zeros(1)), None),
    (masking_utils.bidirectional_mask_function, None),
]


@pytest.mark.parametrize(("rule", "pattern"), RULES)
def test_the_pattern_of_a_rule_is_known_or_is_told_to_be_unknown(rule: Any, pattern: Causal | None) -> None:
    positions_BT = torch.arange(9)[None]
    packed = masking_utils.packed_sequence_compatibility_function(rule, positions_BT, positions_BT * 0)
    assert pattern_of(rule) == pattern_of(packed) == pattern
    place = torch.arange(9)
    if pattern is not None:
        assert pattern.seen(9, 9, torch.device("cpu")).equal(rule(0, 0, place[:, None], place))


# --------------------------------------------------------------------------------------------------- norms


@contextmanager
def kept() -> Iterator[list[int]]:
    """The bytes of each tensor that is kept for the backward pass and has more than one dimension."""
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.nbytes if tensor.dim() > 1 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def given(module: nn.Module, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a module gives, and the gradient to its input of a weighted sum of it."""
    hidden = hidden.clone().requires_grad_()
    out = module(hidden)
    return out, torch.autograd.grad((out * weight).sum(), hidden)[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "gpt_oss", "qwen3"])
def test_a_norm_that_keeps_little_gives_what_it_gave(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_CACHED_NUMBERS", 100)
    config = tiny_config(family)
    base, stock = (AutoModelForCausalLM.from_config(config).bfloat16().requires_grad_(False) for _ in "ab")
    for parameter in base.parameters():
        parameter.normal_(0, 0.3)
    stock.load_state_dict(base.state_dict())
    norms.take_over_norms(base)
    taken = [module for module in base.modules() if isinstance(vars(module).get("forward"), norms._Norm)]
    assert taken
    for ours, theirs in zip(base.modules(), stock.modules(), strict=True):
        if ours not in taken:
            continue
        hidden, weight = torch.randn(2, 2, 7, len(ours.weight)).bfloat16()  # type: ignore[arg-type]
        for mine, its in zip(given(ours, hidden, weight), given(theirs, hidden, weight), strict=True):
            assert distance(mine.double(), its.double()) < 2 * torch.finfo(torch.bfloat16).eps
        with kept() as numbers:
            ours(hidden.requires_grad_())
        assert sum(numbers) == hidden.nbytes + len(hidden.flatten(0, -2)) * 4  # and its weight


@pytest.mark.parametrize("epsilon", [1e-6, 1e-1])
def test_a_gpu_s_kernel_gives_a_norm_that_keeps_as_little(epsilon: float) -> None:
    """torch has the same function for CPUs, though not the same kernel."""
    numbers = torch.randn(2, 7, 64).bfloat16()
    weight_D, way = torch.randn(64).bfloat16(), norms._Way(epsilon, 0.0, late=True)
    found = []
    for ours in (
        lambda h: norms.fused(h, weight_D, epsilon),
        lambda h: norms._Normed.apply(h, weight_D, way),
    ):
        hidden = numbers.clone().requires_grad_()
        out = ours(hidden)
        found.append((out, torch.autograd.grad((out * out.detach()).sum(), hidden)[0]))
    for mine, its in zip(*found, strict=True):
        assert distance(mine.double(), its.double()) < 2 * torch.finfo(torch.bfloat16).eps


def test_a_norm_of_another_kind_is_left_alone() -> None:
    class OddNorm(nn.RMSNorm):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden).clamp(max=0.5)

    hidden = torch.randn(5, 8).bfloat16()
    for norm in (OddNorm(8, 1e-6), nn.LayerNorm(8, bias=False)):
        norm.to(torch.bfloat16).requires_grad_(False)
        own = norm(hidden)
        norms.take_over_norms(norm)
        assert norm(hidden).equal(own)
        assert norm.forward._way is None  # type: ignore[attr-defined]


def test_a_norm_of_each_head_is_left_alone() -> None:
    """Command-R+ has a weight for each head and place, [N, H]."""
    config = tiny_config("cohere")
    config.use_qk_norm = True
    lm = PrefixLM(AutoModelForCausalLM.from_config(config).bfloat16().requires_grad_(False))
    assert grad_of(lm, batch_of([tokens(6)]), noisy_table(lm).float())[0].isfinite()


def test_a_norm_whose_weight_is_trained_has_its_gradient() -> None:
    norm = nn.RMSNorm(8, 1e-6).to(torch.bfloat16)
    norms.take_over_norms(norm)
    norm(torch.randn(5, 8).bfloat16()).sum().backward()
    assert norm.weight.grad is not None


# --------------------------------------------------------------------------------------------------- gates


def of_each(
    base: nn.Module, hidden: Tensor, weight: Tensor, name: str
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """What modules whose class ends so give, and the gradient to their input of a weighted sum of it; and the
    bytes that they kept for it."""
    found, num_bytes = [], 0
    for module in base.modules():
        if type(module).__name__.endswith(name):
            with kept() as numbers:
                module(hidden.clone().requires_grad_())
            num_bytes += sum(numbers)
            found.append(given(module, hidden, weight))
    return found, num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3_moe"])
def test_a_gated_unit_that_keeps_less_gives_bit_by_bit_what_it_gave(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_CACHED_NUMBERS", 100)
    base = AutoModelForCausalLM.from_config(tiny_config(family)).to(dtype).requires_grad_(False)
    hidden, weight = torch.randn(2, 2, 7, base.config.hidden_size, dtype=dtype)
    name = "SparseMoeBlock" if family == "qwen3_moe" else "MLP"
    stock, before = of_each(base, hidden, weight, name)
    gates.take_over_gates(base)
    ours, after = of_each(base, hidden, weight, name)
    assert len(stock) == base.config.num_hidden_layers
    for mine, its in zip(ours, stock, strict=True):
        assert mine[0].equal(its[0])
        assert mine[1].equal(its[1])
    chosen = base.config.num_experts_per_tok if family == "qwen3_moe" else 1
    size = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    inner = 2 * 7 * chosen * getattr(base.config, size) * dtype.itemsize
    assert before - after == inner * base.config.num_hidden_layers


def test_a_gated_unit_that_does_more_is_left_alone() -> None:
    class CappedMLP(modeling_llama.LlamaMLP):
        cap = 0.1

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=self.cap) * self.up_proj(x))

    class LittleCappedMLP(CappedMLP):
        cap = 1000.0

    class AskedMLP(modeling_llama.LlamaMLP):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    class LearnedActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.slope

    config = tiny_config("llama")
    learned = modeling_llama.LlamaMLP(config)
    learned.act_fn = LearnedActivation()
    in_place = modeling_llama.LlamaMLP(config)
    in_place.act_fn = nn.SiLU(inplace=True)
    for unit in (CappedMLP(config), LittleCappedMLP(config), AskedMLP(config), learned, in_place):
        gates.take_over_gates(unit)
        assert "forward" not in vars(unit)
    plain = modeling_llama.LlamaMLP(config)
    gates.take_over_gates(plain)
    assert "forward" in vars(plain)
    x = torch.randn(2, config.hidden_size)
    assert plain(x=x).equal(plain(x))


@pytest.mark.parametrize("cap", [None, 1000.0])
def test_experts_whose_gate_does_more_are_left_alone(cap: float | None) -> None:
    class Experts(nn.Module):
        act_fn = staticmethod(functional.silu)

        def _apply_gate(self, gate_and_up: Tensor) -> Tensor:
            gate, up = gate_and_up.chunk(2, dim=-1)
            return self.act_fn(gate).clamp(max=cap) * up if cap else self.act_fn(gate) * up

    experts = Experts()
    gates.take_over_gates(experts)
    assert ("_apply_gate" in vars(experts)) == (cap is None)


# ---------------------------------------------------------------------------------------------------- loss


def test_a_cap_is_found_where_logits_are_small() -> None:
    config = SimpleNamespace(final_logit_softcapping=30.0)
    raw = torch.linspace(-9, 9, 200, dtype=torch.bfloat16)
    capped = torch.tanh(raw / 30.0) * 30.0
    for final in (raw, capped):
        finish = finish_of(raw, final, config)
        assert finish is not None
        assert finish(raw).equal(final)


@pytest.mark.parametrize("chunk", [1, 70, 1000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_the_plain_one(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood._BLOCK_NUMBERS, "cpu", chunk)
    logits, targets = torch.randn(9, 33).mul(4).to(dtype).requires_grad_(), torch.arange(9)
    wide = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    ours, plain = (
        summed_nll(logits, targets),
        torch.nn.functional.cross_entropy(wide, targets, reduction="sum"),
    )
    (3 * ours).backward()
    (3 * plain).backward()
    assert logits.grad is not None
    assert wide.grad is not None
    assert ours.dtype == torch.float64  # summed so; the terms are those of float32
    assert distance(ours, plain) < 1e-6
    assert distance(logits.grad, wide.grad.to(dtype)) < torch.finfo(dtype).eps * 16


def test_a_batch_without_targets_runs_through_all_layers_and_gives_zeros(llama: PrefixLM) -> None:
    batch = replace(batch_of([tokens(8)]), target_index_M=torch.arange(0), target_ids_M=torch.arange(0))
    with calls_of(llama.base.model.layers[3]) as calls, calls_of(llama.base.lm_head) as output_calls:
        loss, grad_PD = grad_of(llama, batch, noisy_table(llama))
    assert loss.item() == 0
    assert (grad_PD == 0).all()
    assert len(calls) == len(output_calls) == 1


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_only_targets_reach_the_output_layer_some_at_a_time(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood._CHUNK_BYTES, "cpu", num_rows * 100 * 8)
    lm, shapes = PrefixLM(tiny("llama")), []
    layer = lm._head._stock
    monkeypatch.setattr(lm._head, "_stock", lambda h: (shapes.append(tuple(h.shape[:2])), layer(h))[1])
    batch = batch_of([tokens(6)], [tokens(6, seed=1)])
    few = replace(batch, target_index_M=torch.tensor([7, 2, 4]), target_ids_M=torch.tensor([5, 6, 7]))
    lm.loss(few, None, ())
    assert shapes == {1: [(1, 1)] * 3, 2: [(1, 2), (1, 1)], 3: [(1, 3)]}[num_rows]
    lm.logits(few, None, ())
    assert shapes[-1] == (1, 3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "bart", "gpt2"])
@pytest.mark.parametrize("chunk", [100, 3000, 10**9])
@pytest.mark.parametrize("block", [1, 10**9])
def test_a_loss_within_the_output_layer_is_that_of_its_logits(
    family: str, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood._CHUNK_BYTES, "cpu", chunk)
    monkeypatch.setitem(likelihood._BLOCK_NUMBERS, "cpu", block)
    lm = PrefixLM(tiny(family))
    batch, table_PD = batch_of([tokens(9), tokens(4, seed=1)]), noisy_table(lm)
    assert lm._findings.finish is not None
    loss, grad_PD = grad_of(lm, batch, table_PD)
    plain = summed_nll(lm.logits(batch, table_PD, lm.slots), batch.target_ids_M)
    (plain_PD,) = torch.autograd.grad(plain, table_PD)
    assert distance(loss, plain) < EXACT
    assert distance(grad_PD, plain_PD) < EXACT


def test_logits_that_nobody_knows_how_to_finish_are_computed_at_once(llama: PrefixLM) -> None:
    batch, table_PD = batch_of([tokens(9)]), noisy_table(llama)
    loss, grad_PD = grad_of(llama, batch, table_PD)
    llama._findings = replace(llama._findings, finish=None)
    whole, whole_PD = grad_of(llama, batch, table_PD)
    assert distance(loss, whole) < EXACT
    assert distance(grad_PD, whole_PD) < EXACT


@pytest.mark.parametrize("chunk", [100, 10**9])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "bart", "gpt2"])
def test_the_loss_of_each_target_is_a_part_of_the_whole(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood._CHUNK_BYTES, "cpu", chunk)
    lm = PrefixLM(tiny(family))
    batch, table_PD = batch_of([tokens(9), tokens(4, seed=1)]), noisy_table(lm)
    each_M = lm.nll_of_each(batch, table_PD, lm.slots)
    assert not each_M.requires_grad
    assert distance(each_M.sum(), lm.loss(batch, table_PD, lm.slots)) < EXACT
    at = torch.tensor([11, 3])
    some = replace(batch, target_index_M=batch.target_index_M[at], target_ids_M=batch.target_ids_M[at])
    assert distance(lm.nll_of_each(some, table_PD, lm.slots), each_M[at]) < EXACT
    lm._findings = replace(lm._findings, finish=None)
    assert distance(lm.nll_of_each(batch, table_PD, lm.slots), each_M) < EXACT
    none = replace(batch, target_index_M=torch.arange(0), target_ids_M=torch.arange(0))
    with calls_of(lm.base) as calls:
        assert lm.nll_of_each(none, table_PD, lm.slots).tolist() == []
    assert len(calls) == 1, "its ranks would wait for it"


def test_without_gradients_the_output_layer_has_none_either(llama: PrefixLM) -> None:
    batch = batch_of([tokens(9)])
    with torch.no_grad():
        loss = llama.loss(batch, noisy_table(llama), llama.slots)
    assert not loss.requires_grad
    assert distance(loss, grad_of(llama, batch, noisy_table(llama))[0]) == 0


def test_bfloat16_is_near_float32_and_is_summed_in_float64() -> None:
    near, exact = PrefixLM(tiny("llama").bfloat16()), PrefixLM(tiny("llama").float())
    batch, table_PD = batch_of([tokens(9), tokens(7, seed=1)]), noisy_table(exact).float()
    (loss, grad_PD), (true_loss, true_PD) = (grad_of(lm, batch, table_PD) for lm in (near, exact))
    assert (loss.dtype, grad_PD.dtype) == (torch.float64, torch.float32)
    assert loss.item() == pytest.approx(true_loss.item(), rel=0.02)
    assert torch.nn.functional.cosine_similarity(grad_PD.flatten(), true_PD.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("family", "dropouts"),
    [("gpt2", ["attn_pdrop", "resid_pdrop", "embd_pdrop"]), ("llama", ["attention_dropout"])],
)
def test_dropout_is_off_even_in_train_mode(family: str, dropouts: list[str]) -> None:
    config = tiny_config(family)
    for name in dropouts:
        setattr(config, name, 0.5)
    lm = PrefixLM(AutoModelForCausalLM.from_config(config).double().requires_grad_(False), recompute=True)
    batch, table_PD = batch_of([tokens(9)]), noisy_table(lm)
    first, _ = grad_of(lm, batch, table_PD)
    lm.base.train()
    assert grad_of(lm, batch, table_PD)[0].equal(first)


# ----------------------------------------------------------------------------------- recomputation, memory


@pytest.mark.parametrize("recompute", [False, True])
def test_each_layer_attends_once_more_if_it_is_recomputed(recompute: bool) -> None:
    lm = PrefixLM(tiny("llama"), recompute=recompute)
    table_PD = noisy_table(lm)
    with (
        calls_of(lm.base.model.layers[0].self_attn) as first,
        calls_of(lm.base.model.layers[3].self_attn) as last,
    ):
        loss = lm.loss(batch_of([tokens(8)]), table_PD, lm.slots)
        assert (len(first), len(last)) == (1, 1)
        loss.backward()
    assert (len(first), len(last)) == ((2, 2) if recompute else (1, 1))


def test_the_lowest_layers_are_computed_again() -> None:
    lm, plain = PrefixLM(tiny("llama"), recompute=3), PrefixLM(tiny("llama"))
    batch, table_PD = batch_of([tokens(8), tokens(3)]), noisy_table(lm)
    with ExitStack() as stack:
        calls = [stack.enter_context(calls_of(layer.self_attn)) for layer in lm.base.model.layers]
        loss, grad_PD = grad_of(lm, batch, table_PD)
    assert [len(made) for made in calls] == [2, 2, 2, 1]
    plain_loss, plain_PD = grad_of(plain, batch, table_PD)
    assert loss.equal(plain_loss)
    assert grad_PD.equal(plain_PD)


def test_no_more_layers_are_computed_again_than_there_are() -> None:
    with pytest.raises(ModelError, match=r"model\.recompute: 5, but LlamaForCausalLM has 4 layers that can"):
        PrefixLM(tiny("llama"), recompute=5)


class Kept:
    """A tensor that autograd has saved, as long as it keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_by_layers(lm: PrefixLM, slots: Any) -> list[list[Tensor]]:
    """What the backward pass of a loss has been left by each layer."""
    layers = repeatable_layers(lm.base)
    saved: list[list[weakref.ref[Kept]]] = [[] for _ in [*layers, None]]
    now = [len(layers)]  # the number of the layer that runs; that of none is the last

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        saved[now[0]].append(weakref.ref(kept))
        return kept

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: now.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: now.__setitem__(0, len(layers)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = lm.loss(batch_of([tokens(60)]), noisy_table(lm, slots=slots), slots)
    alive = [[kept.tensor for ref in refs if (kept := ref())] for refs in saved[:-1]]
    loss.backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in lm.base.parameters())
    return alive


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_a_layer_that_is_computed_again_keeps_its_input_and_nothing_else(family: str) -> None:
    lm = PrefixLM(tiny(family), recompute=3)
    width = lm.base.config.hidden_size
    *again, last = kept_by_layers(lm, lm.slots)
    for kept in again:
        hidden = [tensor for tensor in kept if tensor.dtype.is_floating_point]  # and GPT-2's mask, for all
        assert [tensor.shape for tensor in hidden] == [(1, 60, width)]
        assert sum(tensor.nbytes for tensor in kept) < sum(tensor.nbytes for tensor in last) / 4


@pytest.mark.parametrize("recompute", [False, True, 2])
def test_nothing_is_kept_of_layers_below_the_lowest_prefix(recompute: bool | int) -> None:
    lm = PrefixLM(tiny("llama"), recompute=recompute)
    with calls_of(lm.base.model.layers[1]) as below, calls_of(lm.base.model.layers[2].self_attn) as lowest:
        kept = kept_by_layers(lm, lm.slots[2:])
    assert [bool(tensors) for tensors in kept] == [False, False, True, True]
    assert (len(below), len(lowest)) == (1, 2 if recompute is True else 1)


def test_a_base_that_was_recomputed_still_generates_with_its_cache() -> None:
    lm = PrefixLM(tiny("llama"), recompute=True)
    table_PD = noisy_table(lm)
    before = answers(lm, [tokens(5).tolist()], table_PD)
    grad_of(lm, batch_of([tokens(8)]), table_PD)
    with calls_of(lm.base.model.layers[0]) as calls:
        assert answers(lm, [tokens(5).tolist()], table_PD) == before
    assert len(calls) == 4
    assert not any(module.training for module in lm.base.modules())


def test_two_models_at_once_keep_their_own_prefix() -> None:
    one, other = (PrefixLM(tiny(family), recompute=True) for family in ("llama", "qwen2"))
    batch, one_PD, other_PD = batch_of([tokens(8), tokens(3)]), noisy_table(one), noisy_table(other)
    expected = [grad_of(lm, batch, table_PD)[1] for lm, table_PD in ((one, one_PD), (other, other_PD))]
    losses = one.loss(batch, one_PD, one.slots), other.loss(batch, other_PD, other.slots)
    for loss in losses:
        loss.backward()
    assert [one_PD.grad, other_PD.grad] == [pytest.approx(grad, abs=0) for grad in expected]


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_detached_prefix_is_neither_seen_nor_kept(family: str) -> None:
    base, whole = tiny(family), batch_of([tokens(8)])
    stock_TV = base(input_ids=whole.ids_BT).logits[0]
    lm = PrefixLM(base)
    table_PD = noisy_table(lm) * 1.0  # no leaf: it has a graph
    kept = weakref.ref(table_PD)
    lm.loss(whole, table_PD, lm.slots).backward()
    lm.detach()
    del table_PD
    gc.collect()
    assert kept() is None
    assert distance(base(input_ids=whole.ids_BT).logits[0], stock_TV) < EXACT


def test_whoever_calls_the_base_gets_the_prefix(llama: PrefixLM) -> None:
    table_PD, text = noisy_table(llama, length=3), batch_of([tokens(8)])
    with llama.prefixed(table_PD, llama.slots):
        theirs = llama.base(input_ids=text.ids_BT, position_ids=text.positions_BT + 3).logits[0]
    assert distance(theirs, llama.logits(text, table_PD, llama.slots)) < EXACT


def test_attention_that_was_exchanged_is_noticed(llama: PrefixLM) -> None:
    llama.base.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="prefix was not seen"):
        llama.loss(batch_of([tokens(8)]), noisy_table(llama), llama.slots)


# ----------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("choice", "own_calls"), [("auto", 0), ("sdpa", 0), ("eager", 4)])
def test_the_attention_asked_for_is_used(
    choice: Any, own_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, calls, own = PrefixLM(tiny("llama"), attention=choice), [], modeling_llama.eager_attention_forward

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(None)
        return own(*args, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", spy)
    lm.loss(batch_of([tokens(8)]), noisy_table(lm), lm.slots)
    assert len(calls) == own_calls


def test_sdpa_is_refused_where_it_would_leave_something_out() -> None:
    with pytest.raises(ModelError, match="sdpa, but the attention of gemma2"):
        PrefixLM(tiny("gemma2"), attention="sdpa")


# ------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart"])
def test_a_step_mixes_no_devices_and_waits_for_none(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device a number that is read, or a tensor that lies elsewhere, is an error."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda _: True)  # else it reads one number a mask
    meta = torch.device("meta")
    lm = moved(PrefixLM(tiny(family), recompute=True), meta)
    batch = batch_of([tokens(5), tokens(4)]).to(meta)
    with pytest.raises(RuntimeError, match="meta tensors"):
        batch.ids_BT.sum().item()
    table_PD = noisy_table(lm).detach().to(meta).requires_grad_()
    lm.loss(batch, table_PD, lm.slots).backward()
    assert table_PD.grad is not None


def moved(lm: PrefixLM, device: torch.device) -> PrefixLM:
    lm.base.to(device)
    lm.device = device
    return lm


class Sendings(TorchDispatchMode):
    """Counts tensors that go to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += result.device != args[0].device
        return result


def test_a_prefix_that_lies_elsewhere_is_sent_once_and_not_at_every_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of an instruction, which is computed on the CPU: the host would wait for each."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda _: True)  # else it reads one number a mask
    meta = torch.device("meta")
    lm = PrefixLM(tiny("llama"))
    table_PD, batch = noisy_table(lm).detach(), batch_of([tokens(5)])
    moved(lm, meta)
    with Sendings() as sendings:
        lm.loss(batch.to(meta), table_PD, lm.slots)
    assert sendings.count == len(batch.tensors()) + 1
