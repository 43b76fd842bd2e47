"""The inputs that every op is tried on, each row naming the path that it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhc_tile import ops, reference
from mhc_tile._library import OPS

MAPPING = {"norm_eps": 1e-6, "pre_eps": 1e-3, "post_scale": 1.5}
PRE = {**MAPPING, "iters": 20, "sinkhorn_eps": 0.0}
HEAD = {"norm_eps": 1e-6, "pre_eps": 1e-3}
PARAMETERS = ("phi", "alpha", "bias")

# op: (names of its tensors, its other arguments). "expand" reads "hidden", made like layer_output.
SIGNATURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "mapping": (("x", *PARAMETERS), MAPPING),
    "sinkhorn": (("logits",), {"iters": 20, "eps": 0.0}),
    "pre_apply": (("x", "h_pre"), {}),
    "merge": (("x", "layer_output", "h_post", "h_res"), {}),
    "pre": (("x", *PARAMETERS), PRE),
    "boundary": (("x", "layer_output", "h_post", "h_res", *PARAMETERS), PRE),
    "expand": (("hidden",), {"num_streams": 4}),
    "collapse": (("x",), {"mode": "mean"}),
    "head": (("x", "phi_head", "alpha_head", "bias_head"), HEAD),
}


@dataclass(frozen=True)
class Shape:
    """Leading dims, streams and width of one case, and which path it is there for."""

    path: str
    tokens: tuple[int, ...] = (2, 5)
    n: int = 4
    width: int = 64
    scale: float = 1.0

    def __str__(self) -> str:
        """The test's id."""
        return self.path.replace(" ", "-")


SHAPES = [
    Shape("ordinary"),
    Shape("no tokens", tokens=(0,)),
    Shape("one token", tokens=(1,)),
    Shape("no leading dims", tokens=()),
    Shape("ragged width", tokens=(7,), width=127),
    Shape("one stream", tokens=(7,), n=1),
    Shape("two streams", tokens=(7,), n=2),
    Shape("eight streams", tokens=(33,), n=8, width=32),
    Shape("many tokens", tokens=(3, 171), width=32),
    Shape("wide", tokens=(2,), width=1280),
    Shape("large logits", tokens=(17,), scale=8.0),
]


def tensors(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs by name: streams in `dtype`, maps and parameters in at least float32."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.promote_types(dtype, torch.float32)
    tokens, n, width, k = shape.tokens, shape.n, shape.width, shape.n * (shape.n + 2)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = maps) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return (values * scale).to(device, dtype)

    hidden = normal(*tokens, width, dtype=dtype)
    return {
        "x": normal(*tokens, n, width, dtype=dtype),
        "hidden": hidden,
        "layer_output": hidden.clone(),
        "logits": normal(*tokens, n, n, scale=shape.scale),
        "h_pre": torch.sigmoid(normal(*tokens, n)),
        "h_post": 2 * torch.sigmoid(normal(*tokens, n)),
        "h_res": reference.sinkhorn(normal(*tokens, n, n)),
        "phi": normal(k, n * width, scale=(n * width) ** -0.5),
        "alpha": normal(3, scale=0.3) + shape.scale,
        "bias": normal(k),
        "phi_head": normal(n, n * width, scale=(n * width) ** -0.5),
        "alpha_head": normal(1) + shape.scale,
        "bias_head": normal(n),
    }


@dataclass(frozen=True)
class Call:
    """One call of an op: tensors in order and the other arguments."""

    name: str
    inputs: tuple[Tensor, ...]
    others: dict[str, Any]

    def run(self, function: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        """The results, always as a tuple."""
        result = (function or getattr(ops, self.name))(*self.inputs, **self.others)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def to(self, dtype: torch.dtype | None = None, grad: bool = False) -> "Call":
        """The same call on fresh leaves, in another dtype if given."""
        inputs = (value.detach().to(dtype or value.dtype).clone() for value in self.inputs)
        return Call(self.name, tuple(v.requires_grad_(grad) for v in inputs), self.others)


def call(
    name: str, shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", **others: Any
) -> Call:
    """A call of the public op `name` on random inputs."""
    names, constants = SIGNATURES[name]
    values = tensors(shape, dtype, device)
    constants = {**constants, **others}
    if name == "expand":
        constants["num_streams"] = shape.n
    return Call(name, tuple(values[key] for key in names), constants)


def cotangents(results: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Random normal cotangents: a loss like `sum()` is constant for Sinkhorn."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for value in results
    )


def torch_op_arguments(name: str, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for `torch.ops.mhc_tile.<name>`, forward or backward, that require gradients."""
    forward = name.removesuffix("_backward")
    made = call(forward, Shape("opcheck", tokens=(3,), n=2, width=8), device=device)
    if forward == name:
        return made.to(grad=True).inputs, made.others
    results = OPS[forward](*made.inputs, **made.others)
    results = (results,) if isinstance(results, Tensor) else results
    saves_projection = forward in ("mapping", "pre", "boundary", "head")
    kept = results[-2:] if saves_projection else ()
    cotangent = cotangents(results[: len(results) - len(kept)])
    if forward == "boundary":
        kept = (*kept, results[0])
    inputs = () if forward in ("expand", "collapse") else made.inputs
    leaves = tuple(value.detach().clone().requires_grad_() for value in (*cotangent, *inputs))
    others = made.others
    if forward == "expand":
        others = {}
    if forward == "collapse":
        others = {"num_streams": 2, "mode": "mean"}
    return (*leaves, *kept), others
