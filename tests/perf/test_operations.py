"""What is measured: cases and their names, inputs, and the bytes that must move."""

import pytest
import torch

from mhc_tile.perf import operations
from mhc_tile.perf.operations import MODES, OPERATIONS, Case, Inputs, cases


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_case_comes_back_from_its_name(where, quick):
    found = cases(quick=quick, device=where)
    assert found
    assert [Case.of(case.key) for case in found] == found
    assert len({case.key for case in found}) == len(found)


def test_the_quick_ones_are_among_all():
    assert set(cases(quick=True)) < set(cases())
    assert set(cases(quick=True, device="cpu")) < set(cases(device="cpu"))


def test_every_op_is_measured_both_ways_and_sublayers_at_every_size():
    found = cases()
    for op in OPERATIONS:
        assert {"inference", "training"} <= {case.mode for case in found if case.op == op}
    sublayers = {case for case in found if case.op == "sublayer"}
    assert {case.mode for case in sublayers} == set(MODES)
    for tokens, width in operations.SIZES:
        for mode in MODES:
            assert Case("sublayer", mode, tokens, width) in sublayers
    for tokens, width in operations.DECODE:
        assert Case("sublayer", "inference", tokens, width) in sublayers
    assert {case.op for case in cases(ops=["merge"])} == {"merge"}
    assert cases(ops=["merge", "merge"]) == cases(ops=["merge"])


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("merge", "named op/mode/TxC/n/dtype"),
        ("merge/training/8xC/n4/bfloat16", "named op/mode/TxC/n/dtype"),
        ("merge/training/8x16/n/bfloat16", "named op/mode/TxC/n/dtype"),
        ("merges/training/8x16/n4/bfloat16", "a known op, mode and dtype"),
        ("merge/sideways/8x16/n4/bfloat16", "a known op, mode and dtype"),
        ("merge/training/8x16/n4/bfloat17", "a known op, mode and dtype"),
    ],
)
def test_other_names_are_refused(key, why):
    with pytest.raises(ValueError, match=f"perf: a case must (be|have) {why}, got {key}"):
        Case.of(key)


def elements(op: str, mode: str, **changes) -> float:
    """Bytes that must move, in elements of C a token."""
    case = Case(op, mode, 8192, 2560, **changes)
    return OPERATIONS[op].moved(case) / (case.tokens * case.hidden_size * 2)


@pytest.mark.parametrize(
    ("op", "mode", "expected"),
    [
        # Forward: pre reads 4C and writes C; merge reads 4C and C and writes 4C.
        ("pre", "inference", 5),
        ("merge", "inference", 9),
        ("sublayer", "inference", 14),
        ("sublayer", "forward", 14),
        # Backward of merge: 4C of grad_x_next, 4C of x and C read, 4C and C written. In a sublayer
        # it leaves grad_x to the backward of pre: x, C and grad_x_next read, 4C written.
        ("merge", "training", 9 + 14),
        ("sublayer", "training", 14 + 10 + 13),
        ("pre", "training", 5 + 9),  # nobody else has a gradient of x
        ("pre_apply", "inference", 5),
        ("expand", "inference", 5),
        ("collapse", "training", 10),
        ("mapping", "inference", 4),
    ],
)
def test_bytes_against_hand_arithmetic(op, mode, expected):
    pytest.importorskip("tilelang")
    assert elements(op, mode) == pytest.approx(expected, rel=0.02)
    if op == "sublayer":  # maps and parameters are half a percent
        assert elements(op, mode) == pytest.approx(expected, rel=0.01)


def test_bytes_of_sinkhorn_and_of_wider_types():
    pytest.importorskip("tilelang")
    case = Case("sinkhorn", "inference", 1000, 64)
    assert OPERATIONS["sinkhorn"].moved(case) == 1000 * 16 * 4 * 2  # logits in, h_res out
    assert elements("merge", "inference", dtype="float32") == pytest.approx(18, rel=0.01)
    assert elements("merge", "inference", streams=8) == pytest.approx(17, rel=0.03)


def test_without_tilelang_nothing_is_said_of_bytes(monkeypatch):
    from mhc_tile.autotune.registry import Kernel

    def load(self):
        raise ImportError

    monkeypatch.setattr(Kernel, "load", load)
    assert OPERATIONS["merge"].moved(Case("merge", "training", 8, 16)) is None


@pytest.mark.parametrize("op", OPERATIONS)
def test_inputs_have_the_shapes_that_ops_want(op):
    case, operation = Case(op, "training", 6, 16), OPERATIONS[op]
    tensors = [Inputs(case, "cpu", 0).get(name) for name in operation.names]
    ours, theirs = operation.ours(*tensors), operation.reference(*tensors)
    if isinstance(ours, torch.Tensor):
        ours, theirs = (ours,), (theirs,)
    assert [(v.shape, v.dtype) for v in ours] == [(v.shape, v.dtype) for v in theirs]
    own = len(tensors) - operation.parameters
    assert all(value.shape[0] == case.tokens for value in (*tensors[:own], *ours))
    again = [Inputs(case, "cpu", 0).get(name) for name in operation.names]
    other = [Inputs(case, "cpu", 1).get(name) for name in operation.names]
    assert tensors[0].equal(again[0])
    assert not tensors[0].equal(other[0])


def test_maps_are_in_the_ranges_that_models_have():
    make = Inputs(Case("merge", "training", 64, 16), "cpu", 0)
    h_pre, h_post, h_res = map(make.get, ("h_pre", "h_post", "h_res"))
    for values, top in ((h_pre, 1), (h_post, 2)):
        assert 0 < values.min() < 0.2 * top < 0.8 * top < values.max() < top
    for dim in (-1, -2):
        assert h_res.sum(dim).sub(1).abs().max() < 1e-3
    assert h_res.std() > 0.1
    assert make.get("x").std().item() == pytest.approx(1, rel=0.1)
    assert make.get("phi").std().item() == pytest.approx((4 * 16) ** -0.5, rel=0.1)
