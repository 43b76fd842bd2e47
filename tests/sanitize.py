"""Run every kernel once, forward and backward, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/sanitize.py [op ..]

`make sanitize` does so for all ops with memcheck, initcheck and racecheck; the last leaves out the
persistent kernel of `pre`'s backward, as it does not know what `bar.arrive` orders and reports a
textbook producer and consumer, too. The emulator in this folder knows, and checks that kernel in
`make test`. Two sizes, one of them ragged; `pre` in both of its forms, and its backward with and
without merge's share of grad_x. The allocator's cache is off, so that every tensor has bounds
of its own, and inputs come from the CPU, so that what runs on the GPU is ours.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

import mhc_tile

SIZES = ((256, 1280), (77, 1048))  # tokens, C
STREAMS = 4


def inputs(tokens: int, width: int) -> dict[str, Tensor]:
    """By name, on the GPU, requiring gradients."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    n = STREAMS
    logits = n * (n + 2)
    made = {
        "x": normal(tokens, n, width).bfloat16(),
        "hidden": normal(tokens, width).bfloat16(),
        "h_pre": normal(tokens, n),
        "h_post": normal(tokens, n),
        "h_res": normal(tokens, n, n),
        "phi": normal(logits, n * width) * (n * width) ** -0.5,
        "alpha": normal(3),
        "bias": normal(logits),
    }
    return {name: value.cuda().requires_grad_() for name, value in made.items()}


def calls(v: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Every op by name."""
    parameters = (v["phi"], v["alpha"], v["bias"])
    constants = {"norm_eps": 1e-6}
    return {
        "expand": lambda: mhc_tile.expand(v["hidden"], STREAMS),
        "collapse": lambda: mhc_tile.collapse(v["x"]),
        "sinkhorn": lambda: mhc_tile.sinkhorn(v["h_res"]),
        "pre_apply": lambda: mhc_tile.pre_apply(v["x"], v["h_pre"]),
        "merge": lambda: mhc_tile.merge(v["x"], v["hidden"], v["h_post"], v["h_res"]),
        "mapping": lambda: mhc_tile.mapping(v["x"], *parameters, **constants),
        "pre": lambda: mhc_tile.pre(v["x"], *parameters, **constants),
        "boundary": lambda: mhc_tile.boundary(
            v["x"], v["hidden"], v["h_post"], v["h_res"], *parameters, **constants
        ),
        "sublayer": lambda: mhc_tile.sublayer(v["x"], torch.neg, *parameters, **constants),
    }


def main(ops: list[str]) -> int:
    """Run these ops; all of them if none is named."""
    for tokens, width in SIZES:
        for many in (False, True):
            mhc_tile.set_batch_invariant(many)
            values = inputs(tokens, width)
            functions = calls(values)
            if unknown := set(ops) - set(functions):
                sys.exit(f"sanitize: ops must be of {sorted(functions)}, got {sorted(unknown)}")
            for name in ops or functions:
                results = functions[name]()
                results = results if isinstance(results, tuple) else (results,)
                grads = [torch.randn(r.shape).to(r.dtype).cuda() for r in results]
                torch.autograd.backward(results, grads)
                torch.cuda.synchronize()
                sys.stdout.write(f"{name}, {tokens} x {width}, many tokens' kernels: {many}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
