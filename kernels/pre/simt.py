"""`pre` for any dtype and any C, a launch for each stage. Equations as in launch.py.

inv_rms, projection, logits, h_pre, h_post are those of mapping/launch.py. Four launches read n * C
elements a token twice and write C.
"""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from .. import pre_apply, sinkhorn
from ..common.constants import Constants
from ..common.knobs import knobs_of
from ..common.problem import Problem, Target
from ..mapping import launch as mapping
from ..mapping import simt as mapping_simt


@dataclass(frozen=True)
class Config(mapping_simt.Config):
    """Launch knobs of the stages: those of the mapping, of `pre_apply` and of `sinkhorn`."""

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
    constants: Constants,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `launch.forward`."""
    own_apply = pre_apply.ForwardConfig(config.apply_threads, config.apply_vectors)
    own_sinkhorn = sinkhorn.Config(config.sinkhorn_threads)
    h_pre, h_post, h_res_logits, projection, inv_rms = mapping.forward(
        x, phi, alpha, bias, norm_eps=constants.norm_eps, pre_eps=constants.pre_eps,
        post_scale=constants.post_scale, config=config,
    )  # fmt: skip
    layer_input = pre_apply.forward(x, h_pre, config=own_apply)
    h_res = sinkhorn.forward(h_res_logits, **constants.manifold._asdict(), config=own_sinkhorn)
    return layer_input, h_post, h_res, projection, inv_rms
