"""A step of ours beside PEFT's prefix tuning under DeepSpeed ZeRO-3 with a loop written by hand.

    python -m tests.benchmarks.peer [--quick] [PART OF A NAME]

The same model (Llama, bfloat16, random weights), the same examples (E2E's and DialogSum's training files of
../shared/data, mixed) in the same order, the same global batches, on two ranks with one thread each. The peer
is what its documentation shows: a model built inside `zero.Init`, `get_peft_model`, an engine with AdamW;
micro-batches of so many examples that they have, padded, about as many tokens as ours. The two take turns in
fresh processes. Printed: real tokens a second (padding not counted), and the memory a rank takes at its
peak beyond what Python and its packages take. With recomputation ours is compared with the peer without,
which cannot recompute.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from prefix_ds.config import parse_config
from prefix_ds.data.examples import load_examples
from prefix_ds.data.stream import Stream
from prefix_ds.dist import joined_world
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.prefix_engine import PrefixEngine
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.loading import load_base, load_tokenizer
from prefix_ds.model import PrefixLM
from prefix_ds.new_tokenizer import trained_tokenizer
from prefix_ds.prefix import Direct, random_table
from tests.ranks import on_ranks
from tests.resident import forget_highest, give_back_what_is_free, highest, resident, settle

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PREFIX, BATCH, MICRO_BATCH_TOKENS = 30, 64, 2048
SIZES = {
    "12 layers x 768, vocabulary 32,000": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 32000,
    },
    "8 layers x 512, vocabulary 128,256": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "vocab_size": 128256,
    },
}  # fmt: skip
RUN = """
model: {{name: {folder}, recompute: {recompute}}}
prefix: {{init: random, length: 30}}
data: {{train: {data}, prompt: "{{prompt}}", target: "{{target}}", max_length: 640}}
train: {{global_batch_size: {batch}, micro_batch_tokens: {tokens}, max_steps: 100, lr: 1.0e-3}}
"""


@dataclass(frozen=True)
class Case:
    """What runs, and how many steps are timed after the first."""

    folder: Path
    data: Path
    steps: int

    def config(self, recompute=False):
        """The run, as its file would say."""
        return parse_config(
            RUN.format(
                folder=self.folder,
                data=self.data,
                recompute=str(recompute).lower(),
                batch=BATCH,
                tokens=MICRO_BATCH_TOKENS,
            )
        )


def main():
    words = [word for word in sys.argv[1:] if word != "--quick"]
    rounds, steps = (1, 1) if "--quick" in sys.argv else (3, 3)
    table = Table("model", "way", "tokens/s", "of the peer", "MiB a rank", "of the peer")
    with tempfile.TemporaryDirectory() as name:
        data = write_examples(Path(name) / "train.jsonl")
        for model, sizes in SIZES.items():
            if all(word in model for word in words):
                compare(Case(made_base(Path(name) / "base", sizes, data), data, steps), model, rounds, table)
    Console(width=130).print(table)


def compare(case, model, rounds, table):
    """Rows of a table: medians of turns."""
    ways = {
        "PEFT": (theirs, case),
        "ours": (ours, case, False),
        "ours, recomputed": (ours, case, True),
    }
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (work, *arguments) in ways.items():
            rates, peaks = zip(*on_ranks(2, work, *arguments, timeout_seconds=1200), strict=True)
            found[way].append((sum(rates), max(peaks)))
            print(f"{model}: {way}: {sum(rates):.0f} tokens/s, {max(peaks):.0f} MiB", flush=True)
    base_rate, base_peak = (statistics.median(values) for values in zip(*found["PEFT"], strict=True))
    for way, pairs in found.items():
        rate, peak = (statistics.median(values) for values in zip(*pairs, strict=True))
        table.add_row(
            model, way, f"{rate:.0f}", f"{rate / base_rate:.2f}", f"{peak:.0f}", f"{peak / base_peak:.2f}"
        )


def write_examples(path):
    """Short and long ones mixed: a caption from data, a summary of a dialogue."""
    short = [json.loads(line) for line in (DATA / "e2e/train.jsonl").read_text().splitlines()]
    long = [json.loads(line) for line in (DATA / "dialogsum/train.jsonl").read_text().splitlines()]
    rows = [{"prompt": row["mr"] + "\n", "target": row["ref"]} for row in short[:1500]]
    rows += [{"prompt": row["dialogue"] + "\nTL;DR:", "target": " " + row["summary"]} for row in long]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made_base(folder, sizes, data):
    """A Llama of random numbers, with a tokenizer of 4,096 entries."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**sizes, pad_token_id=None, max_position_embeddings=2048)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(folder)
    texts = (" ".join(json.loads(line).values()) for line in data.read_text().splitlines())
    trained_tokenizer(texts, 4096).save_pretrained(folder)
    return folder


