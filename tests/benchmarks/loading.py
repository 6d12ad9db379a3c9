"""A base of 3 GB onto two ranks: by slices, and by transformers' own loading under ZeRO-3.

    python -m tests.benchmarks.loading [FOLDER] [ROUNDS]

Makes a Llama-shaped checkpoint of random bfloat16 numbers, a file a layer, and deletes it in the end. The two
ways take turns, each in processes of its own, with the files in the page cache. Printed are, of the slower or
larger rank: seconds; bytes read with system calls, as the kernel counted them (transformers maps the files:
what is read through the mapping is not among them); and how far the process's own memory, without mapped
files, rose while loading above what it was before (sampled every 5 ms), beside its shard.

The bars: time at most 0.6 times; memory at most the shard and the largest slice of a tensor.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

# Before the ranks' processes start: or what the allocator keeps would look like what the loading needs.
os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu"}

import torch

from prefix_ds.config import parse_config
from prefix_ds.dist import joined_world, wait_for_all
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded_construction
from prefix_ds.loading import load_base
from tests.benchmarks.large_base import make_checkpoint
from tests.ranks import on_ranks
from tests.workshop import base_folder

RANKS, SHAPE = 2, (20, 2048, 8192)  # layers, width, of the MLP
WAYS = ("slices", "transformers")
GIB = 2**30


def main():
    place, num_rounds = [*sys.argv[1:], None, None][0], int([*sys.argv[2:], 3][0])
    with tempfile.TemporaryDirectory(dir=place) as folder:
        make_checkpoint(Path(folder) / "base", *SHAPE)
        base_folder(Path(folder) / "small")
        size = sum(file.stat().st_size for file in Path(folder, "base").glob("*.safetensors"))
        print(f"checkpoint: {size / GIB:.2f} GiB", flush=True)
        rounds = [{way: measured_way(folder, way) for way in WAYS} for _ in range(num_rounds)]
    ratios = [one["slices"][0] / one["transformers"][0] for one in rounds]
    told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"time, slices / transformers: {told}; median {statistics.median(ratios):.2f} (bar 0.6)")
    _, _, rise, shard, largest = max((one["slices"] for one in rounds), key=lambda row: row[2])
    print(f"memory, slices: {rise / GIB:.2f} GiB (bar {(shard + largest) / GIB:.2f})")


def measured_way(folder, way):
    columns = zip(*on_ranks(RANKS, measured, folder, way, timeout_seconds=1800), strict=True)
    seconds, read, rise, shard, largest = row = tuple(map(max, columns))
    print(
        f"{way:>12}: {seconds:6.1f} s, read {read / GIB:.2f} GiB, memory +{rise / GIB:.2f} GiB "
        f"(shard {shard / GIB:.2f}, largest slice {largest / GIB:.3f})",
        flush=True,
    )
    return row


def measured(folder, way):
    """Of this rank: seconds, bytes read, rise of its memory, bytes of its shard and of the largest slice."""
    with joined_world() as world:
        settings, load = None, {"slices": by_slices, "transformers": by_transformers}[way]
        for name in ("small", "base"):  # the first time imports what it needs
            config = parse_config(f"model: {{name: {folder}/{name}}}\nprefix: {{init: random, length: 3}}")
            settings = deepspeed_settings(config, world.size)
            wait_for_all()
            before, read, began = own_memory(), bytes_read(), time.perf_counter()
            with highest_memory() as peak:
                base = load(config.model, settings)
                wait_for_all()
            seconds = time.perf_counter() - began
        slices = [p.ds_tensor.numel() * p.ds_tensor.element_size() for p in base.parameters()]
        return seconds, bytes_read() - read, max(peak) - before, sum(slices), max(slices)


def by_slices(keys, settings):
    return in_shards(load_base(keys), settings)


def by_transformers(keys, settings):
    from transformers import AutoModelForCausalLM

    with sharded_construction(settings):
        return AutoModelForCausalLM.from_pretrained(keys.name, dtype=getattr(torch, keys.dtype))


def own_memory():
    """Bytes of this process that are not a file's."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def bytes_read():
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


@contextlib.contextmanager
def highest_memory():
    seen, is_over = [own_memory()], threading.Event()

    def watch():
        while not is_over.wait(0.005):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    is_over.set()
    watcher.join()


if __name__ == "__main__":
    main()
