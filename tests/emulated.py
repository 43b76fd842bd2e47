"""Launchers of kernels on the CPU: their programs run in the emulator, in the form of sm_80."""

import importlib
from typing import Any

import pytest
from torch import Tensor

import emulator
from mhc_tile.autotune import registry

KERNELS = ("merge", "pre_apply", "sinkhorn", "streams", "mapping.launch", "mapping.backward")
KERNELS += ("mapping.grad_x_pass", "mapping.token_state", "mapping.simt")
KERNELS += ("pre.launch", "pre.persistent", "pre_backward.dots", "pre_backward.persistent")
KERNELS += ("pre_backward.launch", "boundary.launch")
LAUNCHERS = {name: f"{name}.launch" for name in ("mapping", "pre", "pre_backward", "boundary")}
LAUNCHERS["mapping_backward"] = "mapping.backward"
CONSTANTS = {"pre_eps": 1e-3, "post_scale": 1.5, "iters": 20, "sinkhorn_eps": 0.0}


class Emulated:
    """Stands for a `@program`: calling it emulates the factory's program instead of compiling."""

    built: dict[Any, Any] = {}  # noqa: RUF012 - one cache for all tests of a process

    def __init__(self, program: Any) -> None:
        self.program = program

    def __call__(self, arch: str, *constants: Any) -> Any:
        key = (self.program.factory, constants)
        if key not in self.built:
            function = self.program.factory(*constants)
            names = [function.buffer_map[value].name for value in function.params]
            run = emulator.emulate(function, arch, self.program.pass_configs)
            self.built[key] = (names, run)
        names, run = self.built[key]
        return lambda *tensors: run(**dict(zip(names, tensors, strict=True)))


@pytest.fixture(autouse=True)
def emulated_kernels(monkeypatch):
    for name in (*KERNELS, "common.programs"):
        module = importlib.import_module(f"mhc_tile.kernels.{name}")
        for attribute in list(vars(module)):
            if hasattr(getattr(module, attribute), "factory"):
                monkeypatch.setattr(module, attribute, Emulated(getattr(module, attribute)))
        multiprocessors = {"multiprocessors": 8, "count_multiprocessors": 8}
        for attribute, value in {"architecture": "sm_80", **multiprocessors}.items():
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, lambda _device, value=value: value)


def kernel(name: str) -> Any:
    return importlib.import_module(f"mhc_tile.kernels.{LAUNCHERS.get(name, name)}")


def default(name: str, x: Tensor) -> Any:
    """The configuration that an op of streams x launches a kernel with where no table has one."""
    programs = kernel("common.programs")
    tokens, n, channels = x.shape
    problem = registry.Problem(name, n, channels, programs.dtype_name(x), tokens)
    return registry.default(problem, programs.target_of(x.device))


def wide(*tensors: Tensor) -> list[Tensor]:
    return [value.double() for value in tensors]
