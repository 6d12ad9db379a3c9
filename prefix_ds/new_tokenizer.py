"""A tokenizer for a base that is made from scratch: byte-level BPE, trained on the base's own texts.

Byte-level, so that no text is unknown. One special token stands between documents: it ends each, and every
text starts with it, in training as in use. Training is `tokenizers`' own. Knows nothing of models.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

END = "<|endoftext|>"


def trained_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A transformers tokenizer of at most `vocab_size` entries, learned from texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    end = (END, bpe.token_to_id(END))
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END)


def opened_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
