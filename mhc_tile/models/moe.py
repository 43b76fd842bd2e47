"""Mixture of experts: a router, routed experts of which a token takes a few, shared experts.

`affinity = sigmoid(W h)`; the token's experts are the `experts_per_token` with the largest
`affinity + expert_bias`; its gates are their affinities divided by their sum;
`out = sum_e gate[e] * expert_e(h) + shared(h)`, every expert a SwiGLU (DeepSeek-V3's layer).

Load is balanced without an auxiliary loss: `expert_bias` has no gradient and moves by a fixed step
against the load of the last optimizer step, when `update_bias` is called. The forward pass in
training only counts: it may run more than once for a step (several batches, recompute), and all
passes of a step must choose by the same bias. Counting a pass twice does not change which experts
are above the mean.

Axes: T tokens, C hidden size, E experts, K experts per token, F expert FFN size, R = T * K rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import autocast_dtype, without_autocast
from ..nn._parameters import MappingModule, parameter
from ..reference import wide
from .configs import ModelConfig, MoEConfig
from .grouped import gather, grouped_linear, spread
from .layers import INPUT_STD, RMSNorm, SwiGLU

# Added to the sum of a token's affinities, all of which may have underflowed.
_GATE_EPS = 1e-20


class Router(MappingModule):
    """Chooses experts and their gates, in fp32 whatever the dtype of the model.

    Args:
        hidden_size: C.
        config: of the experts.

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
        """Start the bias and the count again; `MixtureOfExperts.initialise` starts the weight."""
        self.expert_bias.zero_()
        self.expert_load.zero_()

    def forward(self, hidden_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Choose.

        Args:
            hidden_TC: [T, C].

        Returns:
            gates [T, K], fp32, and chosen [T, K], int64: experts in the order of preference.
        """
        (weight,) = self.read(hidden_TC, self.weight)
        with without_autocast(hidden_TC.device.type):
            affinity_TE = F.linear(hidden_TC.to(weight.dtype), weight).sigmoid()
        preference = affinity_TE.detach() + self.expert_bias
        chosen_TK = preference.topk(self.experts_per_token).indices
        gates_TK = affinity_TE.gather(-1, chosen_TK)
        return gates_TK / (gates_TK.sum(-1, keepdim=True) + _GATE_EPS), chosen_TK

    @torch.no_grad()
    def count(self, ends_E: Tensor) -> None:
        """Add a batch to `expert_load`.

        Args:
            ends_E: [E], running sum of the tokens of each expert.
        """
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

    A token's rows are gathered by expert, so that each of the two products is one grouped matmul
    (see `mhc_tile.models.grouped` for where that needs no host sync). Gates multiply the inner
    activation, which is narrower than the output and is kept for the backward pass anyway. No
    token is dropped, and every pass, forward and backward, has the same bits each time.

    Args:
        config: the decoder's shape.

    Raises:
        ValueError: The configuration has no `moe`.

    Attributes:
        router: chooses the experts.
        experts_in: [E, 2F, C], gates then ups.
        experts_out: [E, C, F].
        shared: the shared experts as one SwiGLU; None without.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe, width = config.moe, config.hidden_size
        if moe is None:
            raise ValueError("MixtureOfExperts: config.moe must be an MoEConfig, got None")
        self.norm = RMSNorm(width, eps=config.norm_eps)
        self.router = Router(width, moe)
        count, inner = moe.num_experts, moe.expert_ffn_size
        self.experts_in = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.experts_out = nn.Parameter(torch.empty(count, width, inner))
        self.shared = SwiGLU(width, moe.shared_experts * inner) if moe.shared_experts else None
        self.initialise(INPUT_STD)

    def initialise(self, output_std: float) -> None:
        """Start the matrices again."""
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
        dtype = _compute_dtype(hidden)
        rows_RC = spread(hidden_TC.to(dtype), source_R, slots_TK)
        inner = grouped_linear(rows_RC, self.experts_in.to(dtype), ends_E)
        gate_RF, up_RF = inner.chunk(2, dim=-1)
        gates_R1 = spread(gates_TK.to(dtype).reshape(-1, 1), order_R, slots_TK.reshape(-1, 1))
        product_RF = F.silu(gate_RF) * up_RF * gates_R1
        rows_RC = grouped_linear(product_RF, self.experts_out.to(dtype), ends_E)
        output = gather(rows_RC, source_R, slots_TK).view(hidden.shape)
        return output if self.shared is None else output + self.shared(hidden)


def sort_by_expert(chosen_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The places of tokens in rows that are sorted by expert, then by token; without a host sync.

    Args:
        chosen_TK: [T, K], int64.
        num_experts: E.

    Returns:
        order [R]: which of the T * K choices a row is for; source [R]: which token; slots [T, K]:
        the row of each choice; ends [E], int32: behind the last row of each expert.

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


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` would compute."""
    if hidden.dtype == torch.float64:
        return hidden.dtype
    return autocast_dtype(hidden.device.type) or hidden.dtype
