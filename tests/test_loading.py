"""Loading by slices gives what transformers' own loading gives, and reads no more than a rank holds.

What transformers makes of a checkpoint in one process is the standard: parameters and buffers bit for bit,
types, ties, and whatever else can be seen of the model. Bytes are counted where the kernel is asked for them.
"""

import errno
import json
import os
import shutil
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from prefix_ds.config import parse_config
from prefix_ds.dist import joined_world
from prefix_ds.engine import filling
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import whole_tensors
from prefix_ds.errors import ModelError
from prefix_ds.int8 import quantised
from prefix_ds.loading import load_base
from prefix_ds.loading.tensor_file import TensorFile
from prefix_ds.promise import Promise, read
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

WEIGHTS, TENSOR = "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
ONE = "model-00001-of-00001.safetensors"


def config_for(folder, *overrides):
    text = f"model: {{name: {folder}, dtype: float32}}\nprefix: {{init: random, length: 3}}"
    return parse_config(text, overrides)


def loaded_whole(folder, dtype, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **more)


@pytest.fixture
def counted(monkeypatch):
    """Bytes asked of the kernel, in a list of one."""
    return counting(monkeypatch.setattr)


def counting(replace=setattr):
    total, real = [0], os.preadv

    def preadv(*words):
        count = real(*words)
        total[0] += count
        return count

    replace(os, "preadv", preadv)
    return total


def numbers(parameter, pieces):
    """The numbers of a promise, read in so many pieces."""
    assert isinstance(parameter, Promise)
    size = parameter.numel()
    step = max(1, -(-size // pieces))
    parts = [read(parameter, start, min(start + step, size)) for start in range(0, size, step)]
    return torch.cat(parts).view(parameter.shape) if parts else torch.empty(parameter.shape)


def assert_same_model(mine, theirs):
    """All that tells two models apart, but for where the parameters are."""
    found, expected = (dict(m.named_parameters(remove_duplicate=False)) for m in (mine, theirs))
    assert list(found) == list(expected)
    assert len(set(found.values())) == len(set(expected.values())), "ties"
    for name, parameter in theirs.named_parameters():
        values = numbers(found[name], 3)
        assert values.dtype == found[name].dtype == parameter.dtype, name
        assert torch.equal(values, parameter), name
    buffers = dict(mine.named_buffers())
    for name, buffer in theirs.named_buffers():
        assert buffers.pop(name).equal(buffer), name
    assert not buffers
    assert mine.training == theirs.training
    assert mine.config.to_dict() == theirs.config.to_dict()
    assert mine.generation_config.to_dict() == theirs.generation_config.to_dict()
    for (name, one), other in zip(mine.named_modules(), theirs.modules(), strict=True):
        assert type(one) is type(other), name
        assert plain(one) == plain(other), name


def plain(module: nn.Module):
    """A module's numbers, names and switches; and its tensors that are neither parameters nor buffers."""
    values = vars(module).items()
    kept = {name: value for name, value in values if isinstance(value, int | float | str | None)}
    return repr(kept), [value.tolist() for _, value in values if isinstance(value, torch.Tensor)]


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


def first_mistake(folder, spoil):
    """What a rank is told, when rank 1 meets a mistake once it reads; what part it had read of its shard."""
    filling._AGREE_EVERY_BYTES = 1000
    total = counting()
    with joined_world() as world:
        config = config_for(folder / str(world.rank))
        base = load_base(config.model)
        size = sum(p.numel() for p in base.parameters()) * 4 / world.size
        if world.rank == 1:
            spoil(folder / "1" / WEIGHTS)
        with pytest.raises(ModelError) as caught:
            in_shards(base, deepspeed_settings(config, world.size))
        return str(caught.value), total[0] / size


def cut(file):
    os.truncate(file, file.stat().st_size - 5000)


def break_disk(_):
    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.preadv = preadv


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(cut, "the file ends before it does; it was cut short"), (break_disk, "cannot be read: ")],
)
def test_what_one_rank_meets_while_reading_stops_all(tmp_path, spoil, said):
    for rank in (0, 1):
        base_folder(tmp_path / str(rank))
    (one, part), (other, _) = on_ranks(2, first_mistake, tmp_path, spoil)
    assert one == other
    assert part < (0.5 if spoil == break_disk else 1)  # the other fails at its first parameter, or its last
    assert one.startswith(f"{tmp_path}/1/{WEIGHTS}: model.")
    assert said in one


