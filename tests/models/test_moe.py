"""The mixture of experts against a naive loop over experts, its load balance, its promises."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compare import compare
from mhc_tile.models import ModelConfig, MoEConfig
from mhc_tile.models.moe import MixtureOfExperts, sort_by_expert

EXPERTS = MoEConfig(num_experts=8, expert_ffn_size=24, experts_per_token=3)
TINY = ModelConfig(
    vocab_size=256,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    head_size=8,
    ffn_size=24,
    context_length=32,
    moe=EXPERTS,
)
# Roundings of float32 in sums over 16 to 48 channels, one behind the other.
K_MOE = 16


def mixture(dtype: torch.dtype = torch.float32, device: str = "cpu", **changes) -> MixtureOfExperts:
    """Weights large enough that routed and shared experts both matter."""
    torch.manual_seed(0)
    module = MixtureOfExperts(TINY.replace(moe=changes) if changes else TINY)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module.to(device=device, dtype=dtype)


def hidden_states(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 16, generator=generator).to(device=device, dtype=dtype)


def swiglu(hidden: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    gate, up = (hidden @ weight_in.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ weight_out.T


def naive(module: MixtureOfExperts, hidden: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Expert after expert, each on the tokens that chose it; by `chosen` if given."""
    tokens = module.norm(hidden).reshape(-1, hidden.shape[-1])
    affinity = torch.sigmoid(tokens @ module.router.weight.to(tokens.dtype).T)
    if chosen is None:
        preference = affinity + module.router.expert_bias
        chosen = preference.topk(module.router.experts_per_token).indices
    total = torch.stack([affinity[t, chosen[t]].sum() for t in range(len(tokens))])
    out = swiglu(tokens, module.shared.project_in.weight, module.shared.project_out.weight)
    for expert in range(len(module.experts_in)):
        mine = (chosen == expert).any(-1)
        result = swiglu(tokens[mine], module.experts_in[expert], module.experts_out[expert])
        gates = affinity[mine, expert] / total[mine]
        update = torch.zeros_like(out)
        update[mine] = gates[:, None] * result
        out = out + update
    return out.view(hidden.shape)


