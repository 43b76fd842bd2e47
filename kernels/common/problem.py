"""What a kernel is asked for: its name, a shape and a dtype; and the GPU that it is for."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Problem:
    """One kernel at one shape."""

    kernel: str  # a name of `autotune.registry.KERNELS`
    n: int
    channels: int  # C; 0 for kernels that see no channels
    dtype: str  # of x, such as "bfloat16"
    tokens: int

    @property
    def fits_tensor_cores(self) -> bool:
        """Whether tensor cores can form the projection: x in 16 bits, rows of whole 16 bytes."""
        return self.dtype != "float32" and self.channels % 8 == 0

    def of(self, kernel: str) -> "Problem":
        """The same shape of another kernel."""
        return replace(self, kernel=kernel)

    def at(self, tokens: int) -> "Problem":
        """The same with another number of tokens."""
        return replace(self, tokens=tokens)

    def __str__(self) -> str:
        """One line for a person."""
        size = f"{self.tokens} x {self.channels}" if self.channels else f"{self.tokens} tokens"
        return f"{self.kernel} {size}, n {self.n}, {self.dtype}"


@dataclass(frozen=True)
class Target:
    """The GPU that configurations are for."""

    arch: str  # such as "sm_90a"
    multiprocessors: int
