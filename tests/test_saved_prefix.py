"""The saved prefix: the same bits as written, old or new but never a mix, and only for its own model."""

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefix_ds import checkpoint
from prefix_ds.checkpoint import (
    PrefixFacts,
    read_prefix,
    write_prefix,
    write_tensors,
)
from prefix_ds.errors import RunError
from tests.saving import FACTS, FORK, Shape, damaged_ways, killed_soon

torch.set_num_threads(1)


def slots_of(step: int, slots: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        f"model.layers.{i}.self_attn": (
            torch.full((2, 5, 4), step + i / 8),
            torch.full((2, 5, 3), float(-step)),
        )
        for i in range(slots)
    }


def write_prefixes_for_ever(folder: Path) -> None:
    for step in itertools.count():
        facts = PrefixFacts("acme/tiny", None, "llama", "ab12", 3, step, None, "0.1.0")
        write_prefix(folder, slots_of(step), facts)


def assert_prefix_is_whole(folder: Path) -> int:
    found = read_prefix(folder)
    expected = slots_of(found.facts.step)
    for name, pair in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found.slots[name], pair, strict=True))
    return found.facts.step


def test_a_prefix_is_old_or_new_and_never_a_mix(tmp_path: Path) -> None:
    folder = tmp_path / "prefix"
    write_prefix(folder, slots_of(0), PrefixFacts("acme/tiny", None, "llama", "ab12", 3, 0, None, "0.1.0"))
    chance = random.Random(3)
    for _ in range(20):
        killed_soon(lambda: write_prefixes_for_ever(folder), 0.02 + 0.04 * chance.random())
        assert_prefix_is_whole(folder)
    writer = FORK.Process(target=write_prefixes_for_ever, args=(folder,), daemon=True)
    writer.start()
    steps: set[int] = set()
    deadline = time.monotonic() + 30
    while len(steps) < 100 and time.monotonic() < deadline:
        steps.add(assert_prefix_is_whole(folder))
    writer.kill()
    writer.join()
    assert len(steps) > 3  # read while it was written
    write_prefix(folder, slots_of(1), FACTS)
    assert sorted(p.name for p in folder.iterdir()) == ["prefix.json", "prefix.safetensors"]


def shapes(slots: dict[str, tuple[Tensor, Tensor]]) -> list[Shape]:
    return [Shape(n, k.shape[0], k.shape[2], v.shape[2]) for n, (k, v) in slots.items()]


def test_a_prefix_comes_back_bit_for_bit_in_slot_order(tmp_path: Path) -> None:
    slots = {f"h.{i}.attn": (torch.randn(2, 5, 4), torch.randn(2, 5, 3)) for i in range(12)}  # "h.10" < "h.2"
    write_prefix(tmp_path, slots, FACTS)
    found = read_prefix(tmp_path)
    assert list(found.slots) == list(slots)
    assert (found.facts, found.length) == (FACTS, 5)
    pairs = zip(found.keys_values(shapes(slots)), slots.values(), strict=True)
    assert all(torch.equal(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))
    told = json.loads((tmp_path / "prefix.json").read_text())
    assert (told["base"], told["length"], told["valid_loss"], len(told["slots"])) == (
        "acme/tiny",
        5,
        1.25,
        12,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: [s[0], Shape("other", 2, 4, 3), s[2]],
            r"it has model.layers.1.self_attn .* asks for other",
        ),
        (lambda s: [s[0], s[1], Shape(s[2].name, 4, 4, 3)], "with 2 heads.*asks for.*with 4 heads"),
        (lambda s: s[:2], "it has 3 slots, the base asks for 2"),
    ],
)
def test_the_prefix_of_another_model_is_refused_by_name(
    tmp_path: Path, change: Callable[[list[Shape]], list[Shape]], words: str
) -> None:
    write_prefix(tmp_path, slots_of(1), FACTS)
    expected = change(shapes(slots_of(1)))
    with pytest.raises(RunError, match=rf"trained for acme/tiny \(llama\).*{words}"):
        read_prefix(tmp_path).keys_values(expected)


def test_a_damaged_prefix_is_refused(tmp_path: Path) -> None:
    write_prefix(tmp_path, slots_of(1), FACTS)
    file = tmp_path / checkpoint.saved_prefix.FILE
    whole = file.read_bytes()
    for content in damaged_ways(file, 23):
        file.write_bytes(content)
        if content != whole:
            with pytest.raises(RunError, match=str(file)):
                read_prefix(tmp_path)


def test_any_flipped_bit_is_told(tmp_path: Path) -> None:
    """Also where it changes nothing: in a word that safetensors keeps for itself, or from 1e-05 to 1E-05."""
    write_prefix(tmp_path, slots_of(1), dataclasses.replace(FACTS, valid_loss=1e-5))
    file = tmp_path / checkpoint.saved_prefix.FILE
    whole = file.read_bytes()
    header_size = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(header_size), *range(header_size, len(whole), 29)]:
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            file.write_bytes(flipped)
            with pytest.raises(RunError, match=str(file)):
                read_prefix(tmp_path)


def test_an_earlier_header_had_a_second_entry(tmp_path: Path) -> None:
    write_prefix(tmp_path, slots_of(1), FACTS)
    file = tmp_path / "prefix.safetensors"
    with safe_open(file, "pt") as opened:
        text = opened.metadata()["prefix_ds"]
    found = read_prefix(tmp_path)
    save_file(load_file(file), file, {"format": "pt", "prefix_ds": text})
    assert read_prefix(tmp_path).facts == found.facts
    save_file(load_file(file), file, {"format": "np", "prefix_ds": text})
    with pytest.raises(RunError, match="its header is not what was written"):
        read_prefix(tmp_path)


def test_no_prefix_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file"):
        read_prefix(tmp_path)
    write_tensors(tmp_path / "prefix.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(RunError, match="not a prefix saved by prefix-ds"):
        read_prefix(tmp_path)
