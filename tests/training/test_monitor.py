"""The stability monitor: its numbers against a naive loop, its rule against planted trends."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mhc_tile import MHCConfig
from mhc_tile.models import Decoder, ModelConfig
from mhc_tile.nn import Expand, HyperConnectedStack, HyperConnection, ManifoldHyperConnection
from mhc_tile.training import GainMonitor, GainRule, measure_gains
from mhc_tile.training.monitor import gain_row

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    head_size=8,
    ffn_size=24,
    context_length=32,
)


def naive_gains(h_res: list) -> dict:
    """The definitions, entry by entry, on nested lists [L][T][n][n]."""
    n, num_tokens = len(h_res[0][0]), len(h_res[0])

    def rows(matrix):
        return max(sum(abs(matrix[o][i]) for i in range(n)) for o in range(n))

    def columns(matrix):
        return max(sum(abs(matrix[o][i]) for o in range(n)) for i in range(n))

    def distance(matrix):
        off = [abs(sum(matrix[o][i] for i in range(n)) - 1) for o in range(n)]
        off += [abs(sum(matrix[o][i] for o in range(n)) - 1) for i in range(n)]
        return max(off + [-matrix[o][i] for o in range(n) for i in range(n)])

    def mean(function, matrices):
        return sum(map(function, matrices)) / num_tokens

    products = []
    for t in range(num_tokens):
        product = h_res[0][t]
        for sublayer in h_res[1:]:
            product = [
                [sum(sublayer[t][o][k] * product[k][i] for k in range(n)) for i in range(n)]
                for o in range(n)
            ]
        products.append(product)
    return {
        "forward": [mean(rows, sublayer) for sublayer in h_res],
        "backward": [mean(columns, sublayer) for sublayer in h_res],
        "distance": [mean(distance, sublayer) for sublayer in h_res],
        "composite_forward": mean(rows, products),
        "composite_backward": mean(columns, products),
    }


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gains_match_the_definition(n):
    torch.manual_seed(0)
    h_res = torch.randn(5, 7, n, n, dtype=torch.float64)
    expected = naive_gains(h_res.tolist())
    for name, value in measure_gains(h_res).items():
        assert value.reshape(-1).tolist() == pytest.approx(
            expected[name] if isinstance(expected[name], list) else [expected[name]], rel=1e-12
        )


def test_later_sublayers_stand_on_the_left():
    """Row 0 copies both streams' sum on, row 1 nothing: only one order has row gain 2."""
    gather = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    double = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    in_order = measure_gains(torch.stack([double, gather]).unsqueeze(1))
    reverse = measure_gains(torch.stack([gather, double]).unsqueeze(1))
    assert in_order["composite_forward"].item() == 3
    assert reverse["composite_forward"].item() == 2


def test_doubly_stochastic_mixing_is_neutral():
    permutation = torch.eye(4)[[2, 0, 3, 1]]
    gains = measure_gains(torch.stack([permutation, torch.full((4, 4), 0.25)]).unsqueeze(1))
    assert gains["distance"].abs().max() == 0
    assert gains["composite_forward"] == gains["composite_backward"] == 1


@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_hears_every_sublayer_in_depth_order(residual):
    torch.manual_seed(0)
    model = Decoder(TINY, residual)
    kind = ManifoldHyperConnection if residual == "mhc" else HyperConnection
    connections = [module for module in model.modules() if isinstance(module, kind)]
    if residual == "hc":
        for index, connection in enumerate(connections):
            connection.bias.data[8:] *= index + 1
    monitor = GainMonitor(model)
    with monitor.listen():
        model(torch.randint(256, (2, 8)))
    samples = monitor.samples()
    assert samples.shape == (4, 16, 4, 4)
    if residual == "hc":
        assert measure_gains(samples)["forward"].tolist() == [1, 2, 3, 4]
    else:
        assert measure_gains(samples)["distance"].max() < 1e-3


