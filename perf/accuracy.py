"""Whether a contender computes what the reference does."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .operations import OPERATIONS, Case, Results
from .peers import Contender

# Relative RMS error. bf16 rounds to 2e-3, and a chain of eager calls rounds several times: the
# reference of `boundary` in bf16 has gradients that differ by 1.4e-2.
TOLERANCE = 0.02
CHUNK = 1024  # tokens of the reference in float64 at a time


def check(
    case: Case, contender: Contender, tensors: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> float:
    """The largest relative RMS error of a contender's results, and of its gradients in training.

    The truth is the reference in float64 on the same tensors, some tokens at a time. What is not a
    number is infinitely wrong.
    """
    operation = OPERATIONS[case.op]
    training = case.mode == "training"
    leaves = leaves_of(case, contender, tensors)
    with contender.setting(), torch.set_grad_enabled(case.mode != "inference"):
        raw = contender.results(*leaves)
    found = [*contender.give(*(value.detach() for value in raw))]
    if training:
        with contender.setting():
            grads = torch.autograd.grad(raw, leaves, contender.cotangents(*cotangents))
        found += contender.gradients(*grads)
    own = len(tensors) - operation.parameters
    count = len(cotangents)
    errors, norms = [0.0] * len(found), [0.0] * len(found)
    sums: dict[int, Tensor] = {}
    for start in range(0, case.tokens, CHUNK):
        part = slice(start, start + CHUNK)
        wide = [t[part].double() if i < own else t.double() for i, t in enumerate(tensors)]
        wide = [value.requires_grad_(training) for value in wide]
        truths = list(as_tuple(operation.reference(*wide)))
        if training:
            truths += torch.autograd.grad(truths, wide, [g[part].double() for g in cotangents])
        for index, truth in enumerate(truths[: len(found)]):
            if index >= count + own:  # of a parameter: a sum over all tokens
                sums[index] = sums.get(index, torch.zeros_like(truth)) + truth.detach()
                continue
            value = found[index][part].double().view_as(truth)
            errors[index] += (value - truth).square().sum().item()
            norms[index] += truth.square().sum().item()
    for index, truth in sums.items():
        errors[index] = (found[index].double().view_as(truth) - truth).square().sum().item()
        norms[index] = truth.square().sum().item()
    pairs = zip(errors, norms, strict=True)
    relative = [(e / n) ** 0.5 if n else e**0.5 for e, n in pairs]
    # max() would pass over a NaN
    return max(error if math.isfinite(error) else math.inf for error in relative)


def leaves_of(case: Case, contender: Contender, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Our tensors in a contender's layout, as leaves of a graph unless in inference."""
    graph = case.mode != "inference"
    return [value.detach().requires_grad_(graph) for value in contender.take(*tensors)]


def as_tuple(results: Any) -> Results:
    """One result or several, as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)
