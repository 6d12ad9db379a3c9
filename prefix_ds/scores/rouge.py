"""ROUGE-1, ROUGE-2 and ROUGE-L, by rouge-score: F measures, without a stemmer, as its command line does it.

Of several references the best counts. Words are runs of a-z and 0-9 in lower case, which is how rouge-score
reads a text: it was made for English, and a letter with an accent ends a word.

Knows nothing of intervals.
"""

import importlib.metadata
from collections.abc import Sequence

from prefix_ds.scores.sums import Sums, mean_of


def rouge(kind: str, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """The mean over records of rouge1, rouge2 or rougeL."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    scorer = RougeScorer(
        [kind], tokenizer=DefaultTokenizer(use_stemmer=False)
    )  # or it logs that it takes this
    pairs = zip(outputs, references, strict=True)
    values = [100 * scorer.score_multi(known, output)[kind].fmeasure for output, known in pairs]
    version = importlib.metadata.version("rouge-score")
    return mean_of(values, f"measure:F|stemmer:no|refs:best|rouge-score:{version}")
