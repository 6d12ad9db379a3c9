"""What tests ask of a base that is loaded, with its weights still promises."""

import os

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from prefix_ds.config import parse_config
from prefix_ds.promise import Promise, read


def config_for(folder, *overrides):
    text = f"model: {{name: {folder}, dtype: float32}}\nprefix: {{init: random, length: 3}}"
    return parse_config(text, overrides)


def loaded_whole(folder, dtype, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **more)


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
