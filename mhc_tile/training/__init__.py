"""Training: the loop, its data and records, and the stability monitor."""

from .config import TrainConfig
from .corpus import Corpus, load_corpus
from .loop import TrainResult, resume, train
from .metrics import read_metrics
from .monitor import GainMonitor, GainRule, GainWarning, measure_gains

__all__ = [
    "TrainConfig", "TrainResult", "train", "resume", "Corpus", "load_corpus", "read_metrics",
    "GainMonitor", "GainRule", "GainWarning", "measure_gains",
]  # fmt: skip
