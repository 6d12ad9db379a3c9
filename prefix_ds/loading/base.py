"""From a hub id or a folder to a tokenizer and a model.

A model is loaded in two halves. Here it gets its structure, and of its weights promises: transformers' own
loading runs on tensors that are not read yet, so its renamings, merges and ties apply, and none of them is
written down again. Who holds which part of a weight then reads that part (`engine.filling`). Rejected:
transformers' loading under ZeRO-3, by which rank 0 reads everything and every rank holds each tensor in turn.

What transformers would leave at random (a tensor the files lack) is refused: a frozen base with one random
layer trains without complaint. Knows nothing of training or prefixes.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from prefix_ds.config import DataKeys, ModelKeys
from prefix_ds.data.chat import end_with_turns
from prefix_ds.errors import ModelError
from prefix_ds.int8 import stored_in_8_bits
from prefix_ds.loading.complaints import config_errors, library_errors, one_line, place
from prefix_ds.loading.files import stored_tensors
from prefix_ds.loading.prequantised import check_storage, dequantised
from prefix_ds.loading.vetting import check_place
from prefix_ds.promise import Promise, kept, same_numbers

log = logging.getLogger(__name__)

# What transformers reports of a loading, in words.
_GAPS = {"missing_keys": "missing tensors", "mismatched_keys": "other shapes", "conversion_errors": "errors"}


def load_tokenizer(keys: ModelKeys, data: DataKeys) -> Any:
    """The tokenizer of the base, or the one `model.tokenizer` names; in a chat its texts end where turns do.

    Raises ModelError, and DataError where it has no chat template and should.
    """
    from transformers import AutoTokenizer

    key, name = "model.tokenizer" if keys.tokenizer else "model.name", str(keys.tokenizer or keys.name)
    check_place(key, name)
    where = place(key, name)
    with library_errors(f"{where}: has no tokenizer that can be loaded (model.tokenizer can name another)"):
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=None if keys.tokenizer else keys.revision,  # it is the base's
            trust_remote_code=keys.trust_remote_code,
            mistral_format=False,  # mistral-common's, where it is installed, has another interface
        )
    return end_with_turns(tokenizer, data)


def load_base(keys: ModelKeys) -> nn.Module:
    """The base; its parameters are promises. Raises ModelError. Makes no collective call."""
    where = place("model.name", str(keys.name))
    with library_errors(where):
        base = _promised(keys, where)
    for module in base.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, kept(buffer))
    if keys.bits == 8:
        stored_in_8_bits(base, keys.vocabulary_bits == 8, keys.in_16_bits, keys.int8_outliers)
    return base


def _promised(keys: ModelKeys, where: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    source = {"revision": keys.revision, "trust_remote_code": keys.trust_remote_code}
    config = AutoConfig.from_pretrained(keys.name, **source)
    check_storage(config)  # before anything is downloaded
    tensors = dequantised(stored_tensors(keys), config)
    try:
        with _opened_as({name: Promise.of(tensor) for name, tensor in tensors.items()}):
            base, report = AutoModelForCausalLM.from_pretrained(
                keys.name,
                config=config,
                dtype=getattr(torch, keys.dtype),
                use_safetensors=True,  # never a pickle
                ignore_mismatched_sizes=True,  # they are reported, and refused below
                output_loading_info=True,
                **source,
            )
    except RuntimeError as error:  # of its conversions; its report has been logged
        raise ModelError(f"{where}: its weights do not fit its config.json: {one_line(error)}") from error
    _refuse_gaps(report, where)
    assert isinstance(base, nn.Module)
    _tie(base)
    return base


def _tie(base: nn.Module) -> None:
    """One parameter, where the files hold it under both of its names; transformers does not look into
    promises.

    Two that differ, in spite of the configuration, stay two, as transformers has it.
    """
    tied: dict[str, str] = getattr(base, "all_tied_weights_keys", {})
    for target, source in tied.items():
        one, other = base.get_parameter(target), base.get_parameter(source)
        if one is other:
            continue
        if same_numbers(one, other):
            module, _, name = target.rpartition(".")
            setattr(base.get_submodule(module), name, other)
        else:
            log.warning("%s and %s differ in the files, so they are not tied", target, source)


class _Opened:
    """What transformers asks of an open safetensors file, answered with promises."""

    def __init__(self, tensors: Mapping[str, Promise]) -> None:
        self.keys, self.get_slice = tensors.keys, tensors.__getitem__

    def __exit__(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def _opened_as(tensors: Mapping[str, Promise]) -> Iterator[None]:
    """Whichever file transformers opens inside, it finds these tensors; it merges what it finds."""
    from transformers import modeling_utils

    original = modeling_utils.safe_open
    modeling_utils.safe_open = lambda *_, **__: _Opened(tensors)
    try:
        yield
    finally:
        modeling_utils.safe_open = original


def new_base(keys: ModelKeys, tokenizer: Any, seed: int) -> nn.Module:
    """A base of the architecture in `model.config`, of the tokenizer's size, with the seed's random weights.

    Raises ConfigError. Every rank calls this.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = special | keys.config | {"vocab_size": len(tokenizer)}
    with config_errors():
        config = AutoConfig.for_model(**sizes)
        torch.manual_seed(seed)
        base: nn.Module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, keys.dtype))
    return base


def _refuse_gaps(report: dict[str, Any], where: str) -> None:
    for kind, words in _GAPS.items():
        if gaps := sorted(map(str, report.get(kind, ()))):
            shown = one_line(", ".join(gaps[:3]))
            raise ModelError(
                f"{where}: its weights do not fit its config.json: {words} ({len(gaps)}): {shown}"
            )
