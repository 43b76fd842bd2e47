"""Slices of models for `mhc-tile perf overhead`: their layers, joined in every way.

Axes: B batch, S sequence, n streams, C hidden size.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_tile import HyperConnectedStack, HyperConnection, ManifoldHyperConnection, Residual
from mhc_tile.models import CONFIGS, Decoder, ModelConfig, model_config

from .bench import tf32_products
from .connections import PeerConnection, ReferenceConnection
from .peers import ADAPTERS, lacks, version
from .records import OURS

PLAIN = "residual (compiled)"
LAYERS, BATCH, SEQUENCE = 4, 2, 4096
UNCHECKED = ("residual", "hc")  # join the layers otherwise than the reference
TF32 = ", tf32)"  # the end of the name of who multiplies fp32 in tf32
WAYS = ("compiled, tf32", "sublayers compiled, tf32", "sublayers compiled", "layers compiled")
NAMES = (
    PLAIN, "residual (layers compiled)", OURS, f"{OURS} (layers compiled)",
    *(f"{kind} ({way})" for kind in ("hc", "reference") for way in WAYS), *ADAPTERS,
)  # fmt: skip
"""All contenders; packages take part where they can join sublayers, tf32 on CUDA alone."""
GRAPHS = "graphs)"  # the end of the name of who runs as CUDA graphs
ON_REQUEST = tuple(f"{kind} ({way})" for kind in ("residual", OURS) for way in ("eager", "graphs"))
"""Further contenders, which take part where their names are asked for: small models wait for the
host."""


def names_here(device: str) -> list[str]:
    """The contenders that can be measured on "cuda" or "cpu"."""
    names = (*NAMES, *ON_REQUEST)
    installed = [name for name in names if name not in ADAPTERS or _joins(name)]
    return [name for name in installed if device == "cuda" or not name.endswith((TF32, GRAPHS))]


def _joins(package: str) -> bool:
    """Whether a package is installed that has what joins a sublayer, `pre` and `merge`."""
    return version(package) is not None and not {"pre", "merge"} & lacks(package).keys()


def compiled(module: nn.Module, mode: str | None = None) -> nn.Module:
    """A module under torch.compile."""
    return cast(nn.Module, torch.compile(module, mode=mode))


@dataclass(frozen=True)
class Slice:
    """What is measured: layers of a model and the shape of a step."""

    model: str
    layers: int = LAYERS
    batch: int = BATCH
    sequence: int = SEQUENCE
    optimizer: bool = False  # whether a step of AdamW is part of the step
    device: str = "cuda"

    @property
    def key(self) -> str:
        """The name in a result file."""
        step = "step+adamw" if self.optimizer else "step"
        return f"{self.model}/{step}/B{self.batch}xS{self.sequence}/L{self.layers}"

    @property
    def config(self) -> ModelConfig:
        """The model cut to these layers, every one with experts where the model has any."""
        changes: dict[str, Any] = {"num_layers": self.layers, "vocab_size": 1}
        changes["context_length"] = self.sequence
        if CONFIGS[self.model].moe:
            changes["moe"] = {"leading_dense_layers": 0}
        return model_config(self.model, **changes)

    @property
    def denominator(self) -> str:
        """What 100% is, in words."""
        what = "forward, backward and AdamW" if self.optimizer else "forward and backward"
        layers = f"{self.layers} layer" + "s" * (self.layers > 1)
        return (
            f"{what} of {layers} of {self.model} without embedding and head, "
            f"{self.batch} x {self.sequence} tokens, bf16, plain residuals under torch.compile"
        )


class Sublayers:
    """The layers of a slice and every way to join them; layers and parameters are shared."""

    def __init__(self, piece: Slice) -> None:
        self.piece, config = piece, piece.config
        torch.manual_seed(0)
        with torch.device(piece.device):
            stack = Decoder(config, "mhc").stack.to(torch.bfloat16)
        self.ours = [c for c in stack.connections if isinstance(c, ManifoldHyperConnection)]
        self.layers = [connection.layer for connection in self.ours]
        self.width = config.hidden_size
        self.streams = self.ours[0].config.num_streams
        # As after training: maps that follow their token and differ between streams, layers that
        # write as much as they read. Else a wrong connection would hardly show in the output.
        for connection in self.ours:
            nn.init.constant_(connection.alpha, 1.0)
            nn.init.normal_(connection.bias)
        for layer in self.layers:
            _write_as_much_as_is_read(layer, self.width, min(64, piece.sequence))

    def contenders(self) -> dict[str, Callable[[], nn.Module]]:
        """How to build each, by name; those with plain residuals first."""
        device = self.ours[0].phi.device
        layers = functools.cache(lambda: [compiled(layer) for layer in self.layers])

        def connect(kind: str, index: int, layer: nn.Module) -> nn.Module:
            if kind == "residual":
                return Residual(layer)
            if kind == "hc":
                return HyperConnection(layer, self.width, layer_index=index, device=device)
            own = self.ours[index]
            ours = ManifoldHyperConnection(layer, self.width, own.config, device=device)
            ours.phi, ours.alpha, ours.bias = own.phi, own.alpha, own.bias
            if kind == "reference":
                return ReferenceConnection(ours)
            return PeerConnection(ours, kind) if kind in ADAPTERS else ours

        def build(name: str) -> nn.Module:
            kind, _, way = name.removesuffix(TF32).removesuffix(")").partition(" (")
            way = "compiled" if name == OURS else way
            chosen = layers() if way in ("", "layers compiled") else self.layers
            parts = [connect(kind, *numbered) for numbered in enumerate(chosen)]
            if way == "sublayers compiled":
                parts = [compiled(part) for part in parts]
            model = HyperConnectedStack(parts) if kind == OURS else nn.Sequential(*parts)
            if way == "graphs":
                return compiled(model, "reduce-overhead")
            return compiled(model) if way == "compiled" else model

        return {name: functools.partial(build, name) for name in names_here(self.piece.device)}

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """What the reference makes of the inputs, and their gradient, in eager PyTorch.

        Sublayers are computed again in the backward pass: else it would need more memory than any
        contender.
        """
        return _differentiated(nn.Sequential(*map(_Again, self.ours)), *self.inputs(OURS))

    def error(self, name: str, model: nn.Module, x: Tensor) -> float | None:
        """The relative error of output and gradient; None where the layers are joined otherwise."""
        if name.startswith(UNCHECKED):
            return None
        truths, grad = self.truth, self.inputs(name)[1]
        with tf32_products() if name.endswith(TF32) else contextlib.nullcontext():
            found = _differentiated(model, x, grad)
        errors = [
            (value.float() - truth.float()).norm() / truth.float().norm()
            for value, truth in zip(found, truths, strict=True)
        ]
        return torch.stack(errors).max().item()  # of a NaN, NaN

    def inputs(self, name: str) -> tuple[Tensor, Tensor]:
        """What a slice reads, and the gradient of what it returns; streams but for residuals."""
        piece = self.piece
        shape: tuple[int, ...] = (piece.batch, piece.sequence, self.streams, self.width)
        if name.startswith("residual"):
            shape = (*shape[:2], self.width)
        generator = torch.Generator(piece.device).manual_seed(1)
        x, grad = (
            torch.randn(shape, generator=generator, device=piece.device).bfloat16()
            for _ in range(2)
        )
        return x.requires_grad_(), grad


class _Again(nn.Module):
    """A sublayer by the reference that keeps its input alone for the backward pass."""

    def __init__(self, ours: ManifoldHyperConnection) -> None:
        super().__init__()
        self.module = ReferenceConnection(ours)

    def forward(self, x: Tensor) -> Tensor:
        """From x [B, S, n, C] to x_next."""
        return cast(Tensor, checkpoint(self.module, x, use_reentrant=False))


def _differentiated(model: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """A model's output, and the gradient of its input."""
    output = model(x)
    return output.detach(), torch.autograd.grad(output, x, grad)[0]


