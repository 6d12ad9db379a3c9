"""The families of models that cannot take a prefix though they call attention like all others, and why.

That a family has attention of its own, or none, or a state besides it, is found out by trial. This page is
for what a short trial does not show: positions that are used as places in memory, and keys that are made from
more than a token.

Knows nothing of tensors.
"""

_NOT_ALONE = "it drafts for another model and needs that model's keys and values"
_MIXED_KEYS = (
    "convolutions mix its keys and values with those of the tokens before, which a prefix cannot stand in for"
)
_PLACES = "it finds keys in memory by their position, and a prefix moves the positions of text"

REFUSED = {
    "blt": "it reads patches of bytes whose borders and embeddings depend on the bytes before",
    "deepseek_v4": _PLACES,
    "gemma4_assistant": _NOT_ALONE,
    "gemma4_unified_assistant": _NOT_ALONE,
    "inkling2_text": _MIXED_KEYS,
    "inkling_text": _MIXED_KEYS,
    "minimax_m3_vl_text": _PLACES,
    "recurrent_gemma": "its recurrent state is reset only by a token at position 0, where a prefix stands",
    "zaya": _MIXED_KEYS,
}
