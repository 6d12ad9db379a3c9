"""When a cached table is still right, and a `datasets` that keeps quiet.

`datasets` finds a table it made before by a fingerprint. Left alone it pickles the function it is given,
which misses changes in the modules that function calls and differs between two loads of one tokenizer. So
the fingerprints are made here from what the result depends on: the text of our own modules, the
tokenizer's rules, the keys.

Knows nothing of records or tokens.
"""

import contextlib
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from prefix_ds.errors import DataError


def fingerprint(*parts: object) -> str:
    """32 hex digits that differ when a part's JSON text differs."""
    text = json.dumps(parts, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def code_fingerprint(*modules: ModuleType) -> str:
    """Differs when the source of a module does, so that no one must remember to raise a version number."""
    return fingerprint(*(inspect.getsource(module) for module in modules))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Differs when two tokenizers might turn the same text into different ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint(
        type(tokenizer).__name__,
        rules,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


@contextlib.contextmanager
def telling_cache_errors(key: str) -> Iterator[None]:
    """Turns an OSError of the block into a DataError that names the cache; `key` says whose."""
    import datasets

    try:
        yield
    except OSError as error:
        cache, reason = datasets.config.HF_DATASETS_CACHE, error.strerror or error
        raise DataError(
            f"{key}: the cache {cache} cannot be written: {reason}; HF_DATASETS_CACHE can name another folder"
        ) from error


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """`datasets` and the hub client without log lines: what they have to say reaches the user as an error."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
