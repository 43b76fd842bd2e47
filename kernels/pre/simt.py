"""Everything before the layer for any dtype and any C: one stage after the other.

    inv_rms, projection, logits, h_pre, h_post: as in mapping/launch.py
    layer_input[c] = sum_i h_pre[i] * x[i, c]
    h_res          = sinkhorn(logits_res as [out, in])

Four launches that read n * C elements a token twice and write C. `pre` calls it for fp32 and for a
C that is no multiple of 8; elsewhere it computes the same, slower.
"""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from .. import pre_apply, sinkhorn
from ..common.knobs import knobs_of
from ..common.problem import Problem, Target
from ..mapping import launch as mapping
from ..mapping import simt as mapping_simt


@dataclass(frozen=True)
class Config(mapping_simt.Config):
    """Launch knobs of the stages: those of the mapping, and of the others.

    Args:
        apply_threads: of a block of `pre_apply`.
        apply_vectors: of channels that a thread of `pre_apply` handles.
        sinkhorn_threads: of a block of `sinkhorn`.
    """

    apply_threads: int = 32
    apply_vectors: int = 1
    sinkhorn_threads: int = 32


@lru_cache(maxsize=1024)
def default_config(problem: Problem, target: Target) -> Config:
    """The default of each stage."""
    projection = mapping_simt.default_config(problem, target)
    apply = pre_apply.default_config(problem.of("pre_apply"), target)
    normalise = sinkhorn.default_config(problem.of("sinkhorn"), target)
    return Config(*knobs_of(projection), *knobs_of(apply), *knobs_of(normalise))


def forward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    norm_eps: float,
    pre_eps: float,
    post_scale: float,
    iters: int,
    sinkhorn_eps: float,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything before the layer (eqs. 8, 9 and 14-19).

    Args:
        x: [T, n, C], bf16, fp16 or fp32. Residual streams.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        norm_eps: added to the mean of squares, at least 0.
        pre_eps: added to h_pre.
        post_scale: factor of h_post.
        iters: Sinkhorn iterations, at least 1.
        sinkhorn_eps: as in `reference.sinkhorn`.
        config: launch knobs.

    Returns:
        layer_input [T, C] in x's dtype; h_post [T, n], h_res [T, n, n], projection [T, n*n + 2n],
        inv_rms [T], fp32.
    """
    own_apply = pre_apply.ForwardConfig(config.apply_threads, config.apply_vectors)
    own_sinkhorn = sinkhorn.Config(config.sinkhorn_threads)
    h_pre, h_post, h_res_logits, projection, inv_rms = mapping.forward(
        x, phi, alpha, bias, norm_eps=norm_eps, pre_eps=pre_eps, post_scale=post_scale,
        config=config,
    )  # fmt: skip
    layer_input = pre_apply.forward(x, h_pre, config=own_apply)
    h_res = sinkhorn.forward(h_res_logits, iters=iters, eps=sinkhorn_eps, config=own_sinkhorn)
    return layer_input, h_post, h_res, projection, inv_rms
