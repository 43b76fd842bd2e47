"""Where the time of a step goes: GPU time by kernel, from torch's profiler."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

PRODUCTS, ATTENTION = "matrix products", "attention"
# Parts by the names of kernels, the first that fits: ours, then tile-kernels' and liger-kernel's.
# Our `pre` is mapping, Sinkhorn and pre-apply in one or two kernels; its backward likewise;
# merge and the next sublayer's `pre` are one kernel where many tokens are. What
# PyTorch computes of a connection is among "matrix products" and "other kernels", beside the
# layers' own: it is what those are more than with plain residuals.
KERNELS = {
    "merge and pre, forward": r"mhc_boundary",
    "pre, forward": r"mhc_pre_persistent|mhc_pre_finish|mhc_project|mhc_pre_big_fuse",
    "pre, backward": r"mhc_pre_backward|pre_backward|mapping_backward",
    "merge, forward": r"merge_forward|mhc_post_(res_)?fwd",
    "merge, backward": r"merge_backward|mhc_post_(res_)?bwd",
    "sinkhorn, backward": r"sinkhorn_(backward|bwd)",
    "sinkhorn, forward": r"sinkhorn",
    "mapping, backward": r"mhc_(pre_norm_fn|pre_split_mixes|fn_normw_merge|mm_norm)_bwd",
    "mapping, forward": r"mhc_mapping|mhc_(pre_norm_fn|pre_split_mixes|fn_normw_merge|mm_norm)_fwd",
    "pre_apply, backward": r"pre_apply_backward|mhc_pre_(apply_mix_)?bwd",
    "pre_apply, forward": r"pre_apply_forward|mhc_pre_(apply_mix_)?fwd",
    ATTENTION: r"flash|fmha|sdpa|[aA]ttention",
    PRODUCTS: r"gemm|nvjet|xmma|cublas|gemv",
}
LAYERS = "other kernels"
GAPS = "no kernel"
LOAD_US = 300_000.0  # of steps before those that are measured, and again of those that are timed
PROFILED = 4  # times as many steps as load the GPU: its clock swings by 10% within them
LEAST_STEPS, MOST_STEPS = 3, 300
MOST_LETTERS = 100  # of a kernel's name

Span = tuple[str, float, float]  # a kernel's name, when it began and ended


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to."""
    if kernel.startswith("triton_"):  # Inductor names them after what they feed: a layer's
        return LAYERS
    return next((part for part, name in KERNELS.items() if re.search(name, kernel)), LAYERS)


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of some spans lasts."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def split(spans: Sequence[Span], steps: int) -> dict[str, float]:
    """Microseconds of one step by part; what no kernel fills is under `GAPS`."""
    sums = dict.fromkeys((*KERNELS, LAYERS), 0.0)
    for name, begin, end in spans:
        sums[part_of(name)] += (end - begin) / steps
    parts = {part: us for part, us in sums.items() if us or part == LAYERS}
    parts[GAPS] = (lasting(spans) - busy(span[1:] for span in spans)) / steps
    return parts


def lasting(spans: Sequence[Span]) -> float:
    """Microseconds from the begin of the first to the end of the last; 0 without any."""
    if not spans:
        return 0.0
    return float(max(end for *_, end in spans) - min(begin for _, begin, _ in spans))


def largest(spans: Iterable[Span], steps: int, count: int = 20) -> dict[str, float]:
    """Microseconds of one step in the kernels that take most, by name, the largest first.

    Example:
        >>> largest([("a", 0, 2), ("b", 2, 7), ("a", 8, 10)], 2, 1)
        {'b': 2.5}
    """
    sums: dict[str, float] = defaultdict(float)
    for name, begin, end in spans:
        sums[name[:MOST_LETTERS]] += (end - begin) / steps
    chosen = sorted(sums.items(), key=lambda item: -item[1])[:count]
    return {name: round(us, 1) for name, us in chosen}


class Breakdown(NamedTuple):
    """Microseconds of a step under the profiler: whole, by part, of the kernels that take most."""

    us: float
    parts: dict[str, float]
    kernels: dict[str, float]


def breakdown(step: Callable[[], Any], step_us: float) -> Breakdown:
    """Where a step's time goes, under the load that steps are timed under.

    Steps run for a while before those that are profiled, and those follow each other without a
    pause: what is then between kernels is so in training as well. A step takes `step_us` without
    the profiler.
    """
    with _profiler():
        pass  # the first one takes long to start
    steps = steps_under_load(step_us)
    for _ in range(steps):
        step()
    steps *= PROFILED
    with _profiler() as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    return Breakdown(lasting(spans) / steps, split(spans, steps), largest(spans, steps))


def steps_under_load(step_us: float) -> int:
    """How many steps load the GPU for `LOAD_US`.

    A GPU that has rested, or that has run something lighter, is faster for a moment.
    """
    wanted = math.ceil(LOAD_US / max(step_us, 1.0))
    return min(MOST_STEPS, max(LEAST_STEPS, wanted))


def _profiler() -> torch.profiler.profile:
    """Records kernels; told to keep its events, else it warns that a next cycle clears them."""
    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    )
