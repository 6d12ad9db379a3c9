"""Weights in 8 bits: what is stored, what is computed with it, and how far that is from 16 bits."""

import pytest
import torch
import transformers
from torch.nn import functional

from prefix_ds.config import ModelKeys, parse_config
from prefix_ds.dist import joined_world
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.saving import saving_parameters
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.errors import ConfigError, ModelError
from prefix_ds.int8 import product, quantised
from prefix_ds.int8.activations import times_rows_in_int8
from prefix_ds.int8.experts import _run, stacks_of
from prefix_ds.int8.modules import Int8Linear
from prefix_ds.int8.product import product_of, times_columns, times_rows
from prefix_ds.loading import load_base
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import random_table
from prefix_ds.promise import kept
from tests.laws import batch_of, tokens
from tests.ranks import on_ranks
from tests.tiny_models import tiny

DENSE = ["llama", "gpt2", "gemma2"]
PAIRS = [(16, None), (8, 6.0)]  # bits, outliers
EXPERTS = ["qwen3_moe", "deepseek_v3"]
INTO_RESULTS = ["gemma3n_text", "llama4_text"]  # their code writes into what a layer gives
REACHED_INTO = ["jamba", "glm_moe_dsa", "longcat_flash"]  # into layers, by others
FAMILIES = [*DENSE, *EXPERTS]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_quantised_as_bitsandbytes_does_it(dtype):
    from bitsandbytes.functional import int8_vectorwise_quant

    rows = random(37, 64).to(dtype)
    rows[3] = 0
    values, scale = quantised(rows)
    theirs, largest, _ = int8_vectorwise_quant(rows)
    assert (values.int() - theirs.int()).abs().max() <= 1  # rounded in their type, or in float32
    assert (values != theirs).float().mean() < 0.01
    assert torch.allclose(scale, largest.flatten() / 127)
    assert torch.equal(values[3], torch.zeros(64, dtype=torch.int8))
    assert float(scale[3]) == 0


def test_a_row_is_off_by_half_a_step_at_most():
    rows = random(5, 7, 33)
    values, scale = quantised(rows)
    assert ((values * scale[..., None] - rows).abs() <= scale[..., None] / 2 * (1 + 1e-5)).all()


def test_a_row_that_is_no_number_has_no_scale():
    rows = random(3, 8)
    rows[1, 2], rows[2, 0] = float("nan"), float("inf")
    assert quantised(rows)[1].isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(64, 48), (3000, 1024)])  # one tile, and several
@pytest.mark.parametrize("times", [times_rows, times_columns])
def test_a_product_and_its_gradient_are_those_of_the_dequantised_weight(times, shape):
    values, scale = quantised(random(*shape))
    weight = values.double() * scale.double()[:, None]
    weight = weight.t() if times is times_rows else weight
    x = random(2, 5, len(weight), seed=1).requires_grad_()
    y = times(x, values, scale)
    assert torch.allclose(y.double(), x.double() @ weight, rtol=1e-4, atol=1e-3)
    (grad,) = torch.autograd.grad(y, x, y.detach())
    assert torch.allclose(grad.double(), y.double() @ weight.t(), rtol=1e-4, atol=1e-1)


def test_a_stack_is_a_matrix_at_a_time():
    values, scale = quantised(random(4, 12, 8))
    x = random(3, 8)
    assert torch.equal(times_rows(x, values, scale, 2), times_rows(x, values[2], scale[2]))


def test_no_layer_is_ever_cast_whole():
    """The largest tensor made while a weight of 8 Mi numbers is used has a quarter of that."""
    values, scale = quantised(random(8192, 1024))
    x = random(4, 1024).bfloat16().requires_grad_()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype != torch.int8:
                seen.append(result.numel())
            return result

    with Watch():
        times_rows(x, values, scale).sum().backward()
    assert max(seen) <= values.numel() / 4


def test_results_are_scaled_in_pieces():
    """A product with float32 scales is in float32: of the logits of a vocabulary, that is never whole."""
    values, scale = quantised(random(65536, 64))
    x = random(512, 64).bfloat16().requires_grad_()
    wide = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                wide.append(result.numel())
            return result

    with Watch():
        y = times_rows(x, values, scale)
        torch.autograd.backward(y, torch.ones_like(y))
    assert max(wide) <= y.numel() / 4


@pytest.mark.parametrize("times", [times_rows, times_columns])
def test_a_product_of_no_rows(times):
    """Of experts that no token of this rank hits."""
    values, scale = quantised(random(8, 8))
    x = torch.zeros(0, 8, requires_grad=True)
    times(x, values, scale).sum().backward()
    assert x.grad.shape == (0, 8)