def test_listening_changes_nothing_and_stops():
    torch.manual_seed(0)
    model = Decoder(TINY, "mhc")
    batch = torch.randint(256, (2, 8))
    before = model(batch)
    monitor = GainMonitor(model)
    with monitor.listen():
        during = model(batch)
    monitor.samples()
    assert torch.equal(before, during)
    model(batch)
    with pytest.raises(
        RuntimeError, match="must run all 4 connections on at least one token, got 0"
    ):
        monitor.samples()
    monitor.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", [HyperConnection, ManifoldHyperConnection])
def test_a_shared_connection_counts_as_often_as_it_runs(kind):
    connection = kind(nn.Identity(), 8)
    connection.tap.register_forward_hook(lambda _module, _inputs, h_res: doubled(h_res))
    stack = HyperConnectedStack([connection] * 3)
    monitor = GainMonitor(stack)
    with monitor.listen():
        stack(torch.randn(5, 4, 8))
    gains = measure_gains(monitor.samples())
    assert gains["forward"].tolist() == [2.0] * 3
    assert gains["composite_forward"].item() == 8.0


def doubled(h_res: torch.Tensor) -> torch.Tensor:
    return 2 * torch.eye(4).expand_as(h_res)


def test_a_call_of_the_model_starts_a_new_record():
    stack = HyperConnectedStack([HyperConnection(nn.Identity(), 8) for _ in range(2)])
    monitor = GainMonitor(stack)
    with monitor.listen():
        stack(torch.randn(5, 4, 8))
        stack(torch.randn(7, 4, 8))
        stack(torch.randn(0, 4, 8))
    assert monitor.samples().shape == (2, 7, 4, 4)


def test_a_pass_without_tokens_is_no_record():
    stack = HyperConnectedStack([HyperConnection(nn.Identity(), 8)])
    monitor = GainMonitor(stack)
    with monitor.listen():
        stack(torch.randn(0, 4, 8))
    with pytest.raises(RuntimeError, match="must run all 1 connections on at least one token"):
        monitor.samples()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_recompute_is_no_further_call(whole, reentrant):
    connections = [HyperConnection(nn.Identity(), 8) for _ in range(3)]
    for index, connection in enumerate(connections):
        connection.bias.data[8:] *= index + 1
    model = nn.Sequential(*connections)
    monitor = GainMonitor(model)
    x = torch.randn(5, 4, 8, requires_grad=True)
    with monitor.listen():
        for part in [model] if whole else connections:
            x = checkpoint(part, x, use_reentrant=reentrant)
        x.sum().backward()
    assert measure_gains(monitor.samples())["forward"].tolist() == [1.0, 2.0, 3.0]


def test_a_compiled_model_is_heard():
    stack = HyperConnectedStack([ManifoldHyperConnection(nn.Linear(8, 8), 8) for _ in range(2)])
    monitor = GainMonitor(stack)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 4, 8)
    with monitor.listen():
        compiled(x).sum().backward()
    recorded = monitor.samples()
    with monitor.listen():
        stack(x)
    assert (recorded - monitor.samples()).abs().max() < 1e-6


def test_a_plain_residual_has_nothing_to_monitor():
    assert GainMonitor(Decoder(TINY, "residual")).num_sublayers == 0


def test_sampled_tokens_are_spread_and_the_same_in_every_sublayer():
    identity = nn.Identity()
    config = MHCConfig.paper()
    stack = HyperConnectedStack([HyperConnection(identity, 8, config, i) for i in range(2)])
    monitor = GainMonitor(stack, max_tokens=16)
    positions = torch.arange(8 * 64).reshape(8, 64)
    marks = (positions + 1.0)[..., None, None] * torch.eye(4)
    with monitor.listen():
        for connection in stack.connections:
            connection.tap(marks)
    samples = monitor.samples()
    assert torch.equal(samples[0], samples[1])
    sampled = samples[0, :, 0, 0].long() - 1
    assert 8 <= len(sampled) <= 16
    assert sampled[-1] > 400
    assert len(set((sampled % 64).tolist())) > 8  # not one position of the sequence again and again


