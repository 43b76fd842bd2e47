"""How an op is defined: once, by the names of its tensors.

From an `Op` follow two torch ops, `<name>` and `<name>_backward`: their schemas, fakes, CPU and
CUDA implementations and autograd formulas. The axes and dtypes of the names are those of
`kernels.common.quantities`; a gradient has those of what it is the gradient of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune.registry import KERNELS
from mhc_tile.kernels.common.quantities import Quantity, quantity, shape_of, sizes_of

from .. import _library
from ._dispatch import flat, leading, on_cuda, tuned

Function = Callable[..., Any]

# Every definition by the name of its torch op, the backward ops among them.
DEFINITIONS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Op:
    """One torch op, and the op of its gradient.

    `reference` returns, from tensors, arguments and constants, the results and after them what is
    `kept`. `gradient` returns, from what the backward reads, its arguments and the constants, the
    gradients of `tensors`. A kernel is a key of `autotune.registry.KERNELS` or a CUDA
    implementation; without one the CPU implementation runs on CUDA tensors, too.
    """

    name: str  # with an underscore in front it is no public op
    tensors: tuple[str, ...]
    results: tuple[str, ...]
    reference: Function
    gradient: Function | None = None  # None: the op is differentiated as it is
    kernel: str | Function | None = None
    gradient_kernel: str | Function | None = None
    kept: tuple[str, ...] = ()  # further results, which only the backward reads
    reads: tuple[str, ...] = ()  # of the backward; default: cotangents of `results`, tensors, kept
    optional: tuple[str, ...] = ()  # tensors that the op may be given in addition
    gradient_optional: tuple[str, ...] = ()
    arguments: dict[str, str] = field(default_factory=dict)  # schemas of what is no tensor, by name
    gradient_arguments: dict[str, str] = field(default_factory=dict)  # from the forward
    constants: str = ""  # schema of the keyword arguments, of forward and backward
    forward: "Op | None" = None  # the op that this one is the backward of
    call: Any = field(default=None, init=False)  # the torch op

    def __post_init__(self) -> None:
        """Register the torch op, its backward first."""
        formula = self._formula() if self.gradient else _library.derive(self._differentiable)
        cuda = None
        if self.kernel is not None:
            functions = (self.by_kernel, self.on_cpu)
            name = self.name.lstrip("_")
            cuda = on_cuda(name, *functions, streams=self._streams, dims=self._axes)
        call = _library.define(self.schema, cpu=self.on_cpu, cuda=cuda, fake=self._fake, **formula)
        object.__setattr__(self, "call", call)
        DEFINITIONS[self.name] = self

    @property
    def schema(self) -> str:
        """The torch op's, without the namespace."""
        given = [f"Tensor {name}" for name in self.tensors]
        given += self.arguments.values()
        given += [f"Tensor? {name}=None" for name in self.optional]
        given += ["*", self.constants] if self.constants else []
        results = [f"Tensor {name}" for name in self.returned]
        returned = results[0] if len(results) == 1 else f"({', '.join(results)})"
        return f"{self.name}({', '.join(given)}) -> {returned}"

    @property
    def returned(self) -> tuple[str, ...]:
        """Names of all that the torch op returns."""
        return (*self.results, *self.kept)

    @cached_property
    def backward(self) -> "Op":
        """The op of the gradient."""
        assert self.gradient is not None
        cotangents = tuple(f"grad_{name}" for name in self.results)
        return Op(
            f"{self.name}_backward",
            self.reads or (*cotangents, *self.tensors, *self.kept),
            tuple(f"grad_{name}" for name in self.tensors),
            self.gradient,
            kernel=self.gradient_kernel,
            optional=self.gradient_optional,
            arguments=self.gradient_arguments,
            constants=self.constants,
            forward=self,
        )

    def call_of(
        self, tensor: Function, others: dict[str, Any], optional: Sequence[str] = ()
    ) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of a call.

        `tensor` gives a tensor for a name, such as `quantities.Samples.get`; `others` has the other
        arguments and maybe more; `optional` names the optional tensors that are given.
        """
        given = [*map(tensor, self.tensors), *(others[name] for name in self.arguments)]
        given += [tensor(name) if name in optional else None for name in self.optional]
        keywords = [a.name for a in self.call._schema.arguments if a.kwarg_only]
        return given, {name: others[name] for name in keywords}

    def on_cpu(self, *args: Any, **constants: Any) -> Any:
        """The reference, its results in their dtypes."""
        alike, results = self._alike(args), _listed(self.reference(*args, **constants))
        pairs = zip(self.returned, results, strict=True)
        return _single([value.to(alike[quantity(name).of_streams].dtype) for name, value in pairs])

    def by_kernel(self, *args: Any, **constants: Any) -> Any:
        """A kernel's results, its configuration from a table or the default."""
        if not isinstance(self.kernel, str):
            return self.kernel(*args, **constants)  # type: ignore[misc]
        kernel, count = KERNELS[self.kernel], len(self.tensors)
        first, n = self._streams(*args)
        tokens = first.shape[: first.dim() - self._axes]
        tensors: Sequence[Any] = args
        others = constants
        if self.arguments:
            others = {**dict(zip(self.arguments, args[count:], strict=False)), **constants}
            tensors = args[:count]
        flattened = len(tokens) != 1
        if flattened:
            pairs = zip(tensors, self._flattened, strict=False)
            tensors = [v if axes is None or v is None else flat(v, axes) for v, axes in pairs]
            size = tokens.numel()
        else:
            size = tokens[0]
        results = tuned(
            self.kernel,
            first,
            (size, n, first.shape[-1] if kernel.of_channels else 0),
            lambda config: kernel.call(tensors, others, config),
        )
        if flattened:
            pairs = zip(results, self._unflattened, strict=True)
            results = tuple([leading(v, tokens) if per_token else v for v, per_token in pairs])
        return results[0] if len(results) == 1 else results

    @cached_property
    def _given(self) -> list[Quantity]:
        return [quantity(name) for name in (*self.tensors, *self.optional)]

    @cached_property
    def _flattened(self) -> list[int | None]:
        """Of each tensor how many dims are no tokens; None where no dim is."""
        return [len(known.axes) if known.per_token else None for known in self._given]

    @cached_property
    def _unflattened(self) -> list[bool]:
        return [quantity(name).per_token for name in self.returned]

    @cached_property
    def _first(self) -> int:
        """Which tensor decides on dtype, device and tokens: the first x, hidden state or other."""
        return next((i for i, known in enumerate(self._given) if known.axes == ("n", "C")), 0)

    @cached_property
    def _axes(self) -> int:
        """How many of that tensor's dims are no tokens."""
        return len(self._given[self._first].axes)

    def _streams(self, *args: Any) -> tuple[Tensor, int]:
        """That tensor, and n."""
        first = args[self._first]
        if self._counted is None:
            return first, args[len(self.tensors)]
        tensor, dim = self._counted
        return first, args[tensor].shape[dim]

    @cached_property
    def _counted(self) -> tuple[int, int] | None:
        """A tensor and its dim that is n long; None if n is an argument."""
        for index, tensor in enumerate(self._given):
            if "n" in tensor.axes:
                return index, tensor.axes.index("n") - len(tensor.axes)
        return None

    def _alike(self, args: Sequence[Any]) -> dict[bool, Tensor]:
        """The first tensor in the streams' dtype (True) and the first in the maps' (False)."""
        pairs = reversed(list(zip(self.tensors, args, strict=False)))
        return {quantity(name).of_streams: value for name, value in pairs}

    def _fake(self, *args: Any, **constants: Any) -> Any:
        alike, sizes = self._alike(args), sizes_of(self.tensors, args[: len(self.tensors)])
        sizes.setdefault("n", self._streams(*args)[1])
        known = ((quantity(name), shape_of(name, sizes)) for name in self.returned)
        return _single([alike[each.of_streams].new_empty(shape) for each, shape in known])

    def _formula(self) -> dict[str, Function]:
        """`setup_context` and `backward` of the torch op, by the names that its backward reads."""
        backward, count = self.backward, len(self.results)
        cotangents = {f"grad_{name}": index for index, name in enumerate(self.results)}
        saved = [name for name in backward.tensors if name not in cotangents]

        def setup_context(
            ctx: Any, inputs: Any, output: Any, keyword_only_inputs: Any = None
        ) -> None:
            outputs = _listed(output)
            ctx.mark_non_differentiable(*outputs[count:])
            ctx.set_materialize_grads(False)  # else autograd fills zeros for these as well
            named = dict(zip((*self.tensors, *self.arguments), inputs, strict=True))
            named.update(zip(self.returned, outputs, strict=True))
            named.setdefault("num_streams", self._streams(*inputs)[1])
            ctx.save_for_backward(*(named[name] for name in saved))
            ctx.arguments = [named[name] for name in backward.arguments]
            ctx.constants = keyword_only_inputs or {}
            save_output_shapes(ctx, outputs[:count])

        def formula(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            own, kept = fill_missing_grads(ctx, grads[:count]), iter(ctx.saved_tensors)
            tensors = [
                own[cotangents[name]] if name in cotangents else next(kept)
                for name in backward.tensors
            ]
            found = backward.call(*tensors, *ctx.arguments, **ctx.constants)
            return (*_listed(found), *[None] * len(self.arguments))

        return {"setup_context": setup_context, "backward": formula}

    def _differentiable(self, *args: Any, **constants: Any) -> Any:
        """The reference; of a backward op with what its forward kept computed again."""
        if self.forward is None or not self.forward.kept:
            return self.on_cpu(*args, **constants)
        named = dict(zip(self.tensors, args, strict=False))
        inputs = [named[name] for name in self.forward.tensors]
        again = zip(self.forward.returned, self.forward.on_cpu(*inputs, **constants), strict=True)
        named.update((name, value) for name, value in again if name in named)
        return self.on_cpu(*named.values(), *args[len(named) :], **constants)


def save_output_shapes(ctx: Any, outputs: Sequence[Tensor]) -> None:
    """Keep what `fill_missing_grads` needs."""
    ctx.outputs = [(value.shape, value.dtype, value.device) for value in outputs]


def fill_missing_grads(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The cotangents of the outputs, zeros for an output that nothing read."""
    return [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.outputs, strict=True)
    ]


def _listed(results: Any) -> tuple[Any, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _single(results: list[Tensor]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)