def test_int8_activations_leave_their_input_as_it_is():
    """What made it may need it for its own gradient, as ReLU does."""
    values, scale = quantised(random(8, 32))
    x = random(3, 32)
    x[0, 5] = 40.0
    x.requires_grad_()
    times_rows_in_int8(6.0)(x.relu(), values, scale).sum().backward()
    assert x.grad is not None


def test_only_the_parameters_themselves_are_saved():
    values = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    scale = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        times_rows(torch.ones(2, 4, requires_grad=True), values, scale)
    assert len(saved) == 2
    assert saved[0] is values
    assert saved[1] is scale


def test_a_layer_that_is_computed_again_leaves_its_last_product_out(monkeypatch):
    """All that it saves is there before; autograd's own products are left out too."""
    values, scale = quantised(random(8, 8))
    made = []
    monkeypatch.setattr(product, "product_of", lambda *words: made.append(None) or product_of(*words))

    def layer(x):
        return times_rows(times_rows(x, values, scale).tanh(), values, scale)

    x = random(2, 8).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert len(made) == 2
    y.sum().backward()
    assert len(made) == 2 + 1 + 2


def test_as_near_as_bitsandbytes_own_linear():
    """Both approximate the weight they were made of; bitsandbytes also quantises its input."""
    import bitsandbytes

    weight, x = random(96, 64).bfloat16(), random(32, 64, seed=1).bfloat16()
    theirs = bitsandbytes.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    theirs.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    theirs = theirs.to("cpu")
    values, scale = quantised(weight)
    ours = Int8Linear(
        *(torch.nn.Parameter(t, requires_grad=False) for t in (values, scale)), None, times_rows
    )
    exact = functional.linear(x, weight)
    error, their_error = ((y - exact).float().norm() / exact.float().norm() for y in (ours(x), theirs(x)))
    assert error < 0.01
    assert error <= their_error * 1.05
    assert (ours(x) - theirs(x)).float().norm() / exact.float().norm() < 0.02


@pytest.mark.parametrize("outlier", [None, 40.0])
def test_with_int8_activations_it_is_bitsandbytes_own_product(outlier):
    """The same numbers and the same gradient, an outlier apart or none. (Its module takes another way on a
    CPU, so its function is asked.)"""
    from bitsandbytes import MatmulLtState
    from bitsandbytes.autograd._functions import MatMul8bitLt

    weight, x = random(96, 64).bfloat16(), random(2, 16, 64, seed=1).bfloat16()
    if outlier is not None:
        x[0, 3, 5] = outlier
    values, scale = quantised(weight)
    state = MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = values, scale * 127, 6.0, False
    mine, others = (x.clone().requires_grad_() for _ in range(2))
    y, expected = (
        times_rows_in_int8(6.0)(mine, values, scale),
        MatMul8bitLt.apply(others, values, None, None, state),
    )
    assert torch.equal(y, expected)
    assert not y._is_view()
    towards = random(2, 16, 96, seed=2).bfloat16()
    (grad,) = torch.autograd.grad(y, mine, towards)
    (their_grad,) = torch.autograd.grad(expected, others, towards)
    assert (grad - their_grad).float().norm() / their_grad.float().norm() < 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for family in [*FAMILIES, *INTO_RESULTS, *REACHED_INTO]:
        tiny(family).float().save_pretrained(folder / family)
    return folder


def keys(folder, bits, vocabulary=16, dtype="float32"):
    return ModelKeys(name=str(folder), bits=bits, vocabulary_bits=vocabulary, dtype=dtype)


@pytest.mark.parametrize(
    ("family", "vocabulary"), [(f, v) for f in FAMILIES for v in (16, 8) if (f, v) != ("gemma2", 8)]
)
def test_all_large_weights_are_stored_in_8_bits(folders, family, vocabulary):
    base, plain = load_base(keys(folders / family, 8, vocabulary)), load_base(keys(folders / family, 16))
    wide = {name for name, p in base.named_parameters() if p.dim() > 1 and p.is_floating_point()}
    ends = {"wte", "wpe", "embed_tokens", "lm_head", "gate"}  # and the routers of experts
    left = {name for name in wide if name.split(".")[-2] not in ends and not name.endswith("_scale")}
    assert not left
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert (head.weight.dtype == torch.int8) == (vocabulary == 8)
    for name, parameter in base.named_parameters():
        if parameter.dtype == torch.int8:
            rows = kept(plain.get_parameter(name))
            assert torch.equal(kept(parameter), quantised(rows)[0]), name


