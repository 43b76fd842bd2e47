"""Which GPU this is: what tables are keyed by and reports are headed with."""

import re
import subprocess
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """One CUDA device."""

    name: str  # the vendor's, such as "NVIDIA H200"
    capability: tuple[int, int]  # major, minor
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int

    @property
    def slug(self) -> str:
        """The name as a file name.

        Example:
            >>> Device("NVIDIA H200", (9, 0), 132, 0, 0).slug
            'nvidia_h200'
        """
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")

    def __str__(self) -> str:
        """One line for a person."""
        major, minor = self.capability
        return (
            f"{self.name}, compute capability {major}.{minor}, {self.multiprocessors} "
            f"multiprocessors, {self.memory_bytes / 2**30:.0f} GiB, L2 {self.l2_bytes / 1e6:.0f} MB"
        )


def identity() -> str:
    """What tells the first GPU from others of its model; empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    return str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))


def describe(index: int = 0) -> Device:
    """Describe a CUDA device; RuntimeError if there is none, ValueError for another index."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise RuntimeError("describe: torch must see a CUDA device, got none")
    if not 0 <= index < count:
        raise ValueError(f"describe: index must be from 0 to {count - 1}, got {index}")
    properties = torch.cuda.get_device_properties(index)
    return Device(
        name=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
    )


def driver_version() -> str:
    """The NVIDIA driver's version, such as "580.65.06"; "unknown" where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (result.stdout.split() or ["unknown"])[0]
