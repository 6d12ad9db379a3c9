"""The families of models that cannot take a prefix though they call attention like all others, and why.

That a family has attention of its own, or none, or a state besides it, is found out by trial. This page is
for what a short trial does not show: positions that are used as places in memory, keys that are made from
more than a token, inputs that are not a text.

Knows nothing of tensors.
"""

from prefix_ds.errors import ModelError

_AUDIO = "it reads several streams of audio codes side by side, not a text"
_DRAFTS = "it drafts for another model and needs that model's keys and values"
_MIXED = (
    "convolutions mix its keys and values with those of the tokens before, and a prefix has none before it"
)
_PLACES = "it finds keys in memory by their position, and a prefix moves the positions of text"

REFUSED = {
    "blt": "it reads patches of bytes whose borders and embeddings depend on the bytes before",
    "deepseek_v4": _PLACES,
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "inkling2_text": _MIXED,
    "inkling_text": _MIXED,
    "minimax_m3_vl_text": _PLACES,
    "musicgen_decoder": _AUDIO,
    "musicgen_melody_decoder": _AUDIO,
    "recurrent_gemma": "its recurrent state is reset only by a token at position 0, where a prefix stands",
    "zaya": _MIXED,
}


def check_family(family: str) -> None:
    """Raises ModelError for a family (transformers' model_type) that is on the page."""
    if family in REFUSED:
        raise ModelError(f"{family} cannot take a prefix: {REFUSED[family]}")
