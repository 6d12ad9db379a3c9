"""A base that cannot be used: one line that names the file, the tensor or the reason, and no harm done."""

import json
import shutil

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_ds.errors import EXIT_USER, ModelError
from prefix_ds.loading.complaints import library_errors
from tests.ranks import command
from tests.refusals import refusal
from tests.tiny_models import tiny_config

WEIGHTS, TENSOR = "model.safetensors", "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def base(place, tmp_path):
    """A copy of the base, to be spoiled."""
    return shutil.copytree(place / "base", tmp_path / "base")


def problems(*words):
    """What `prefix-ds WORDS` has to say of a run that is wrong."""
    (ended,) = command(*words)
    assert ended.code == EXIT_USER, ended.err
    assert "Traceback" not in ended.err
    return ended.err


@pytest.fixture
def refused(place):
    """The line for a run on another base."""

    def refused(base, *overrides, size=1):
        shutil.rmtree(place / "run", ignore_errors=True)
        words = [f"model.name={base}", *overrides]
        return refusal("train", place / "run.yaml", *words, size=size, run=place / "run")

    return refused


def test_a_folder_that_is_no_base(refused, base, tmp_path):
    assert refused(tmp_path / "gone") == f"model.name: {tmp_path}/gone: there is no such folder"
    assert refused("gone").startswith("model.name: gone (no such folder, so a hub id): ")
    (base / "tokenizer.json").write_text("{")
    assert f"model.name: {base}: has no tokenizer that can be loaded (model.tokenizer can" in refused(base)
    (base / "config.json").write_text("{")
    assert "config.json' is not a valid JSON file" in refused(base)
    (base / "config.json").unlink()
    assert refused(base) == f"model.name: {base}: the folder has no config.json"


