"""The one `torch.library.Library` of the package, and how an op enters it.

Under forward-mode AD and the transforms of `torch.func`, which need more than a formula for the
reverse mode, an op is its CPU implementation: operators of PyTorch, which have all formulas.
`Library.define` with `impl` costs less host time a call than `torch.library.custom_op`, and refuses
a second definition of the same name, where the latter replaces the first.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "mhc_tile"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Every op of `mhc_tile.ops` by name, for the tests.
OPS: dict[str, torch._ops.OpOverload] = {}

Formula = Callable[..., Any]

# Before 2.13 Inductor, at an op that it has no lowering for, formats the arguments with everything
# that they were computed from, which grows exponentially with the number of sublayers.
_WRITES_ARGUMENTS_OUT = torch.__version__ < "2.13"


def define(
    schema: str,
    *, cpu: Formula, fake: Formula, setup_context: Formula, backward: Formula,
    cuda: Formula | None = None,
) -> torch._ops.OpOverload:  # fmt: skip
    """Register an op; returns its default overload, which public functions call.

    The schema has no namespace; an op that a model keeps to itself starts with an underscore and is
    not in `OPS`. `cpu`, of `reference.py` or `gradients.py`, is given contiguous tensors, and what
    it returns is made contiguous; without `cuda` it also runs on CUDA tensors. `fake` returns
    contiguous empties. The others are as in `torch.library.register_autograd`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    composite = _contiguous(_with_defaults(op, cpu))
    _LIBRARY.impl(name, composite, "CPU")
    _LIBRARY.impl(name, _contiguous(_with_defaults(op, cuda or cpu)), "CUDA")
    fake = _known_to_inductor(op, _with_defaults(op, fake))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    formula = torch._library.autograd.Info(backward, setup_context)
    reverse = torch._library.autograd.make_autograd_impl(op, formula)
    autograd = _composite_under_transforms(name, composite, reverse)
    for key in ("Autograd", "AutogradXPU"):  # the latter by its name is where C++ asks for it
        _LIBRARY.impl(name, autograd, key, with_keyset=True)
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, _outside_autocast(op, device), f"Autocast{device.upper()}")
    if not name.startswith("_"):
        OPS[name] = op
    return op


def while_tracing(function: Formula) -> Formula:
    """Let torch.compile call a function as it traces, and take its result for a constant.

    What `torch.compiler.assume_constant_result` does, which would import Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def under_transforms() -> bool:
    """Whether forward-mode AD or a transform of `torch.func` is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _composite_under_transforms(name: str, composite: Formula, reverse: Formula) -> Formula:
    """The autograd implementation: the reverse formula, or operators that have every formula."""

    def implementation(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if not under_transforms():
            return reverse(keyset, *args, **kwargs)
        if any(isinstance(value, Tensor) and value.is_cuda for value in args):
            _warn_of_reference(name)
        return composite(*args, **kwargs)

    return implementation


@functools.cache
def _warn_of_reference(name: str) -> None:
    warnings.warn(
        f"{name}: the PyTorch reference runs instead of a kernel: forward-mode AD and torch.func "
        "need formulas that a kernel has not",
        RuntimeWarning,
        stacklevel=3,
    )


def _with_defaults(op: torch._ops.OpOverload, function: Formula) -> Formula:
    """Put back the arguments that equal the schema's defaults: the dispatcher drops them."""
    arguments = op._schema.arguments
    positional = [a.default_value for a in arguments if not a.kwarg_only]
    with_default = (a for a in arguments if a.kwarg_only and a.has_default_value())
    keywords = {a.name: a.default_value for a in with_default}

    @functools.wraps(function)
    def implementation(*args: Any, **kwargs: Any) -> Any:
        return function(*args, *positional[len(args) :], **{**keywords, **kwargs})

    return implementation


def _known_to_inductor(op: torch._ops.OpOverload, fake: Formula) -> Formula:
    """Give Inductor, once it is there, the lowering that it would give itself: a call of the op."""

    @functools.wraps(fake)
    def implementation(*args: Any, **kwargs: Any) -> Any:
        if _WRITES_ARGUMENTS_OUT:
            lowering: Any = sys.modules.get("torch._inductor.lowering")
            # another thread may still be importing it
            if hasattr(lowering, "make_fallback") and op not in lowering.lowerings:
                tag = torch._library.utils.get_layout_constraint_tag(op, with_default=True)
                constraint = lowering.tag_to_layout_constraint(tag)
                lowering.make_fallback(op, layout_constraint=constraint, warn=False)
        return fake(*args, **kwargs)

    return implementation


def _contiguous(function: Formula) -> Formula:
    def dense(value: Any) -> Any:
        return value.contiguous() if isinstance(value, Tensor) else value

    @functools.wraps(function)
    def implementation(*args: Any, **kwargs: Any) -> Any:
        result = function(*map(dense, args), **kwargs)
        return dense(result) if isinstance(result, Tensor) else tuple(map(dense, result))

    return implementation


def _outside_autocast(op: torch._ops.OpOverload, device: str) -> Formula:
    """The op under autocast: x keeps its dtype and the maps stay float32."""

    def implementation(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return implementation


def derive(function: Formula) -> dict[str, Formula]:
    """The keywords `setup_context` and `backward` of `define`, by differentiating its function.

    It gives the backward ops their own gradients, of any order; nothing that trains without second
    derivatives runs it.
    """

    def setup_context(ctx: Any, inputs: Any, output: Any, keyword_only_inputs: Any = None) -> None:
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.keywords = keyword_only_inputs or {}

    def backward(ctx: Any, *grads: Tensor) -> Any:
        # the dispatcher dropped arguments that equal their defaults: they need no gradient
        needs = (*ctx.needs_input_grad, *[False] * (len(ctx.others) - len(ctx.needs_input_grad)))
        again = torch.is_grad_enabled()  # this, too, is to be differentiated

        def leaf(value: Tensor, needed: bool) -> Tensor:
            if again and needed:
                return value.view_as(value)  # of its own, or what leads to it would count as well
            return value.detach().requires_grad_(needed)

        with torch.enable_grad():
            inputs = [
                other if value is None else leaf(value, needed)
                for value, other, needed in zip(ctx.saved_tensors, ctx.others, needs, strict=True)
            ]
            outputs = function(*inputs, **ctx.keywords)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
        wanted = [index for index, needed in enumerate(needs) if needed]
        result: list[Tensor | None] = [None] * len(inputs)
        derived = torch.autograd.grad(
            [output for output, _ in pairs],
            [inputs[index] for index in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
            create_graph=again,
        )
        for index, grad in zip(wanted, derived, strict=True):
            result[index] = grad
        return tuple(result)

    return {"setup_context": setup_context, "backward": backward}
