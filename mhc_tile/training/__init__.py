"""Training: the loop, its data and records, and the stability monitor."""

from mhc_tile.training.config import TrainConfig
from mhc_tile.training.corpus import Corpus, load_corpus
from mhc_tile.training.loop import TrainResult, resume, train
from mhc_tile.training.metrics import read_metrics
from mhc_tile.training.monitor import GainMonitor, GainRule, GainWarning, measure_gains

__all__ = [
    "TrainConfig",
    "TrainResult",
    "train",
    "resume",
    "Corpus",
    "load_corpus",
    "read_metrics",
    "GainMonitor",
    "GainRule",
    "GainWarning",
    "measure_gains",
]
