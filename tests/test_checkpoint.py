"""The run's memory on disk: what is read is what was written, or a clear error; whatever happens to a writer.

Laws: a round trip is exact; damage to any byte is seen and the checkpoint before is taken; a writer killed at
any moment costs at most its own checkpoint. (`test_disk.py`: disks that refuse.)
"""

import itertools
import logging
import os
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefix_ds.checkpoint import (
    begin,
    discard,
    latest,
    pending_folder,
    prune,
    read_tensors,
    save_checkpoint,
    seal,
    steps,
    write_tensors,
)
from prefix_ds.errors import RunError
from tests.saving import damaged_ways, killed_soon, tensors_of

torch.set_num_threads(1)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 100 and 200."""
    for step in (100, 200):
        save_checkpoint(tmp_path, step, tensors_of(step), {"position": step})
    return tmp_path


# What is read is what was written


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    noise = torch.randn(4, 6)
    written = tensors_of(3) | {"noise": noise, "view": noise.t()[1:3], "nan": torch.tensor([float("nan")])}
    state = {
        "loss": float("inf"),
        "tiny": 1e-300,
        "seed": 2**70,
        "text": "é\n\u2028",
        "nested": {"a": [1, None]},
    }
    folder = save_checkpoint(tmp_path, 3, written, state)
    found = latest(tmp_path)
    assert found is not None
    assert (found.folder, found.step, found.state) == (folder, 3, state)
    read = found.tensors(like=written)
    assert read.pop("nan").isnan()
    assert_equal(read, {name: t for name, t in written.items() if name != "nan"})


def test_what_was_read_outlives_its_file(run: Path) -> None:
    found = latest(run)
    assert found is not None
    read = found.tensors()
    with (found.folder / "tensors.safetensors").open("r+b") as file:
        file.truncate(0)
    shutil.rmtree(run / "checkpoints")
    assert_equal(read, tensors_of(200))


def test_only_tensors_and_json_are_on_disk(run: Path) -> None:
    files = {p.name for p in run.rglob("*") if p.is_file()}
    assert files == {"tensors.safetensors", "state.json"}


def test_the_newest_is_the_highest_step_not_the_last_written(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        save_checkpoint(tmp_path, step, {}, {})
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"table": None}, "tensor 'table' is missing"),
        ({"table": torch.zeros(7, 8)}, r"tensor 'table' is float32 \[7, 9\], expected float32 \[7, 8\]"),
        ({"table": torch.zeros(7, 9).double()}, r"'table' is float32 \[7, 9\], expected float64 \[7, 9\]"),
        ({"more": torch.zeros(1)}, "tensor 'more' is not of this run"),
    ],
)
def test_a_tensor_that_is_not_as_asked_for_is_named(run: Path, change: dict[str, Tensor], words: str) -> None:
    here = tensors_of(200)
    there = {name: t for name, t in (here | change).items() if t is not None}
    found = latest(run)
    assert found is not None
    if "more" in change or change["table"] is None:
        here, there = there, here
    write_tensors(run / "x.safetensors", here)
    with pytest.raises(RunError, match=words):
        read_tensors(run / "x.safetensors", like=there)


# Damage


@pytest.mark.parametrize(("name", "every"), [("state.json", 1), ("tensors.safetensors", 7)])
def test_damage_to_any_byte_is_seen_and_told(
    run: Path, name: str, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = run / "checkpoints" / "step-00000200" / name
    whole = latest(run)
    assert whole is not None
    for content in damaged_ways(file, every):
        file.write_bytes(content)
        caplog.clear()
        found = latest(run)
        assert found is not None
        if found.step == 200:  # a change that changes nothing, say of white space at the end
            assert found == whole
            assert name == "state.json"
        else:
            assert (found.step, found.state) == (100, {"position": 100})
            assert "step-00000200 is damaged and skipped" in caplog.text


def test_a_missing_file_is_seen_and_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / "step-00000200" / "tensors.safetensors").unlink()
    found = latest(run)
    assert found is not None
    assert found.step == 100
    assert "tensors.safetensors is missing" in caplog.text


def test_a_checkpoint_under_another_step_is_not_taken(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / "step-00000200").rename(run / "checkpoints" / "step-00000900")
    found = latest(run)
    assert found is not None
    assert found.step == 100
    assert "it is the checkpoint of step 200" in caplog.text


def test_a_run_with_nothing_but_damage_is_refused(run: Path) -> None:
    for state in run.rglob("state.json"):
        state.write_text("{")
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        latest(run)


# A writer that dies


def save_for_ever(run: Path, first: int) -> None:
    for step in itertools.count(first):
        save_checkpoint(run, step, tensors_of(step), {"position": step})
        prune(run, keep=2, step=step)


def save_the_same_for_ever(run: Path, step: int) -> None:
    for position in itertools.count():
        save_checkpoint(run, step, tensors_of(position), {"position": position})
        prune(run, keep=1, step=step)


def test_a_writer_killed_at_any_moment_costs_at_most_its_own_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(1)
    newest = 0
    save_checkpoint(tmp_path, 0, tensors_of(0), {"position": 0})
    for _ in range(20):
        killed_soon(partial(save_for_ever, tmp_path, newest + 1), 0.02 + 0.05 * chance.random())
        found = latest(tmp_path)
        assert found is not None
        assert found.step >= newest
        assert found.state == {"position": found.step}
        assert_equal(found.tensors(), tensors_of(found.step))
        newest = found.step
    assert newest > 0
    assert not caplog.records


def test_replacing_a_checkpoint_leaves_one_at_every_moment(tmp_path: Path) -> None:
    chance = random.Random(2)
    save_checkpoint(tmp_path, 5, tensors_of(0), {"position": 0})
    for _ in range(20):
        killed_soon(lambda: save_the_same_for_ever(tmp_path, 5), 0.02 + 0.05 * chance.random())
        found = latest(tmp_path)
        assert found is not None
        assert found.step == 5
        assert_equal(found.tensors(), tensors_of(found.state["position"]))


def test_a_checkpoint_about_to_be_replaced_counts(run: Path) -> None:
    final = run / "checkpoints" / "step-00000200"
    final.rename(final.with_name("step-00000200.replaced"))
    found = latest(run)
    assert found is not None
    assert (found.step, found.state) == (200, {"position": 200})
    save_checkpoint(run, 200, tensors_of(200), {"position": 201})
    again = latest(run)
    assert again is not None
    assert again.state == {"position": 201}
    assert sorted(p.name for p in final.parent.iterdir()) == ["step-00000100", "step-00000200"]


def test_the_next_writer_removes_what_a_killed_one_left(run: Path) -> None:
    write_tensors(begin(run, 300) / "rank-0000.safetensors", tensors_of(300))
    save_checkpoint(run, 400, {}, {})
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step-00000100", "step-00000200", "step-00000400"]


# Many ranks, few checkpoints


def test_every_rank_writes_its_own_file(tmp_path: Path) -> None:
    begin(tmp_path, 40)
    names = [f"rank-{rank:04d}.safetensors" for rank in range(3)]
    files = [
        write_tensors(pending_folder(tmp_path, 40) / name, {"shard": torch.full((4,), float(rank))})
        for rank, name in enumerate(names)
    ]
    assert latest(tmp_path) is None  # not before it is sealed
    seal(tmp_path, 40, files, {"size": 3})
    found = latest(tmp_path)
    assert found is not None
    assert found.state == {"size": 3}
    for rank, name in enumerate(names):
        assert_equal(found.tensors(name=name), {"shard": torch.full((4,), float(rank))})
    (found.folder / names[2]).unlink()
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        latest(tmp_path)


def test_a_discarded_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    write_tensors(begin(tmp_path, 40) / "rank-0000.safetensors", tensors_of(1))
    discard(tmp_path, 40)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert latest(tmp_path) is None


@pytest.mark.parametrize(("keep", "left"), [(0, [5]), (1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_pruning_keeps_the_newest_and_never_nothing(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, {}, {})
    (tmp_path / "checkpoints" / "notes").mkdir()  # not ours
    prune(tmp_path, keep, step=5)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["notes", *(f"step-{step:08d}" for step in left)]


def test_pruning_counts_no_damaged_one_ahead_of_the_run(tmp_path: Path) -> None:
    for step in (100, 200):
        save_checkpoint(tmp_path, step, {}, {})
    (tmp_path / "checkpoints" / "step-00000200" / "state.json").write_text("{")
    save_checkpoint(tmp_path, 150, {}, {})
    prune(tmp_path, 1, step=150)
    assert (found := latest(tmp_path)) is not None
    assert found.step == 150


def test_one_that_cannot_be_read_is_not_taken_for_damaged(run: Path) -> None:
    """Nobody is told to remove what a disk of the network, or a right, keeps from us for a while."""
    newest = max(run.rglob("state.json"))
    newest.unlink()
    newest.mkdir()
    with pytest.raises(RunError, match=rf"^{newest.parent}: cannot be read: Is a directory$"):
        latest(run)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would begin anew, over its own metrics."""
    listed = os.scandir, os.listdir

    def refused(path: object = ".", *, how: int = 0) -> object:
        if Path(str(path)).name == "checkpoints":
            raise PermissionError(13, "Permission denied", str(path))
        return listed[how](path)

    monkeypatch.setattr(os, "scandir", refused)
    monkeypatch.setattr(os, "listdir", partial(refused, how=1))
    with pytest.raises(RunError, match=r"checkpoints: cannot be read: Permission denied$"):
        latest(run)


def test_another_format_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "FORMAT", 2)
    save_checkpoint(tmp_path, 1, {}, {})
    monkeypatch.undo()
    with pytest.raises(RunError, match="has format 2, this version of prefix-ds reads 1"):
        latest(tmp_path)


def test_nothing_is_told_where_all_is_well(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert latest(run) is not None
    assert not caplog.records
