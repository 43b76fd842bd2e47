"""The constants that are compiled into the programs of `pre`, its backward and `boundary`."""

from typing import NamedTuple


class Sinkhorn(NamedTuple):
    """The manifold of h_res: `iters` normalisations with `eps`, see `reference.sinkhorn`."""

    iters: int
    eps: float


class Constants(NamedTuple):
    """Of `reference.pre`; norm_eps matters to the forward alone."""

    norm_eps: float
    pre_eps: float
    post_scale: float
    manifold: Sinkhorn

    @classmethod
    def of(
        cls,
        *,
        pre_eps: float,
        post_scale: float,
        iters: int,
        sinkhorn_eps: float,
        norm_eps: float = 0.0,
    ) -> "Constants":
        """From the names that the ops have for them."""
        manifold = Sinkhorn(int(iters), float(sinkhorn_eps))
        return cls(float(norm_eps), float(pre_eps), float(post_scale), manifold)