def outcome(function, module: MixtureOfExperts, hidden: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter."""
    hidden = hidden.detach().requires_grad_()
    out = function(hidden)
    leaves = [hidden, *module.parameters()]
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out))]


def prepare(case: str, module: MixtureOfExperts) -> None:
    bias, weight = module.router.expert_bias, module.router.weight
    if case == "unused experts":
        bias[torch.tensor([0, 3, 7])] = -2.0
    elif case == "same experts":
        bias[torch.tensor([1, 4, 5])] = 2.0
    elif case == "ties":
        with torch.no_grad():
            weight.zero_()


CASES = ["ordinary", "unused experts", "same experts", "ties", "one token"]


def chosen_by(module: MixtureOfExperts) -> list[Tensor]:
    """Filled with the experts that the module chooses, as it runs."""
    seen: list[Tensor] = []
    module.router.register_forward_hook(
        lambda _module, _inputs, results: seen.append(results[1].cpu())
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_a_loop_over_experts(case, dtype, device):
    module, exact = mixture(dtype, device), mixture(torch.float64)
    prepare(case, module)
    prepare(case, exact)
    shape = (1, 1) if case == "one token" else (2, 13)
    hidden = hidden_states(*shape, dtype=dtype, device=device)
    cotangent = torch.randn_like(hidden)
    seen = chosen_by(module)
    actual = outcome(module, module, hidden, cotangent)
    # Of equal affinities any three will do; otherwise float64 leaves no doubt.
    given = seen[0] if case == "ties" or dtype == torch.float32 else None
    assert all(len(set(row)) == 3 for row in seen[0].tolist())
    truth = outcome(
        lambda value: naive(exact, value, given), exact, hidden.cpu().double(), cotangent.cpu()
    )
    names = ["output", "hidden", *(name for name, _ in module.named_parameters())]
    for name, value, expected in zip(names, actual, truth, strict=True):
        compare(value.cpu(), expected, k=K_MOE, name=name)
    load = module.router.expert_load.tolist()
    assert sum(load) == 3 * hidden[..., 0].numel()
    if case == "unused experts":
        assert load[0] == load[3] == load[7] == 0
    elif case == "same experts":
        assert load[1] == load[4] == load[5] == 26


def test_one_expert_for_all_tokens_and_no_shared_one():
    module = mixture(torch.float64, experts_per_token=1, shared_experts=0)
    assert module.shared is None
    module.router.expert_bias[2] = 2.0
    hidden = hidden_states(9, dtype=torch.float64)
    out = module(hidden)
    compare(out, swiglu(module.norm(hidden), module.experts_in[2], module.experts_out[2]), k=K_MOE)
    assert module.router.expert_load.tolist() == [0, 0, 9, 0, 0, 0, 0, 0]


def test_no_tokens(device):
    module = mixture(device=device)
    hidden = hidden_states(0, device=device).requires_grad_()
    out = module(hidden)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert hidden.grad.shape == (0, 16)
    assert not any(parameter.grad.any() for parameter in module.parameters())
    assert not module.router.expert_load.any()


def test_gradcheck():
    module = mixture(torch.float64, num_experts=4, expert_ffn_size=3, experts_per_token=2)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(hidden: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (hidden,))

    inputs = (hidden_states(4, dtype=torch.float64).requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_a_token_does_not_depend_on_the_others():
    module = mixture(torch.float64)
    hidden = hidden_states(12, dtype=torch.float64)
    out = module(hidden)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    compare(module(hidden[order]), out[order], k=K_MOE)
    compare(module(hidden[5:6]), out[5:6], k=K_MOE)
    assert torch.equal(module(hidden.view(3, 4, 16)), out.view(3, 4, 16))
    assert torch.equal(module(hidden[5]), module(hidden[5:6])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice(dtype, device):
    torch.use_deterministic_algorithms(False)  # it must not need them
    module = mixture(dtype, device)
    hidden = hidden_states(4, 500, dtype=dtype, device=device)
    cotangent = torch.randn_like(hidden)
    first = outcome(module, module, hidden, cotangent)
    for _ in range(3):
        again = outcome(module, module, hidden, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_are_sorted_by_expert_then_token():
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])
    order, source, slots, ends = sort_by_expert(chosen, 5)
    assert source.tolist() == [0, 1, 3, 0, 2, 3, 1, 2]
    assert ends.tolist() == [3, 3, 6, 8, 8]
    assert torch.equal(chosen.flatten()[order], chosen.flatten().sort().values)
    assert torch.equal(order[slots.flatten()], torch.arange(8))


# precision


def test_the_router_stays_float32():
    module = mixture().bfloat16()
    assert module.experts_in.dtype == torch.bfloat16
    assert module.router.weight.dtype == module.router.expert_bias.dtype == torch.float32
    assert module.router.expert_load.dtype == torch.int64
    gates, _ = module.router(hidden_states(5, dtype=torch.bfloat16))
    assert gates.dtype == torch.float32
    assert (gates.sum(-1) - 1).abs().max() < 1e-6
    assert mixture(torch.float64).router.weight.dtype == torch.float64


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_near_the_exact_result(autocast, device):
    """By autocast with fp32 parameters, and with bf16 parameters."""
    module = mixture(torch.float32 if autocast else torch.bfloat16, device)
    hidden = hidden_states(2, 40, dtype=torch.bfloat16, device=device)
    cotangent = torch.randn_like(hidden)
    seen = chosen_by(module)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        actual = outcome(module, module, hidden, cotangent)
    exact = mixture(torch.float64)
    exact.load_state_dict({name: value.cpu() for name, value in module.state_dict().items()})
    truth = outcome(
        lambda value: naive(exact, value, seen[0]), exact, hidden.cpu().double(), cotangent.cpu()
    )
    assert actual[0].dtype == torch.bfloat16
    for value, expected, leaf in zip(actual[2:], truth[2:], module.parameters(), strict=True):
        assert value.dtype == leaf.dtype
        assert (value.cpu().double() - expected).norm() < 0.02 * expected.norm()
    assert (actual[0].cpu().double() - truth[0]).norm() < 0.01 * truth[0].norm()


def test_autocast_of_a_float32_input_computes_in_bf16_but_routes_in_float32():
    module = mixture()
    hidden = hidden_states(5)
    with torch.autocast("cpu", torch.bfloat16):
        out, (gates, _) = module(hidden), module.router(hidden)
    assert out.dtype == torch.bfloat16
    assert torch.equal(gates, module.router(hidden)[0])


# balance


def test_bias_moves_against_the_load():
    router = mixture(balance_rate=0.25).router
    router.expert_load.copy_(torch.tensor([9, 3, 5, 4, 5, 5, 0, 9]))
    router.update_bias()
    assert router.expert_bias.tolist() == [-0.25, 0.25, 0, 0.25, 0, 0, 0.25, -0.25]
    assert not router.expert_load.any()
    router.update_bias()  # nothing was counted
    assert router.expert_bias.tolist() == [-0.25, 0.25, 0, 0.25, 0, 0, 0.25, -0.25]


def test_bias_chooses_and_does_nothing_else():
    module = mixture(torch.float64)
    hidden = hidden_states(10, dtype=torch.float64)
    out = module(hidden)
    module.router.expert_bias += 0.5  # the same for all
    assert torch.equal(module(hidden), out)
    module.router.expert_bias[6] = 5.0
    gates, chosen = module.router(module.norm(hidden))
    assert (chosen == 6).any(-1).all()
    assert (gates.sum(-1) - 1).abs().max() < 1e-12
    assert (module(hidden) - out).abs().max() > 1e-3
    assert "expert_bias" not in dict(module.router.named_parameters())


def test_updates_even_out_the_load():
    module = mixture(balance_rate=0.02)
    hidden = hidden_states(400) + 2 * hidden_states(1)  # all tokens are alike
    spreads = []
    for _ in range(40):
        with torch.no_grad():
            module(hidden)
        spreads.append(module.router.expert_load.double().std().item())
        module.router.update_bias()
    assert spreads[-1] < 0.3 * spreads[0]


def test_only_training_counts_and_recompute_changes_no_update():
    module = mixture()
    hidden = hidden_states(7).requires_grad_()
    module.eval()(hidden)
    assert not module.router.expert_load.any()
    module.train()
    out = module(hidden)
    once = module.router.expert_load.clone()
    again = checkpoint(module, hidden, use_reentrant=False)
    assert torch.equal(out, again)
    again.sum().backward()
    assert torch.equal(module.router.expert_load, 3 * once)
    module.router.update_bias()
    direction = (once.double().mean() - once).sign()
    assert torch.equal(module.router.expert_bias, EXPERTS.balance_rate * direction.float())


def test_a_config_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"MixtureOfExperts: config.moe must be an MoEConfig"):
        MixtureOfExperts(TINY.replace(moe=None))


# torch.compile, CUDA graphs


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole(backend, dtype):
    device = "cuda" if backend == "inductor" else "cpu"
    module = mixture(dtype, device)
    prepare("same experts", module)  # so that a rounding changes no choice
    hidden = hidden_states(2, 9, dtype=dtype, device=device)
    cotangent = torch.randn_like(hidden)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    actual = outcome(compiled, module, hidden, cotangent)
    load = module.router.expert_load.clone()
    expected = outcome(module, module, hidden, cotangent)
    tolerance = 4e-6 if dtype == torch.float32 else 0.03
    for value, eager in zip(actual, expected, strict=True):
        assert (value - eager).float().norm() <= tolerance * eager.float().norm()
    assert load.sum() == 18 * 3
    assert torch.equal(module.router.expert_load, 2 * load)


@pytest.fixture
def _hopper():
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("torch's grouped matmul waits for the ends before compute capability 9.0")
    torch.use_deterministic_algorithms(False)
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_waits_for_nothing(autocast):
    module = mixture(torch.float32 if autocast else torch.bfloat16, "cuda")
    hidden = hidden_states(300, dtype=torch.bfloat16, device="cuda")
    cotangent = torch.randn_like(hidden)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = outcome(module, module, hidden, cotangent)
        torch.cuda.set_sync_debug_mode("error")
        actual = outcome(module, module, hidden, cotangent)
        module.router.update_bias()
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
def test_cuda_graph():
    """One graph of forward and backward serves tokens that are routed in other ways."""
    module = mixture(torch.bfloat16, "cuda")
    hidden = hidden_states(2, 300, dtype=torch.bfloat16, device="cuda")
    cotangent = torch.randn_like(hidden[0])
    static = hidden[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            outcome(module, module, static, cotangent)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(module, module, static, cotangent)
    for tokens in hidden:
        static.copy_(tokens)
        graph.replay()
        actual = [value.clone() for value in captured]
        expected = outcome(module, module, tokens, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
