"""What the ops with a mapping keep for their backward."""

from typing import Any


def keep_projection(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    """Save the inputs and the last two outputs, projection and inv_rms, which have no gradient.

    The `setup_context` of mapping, pre, boundary and head; their second derivatives rebuild both.
    """
    *_, projection, inv_rms = output
    ctx.mark_non_differentiable(projection, inv_rms)
    ctx.save_for_backward(*inputs, projection, inv_rms)
    ctx.constants = keyword_only_inputs
