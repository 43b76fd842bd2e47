"""Modules: wrap any layer `[..., C] -> [..., C]` in mHC, in Hyper-Connections or in a residual."""

from ._parameters import parameters_without_weight_decay
from .connections import HyperConnection, ManifoldHyperConnection, Residual
from .deepseek_v4 import export_deepseek_v4, load_deepseek_v4
from .stack import HyperConnectedStack
from .streams import Collapse, Expand, Head

__all__ = [
    "ManifoldHyperConnection", "HyperConnection", "Residual", "HyperConnectedStack",
    "Expand", "Collapse", "Head",
    "load_deepseek_v4", "export_deepseek_v4", "parameters_without_weight_decay",
]  # fmt: skip
