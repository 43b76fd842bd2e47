"""Mistakes planted among the candidates of a real GPU, by their number of threads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune.bench import CudaBench

WRONG, HANGS, BREAKS = 32, 64, 96


class PlantedBench(CudaBench):
    """`CudaBench`, but some configurations return a wrong bit, hang, or break the context."""

    def results(self, config: Any) -> Iterator[tuple[Tensor, ...]]:
        """Results of a few calls, or worse."""
        if config.threads == HANGS:
            torch.cuda._sleep(10**13)  # more than an hour
            torch.cuda.synchronize()
        if config.threads == BREAKS:
            torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]
            torch.cuda.synchronize()
        for results in super().results(config):
            if config.threads == WRONG:
                results[0].view(-1)[-1] += 1
            yield results