def ours(case, recompute):
    """(tokens/s, MiB) of this rank's part."""
    settle()
    config = case.config(recompute)
    with joined_world() as world:
        stream = new_stream(config, world)
        settings = deepspeed_settings(config, world.size)
        give_back_what_is_free()
        own = resident()
        shards = sharded(in_shards(load_base(config.model), settings), settings)
        lm = PrefixLM(shards.module, recompute=recompute, device=world.device)
        prefix = Direct(lm.slots, random_table(lm.slots, PREFIX, 0.02, seed=0))
        engine = PrefixEngine(lm, prefix, config.train, world, write=None)
        return timed(case, world, own, lambda step: ours_step(engine, stream.share(step)))


def ours_step(engine, share):
    engine.step(share, 1e-3)
    return share.global_tokens


def theirs(case):
    """The same, with PEFT."""
    import deepspeed
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    settle()
    config = case.config()
    with joined_world() as world:
        stream = new_stream(config, world)
        settings = deepspeed_settings(config, world.size)
        settings["zero_optimization"].pop("offload_param", None)
        settings |= {
            "train_micro_batch_size_per_gpu": per_micro_batch(stream),
            "gradient_accumulation_steps": BATCH // world.size // per_micro_batch(stream),
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
        }
        settings.pop("train_batch_size", None)
        give_back_what_is_free()
        own = resident()
        alive = HfDeepSpeedConfig(settings)
        base = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16)
        model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        engine.train()
        assert alive
        return timed(case, world, own, lambda step: their_step(engine, stream, step, world))


def new_stream(config, world):
    examples = load_examples("train", config.data, load_tokenizer(config.model), world)
    return Stream(examples, config.data, config.train, world)


def per_micro_batch(stream):
    """Examples that have, padded, about as many tokens as a micro-batch of ours; a power of two."""
    padded = [
        float(stream.examples.lengths[b].max()) for b in (stream.order.batch(step)[:8] for step in range(20))
    ]
    size = MICRO_BATCH_TOKENS / statistics.mean(padded)
    return max(1, 2 ** round(torch.tensor(size).log2().item()))


def their_step(engine, stream, step, world):
    indices = stream.order.batch(step)
    mine, size = indices[world.rank :: world.size], per_micro_batch(stream)
    for start in range(0, len(mine), size):
        loss = engine(**padded(stream.examples, mine[start : start + size])).loss
        engine.backward(loss)
        engine.step()
    return int(stream.examples.lengths[indices].sum())


def padded(examples, indices):
    """As a collator pads: to the longest, labels on the targets only."""
    texts = [torch.from_numpy(ids.astype("int64")) for ids in examples.ids(indices)]
    length = max(map(len, texts))
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (text, index) in enumerate(zip(texts, indices, strict=True)):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        targets = int(examples.num_targets[index])
        labels[row, len(text) - targets : len(text)] = text[-targets:]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def timed(case, world, own, step):
    """(this rank's part of tokens/s, MiB at the peak beyond `own`): two steps are not counted."""
    for number in range(2):
        step(number)
    forget_highest()
    began = time.perf_counter()
    tokens = sum(step(2 + number) for number in range(case.steps))
    return tokens / (time.perf_counter() - began) / world.size, highest() - own


if __name__ == "__main__":
    main()