@torch.no_grad()
def _write_as_much_as_is_read(layer: nn.Module, width: int, tokens: int) -> None:
    """Scale a layer's last matrices so that its output has the size of its input."""
    last = [
        parameter
        for name, parameter in layer.named_parameters()
        if name.endswith(("project_out.weight", "experts_out"))
    ]
    x = torch.randn(1, tokens, width, device=last[0].device, dtype=last[0].dtype)
    size = layer(x).float().square().mean().sqrt()
    for parameter in last:
        parameter.div_(size)


class Step:
    """One contender's training step: forward, backward from the gradient of the output, optimizers.

    With `tf32`, PyTorch multiplies fp32 in tf32 meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        grad: Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        tf32: bool = False,
    ) -> None:
        self.model, self.x, self.grad, self.optimizers = model, x, grad, optimizers
        self._setting = tf32_products if tf32 else contextlib.nullcontext
        self._leaves = [x, *model.parameters()]

    def __call__(self) -> None:
        """Run the step."""
        self.free()
        torch.compiler.cudagraph_mark_step_begin()
        with self._setting():
            self.model(self.x).backward(self.grad)
        for optimizer in self.optimizers:
            optimizer.step()

    def free(self) -> None:
        """Let go of the gradients: contenders share the memory."""
        for leaf in self._leaves:
            leaf.grad = None