def test_an_embedding_that_does_more_than_look_up_rows_is_not_exchanged_silently(folders):
    with pytest.raises(ModelError, match=r"model.vocabulary_bits: 8: the embedding of gemma2 \(Gemma2Text"):
        load_base(keys(folders / "gemma2", 8, 8))


def keep(base):
    """Puts a base's weights in the place of their promises."""
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(kept(parameter), requires_grad=False))


class Neighbour(torch.nn.Module):
    """A layer that computes with another's weight itself."""

    def __init__(self, base, reach):
        super().__init__()
        self.inside, self.reach = base.model.layers[1].mlp.down_proj, reach

    def forward(self, x):
        return self.reach(x, self.inside.weight)


@pytest.mark.parametrize(
    ("reach", "said"),
    [
        (lambda x, weight: x @ weight.float().t(), r"computes with .*mlp.inside.*: \[mlp.inside\]"),
        (lambda x, weight: x @ weight.t(), r"computes with .*mlp.inside.*: \[mlp.inside\]"),
        (lambda x, weight: x * weight[0, 0], r"computes with .*mlp.inside.*: \[mlp.inside\]"),
        (lambda x, weight: x.to(weight.dtype), "casts what goes into a layer"),
    ],
)
def test_weights_used_without_their_scales_are_found(folders, reach, said):
    base = load_base(keys(folders / "llama", 8))
    keep(base)
    base.model.layers[1].mlp = Neighbour(base, reach)
    with pytest.raises(ModelError, match=said):
        PrefixLM(base)


def test_experts_of_one_layer_stay_in_16_bits(folders):
    """Others run by a function of ours, which these have no scales for."""
    some = keys(folders / "qwen3_moe", 8).model_copy(update={"in_16_bits": ["layers.0.mlp.experts"]})
    base = load_base(some)
    keep(base)
    first, second, *_ = (module for module in base.modules() if "is_transposed" in vars(module))
    assert [each.gate_up_proj.dtype == torch.int8 for each in (first, second)] == [False, True]
    assert base(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits.isfinite().all()


def test_layers_that_are_left_in_16_bits(folders):
    base = load_base(
        keys(folders / "llama", 8).model_copy(update={"in_16_bits": ["q_proj", "layers.1.mlp.up_proj"]})
    )
    left = {name for name, p in base.named_parameters() if p.dim() == 2 and p.dtype != torch.int8}
    ours = {name for name in left if "layers" in name}
    assert ours == {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(4)} | {
        "model.layers.1.mlp.up_proj.weight"
    }
    with pytest.raises(ModelError, match=r"model.in_16_bits: proj: no layer of the base"):
        load_base(keys(folders / "llama", 8).model_copy(update={"in_16_bits": ["proj"]}))


@pytest.mark.parametrize("family", EXPERTS)
def test_the_order_of_modules_does_not_depend_on_where_tokens_go(folders, family):
    """ZeRO-3 stops fetching ahead when it does: one expert's activation after another's is another order."""
    base = load_base(keys(folders / family, 8))
    keep(base)
    orders, order = [], []
    for name, module in base.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: order.append(name))
    for ids in ([[7]], [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]):  # few experts, and many
        order.clear()
        base(input_ids=torch.tensor(ids), use_cache=False)
        orders.append(list(order))
    assert any(name.endswith("act_fn") for name in orders[0])
    assert orders[0] == orders[1]


@pytest.mark.parametrize("family", EXPERTS)
def test_the_gradient_of_a_layer_does_not_pass_all_tokens_once_for_each_expert(folders, family):
    """Rows cut out one by one would: the gradient of a slice is as large as what it was cut from."""
    base = load_base(keys(folders / family, 8))
    module = next(module for module in base.modules() if stacks_of(module))
    keep(module)
    stack_NRK = getattr(module, stacks_of(module)[0])
    hidden_TE = torch.randn(12, stack_NRK.shape[2], dtype=base.dtype, requires_grad=True)
    index_TK = torch.arange(24).view(12, 2) % len(stack_NRK)
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        _run(module, hidden_TE, index_TK, torch.ones(12, 2, dtype=hidden_TE.dtype)).sum().backward()
    assert hidden_TE.grad is not None
    assert not [name for name in called if "slice_backward" in name]