def test_a_tokenizer_of_a_kind_that_is_not_known_here(refused, base):
    """What `tokenizers` raises of it is a bare Exception."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "of tomorrow"}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"model.name: {base}: has no tokenizer that can be loaded" in refused(base)


def test_remote_code_that_wants_a_package_which_is_missing(refused, base):
    """Told before the data are read."""
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (base / "own.py").write_text(
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own:\n    def __init__(self, config):\n        import not_here\n"
    )
    line = refused(base, "model.trust_remote_code=true")
    assert "not_here" in line
    assert line.startswith(f"model.name: {base}: ")


def test_a_connection_that_breaks_while_weights_are_fetched():
    """Its error is no OSError."""
    with (
        pytest.raises(ModelError, match=r"model\.name: someone/base: connection reset"),
        library_errors("model.name: someone/base"),
    ):
        raise httpx2.ReadError("connection reset")


def test_pickled_weights_are_not_loaded(refused, base):
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    line = f"model.name: {base}: the folder has no .safetensors file (pickled weights are not loaded)"
    assert refused(base) == line


@pytest.mark.parametrize("keep", [0, 7, 2000, -1])
def test_weights_that_were_cut_short(refused, base, keep):
    content = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(content[:keep])
    assert refused(base).startswith(f"{base}/{WEIGHTS}: damaged or cut short: ")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({TENSOR: None}, f"missing tensors (1): {TENSOR}"),
        ({TENSOR: torch.zeros(3, 3)}, f"other shapes (1): ('{TENSOR}', "),
    ],
)
def test_a_tensor_that_is_missing_or_has_another_shape(refused, base, size, change, said):
    tensors = {name: t for name, t in (load_file(base / WEIGHTS) | change).items() if t is not None}
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    line = refused(base, size=size)
    assert line.startswith(f"model.name: {base}: its weights do not fit its config.json: {said}")


def test_a_missing_file_of_several(refused, base):
    tensors = load_file(base / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if name != TENSOR}, base / "one.safetensors")
    files = {name: "two.safetensors" if name == TENSOR else "one.safetensors" for name in tensors}
    (base / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (base / WEIGHTS).unlink()
    assert refused(base) == f"{base}/{WEIGHTS}.index.json: two.safetensors: there is no such file"


def test_an_unknown_family(refused, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    assert "has model type `lama` but Transformers does not recognize" in refused(base)


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_a_base_that_no_prefix_can_enter_is_refused_before_its_weights_are_read(refused, place, family):
    folder = place / family
    tiny_config(family).save_pretrained(folder)
    save_file({}, folder / WEIGHTS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "base" / name, folder / name)
    line = refused(folder)
    assert line.startswith(f"{family} cannot take a prefix: its layers never call the attention functions")


def test_a_family_that_is_known_not_to_work_is_refused_before_its_weights_are_read(refused, base):
    (base / "config.json").write_text(json.dumps({"model_type": "recurrent_gemma"}))
    assert refused(base).startswith("recurrent_gemma cannot take a prefix: its recurrent state")


def test_more_positions_than_the_base_has_learnt(refused, place):
    config = tiny_config("gpt2")
    config.n_positions, config.vocab_size = 40, 400
    AutoModelForCausalLM.from_config(config).float().save_pretrained(place / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "base" / name, place / "short" / name)
    start = ("prefix.init=random", "prefix.length=8")
    for size in (1, 2):
        line = refused(place / "short", "data.max_length=33", *start, size=size)
        assert line.startswith(
            "data.max_length: takes 41 positions with all that comes before; gpt2 has only"
        )
    assert "prefix.length: takes 41 positions" in refused(place / "short", "prefix.length=41")
    words = ["check", place / "run.yaml", f"model.name={place}/short"]
    assert "data.max_length: takes 41 positions" in problems(*words, "data.max_length=33", *start)
    words = [f"model.name={place}/short", "data.max_length=32", *start]
    (ended,) = command("train", place / "run.yaml", *words)
    assert ended.code == 0, ended.err
    long = place / "long.jsonl"
    long.write_text(json.dumps({"q": "the cat sees " * 20, "a": "the dog"}))
    words = ["evaluate", place / "run", f"data.test={long}", "data.max_length=64", "data.prompt={q}"]
    for size in (1, 2):
        line = refusal(*words, "data.target={a}", size=size, after_log=True)
        assert line.startswith("data.max_length: takes ")
    words = ["generate", place / "run", "--prompt", "the cat sees"]
    assert "generate.max_new_tokens: takes " in refusal(*words, "generate.max_new_tokens=40")


def test_a_tokenizer_with_a_token_that_the_base_has_not(refused, place, base):
    """Everywhere in one line: an index error on a CPU, a dead process on a GPU."""
    run = place / "whole"
    (ended,) = command("train", place / "run.yaml", f"model.name={base}", f"run.folder={run}")
    assert ended.code == 0, ended.err
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(place / "more")
    (place / "zebra.jsonl").write_text(json.dumps({"q": "the zebra sees", "a": "the zebra"}))
    more = [f"model.tokenizer={place}/more", "data.prompt={q}", "data.target={a}"]
    data = [f"data.{split}={place}/zebra.jsonl" for split in ("train", "valid", "test")]
    said = (
        f"has token {len(tokenizer) - 1}, and the base has {len(tokenizer) - 1}: is the tokenizer the base's"
    )
    assert f"data.train: {said}" in problems("check", place / "run.yaml", f"model.name={base}", *more, *data)
    assert f"data.test: {said}" in refusal("evaluate", run, *more, *data, after_log=True)
    assert f"a prompt {said}" in refusal("generate", run, "--prompt", "a zebra", *more, after_log=True)
    assert f"data.train: {said}" in refused(base, *more, *data)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{hidden_size: 32}", "model.config: pretrain needs a model_type"),
        ("{model_type: lama}", "model.config.model_type: lama: unknown; did you mean llama?"),
        (
            "{model_type: llama, hidden_sise: 32}",
            "model.config.hidden_sise: llama has no such size; did you mean hidden_size?",
        ),
        ("{model_type: llama, hidden_size: big}", "'hidden_size' expected int, got str (value: 'big')"),
        (
            "{model_type: llama, hidden_size: 30, num_attention_heads: 4}",
            "The hidden size (30) is not a multiple of the number of attention heads (4)",
        ),
    ],
)
def test_a_new_base_with_wrong_sizes(refused, config, said):
    line = refused("null", "train.method=pretrain", "data.prompt=", f"model.config={config}")
    assert "model.config" in line
    assert said in line
