"""Random tensors for one call of a kernel."""

import torch
from torch import Tensor

from .problems import Problem


class Inputs:
    """Makes the tensors of one problem: random values, the same for the same seed.

    Args:
        problem: gives the shapes.
        device: "cuda", "cpu", or "meta" for tensors without values.
        seed: of the values.
    """

    def __init__(self, problem: Problem, device: str, seed: int = 0) -> None:
        self.problem = problem
        self._device = device
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: str = "float32") -> Tensor:
        """Standard normal values; none on the meta device."""
        kind = getattr(torch, dtype)
        if self._generator is None:
            return torch.empty(size, device=self._device, dtype=kind)
        return torch.randn(size, generator=self._generator, device=self._device, dtype=kind)

    @property
    def x(self) -> Tensor:
        """New streams [T, n, C]."""
        problem = self.problem
        return self.normal(problem.tokens, problem.n, problem.channels, dtype=problem.dtype)

    @property
    def hidden(self) -> Tensor:
        """A new hidden state [T, C]."""
        return self.normal(self.problem.tokens, self.problem.channels, dtype=self.problem.dtype)

    @property
    def vector(self) -> Tensor:
        """A new map [T, n], fp32."""
        return self.normal(self.problem.tokens, self.problem.n)

    @property
    def matrix(self) -> Tensor:
        """A new map [T, n, n], fp32."""
        return self.normal(self.problem.tokens, self.problem.n, self.problem.n)

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """New phi, alpha and bias."""
        n, width = self.problem.n, self.problem.n * self.problem.channels
        phi = self.normal(n * (n + 2), width) * width**-0.5
        return phi, self.normal(3), self.normal(n * (n + 2))

    @property
    def saved(self) -> tuple[Tensor, Tensor]:
        """New projection and inv_rms, as a forward of x leaves them: the latter near 1."""
        tokens, n = self.problem.tokens, self.problem.n
        return self.normal(tokens, n * (n + 2)), self.normal(tokens) * 0.01 + 1
