"""Mixture of experts: a router, routed experts of which each token uses a few, shared experts.

`affinity = sigmoid(W h)`; the token's experts are the `experts_per_token` with the largest
`affinity + expert_bias`; its gates are their affinities divided by their sum;
`out = sum_e gate[e] * expert_e(h) + shared(h)`, every expert a SwiGLU (DeepSeek-V3's layer).

`update_bias` balances the experts' load without an auxiliary loss: it moves `expert_bias`, which
has no gradient, by a fixed step against the load of the last optimizer step. The forward pass in
training only counts: it may run several times per step (several batches, recompute), and all passes
of a step must choose by the same bias.

Axes: T tokens, C hidden size, E experts, K experts per token, F expert FFN size, R = T * K rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._autocast import autocast_dtype, without_autocast
from ..nn._parameters import MappingModule, parameter
from ..reference import wide
from .grouped import gather, grouped_linear, spread
from .layers import INPUT_STD, RMSNorm, SwiGLU

if TYPE_CHECKING:
    from .configs import ModelConfig

# torch's grouped matmul accepts fewer than 1024 groups.
_MOST_EXPERTS = 1023
# Added to the sum of a token's affinities, all of which may have underflowed.
_GATE_EPS = 1e-20


@dataclass(frozen=True)
class MoEConfig:
    """Experts in place of the dense FFN.

    Args:
        num_experts: routed experts of a layer; 1 to 1023.
        expert_ffn_size: inner width of one expert; at least 1.
        experts_per_token: routed experts of a token; 1 to num_experts.
        shared_experts: experts that every token uses, computed as one; at least 0.
        leading_dense_layers: layers before the first mixture, with the dense FFN of ffn_size; at
            least 0.
        balance_rate: step of the bias that balances the experts' load; at least 0.

    Raises:
        TypeError: A count is not an int, or balance_rate not a number.
        ValueError: A value is out of range; the message names it.

    Example:
        >>> MoEConfig(num_experts=64, expert_ffn_size=896).experts_per_token
        6
    """

    num_experts: int
    expert_ffn_size: int
    experts_per_token: int = 6
    shared_experts: int = 2
    leading_dense_layers: int = 1
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Reject what no layer could have."""
        _checks.fields(self, at_least_0=("shared_experts", "leading_dense_layers"))
        for name, most, value in (
            ("num_experts", _MOST_EXPERTS, self.num_experts),
            ("experts_per_token", self.num_experts, self.experts_per_token),
        ):
            if value > most:
                raise ValueError(f"MoEConfig: {name} must be at most {most}, got {value}")


