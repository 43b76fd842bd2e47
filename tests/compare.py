"""How close is close enough, and proof that the comparison bites.

Truth is the reference in float64 on the rounded inputs. A result passes if its relative RMS error
stays below one rounding to its own dtype plus K[op] roundings of float32, in which sums and maps
are computed; and if its largest error is at most twice that of the same reference run in the
result's precision, plus one rounding of the largest value. Before anything is compared, an all-zero
answer must fail.
"""

import torch
from torch import Tensor

# Roundings of float32 (or float64), with the reason.
K = {
    "expand": 0,  # a copy
    "collapse": 1,  # n additions
    "pre_apply": 1,  # n multiply-adds
    "merge": 1,  # n + 1 multiply-adds
    "sinkhorn": 8,  # 39 normalisations with errors of about eps / 2 that partly cancel
    # A sum of n*C products: at most eps/2 * sqrt(n*C), 36 at n*C = 5120 if errors never cancel.
    "mapping": 16,
    "head": 16,
    "pre": 16,
    "boundary": 16,
}
# On CUDA the kernels hold phi as a pair of bf16 (fp16) numbers: 2^-17 is 64 roundings of float32.
# The forward of a float32 x does not.
PAIRS = {"mapping": 128, "pre": 128, "boundary": 128}
# Gradients add a sum over C or over tokens, and a walk back through Sinkhorn's 39 steps.
BACKWARD = 8


def relative_rms(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||, in float64."""
    error = actual.detach().double() - truth.detach().double()
    return (error.norm() / truth.detach().double().norm()).item()


def largest(actual: Tensor, truth: Tensor) -> float:
    return (actual.detach().double() - truth.detach().double()).abs().max().item()


def compare(
    actual: Tensor, truth: Tensor, *, k: float, name: str = "result", baseline: Tensor | None = None
) -> None:
    """Assert that `actual` is `truth` (float64) up to its rounding and k roundings of float32.

    Args:
        actual: what the op returned.
        truth: the reference in float64 on the same, rounded inputs.
        k: the number of eps(float32) that the relative RMS error may reach beyond eps(dtype).
        name: for the message.
        baseline: the reference in actual's precision; bounds the largest error.
    """
    assert actual.shape == truth.shape, f"{name}: {list(actual.shape)} is not {list(truth.shape)}"
    if truth.numel() == 0:
        return
    wide = torch.promote_types(actual.dtype, torch.float32)
    limit = torch.finfo(actual.dtype).eps + k * torch.finfo(wide).eps
    zeros = torch.zeros_like(truth)
    assert relative_rms(zeros, truth) > limit, f"{name}: all zeros would pass; test something else"
    error = relative_rms(actual, truth)
    assert error <= limit, f"{name}: relative RMS error {error:.2e} is above {limit:.2e}"
    if baseline is not None:
        one_rounding = torch.finfo(wide).eps * truth.abs().max().item()
        allowed = 2 * largest(baseline, truth) + one_rounding
        worst = largest(actual, truth)
        assert worst <= allowed, f"{name}: largest error {worst:.2e} is above {allowed:.2e}"
