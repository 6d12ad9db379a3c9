"""Loading by slices gives what transformers' own loading gives, and reads no more than a rank holds.

What transformers makes of a checkpoint in one process is the standard: parameters and buffers bit for bit,
types, ties, and whatever else can be seen of the model. Bytes are counted where the kernel is asked for them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from prefix_ds.dist import joined_world
from prefix_ds.engine import filling
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import whole_tensors
from prefix_ds.int8 import quantised
from prefix_ds.loading import load_base
from prefix_ds.promise import Promise, kept
from tests.loaded import assert_same_model, config_for, counting, loaded_whole, numbers
from tests.ranks import on_ranks
from tests.tiny_models import FAMILIES, tiny, tiny_config
from tests.workshop import base_folder

# transformers itself does not load these from a folder: it saves the configuration of their text half.
NOT_LOADED = {"emu3", "mllama", "musicgen", "musicgen_melody"}
NOT_MADE = {
    "gemma3n": "needs timm",
    "gemma4_assistant": "needs another model's configuration",
    "gemma4_unified_assistant": "needs another model's configuration",
}
# Read in more than a rank's share, with a reason.
READ_TWICE = {"inkling2_text": "two parameters are made of one tensor, by an operation on all of it"}

WEIGHTS = "model.safetensors"


class Numbers:
    """0 to 5, in two rows."""

    shape, dtype = (2, 3), torch.float32

    def read(self, start, stop):
        return torch.arange(6.0)[start:stop]


@pytest.fixture
def counted(monkeypatch):
    """Bytes asked of the kernel, in a list of one."""
    return counting(monkeypatch.setattr)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NOT_LOADED | NOT_MADE.keys()])
def test_a_family_loads_as_transformers_loads_it(family, tmp_path, counted):
    tiny(family).float().save_pretrained(tmp_path)
    mine = load_base(config_for(tmp_path, "model.dtype=bfloat16").model)
    assert_same_model(mine, loaded_whole(tmp_path, "bfloat16"))
    assert counted[0] <= (tmp_path / WEIGHTS).stat().st_size or family in READ_TWICE


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
def test_numbers_stored_in_any_type_in_several_files(tmp_path, stored):
    tiny("mixtral").to(getattr(torch, stored)).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / f"{WEIGHTS}.index.json").exists()
    for dtype in ("float32", "bfloat16"):
        mine = load_base(config_for(tmp_path, f"model.dtype={dtype}").model)
        assert_same_model(mine, loaded_whole(tmp_path, dtype))


def odd(folder):
    """GPT-2 with output tied to input, and sizes that neither 2 nor 3 divide."""
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=1001, n_embd=115, n_layer=2, n_head=5, n_positions=65, bos_token_id=0)
    ).save_pretrained(folder)


def read_by_the_kernel():
    with Path("/proc/self/io").open() as file:
        return int(file.readline().split()[1])


ALL, LARGE = ({"stage3_param_persistence_threshold": size} for size in (0, 500))  # what is in shards
HOST = {"offload_param": {"device": "cpu", "pin_memory": True}}
CASES = [  # folder, keys, settings of ZeRO
    ("odd", ["model.dtype=float32"], ALL),
    ("odd", ["model.bits=8", "model.vocabulary_bits=8"], ALL),
    ("odd", ["model.dtype=bfloat16"], LARGE | HOST),
    ("mixtral", ["model.bits=8"], LARGE),
    ("gpt_oss", ["model.dtype=bfloat16"], ALL),
]


def loaded_in_shards(folder):
    """Of each case all tensors, gathered on rank 0, and the bytes asked for, read by the kernel, and held."""
    total = counting()
    filling._PIECE_NUMBERS, filling._AGREE_EVERY_BYTES = 5003, 100_000
    with joined_world() as world:
        return [in_shards_twice(folder / name, *case, world, total) for name, *case in CASES]


def in_shards_twice(folder, keys, zero, world, total):
    """The second time nothing but the checkpoint is read: no module, no fact of the machine."""
    config = config_for(folder, *keys)
    settings = deepspeed_settings(config, world.size)
    settings["zero_optimization"] |= zero
    in_shards(load_base(config.model), settings)
    base = load_base(config.model)
    before, total[0] = read_by_the_kernel(), 0
    base = in_shards(base, settings)
    of_kernel = read_by_the_kernel() - before
    stored = [p for name, p in base.named_parameters() if not name.endswith("scale")]
    held = sum(p.ds_tensor.numel() * 4 for p in stored)  # the files are in float32
    whole = whole_tensors(base, keep=world.is_first)
    return {name: tensor.float().numpy() for name, tensor in whole.items()}, total[0], of_kernel, held


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_read_what_they_hold(tmp_path, size):
    odd(tmp_path / "odd")
    for family in ("mixtral", "gpt_oss"):
        tiny(family).float().save_pretrained(tmp_path / family)
    ranks = on_ranks(size, loaded_in_shards, tmp_path)
    for number, (folder, keys, _) in enumerate(CASES):
        base = load_base(config_for(tmp_path / folder, *keys).model)
        expected = {name: numbers(p, 1) for name, p in base.named_parameters(remove_duplicate=False)}
        found = ranks[0][number][0]
        assert expected.keys() <= found.keys()
        for name, tensor in expected.items():
            assert torch.equal(torch.from_numpy(found[name]), tensor.float()), name
        for answers in ranks:
            _, asked, of_kernel, held = answers[number]
            assert max(asked, of_kernel) <= 1.1 * held, (folder, keys)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "llama"])
def test_8_bits_are_the_quantised_rows_of_what_is_loaded(tmp_path, family):
    tiny(family).float().save_pretrained(tmp_path)
    base = load_base(config_for(tmp_path, "model.bits=8").model)
    whole = dict(load_base(config_for(tmp_path).model).named_parameters())
    for name, parameter in base.named_parameters():
        if parameter.dtype == torch.int8:
            values, scales = quantised(numbers(whole.pop(name), 1))
            assert numbers(parameter, 3).equal(values), name
            other = f"{name.removesuffix('weight')}scale" if name.endswith("weight") else f"{name}_scale"
            assert numbers(base.get_parameter(other), 2).equal(scales), name
        elif name in whole:
            assert numbers(parameter, 1).equal(numbers(whole.pop(name), 1)), name
    assert not whole


def stored_by_bitsandbytes(folder):
    """The folder's linear layers as bitsandbytes writes them; the numbers they stand for."""
    tensors, meant = load_file(folder / WEIGHTS), {}
    for name in [name for name in tensors if "_proj" in name]:
        values, scales = quantised(tensors[name])
        tensors[name], meant[name] = values, values * scales[:, None]
        tensors[f"{name.removesuffix('.weight')}.SCB"] = scales * 127.0
        tensors[f"{name}_format"] = torch.tensor(0, dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantisation = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return tensors, meant


@pytest.mark.parametrize("bits", [8, 16])
def test_a_checkpoint_of_bitsandbytes(tmp_path, bits):
    tensors, meant = stored_by_bitsandbytes(base_folder(tmp_path))
    base = load_base(config_for(tmp_path, f"model.bits={bits}").model)
    found = dict(base.named_parameters())
    for name, expected in meant.items():
        if bits == 16:
            assert numbers(found[name], 3) == pytest.approx(expected, rel=1e-6)
        else:
            assert torch.equal(numbers(found[name], 3), tensors[name])
            scales = numbers(found[name.replace("weight", "scale")], 3)
            assert scales == pytest.approx(expected.abs().amax(dim=1) / 127, rel=1e-6)


def put_in_cache(folder, cache, revision="main"):
    """A folder as huggingface_hub keeps a repository that was downloaded."""
    commit = ("1" if revision == "main" else "2") * 40
    repository = cache / "models--someone--base"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("largest", ["100KB", "1GB"])
def test_a_base_of_the_hub_that_was_downloaded(tmp_path, monkeypatch, largest):
    for seed, revision in enumerate(["main", "other"]):
        model = LlamaForCausalLM(tiny_config("llama"))
        model.lm_head.weight.data.fill_(seed)
        model.save_pretrained(tmp_path / revision, max_shard_size=largest)
        put_in_cache(tmp_path / revision, tmp_path / "cache", revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for seed, revision in enumerate(["main", "other"]):
        mine = load_base(config_for("someone/base", f"model.revision={revision}").model)
        assert_same_model(mine, loaded_whole("someone/base", "float32", revision=revision))
        assert (numbers(mine.lm_head.weight, 1) == seed).all()


def test_one_file_comes_before_an_index(tmp_path):
    """As in transformers; an index may be left of an earlier save."""
    folder = base_folder(tmp_path)
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    assert_same_model(load_base(config_for(folder).model), loaded_whole(folder, "float32"))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_weight_that_the_files_hold_twice(tmp_path, same):
    """One parameter if both are equal, to the last number; as transformers has it, two if not."""
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 0 if same else 1
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    mine = load_base(config_for(tmp_path).model)
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == same
    assert_same_model(mine, loaded_whole(tmp_path, "float32"))


def test_a_promise_takes_the_type_of_another_tensor():
    like = torch.zeros(1, dtype=torch.bfloat16)
    assert torch.equal(kept(Promise.of(Numbers()).to(like)), torch.arange(6.0).view(2, 3).to(like))
