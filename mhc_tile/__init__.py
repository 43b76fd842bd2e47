"""Manifold-Constrained Hyper-Connections (mHC, arXiv 2512.24880) for PyTorch.

`mhc_tile.ops` has the torch ops, `mhc_tile.nn` the modules, `mhc_tile.reference` the specification.
Importing the package needs torch alone: no GPU and no TileLang.
"""

from . import _checkout as _checkout  # first: it makes kernels, autotune and perf importable
from . import _environment as _environment  # before what the switches decide
from . import nn as nn
from . import ops as ops
from . import reference as reference
from ._version import __version__
from .config import MHCConfig
from .nn import (
    Collapse,
    Expand,
    Head,
    HyperConnectedStack,
    HyperConnection,
    ManifoldHyperConnection,
    Residual,
)
from .ops import *  # noqa: F403 - each op
from .ops._dispatch import set_batch_invariant
from .ops._warmup import kernels_info, warmup

# without nn, ops and reference: `import *` would replace torch.nn by mhc_tile.nn
__all__ = [
    "__version__", "MHCConfig", "kernels_info", "set_batch_invariant", "warmup",
    "ManifoldHyperConnection", "HyperConnection", "Residual", "HyperConnectedStack",
    "Expand", "Collapse", "Head",
]  # fmt: skip
__all__ += ops.__all__