def test_a_row_has_numbers_and_the_canary():
    row = gain_row(7, measure_gains(torch.eye(4).mul(3.0).expand(2, 5, 4, 4)))
    assert (row["kind"], row["step"]) == ("gain", 7)
    assert (row["forward"], row["canary"], row["composite_backward"]) == ([3.0, 3.0], 3.0, 9.0)


# the rule


def record(step: int, composite: float | None, first: float = 1.0) -> dict:
    both = {"composite_forward": composite, "composite_backward": 1.0}
    return {"step": step, **both, "forward": [first, 1.0], "backward": [1.0, 1.0]}


def warnings_of(composites, losses=None, firsts=None) -> list:
    rule = GainRule()
    losses = losses or [2.0] * len(composites)
    firsts = firsts or [1.0] * len(composites)
    found = []
    for step, (gain, loss, first) in enumerate(zip(composites, losses, firsts, strict=True)):
        found += rule.update(record(step, gain, first), loss)
    return found


def test_a_planted_explosion_warns_once_per_decade_while_the_loss_falls():
    composites = [1.15**step for step in range(60)]  # to 3800
    found = warnings_of(composites, losses=[3.0 - 0.02 * step for step in range(60)])
    assert [warning.threshold for warning in found] == [3.0, 30.0, 300.0, 3000.0]
    assert found[0].step == pytest.approx(math.log(3) / math.log(1.15), abs=1.5)
    assert all(warning.loss_looks_normal for warning in found)
    assert "composite gain of h_res reached" in found[0].message()
    assert "while the loss looks normal" in found[0].message()


def test_healthy_gains_never_warn():
    torch.manual_seed(0)
    for _ in range(200):
        gains = (1 + 0.6 * torch.rand(50)).tolist()
        assert warnings_of(gains, firsts=gains) == []
    worst_for_a_line = [1.0, 1.0, 1.6, 1.6, 1.6]
    assert warnings_of(worst_for_a_line * 4, firsts=worst_for_a_line * 4) == []


def test_a_lone_spike_does_not_warn_and_a_plateau_does():
    assert warnings_of([1.0] * 9 + [5.0] + [1.0] * 9) == []
    assert len(warnings_of([5.0] * 9)) == 1


def test_the_first_sublayer_is_the_canary():
    (warning,) = warnings_of([1.0] * 10, firsts=[1.0 + 0.2 * step for step in range(10)])
    assert warning.signal == "canary"
    assert "first sublayer" in warning.message()


@pytest.mark.parametrize("gain", [None, math.inf, math.nan])
def test_a_gain_that_is_not_finite_warns(gain):
    assert warnings_of([1.0, 1.0, gain])[0].signal == "composite"


def test_a_risen_loss_is_said_to_have_risen():
    found = warnings_of([1.0] * 7 + [9.0] * 3, losses=[2.0] * 7 + [4.0] * 3)
    assert not found[0].loss_looks_normal
    assert "the loss has risen" in found[0].message()
    assert not warnings_of([9.0] * 3, losses=[2.0, 2.0, None])[0].loss_looks_normal


def test_an_explosion_planted_in_a_model_is_seen():
    """Gain 1.5 per sublayer over 8 sublayers: 25 in all, through hooks, gains and rule."""
    config = MHCConfig.paper()
    layers = [HyperConnection(nn.Identity(), 8, config, index) for index in range(8)]
    for connection in layers:
        connection.bias.data[8:] *= 1.5
    stack, rule = HyperConnectedStack(layers), GainRule()
    monitor = GainMonitor(stack)
    found = []
    for step in range(5):
        with monitor.listen():
            stack(Expand(4)(torch.randn(3, 8)))
        row = gain_row(step, measure_gains(monitor.samples()))
        assert row["composite_forward"] == pytest.approx(1.5**8, rel=1e-5)
        found += rule.update(row, loss=2.0)
    assert [warning.signal for warning in found] == ["composite"]
