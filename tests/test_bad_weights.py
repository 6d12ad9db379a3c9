"""Files of weights that are damaged, or become so while they are read: a line that names file and tensor."""

import errno
import json
import os
import shutil
import struct
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefix_ds.dist import joined_world
from prefix_ds.engine import filling
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.errors import ModelError
from prefix_ds.loading import load_base, vetted_config
from prefix_ds.loading.tensor_file import TensorFile
from tests.loaded import config_for, counting, numbers
from tests.ranks import on_ranks
from tests.workshop import base_folder

WEIGHTS, TENSOR = "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
ONE = "model-00001-of-00001.safetensors"


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


def test_a_checkpoint_quantised_another_way(tmp_path):
    folder = base_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    for read in (vetted_config, load_base):  # `check` says it too
        with pytest.raises(ModelError, match="its weights are stored as gptq; expected ordinary weights"):
            read(config_for(folder).model)
