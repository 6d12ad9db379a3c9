"""The peer as people tune it: PEFT's prefix tuning or LoRA in one process, with a loop in plain PyTorch.

    python -m tests.benchmarks.peft_tuning tune|test RUN.yaml WAY RESULT.json [a.b=value ...]

WAY is `prefix`, `prefix-mlp` (through PEFT's projection) or `lora-RANK`. All else is what a run file of ours
says: base, data, the examples of each step, steps, schedule, clipping, cadence of validation. Rows are padded
as a collator pads them, a micro-batch's loss is divided by the targets of the whole batch. RESULT says what
was trained, took and weighs, and the validation losses by step; what validates best lies beside it.

`test` adds that one's loss on the test split, and the scores of its greedy outputs by `evaluate.scores`, in
the schema of `prefix-ds evaluate`.
"""

import json
import resource
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefix_ds.config import parse_config
from prefix_ds.data.examples import load_examples
from prefix_ds.data.order import Order
from prefix_ds.data.prompts import read_prompts
from prefix_ds.dist import joined_world
from prefix_ds.loading import load_tokenizer
from prefix_ds.optim import adamw, learning_rate
from prefix_ds.scores import names_of, scored
from tests.benchmarks.peft_zero3 import padded

ANSWERS_AT_ONCE = 32


def main():
    command, file, way, result, *words = sys.argv[1:]
    warnings.simplefilter("ignore")
    config = parse_config(Path(file).read_text(), words, file)
    result = Path(result)
    with joined_world() as world:
        tokenizer = load_tokenizer(config.model, config.data)
        examples = {
            name: load_examples(name, config.data, tokenizer, world) for name in ("train", "valid", "test")
        }
        model = tunable(config, way)
        if command == "tune":
            told = facts(model, config, examples, result)
        else:
            model.load_state_dict(load_file(trained(result)), strict=False)
            told = json.loads(result.read_text()) | tested(model, config, examples["test"], tokenizer)
    result.write_text(json.dumps(told, indent=1))


def facts(model, config, examples, result):
    """Of a training, whose outcome is written beside the result."""
    began = time.perf_counter()
    best, curve = tuned(model, config, examples)
    seconds = time.perf_counter() - began
    save_file(best, trained(result))
    model.load_state_dict(best, strict=False)
    adapter = result.with_suffix(".adapter.safetensors")
    save_file({name: t.contiguous() for name, t in get_peft_model_state_dict(model).items()}, adapter)
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bytes": adapter.stat().st_size,
        "train_seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "valid": curve,
    }


def trained(result):
    return result.with_suffix(".trained.safetensors")


def tunable(config, way):
    """PEFT's model of the base, by its own defaults but for length and rank."""
    base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=getattr(torch, config.model.dtype))
    torch.manual_seed(config.train.seed)
    if way.startswith("lora-"):
        rank = int(way.removeprefix("lora-"))
        keys = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    else:
        length, wide = config.prefix.length, base.config.hidden_size
        through = {"prefix_projection": True, "encoder_hidden_size": wide} if way == "prefix-mlp" else {}
        keys = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, **through)
    return get_peft_model(base, keys)


def tuned(model, config, examples):
    """(what is trained, where it validates best; validation losses by step)."""
    keys, order = config.train, Order(len(examples["train"]), config.train)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], keys)
    best, curve = None, {}
    for step in range(order.num_steps + 1):
        if step % config.run.valid_every == 0 or step == order.num_steps:
            curve[step] = mean_nll(model, examples["valid"], keys.micro_batch_tokens)
            if curve[step] == min(curve.values()):
                best = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            print(f"step {step}: valid {curve[step]:.4f}", flush=True)
        if step < order.num_steps:
            optimizer.param_groups[0]["lr"] = learning_rate(step, order.num_steps, keys)
            update(model, optimizer, examples["train"], order.batch(step), keys)
    return best, curve


def update(model, optimizer, examples, indices, keys):
    """One step, on these examples."""
    targets = int(examples.num_targets[indices].sum())
    optimizer.zero_grad()
    for group in groups(examples, indices, keys.micro_batch_tokens):
        (summed_nll(model, examples, group) / targets).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], keys.clip_norm)
    optimizer.step()


def groups(examples, indices, most):
    """Neighbours by length, padded no more than so many tokens."""
    order = sorted(map(int, indices), key=lambda n: -examples.lengths[n])
    while order:
        size = max(1, most // int(examples.lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def summed_nll(model, examples, group):
    """Of the targets of some examples."""
    texts = examples.ids(np.array(group))
    rows = [
        {"ids": ids.astype("int64"), "prompt": len(ids) - int(examples.num_targets[n])}
        for n, ids in zip(group, texts, strict=True)
    ]
    batch = padded(rows)
    count = int((batch["labels"][:, 1:] != -100).sum())
    return model(**batch).loss * count


@torch.no_grad()
def mean_nll(model, examples, most):
    """Nats a target token."""
    total = sum(float(summed_nll(model, examples, g)) for g in groups(examples, range(len(examples)), most))
    return total / int(examples.num_targets.sum())


@torch.no_grad()
def tested(model, config, examples, tokenizer):
    """As `prefix-ds evaluate` writes it."""
    data, keys = config.data, config.generate
    prompts = read_prompts(data.test, "data.test", data, tokenizer, data.max_length, references=True)
    outputs = written(model, [list(prompt.ids) for prompt in prompts], keys.max_new_tokens, tokenizer)
    found = scored(names_of(config.evaluate.scores), outputs, [prompt.references for prompt in prompts])
    return {
        "split": "test",
        "records": len(prompts),
        "loss": mean_nll(model, examples, config.train.micro_batch_tokens),
        "scores": {score.name: asdict(score) for score in found.scores},
    }


def written(model, prompts, most, tokenizer):
    """Greedy answers, prompts of like lengths together, padded on the left."""
    end = tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    texts = {}
    for start in range(0, len(order), ANSWERS_AT_ONCE):
        batch = order[start : start + ANSWERS_AT_ONCE]
        longest = len(prompts[batch[0]])
        pads = [longest - len(prompts[n]) for n in batch]
        ids = torch.tensor([[end] * pad + prompts[n] for pad, n in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        options = {"max_new_tokens": most, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        rows = model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:]
        texts |= dict(zip(batch, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True))
    return [texts[n] for n in range(len(prompts))]


if __name__ == "__main__":
    main()