class Router(MappingModule):
    """Chooses experts and their gates, in fp32 whatever the dtype of the model.

    Attributes:
        weight: [E, C], fp32.
        expert_bias: [E], fp32 buffer: added to the affinities to choose, and for nothing else.
        expert_load: [E], int64 buffer, not in the state dict: tokens that each expert got since
            the last `update_bias`. Sum it over the ranks of data parallelism before.
    """

    expert_bias: Tensor
    expert_load: Tensor

    def __init__(self, hidden_size: int, config: MoEConfig):
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.balance_rate = config.balance_rate
        self.weight = parameter(config.num_experts, hidden_size, device=None)
        self.register_buffer("expert_bias", torch.empty_like(self.weight[:, 0]))
        load = torch.empty(config.num_experts, dtype=torch.int64)
        self.register_buffer("expert_load", load, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero the bias and the count; `MixtureOfExperts.initialise` draws the weight."""
        self.expert_bias.zero_()
        self.expert_load.zero_()

    def forward(self, hidden_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Gates [T, K], fp32, and experts [T, K], int64, in the order of preference."""
        (weight,) = self.read(hidden_TC, self.weight)
        with without_autocast(hidden_TC.device.type):
            affinity_TE = F.linear(hidden_TC.to(weight.dtype), weight).sigmoid()
        preference = affinity_TE.detach() + self.expert_bias
        chosen_TK = preference.topk(self.experts_per_token).indices
        gates_TK = affinity_TE.gather(-1, chosen_TK)
        return gates_TK / (gates_TK.sum(-1, keepdim=True) + _GATE_EPS), chosen_TK

    @torch.no_grad()
    def count(self, ends_E: Tensor) -> None:
        """Add a batch to `expert_load`; ends_E is the running sum of the experts' tokens."""
        self.expert_load += torch.diff(ends_E, prepend=torch.zeros_like(ends_E[:1]))

    @torch.no_grad()
    def update_bias(self) -> None:
        """`bias[e] += balance_rate * sign(mean load - load[e])`, and start to count again."""
        load = self.expert_load
        # In integers: exactly 0 where the load is the mean.
        error = load.sum() - load * load.shape[0]
        # A 16-bit bias, which a state may hold, would take no step of this size.
        self.expert_bias = wide(self.expert_bias)
        self.expert_bias += self.balance_rate * error.sign().to(self.expert_bias.dtype)
        load.zero_()


class MixtureOfExperts(nn.Module):
    """Norm and mixture of experts, [..., C] -> [..., C].

    The rows of the tokens are sorted by expert, so that each of the two products is one grouped
    matmul (`mhc_tile.models.grouped` says where that needs no host sync). Gates multiply the inner
    activation, which is narrower than the output. No token is dropped, and every pass, forward and
    backward, has the same bits each time. A configuration without `moe` is a ValueError.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        moe, width = config.moe, config.hidden_size
        if moe is None:
            raise ValueError("MixtureOfExperts: config.moe must be an MoEConfig, got None")
        self.norm = RMSNorm(width, eps=config.norm_eps)
        self.router = Router(width, moe)
        count, inner = moe.num_experts, moe.expert_ffn_size
        # those that a token does not use
        self.idle_parameters = (count - moe.experts_per_token) * 3 * inner * width
        self.experts_in = nn.Parameter(torch.empty(count, 2 * inner, width))  # gates, then ups
        self.experts_out = nn.Parameter(torch.empty(count, width, inner))
        self.shared = SwiGLU(width, moe.shared_experts * inner) if moe.shared_experts else None
        self.initialise(INPUT_STD)

    def initialise(self, output_std: float) -> None:
        """Draw the matrices again."""
        nn.init.normal_(self.router.weight, std=INPUT_STD)
        nn.init.normal_(self.experts_in, std=INPUT_STD)
        nn.init.normal_(self.experts_out, std=output_std)
        if self.shared is not None:
            self.shared.initialise(output_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """Route every token through its experts."""
        hidden = self.norm(hidden)
        hidden_TC = hidden.reshape(-1, hidden.shape[-1])
        gates_TK, chosen_TK = self.router(hidden_TC)
        order_R, source_R, slots_TK, ends_E = sort_by_expert(chosen_TK, self.experts_in.shape[0])
        if self.training:
            self.router.count(ends_E)
        dtype = hidden.dtype
        if dtype != torch.float64:  # as `F.linear`
            dtype = autocast_dtype(hidden.device.type) or dtype
        rows_RC = spread(hidden_TC.to(dtype), source_R, slots_TK)
        inner = grouped_linear(rows_RC, self.experts_in.to(dtype), ends_E)
        gate_RF, up_RF = inner.chunk(2, dim=-1)
        gates_R1 = spread(gates_TK.to(dtype).reshape(-1, 1), order_R, slots_TK.reshape(-1, 1))
        product_RF = F.silu(gate_RF) * up_RF * gates_R1
        rows_RC = grouped_linear(product_RF, self.experts_out.to(dtype), ends_E)
        output = gather(rows_RC, source_R, slots_TK).view(hidden.shape)
        return output if self.shared is None else output + self.shared(hidden)


def sort_by_expert(chosen_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the tokens' choices [T, K], int64, by expert, then by token; without a host sync.

    Returns:
        order [R]: the choice (of T * K) of each row; source [R]: its token; slots [T, K]: the row
        of each choice; ends [E], int32: the end of each expert's rows.

    Example:
        >>> sort_by_expert(torch.tensor([[1, 0], [0, 2]]), 3)[2:]
        (tensor([[2, 0],
                [1, 3]]), tensor([2, 3, 4], dtype=torch.int32))
    """
    # 16 bits are half the passes of a radix sort of 32.
    experts_R, order_R = chosen_TK.flatten().to(torch.int16).sort(stable=True)
    rows_R = torch.arange(order_R.shape[0], device=order_R.device)
    slots_R = torch.empty_like(order_R).scatter_(0, order_R, rows_R)
    experts_E = torch.arange(num_experts, dtype=torch.int16, device=order_R.device)
    ends_E = torch.searchsorted(experts_R, experts_E, right=True, out_int32=True)
    source_R = order_R // chosen_TK.shape[-1]
    return order_R, source_R, slots_R.view_as(chosen_TK), ends_E
