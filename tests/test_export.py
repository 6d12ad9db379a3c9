"""Exchange with PEFT: the same numbers in both formats, or a refusal where PEFT's cannot hold them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefix_ds.checkpoint import PrefixFacts, read_prefix, write_prefix
from prefix_ds.errors import ModelError, RunError
from prefix_ds.export import export_peft, import_peft
from tests.saving import Shape

torch.set_num_threads(1)
LAYERS = 12  # "h.10" sorts before "h.2"
FACTS = PrefixFacts("acme/tiny", "main", "llama", "ab12", LAYERS, 40, 1.25, "0.1.0")
Slots = dict[str, tuple[Tensor, Tensor]]


def random_slots(heads: int = 2, length: int = 5, dim: int = 4, layers: int = LAYERS) -> Slots:
    shape = (heads, length, dim)
    return {f"model.layers.{i}.self_attn": (torch.randn(shape), torch.randn(shape)) for i in range(layers)}


def shapes(slots: Slots) -> list[Shape]:
    return [Shape(n, k.shape[0], k.shape[2], v.shape[2]) for n, (k, v) in slots.items()]


def saved(run: Path, slots: Slots, facts: PrefixFacts = FACTS) -> Path:
    write_prefix(run / "prefix", slots, facts)
    return run


def assert_same(found: Slots, expected: Slots) -> None:
    assert list(found) == list(expected)
    for name, pair in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found[name], pair, strict=True))


def test_out_and_in_again_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    slots = random_slots()
    export_peft(saved(tmp_path, slots), tmp_path / "peft")
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    import_peft(tmp_path / "peft", tmp_path / "back", shapes(slots), FACTS)
    found = read_prefix(tmp_path / "back")
    assert_same(found.slots, slots)
    assert found.facts == FACTS


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4))


BASES = [(llama, 2, 12), (gpt2, 4, 8)]


@pytest.mark.parametrize(("base", "heads", "dim"), BASES)
def test_peft_reads_our_export_as_the_same_keys_and_values(
    tmp_path: Path, base: object, heads: int, dim: int
) -> None:
    from peft import PeftModel

    slots = random_slots(heads, 5, dim, layers=3)
    facts = PrefixFacts("", None, "any", "", 3, 0, None, "0.1.0")
    export_peft(saved(tmp_path, slots, facts), tmp_path / "peft")
    model = PeftModel.from_pretrained(base(), tmp_path / "peft")  # type: ignore[operator]
    cache = model.get_prompt(batch_size=1)
    for layer, (key_NPH, value_NPH) in zip(cache.layers, slots.values(), strict=True):
        assert torch.equal(layer.keys[0], key_NPH)
        assert torch.equal(layer.values[0], value_NPH)
    assert model(input_ids=torch.arange(7)[None]).logits.shape == (1, 7, 50)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("base", "heads", "dim"), BASES)
def test_pefts_own_prefix_is_read_as_the_same_keys_and_values(
    tmp_path: Path, base: object, heads: int, dim: int, projection: bool
) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection)
    model = get_peft_model(base(), config)  # type: ignore[operator]
    model.save_pretrained(tmp_path / "peft")
    slots = [Shape(f"layer.{i}", heads, dim, dim) for i in range(3)]
    import_peft(tmp_path / "peft", tmp_path / "ours", slots, FACTS)
    for layer, pair in zip(
        model.get_prompt(1).layers, read_prefix(tmp_path / "ours").slots.values(), strict=True
    ):
        assert torch.equal(layer.keys[0], pair[0])
        assert torch.equal(layer.values[0], pair[1])


def without_layer(slots: Slots) -> Slots:
    return dict(list(slots.items())[1:])


def with_short_values(slots: Slots) -> Slots:
    return {name: (key, value[..., :3]) for name, (key, value) in slots.items()}


def with_one_wider(slots: Slots) -> Slots:
    return slots | {"model.layers.3.self_attn": (torch.randn(2, 5, 6), torch.randn(2, 5, 6))}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_layer, "11 attentions have one, of 12 layers; it needs all"),
        (with_short_values, r"model\.layers\.0\.self_attn has keys of 4 and values of 3"),
        (
            with_one_wider,
            r"model\.layers\.0\.self_attn and model\.layers\.3\.self_attn have different shapes",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, change: object, words: str) -> None:
    run = saved(tmp_path, change(random_slots()))  # type: ignore[operator]
    with pytest.raises(ModelError, match=f"cannot hold this prefix: {words}"):
        export_peft(run, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (random_slots(layers=11), "has 12 layers of 2 heads of 4, the base 11 attentions"),
        (random_slots(heads=4), r"but model\.layers\.0\.self_attn of the base has 4 heads, keys of 4"),
        (with_short_values(random_slots()), "keys of 4 and values of 3"),
    ],
)
def test_the_adapter_of_another_base_is_refused(tmp_path: Path, slots: Slots, words: str) -> None:
    export_peft(saved(tmp_path, random_slots()), tmp_path / "peft")
    with pytest.raises(ModelError, match=words):
        import_peft(tmp_path / "peft", tmp_path / "ours", shapes(slots), FACTS)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LORA"}, "expected a PREFIX_TUNING adapter.*found LORA"),
        ({"num_transformer_submodules": 2}, "expected a PREFIX_TUNING adapter of a decoder"),
        ({"num_layers": None}, "with all sizes"),
        ({"num_layers": 11}, r"prompt_embeddings is \[5, 192\], adapter_config.json describes \[5, 176\]"),
        ({"num_attention_heads": 3}, "prompt_embeddings is"),
    ],
)
def test_what_is_no_prefix_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    export_peft(saved(tmp_path, random_slots()), tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(RunError, match=words):
        import_peft(tmp_path / "peft", tmp_path / "ours", shapes(random_slots()), FACTS)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    export_peft(saved(tmp_path, random_slots()), tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "adapter_model.bin")
    with pytest.raises(RunError, match="holds a pickle"):
        import_peft(tmp_path / "peft", tmp_path / "ours", shapes(random_slots()), FACTS)
    shutil.rmtree(tmp_path / "peft")
    with pytest.raises(RunError, match=r"config\.json: no such file; expected a PEFT adapter's folder$"):
        import_peft(tmp_path / "peft", tmp_path / "ours", shapes(random_slots()), FACTS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "it has no 'peft_type'$"),
        ("{", "adapter: Expecting property"),
        ("[]", "adapter: list indices"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said_in_words(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(RunError, match=words):
        import_peft(tmp_path, tmp_path / "ours", shapes(random_slots()), FACTS)


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    run = saved(tmp_path, random_slots())
    (tmp_path / "out").mkdir()
    export_peft(run, tmp_path / "out")  # an empty folder is taken
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunError, match="exists and is not empty"):
        export_peft(run, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        export_peft(run, tmp_path / "file" / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"prefix", "out", "file"}
