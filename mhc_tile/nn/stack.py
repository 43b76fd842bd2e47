"""A list of connected layers, with one op between neighbours."""

import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any, TypeGuard, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _checks
from ..ops import OpenSublayer, close_sublayer
from ._arguments import Extras, check_module, split_extras
from .connections import Connection, ManifoldHyperConnection, Residual, close_by

# With another function in its place, as by a tool that traces calls, every connection is called.
_CALL = nn.Module.__call__
# Where modules whose forward takes anything hold what they call: torch.compile, activation
# checkpointing, FSDP1, DDP.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# Methods that a fused stack runs in place of a connection's call, if an instance has no own ones.
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class HyperConnectedStack(nn.Module):
    """Run the residual streams through a list of connected layers.

    Between two neighbouring `ManifoldHyperConnection`s the `merge` of the first and the `pre` of
    the second are one op, `mhc_tile.boundary`. The result is that of calling the connections one
    after the other. Connections of other kinds, those with a `forward` of their own, compiled ones
    (`connection.compile()`) and those with hooks (such as FSDP2's, which gather parameters) are
    called as modules; where torch has global module hooks, all connections are.

    `len(stack)`, `stack[i]`, `stack[i:j]` (a stack of the same connections) and iteration are those
    of its connections.

    With FSDP2 in bf16, give `fully_shard` the layers with `MixedPrecisionPolicy(torch.bfloat16)`,
    and the stack or the model without one: phi, alpha and bias have to stay fp32, and connections
    without hooks stay fused.

    Args:
        connections: `ManifoldHyperConnection`, `HyperConnection` or any module of streams to
            streams (`Residual` where the streams are a hidden state [..., C]).
        fused: use `boundary`. Without it every connection is called as a module. Hooks on the
            connections, their layers and their taps run either way.

    Raises:
        TypeError: A connection is not a module, or fused not a bool.
        ValueError: Two neighbours differ in num_streams or hidden_size.

    Example:
        >>> layers = [torch.nn.Linear(64, 64) for _ in range(3)]
        >>> stack = HyperConnectedStack(ManifoldHyperConnection(layer, 64) for layer in layers)
        >>> stack(torch.randn(2, 10, 4, 64)).shape
        torch.Size([2, 10, 4, 64])
    """

    _read: tuple[Any, ...] = ()

    def __init__(self, connections: Iterable[nn.Module], *, fused: bool = True) -> None:
        super().__init__()
        _checks.flag("HyperConnectedStack", fused=fused)
        if not isinstance(connections, Iterable):
            raise TypeError(
                f"HyperConnectedStack: connections must be an iterable of modules, "
                f"got {type(connections).__name__}"
            )
        found = list(connections)
        for index, connection in enumerate(found):
            check_module("HyperConnectedStack", f"connections[{index}]", connection)
        self.connections, self.fused = nn.ModuleList(found), fused
        for index, (before, after) in enumerate(pairwise(self.connections), start=1):
            if not (isinstance(before, Connection) and isinstance(after, Connection)):
                continue
            expected, sizes = ((c.config.num_streams, c.hidden_size) for c in (before, after))
            if sizes != expected:
                raise ValueError(
                    f"HyperConnectedStack: connections[{index}] must have num_streams "
                    f"{expected[0]} and hidden_size {expected[1]} as connections[{index - 1}] has, "
                    f"got {sizes[0]} and {sizes[1]}"
                )
        self._inspect()

    def __len__(self) -> int:
        return len(self.connections)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.connections)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> "HyperConnectedStack": ...

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            return HyperConnectedStack(list(self.connections)[index], fused=self.fused)
        return self.connections[index]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run every layer.

        Args:
            x: [..., n, C]. The residual streams.
            *args: passed to every layer after its input.
            **kwargs: each is passed to the layers whose `forward` has an argument of its name, or
                takes any keyword.

        Returns:
            x_next: the shape and dtype of x. Where a layer returns a tuple of its output and
            extras, (x_next, extras): for every connection the tuple of its layer's extras, empty
            where it has none.

        Raises:
            TypeError: No layer takes a keyword; the message names it.
        """
        routed = self._route(kwargs) if kwargs else None
        fused = self.fused and not _has_any_global_hook() and nn.Module.__call__ is _CALL
        extras: list[Extras | None] = []
        # the open sublayer and its layer's output, which the next connection merges
        pending: tuple[OpenSublayer, Tensor] | None = None
        for index, connection in enumerate(self.connections):
            own = kwargs if routed is None else routed[index]
            if fused and _may_fuse(connection):
                state = connection.begin(x) if pending is None else connection.cross(*pending)
                h_res = connection.tap(state.h_res)
                result = connection.run_layer(state.layer_input, *args, **own)
                output, more = split_extras(result)
                if h_res is state.h_res:
                    pending = state, output
                else:
                    x, pending = close_by(h_res, state, output), None
            else:
                x, pending = x if pending is None else close_sublayer(*pending), None
                x, more = split_extras(connection(x, *args, **own))
            extras.append(more)
        x = x if pending is None else close_sublayer(*pending)
        if all(more is None for more in extras):
            return x
        return x, tuple(more or () for more in extras)

    def _inspect(self) -> None:
        """Read which keywords each connection takes."""
        self._read = self._forwards()
        self._keywords = [_keywords_of(connection) for connection in self.connections]

    def _forwards(self) -> tuple[Any, ...]:
        """The `forward` of the classes of all connections and layers."""
        found = []
        for connection in self.connections:
            found.append(getattr(type(connection), "forward", None))
            if isinstance(connection, Connection | Residual):
                found.append(getattr(type(connection.layer), "forward", None))
        return tuple(found)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_read"}

    def _route(self, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        """For each connection the keywords that its present `forward` takes."""
        # torch.compile need not trace signatures where no layer has been replaced
        if not torch.compiler.is_compiling() or self._forwards() != self._read:
            self._inspect()
        for name in kwargs:
            if not any(taken is None or name in taken for taken in self._keywords):
                known = sorted({each for taken in self._keywords for each in taken or ()})
                raise TypeError(
                    f"HyperConnectedStack: a keyword must be one that a layer takes, of {known}, "
                    f"got {name!r}"
                )
        return [
            kwargs if taken is None else {k: v for k, v in kwargs.items() if k in taken}
            for taken in self._keywords
        ]


def _keywords_of(module: nn.Module) -> frozenset[str] | None:
    """The keywords that a module's `forward` takes after its input; None if it takes any."""
    for name in (*_WRAPPERS, "module") if isinstance(module, _PARALLEL) else _WRAPPERS:
        if name in module._modules and (wrapped := module._modules[name]) is not None:
            return _keywords_of(wrapped)
    forward = module.forward
    own = _signature(getattr(forward, "__func__", forward), hasattr(forward, "__func__"))
    if own is None:
        return None
    found, takes_any = own
    if takes_any:
        if isinstance(module, Connection | Residual):
            passed_to = [module.layer]
        elif isinstance(module, HyperConnectedStack):
            passed_to = list(module)
        else:
            return None
        for layer in passed_to:
            if (taken := _keywords_of(layer)) is None:
                return None
            found |= taken
    return found