def answers(folder, families, bits, recompute=False, outliers=None):
    """Logits and the gradient to the prefix, and what greedy decoding writes."""
    transformers.logging.disable_progress_bar()
    found = {}
    with joined_world() as world:
        for family in families:
            config = parse_config(
                f"model: {{name: {folder / family}, dtype: float32, bits: {bits}}}\n"
                "prefix: {init: random, length: 4}",
                [f"model.int8_outliers={outliers or ''}"],
            )
            settings = deepspeed_settings(config, world.size)
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            base = sharded(in_shards(load_base(config.model), settings), settings)
            lm = PrefixLM(base.module, recompute=recompute, device=world.device)
            table_PD = random_table(lm.slots, 4, 0.5, seed=0).requires_grad_()
            batch = batch_of([tokens(12, 1)], [tokens(12, 2)])
            with saving_parameters():
                logits_MV = lm.logits(batch, table_PD, lm.slots)
                loss = lm.loss(batch, table_PD, lm.slots)
            loss.backward()
            told = {"max_new_tokens": 6, "eos_ids": [], "pad_id": 0, "synced": world.size > 1}
            texts = lm.generate([[5, 6, 7], [8, 9]], table_PD.detach(), lm.slots, **told)
            lm.detach()
            found[family] = logits_MV.detach().numpy(), table_PD.grad.numpy(), texts
    return found


@pytest.fixture(scope="module")
def whole(folders):
    """The answers of bases in 8 bits, in one piece."""
    return on_ranks(1, answers, folders, FAMILIES, 8)[0]


def test_logits_and_the_gradient_to_the_prefix_are_near_those_of_16_bits(folders, whole):
    """On random weights, drawn wide: the hardest case, since nothing in them is redundant. (Of random
    experts, one that is nearly chosen may be chosen in 8 bits, and the logits of that token are others'.)"""
    (exact,) = on_ranks(1, answers, folders, DENSE, 16)
    for family in DENSE:
        logits, grad = (torch.from_numpy(t) for t in whole[family][:2])
        expected, expected_grad = (torch.from_numpy(t) for t in exact[family][:2])
        divergence = functional.kl_div(
            logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        assert divergence < 5e-3
        assert torch.cosine_similarity(grad.flatten(), expected_grad.flatten(), dim=0) > 0.99
        assert (grad - expected_grad).norm() / expected_grad.norm() < 0.15


def test_int8_activations_in_shards(folders):
    """Near those of 16 bits, if not as near as with the weights alone; 2 ranks are as one."""
    (exact,), (whole,) = (on_ranks(1, answers, folders, ["llama"], bits, False, o) for bits, o in PAIRS)
    expected, found = (torch.from_numpy(a["llama"][0]) for a in (exact, whole))
    divergence = functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert 0 < divergence < 0.02
    for shards in on_ranks(2, answers, folders, ["llama"], 8, False, 6.0):
        for mine, theirs in zip(shards["llama"][:2], whole["llama"][:2], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_families_whose_code_does_uncommon_things(folders):
    """They take a prefix in 8 bits, and their logits are near those of 16 bits, in the median token."""
    families = [*INTO_RESULTS, *REACHED_INTO]
    (exact,), (near,) = (on_ranks(1, answers, folders, families, bits) for bits in (16, 8))
    for family in families:
        logits, expected = torch.from_numpy(near[family][0]), torch.from_numpy(exact[family][0])
        divergence_M = functional.kl_div(
            logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        assert divergence_M.median() < 0.05, family


@pytest.mark.parametrize("recompute", [False, True])
def test_in_shards_as_whole(folders, whole, recompute):
    for found in on_ranks(2, answers, folders, FAMILIES, 8, recompute):
        for family in FAMILIES:
            for mine, expected in zip(found[family][:2], whole[family][:2], strict=True):
                assert mine == pytest.approx(expected, rel=1e-4, abs=1e-5), family
            assert found[family][2] == whole[family][2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model: {name: x, bits: 8}\ntrain: {method: full}", "model.bits: 8 is for a frozen base"),
        (
            "model: {name: x, vocabulary_bits: 8}\nprefix: {text: x}",
            "model.vocabulary_bits: 8 needs model.bits: 8",
        ),
        (
            "model: {name: x, in_16_bits: [lm_head]}\nprefix: {text: x}",
            "model.in_16_bits: all layers are in 16 bits",
        ),
        (
            "model: {name: x, int8_outliers: 6}\nprefix: {text: x}",
            "model.int8_outliers: needs model.bits: 8",
        ),
        ("model: {name: x, bits: 4}\nprefix: {text: x}", "model.bits"),
    ],
)
def test_keys_that_do_not_go_together(words, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(words)
