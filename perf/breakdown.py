"""Where the time of a step goes: GPU time by kernel, from torch's profiler."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Parts by the names of kernels, the first that fits. `pre` is mapping, Sinkhorn and pre-apply in
# one or two kernels; its backward likewise.
KERNELS = {
    "pre, forward": r"mhc_pre_team|mhc_pre_finish|mhc_project",
    "pre, backward": r"mhc_pre_backward|pre_backward|mapping_backward",
    "merge, forward": r"merge_forward",
    "merge, backward": r"merge_backward",
    "mapping, forward": r"mhc_mapping",
    "pre_apply, forward": r"pre_apply_forward",
    "pre_apply, backward": r"pre_apply_backward",
    "sinkhorn": r"sinkhorn",
}
LAYERS = "other kernels"
GAPS = "no kernel"


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to.

    Example:
        >>> part_of("merge_backward_kernel"), part_of("nvjet_tst_128x256")
        ('merge, backward', 'other kernels')
    """
    return next((part for part, name in KERNELS.items() if re.search(name, kernel)), LAYERS)


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of some spans lasts.

    Example:
        >>> busy([(0, 2), (1, 3), (5, 6)])
        4.0
    """
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def breakdown(step: Callable[[], Any], step_us: float) -> dict[str, float]:
    """Microseconds of a step by part.

    Args:
        step: runs one, warm.
        step_us: what it takes without the profiler; what no kernel fills is under `GAPS`.
    """
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            spans.setdefault(part_of(event.name), []).append(span)
    parts = {name: sum(end - begin for begin, end in spans.get(name, ())) for name in KERNELS}
    parts = {name: us for name, us in parts.items() if us}
    parts[LAYERS] = sum(end - begin for begin, end in spans.get(LAYERS, ()))
    parts[GAPS] = max(0.0, step_us - busy(span for group in spans.values() for span in group))
    return parts
