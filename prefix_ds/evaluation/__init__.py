"""How good a run's outputs are: the likelihood of what people wrote, and scores of what it writes itself."""

from prefix_ds.evaluation.found import Evaluation, Front, table_of, write_evaluation
from prefix_ds.evaluation.losses import RecordLosses, record_losses
from prefix_ds.evaluation.sample import Sample, sampled

__all__ = [
    "Evaluation",
    "Front",
    "RecordLosses",
    "Sample",
    "record_losses",
    "sampled",
    "table_of",
    "write_evaluation",
]