# A signature takes some 20 us to read.
_SIGNATURES: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def _signature(function: Any, bound: bool) -> tuple[frozenset[str], bool] | None:
    """The keywords of a `forward` after its input, and whether it takes any other; None: unknown.

    The function is not bound; `bound` says whether its first argument is a module.
    """
    with suppress(KeyError, TypeError):  # TypeError: it has no hash or no weak reference
        return _SIGNATURES[function]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # no function of Python, as in TorchScript
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    after_input = parameters[2 if bound else 1 :]
    keywords = frozenset(parameter.name for parameter in after_input if parameter.kind in named)
    found = keywords, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    with suppress(TypeError):
        _SIGNATURES[function] = found
    return found


def _may_fuse(connection: nn.Module) -> TypeGuard[ManifoldHyperConnection]:
    """Whether calling the module would run `ManifoldHyperConnection.forward` and nothing else."""
    kind = type(connection)
    return (
        kind.forward is ManifoldHyperConnection.forward
        and kind.__call__ is ManifoldHyperConnection.__call__
        and kind._call_impl is ManifoldHyperConnection._call_impl
        and getattr(kind, "begin", None) is ManifoldHyperConnection.begin
        and getattr(kind, "cross", None) is ManifoldHyperConnection.cross
        # one by one: Dynamo of torch 2.11 traces no other question to a module's __dict__
        and "forward" not in connection.__dict__
        and "begin" not in connection.__dict__
        and "cross" not in connection.__dict__
        and connection._compiled_call_impl is None
        and not connection._forward_pre_hooks
        and not connection._forward_hooks
        and not connection._backward_pre_hooks
        and not connection._backward_hooks
    )
