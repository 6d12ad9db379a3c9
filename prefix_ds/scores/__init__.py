"""Scores of outputs beside what people wrote, all of them from 0 to 100, with confidence intervals."""

from prefix_ds.scores.table import KNOWN, Score, Scored, names_of, scored, values_of

__all__ = ["KNOWN", "Score", "Scored", "names_of", "scored", "values_of"]
