"""The public ops, one file each: checks, schema, CPU and CUDA implementations, gradient.

Each function calls the torch op of its name, `torch.ops.mhc_tile.<name>`; `sublayer` and its steps
call those of `pre`, `merge` and `boundary`. `torch.ops.mhc_tile.<name>_backward` is the gradient.
The torch ops of mapping, pre, boundary and head also return what their backward keeps.
"""

from .boundary import boundary
from .mapping import mapping
from .merge import merge
from .pre import pre
from .pre_apply import pre_apply
from .sinkhorn import sinkhorn
from .streams import collapse, expand, head
from .sublayer import OpenSublayer, close_sublayer, next_sublayer, open_sublayer, sublayer

__all__ = [
    "boundary", "collapse", "expand", "head", "mapping", "merge", "pre", "pre_apply", "sinkhorn",
    "sublayer", "open_sublayer", "next_sublayer", "close_sublayer", "OpenSublayer",
]  # fmt: skip
