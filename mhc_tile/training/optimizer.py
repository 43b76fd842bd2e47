"""AdamW with weight decay on matrices."""

import torch
from torch import nn

from ..nn import parameters_without_weight_decay

BETAS = (0.9, 0.95)
EPS = 1e-20
"""Betas and epsilon of arXiv 2512.24880, Table 5."""


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW that decays all but `mhc_tile.nn.parameters_without_weight_decay`.

    Of a connection, phi (theta of HC) is a matrix and decays: it grows against a saturating map,
    and 20 Sinkhorn iterations converge on small logits. alpha and bias do not decay.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    spared = set(parameters_without_weight_decay(model))
    groups = [
        {"params": [p for p in parameters if p not in spared], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in spared], "weight_decay": 0.0},
    ]
    # Fused: on CUDA a step needs no host sync.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPS, fused=True)
