"""What the ops with a mapping keep for their backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def keep_projection(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    """Save the inputs and the last two outputs, projection and inv_rms, which have no gradient.

    The `setup_context` of mapping, pre, boundary and head; their second derivatives rebuild both.
    """
    ctx.mark_non_differentiable(*output[-2:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for these two as well
    ctx.save_for_backward(*inputs, *output[-2:])
    ctx.constants = keyword_only_inputs
    keep_shapes(ctx, output[:-2])


def keep_shapes(ctx: Any, results: Sequence[Tensor]) -> None:
    """What `given` needs."""
    ctx.results = [(value.shape, value.dtype, value.device) for value in results]


def given(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The cotangents of the results, zeros for a result that nothing read."""
    return [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.results, strict=True)
    ]
