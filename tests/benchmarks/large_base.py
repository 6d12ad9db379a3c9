"""A base larger than a machine would like: its prefix is trained on it, and the memory of all ranks is
watched.

    python -m tests.benchmarks.large_base FOLDER [BILLIONS] [BITS]

Makes a Llama-shaped checkpoint of 7 billion random parameters in bfloat16 (13.5 GB in FOLDER, made once), and
runs `prefix-ds train` on 2 ranks under torchrun for 3 steps, with recomputation and, unless told otherwise,
the base in 8 bits. Printed are the losses, the bytes of all processes together at their highest (proportional
set size, sampled every half second: what two ranks share counts once), each rank's own highest as the kernel
recorded it, seconds, and the verdict of each rank on what it held: whether any byte of its shards differs
after training, and how far the prefix has moved.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.workshop import records, tokenizer, write_jsonl

RANKS, STEPS = 2, 3
SHAPES = {  # billions of parameters: layers, width, of the MLP
    "7": (32, 4096, 11008),
    "1": (16, 2048, 5504),
}
RUN = """
model: {name: %(folder)s/base, bits: %(bits)s, recompute: true}
prefix: {init: random, length: 16}
data: {train: %(folder)s/train.jsonl, prompt: "{source}\\n", target: "{goal}", max_length: 64}
train: {max_steps: %(steps)d, global_batch_size: 4, micro_batch_tokens: 128, lr: 0.01}
run: {folder: %(folder)s/run, log_every: 1, save_every: 0}
mlflow: {uri: null}
"""


def main():
    folder, billions, bits = Path(sys.argv[1]).resolve(), *(*sys.argv[2:], "7", "8")[:2]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base" / "config.json").exists():
        timed("made the checkpoint", lambda: make_checkpoint(folder / "base", *SHAPES[billions]))
    write_jsonl(folder / "train.jsonl", records(64))
    (folder / "run.yaml").write_text(RUN % {"folder": folder, "bits": bits, "steps": STEPS})
    subprocess.run(["rm", "-rf", folder / "run"], check=True)
    peaks = timed(
        "trained", lambda: watched(["-m", "tests.benchmarks.large_base", "rank", folder / "run.yaml"])
    )
    for number in range(RANKS):
        print((folder / f"rank{number}.txt").read_text(), end="")
    for row in (json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()):
        print(f"step {row['step']}: loss {row['train/loss']:.4f}, {row['time/step_seconds']:.1f} s")
    gib = [f"{peak / 2**30:.2f}" for peak in peaks]
    print(f"highest memory, GiB: all ranks together {gib[0]}; each rank {', '.join(gib[1:])}")


def timed(what, work):
    began = time.perf_counter()
    answer = work()
    print(f"{what} in {time.perf_counter() - began:.0f} s", flush=True)
    return answer


def make_checkpoint(folder, num_layers, width, inner):
    """A file a layer, written one at a time, so that the whole never stands in memory."""
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    words.save_pretrained(folder)
    square, wide, norm = (width, width), (inner, width), (width,)
    layer = {f"self_attn.{name}_proj.weight": square for name in "qkvo"} | {
        "mlp.gate_proj.weight": wide,
        "mlp.up_proj.weight": wide,
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": norm,
        "post_attention_layernorm.weight": norm,
    }
    files = [{f"model.layers.{n}.{name}": shape for name, shape in layer.items()} for n in range(num_layers)]
    ends = {"model.embed_tokens.weight": (32000, width), "lm_head.weight": (32000, width)}
    files.append(ends | {"model.norm.weight": norm})
    places, size = {}, 0
    for number, shapes in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {key: random_weight(shape) for key, shape in shapes.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)  # last: it says that the folder is whole


def random_weight(shape):
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)


def watched(words):
    """Runs torchrun to its end; the highest bytes of all ranks together, then of each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.Popen([*launch, *words], env=os.environ | allocator | {"DS_ACCELERATOR": "cpu"})
    peaks = {}
    watcher = threading.Thread(target=watch, args=(child, peaks))
    watcher.start()
    code = child.wait()
    watcher.join()
    if code:
        raise SystemExit(f"the ranks ended with {code}")
    total = peaks.pop("all")
    return [total, *sorted(peaks.values(), reverse=True)[:RANKS]]


def watch(child, peaks):
    while child.poll() is None:
        now = {}
        for process in psutil.Process(child.pid).children(recursive=True):
            try:
                now[process.pid] = process.memory_full_info().pss
            except psutil.Error:
                continue
        for key, size in {**now, "all": sum(now.values())}.items():
            peaks[key] = max(peaks.get(key, 0), size)
        time.sleep(0.5)


def rank(path):
    """One rank of the run: the command itself, with the loop between two looks at the shards."""
    from prefix_ds import train as command
    from prefix_ds.config import read_config

    fit = command.fit

    def compared(run, *rest):
        before, start = digest(run.engine.lm.base), run.engine.prefix.table().detach().clone()
        end = fit(run, *rest)
        moved = (run.engine.prefix.table().detach() - start).abs().max()
        same = digest(run.engine.lm.base) == before
        number = run.engine.world.rank
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        told = f"rank {number}: shards the same: {same}; largest change in the prefix {moved:.4f}; "
        told += f"most resident {highest:.2f} GiB\n"
        (Path(path).parent / f"rank{number}.txt").write_text(told)
        return end

    command.fit = compared
    command.train(read_config(Path(path), []))


def digest(base):
    """Of every byte this rank holds of the base."""
    whole = hashlib.sha256()
    for name, parameter in base.named_parameters():
        whole.update(name.encode())
        whole.update(parameter.ds_tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return whole.hexdigest()


if __name__ == "__main__":
    rank(sys.argv[2]) if sys.argv[1] == "rank" else main()
