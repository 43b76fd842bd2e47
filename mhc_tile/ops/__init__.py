"""The public ops, one file each: checks, schema, CPU and CUDA implementations, gradient.

Each function here calls the torch op of the same name, `torch.ops.mhc_tile.<name>`; `sublayer`,
which takes a layer, calls those of `pre` and `merge`. The torch ops
of mapping, pre, boundary and head return, after the public results, the `projection` and `inv_rms`
that their backward keeps; `torch.ops.mhc_tile.<name>_backward` is the gradient.
"""

from .boundary import boundary
from .mapping import mapping
from .merge import merge
from .pre import pre
from .pre_apply import pre_apply
from .sinkhorn import sinkhorn
from .streams import collapse, expand, head
from .sublayer import sublayer

__all__ = [
    "boundary",
    "collapse",
    "expand",
    "head",
    "mapping",
    "merge",
    "pre",
    "pre_apply",
    "sinkhorn",
    "sublayer",
]
