"""Whether the GPU of a run waits for the host."""

import torch

WARM_UP = 5
ENOUGH = 10


class GpuWaits:
    """Counts the steps in which the GPU is idle before the host has enqueued the whole step.

    A step calls `mark` after its backward pass and `read` at its end: where the GPU has reached the
    mark by then, the GPU waits for the host. Neither waits for the device, and on another device
    than CUDA they do nothing. The first WARM_UP steps are not counted.

    Args:
        device: of the run.
    """

    def __init__(self, device: torch.device):
        self.measured, self.idle = -WARM_UP, 0
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def mark(self) -> None:
        """Record that the backward pass has been enqueued."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def read(self) -> None:
        """Count the step that ends here."""
        if self._event is not None:
            self.count(self._event.query())

    def count(self, idle: bool) -> None:
        """Count one step."""
        self.measured += 1
        self.idle += idle and self.measured > 0

    def advice(self, mode: str) -> str | None:
        """What makes a run of this mode faster, if the GPU waits in most of ENOUGH steps or more.

        Example:
            >>> waits = GpuWaits(torch.device("cpu"))
            >>> for step in range(105):
            ...     waits.count(step != 50)
            >>> print(waits.advice("default"))
            the GPU waited for the host in 99% of the steps: --compile graphs or a larger batch helps
        """  # noqa: E501 - one line of output
        if self.measured < ENOUGH or 2 * self.idle <= self.measured:
            return None
        graphs = "" if mode == "graphs" else "--compile graphs or "
        return (
            f"the GPU waited for the host in {self.idle / self.measured:.0%} of the steps: "
            f"{graphs}a larger batch helps"
        )
