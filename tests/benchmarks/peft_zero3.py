"""The peer: PEFT's prefix tuning under DeepSpeed ZeRO-3, with a loop by hand, as their documentation has it.

    torchrun --nproc-per-node 2 -m tests.benchmarks.peft_zero3 BASE DATA.jsonl RESULT [EXAMPLES AT ONCE]

A base built inside `zero.Init`, `get_peft_model`, an engine with AdamW, micro-batches of so many examples,
padded to the longest; one epoch. What it took is written to RESULT, and the trained prefix beside it.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import deepspeed
import torch
from datasets import load_dataset
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

PREFIX, BATCH, MAX_LENGTH, RATE = 30, 64, 640, 1e-3
ZERO = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 0,
}  # fmt: skip


def settings(at_once, batch, num_ranks, zero=None):
    """DeepSpeed's; `zero` says what is different of ZeRO-3."""
    return {
        "zero_optimization": ZERO | (zero or {}),
        "train_micro_batch_size_per_gpu": at_once,
        "gradient_accumulation_steps": max(1, batch // num_ranks // at_once),
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def trainers_sizes(base):
    """What transformers' Trainer makes of "auto", and the rest of its documentation's file."""
    square = AutoConfig.from_pretrained(base).hidden_size ** 2
    return {
        "reduce_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * int(square**0.5),
        "stage3_max_reuse_distance": 1_000_000_000,
    }


def new_engine(base, config, prefix):
    """DeepSpeed's engine around PEFT's model of a base in a folder."""
    alive = HfDeepSpeedConfig(config)  # transformers looks whether it is there
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    del alive
    return engine


def step(engine, micro_batches):
    """An optimizer step, if there are as many as DeepSpeed was told; the mean loss."""
    losses = []
    for batch in micro_batches:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def padded(examples):
    """To the longest, as a collator pads; labels on the targets only."""
    length = max(len(example["ids"]) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        text, start = torch.as_tensor(example["ids"]), example["prompt"]
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        labels[row, start : len(text)] = text[start:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tokenised(path, tokenizer):
    """Examples of a file: ids, and how many of them are prompt."""

    def ids(record):
        prompt = tokenizer(record["prompt"]).input_ids
        target = [*tokenizer(record["target"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        whole = (prompt + target)[-MAX_LENGTH:]
        return {"ids": whole, "prompt": max(0, len(whole) - len(target))}

    return load_dataset("json", data_files=str(path), split="train").map(ids)


def main():
    base, data, result = sys.argv[1:4]
    at_once = int([*sys.argv[4:], 8][0])
    warnings.simplefilter("ignore")
    deepspeed.init_distributed()
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    examples = tokenised(data, AutoTokenizer.from_pretrained(base))
    loader = DataLoader(
        examples, at_once, sampler=DistributedSampler(examples), collate_fn=padded, drop_last=True
    )
    config = settings(at_once, BATCH, num_ranks)
    engine = new_engine(base, config, PREFIX)
    began, losses = time.perf_counter(), []
    for number, batch in enumerate(loader, start=1):
        losses.append(step(engine, [batch]))
        if rank == 0 and number % (10 * config["gradient_accumulation_steps"]) == 0:
            print(f"{number} of {len(loader)}: loss {sum(losses[-10:]) / len(losses[-10:]):.3f}", flush=True)
    seconds = time.perf_counter() - began
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        if rank == 0:
            save_file({name: p.detach().clone() for name, p in trained.items()}, f"{result}.safetensors")
    if rank == 0:
        told = {"seconds": seconds, "loss": sum(losses[-20:]) / len(losses[-20:])}
        Path(result).write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