def all_numbers(folder):
    for parameter in load_base(config_for(folder).model).parameters():
        numbers(parameter, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_weight_that_is_no_number_is_named(tmp_path, value, dtype):
    base_folder(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[TENSOR][3, 5] = value
    tensors[TENSOR] = tensors[TENSOR].to(dtype)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{WEIGHTS}: {TENSOR}: element 101 is no finite number"):
        all_numbers(tmp_path)


def write_file(path, header, length):
    """A file with such a header and so many bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(length))
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "its header is no JSON"),
        (b"\xff", "its header is no JSON"),
        ([], "its header is no JSON object"),
        ({"a": 1}, "a: unknown or damaged entry"),
        ({"a": {}}, "a: unknown or damaged entry"),
        ({"a": entry(0, 8, [2], "F33")}, "a: unknown or damaged entry"),
        ({"a": entry(0, float("inf"), [2])}, "a: unknown or damaged entry"),
        ({"a": entry(0, 8, [3])}, "a: 8 bytes for a shape of \\[3\\]"),
        ({"a": entry(0, 8, [-1, -2])}, "a: 8 bytes for a shape of \\[-1, -2\\]"),
        ({"a": entry(-8, 0, [2])}, "a: 8 bytes for a shape of \\[2\\]"),
        ({"a": entry(16, 24, [2])}, "cut short: it ends before a does"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "a and b share bytes"),
    ],
)
def test_a_header_that_does_not_fit_its_file(tmp_path, header, said):
    with pytest.raises(ModelError, match=said):
        TensorFile(write_file(tmp_path / WEIGHTS, header, 16))


def test_a_file_of_sound_entries(tmp_path):
    header = {"__metadata__": {}, "b": entry(0, 8, [2]), "none": entry(8, 8, [0, 4]), "one": entry(8, 12, [])}
    tensors = TensorFile(write_file(tmp_path / WEIGHTS, header, 12)).tensors
    assert [t.shape for t in tensors.values()] == [(2,), (0, 4), ()]
    assert [t.read(0, prod(t.shape)).tolist() for t in tensors.values()] == [[0, 0], [], [0]]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({TENSOR: "../model.safetensors"}, "expected the name of a .safetensors file beside the index"),
        ({TENSOR: "/etc/passwd"}, "expected the name of a .safetensors file beside the index"),
        ({TENSOR: "gone.safetensors"}, "gone.safetensors: there is no such file"),
        ({"gone.weight": ONE}, f"gone.weight: not in {ONE}, where the index says it is"),
        ({TENSOR: 3}, "'3': expected the name"),
    ],
)
def test_an_index_that_points_elsewhere(tmp_path, places, said):
    folder = base_folder(tmp_path / "base")
    shutil.copy(folder / WEIGHTS, tmp_path)
    (folder / WEIGHTS).rename(folder / ONE)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelError) as caught:
        load_base(config_for(folder).model)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path, text):
    folder = base_folder(tmp_path)
    (folder / WEIGHTS).rename(folder / ONE)
    (folder / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(ModelError, match="not an index of tensors"):
        load_base(config_for(folder).model)


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


def test_a_checkpoint_quantised_another_way(tmp_path):
    folder = base_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(ModelError, match="its weights are stored as gptq; expected ordinary weights"):
        load_base(config_for(folder).model)


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
