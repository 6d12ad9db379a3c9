"""Prefix tuning written plainly: one process, no sharding, no packing, no attention function of ours.

The prefix enters as transformers' own key/value cache, which for one document at a time, without padding or
recomputation, is correct. What the product does in shards must come to the same numbers.
"""

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from prefix_ds.optim import learning_rate


def reference_prefix(base_folder, keys_values, batches, train):
    """Trains `keys_values` ([layer][key, value], each [N, P, H]); returns the losses and the trained tensors.

    `batches`: for each step, the global batch as (prompt ids, target ids) pairs.
    """
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).requires_grad_(False)
    prefix = [[t.clone().requires_grad_() for t in pair] for pair in keys_values]
    leaves = [t for pair in prefix for t in pair]
    optimizer = torch.optim.AdamW(leaves, betas=train.betas, weight_decay=train.weight_decay)
    losses = []
    for step, batch in enumerate(batches):
        num_targets = sum(len(target) for _, target in batch)
        loss = sum(_nll(base, prefix, *example) for example in batch) / num_targets
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), train)
        optimizer.step()
        losses.append(loss.item())
    return losses, prefix


def _nll(base, prefix, prompt, target):
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix):
        cache.update(key[None], value[None], layer)
    logits = base(torch.tensor([prompt + target]), past_key_values=cache).logits[0]
    predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return -predicted.gather(1, torch.tensor(target)[:, None]).sum()
