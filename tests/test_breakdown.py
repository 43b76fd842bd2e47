"""Where the time of a step goes: parts by kernels' names, and what no kernel fills."""

import json
from pathlib import Path

import pytest
import torch

from mhc_tile.perf import breakdown
from mhc_tile.perf.breakdown import (
    GAPS,
    KERNELS,
    LAYERS,
    busy,
    lasting,
    part_of,
    split,
    steps_under_load,
)

RECORD = Path(__file__).parents[1] / "perf" / "static" / "sm_90a.json"


def test_every_kernel_of_ours_has_a_part():
    names = list(json.loads(RECORD.read_text())["kernels"])
    parts = {name: part_of(name) for name in names}
    # No slice has an expand or a collapse.
    assert {n.split("_")[0] for n, p in parts.items() if p == LAYERS} <= {"expand", "collapse"}
    for name, part in parts.items():
        if part not in (LAYERS, "sinkhorn"):
            assert ("backward" in name) == ("backward" in part), name
    assert part_of("void at::native::vectorized_elementwise_kernel<4>") == LAYERS


def test_spans_that_overlap_count_once():
    assert busy([]) == 0
    assert busy([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7
    assert busy([(5, 6), (0, 2)]) == 3


RECORDED = [  # two steps of 20 us
    ("mhc_pre_team_kernel", 0.0, 3.0),
    ("nvjet_tst_128x256", 3.0, 8.0),
    ("merge_forward_kernel", 7.0, 9.0),  # begins before the one before has ended
    ("merge_backward_kernel", 10.0, 14.0),
    ("mhc_pre_team_kernel", 20.0, 25.0),
    ("nvjet_tst_128x256", 25.0, 30.0),
    ("merge_forward_kernel", 30.0, 32.0),
    ("merge_backward_kernel", 32.0, 36.0),
]


def test_parts_are_of_one_step():
    parts = split(RECORDED, 2)
    assert parts == {
        "pre, forward": 4.0,
        "merge, forward": 2.0,
        "merge, backward": 4.0,
        LAYERS: 5.0,
        GAPS: (36 - 13 - 16) / 2,
    }
    assert list(parts) == [n for n in (*KERNELS, LAYERS, GAPS) if n in parts]
    assert sum(parts.values()) == 36 / 2 + 1 / 2  # the overlap counts for both


def test_steps_without_a_kernel_are_nothing():
    assert split([], 1) == {LAYERS: 0.0, GAPS: 0.0}
    assert lasting([]) == 0.0


def test_steps_load_the_gpu():
    assert steps_under_load(64_000.0) == 5
    assert steps_under_load(10e6) == breakdown.LEAST_STEPS
    assert steps_under_load(0.0) == breakdown.MOST_STEPS


@pytest.mark.gpu
def test_a_step_on_a_gpu():
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    us, parts, kernels = breakdown.breakdown(lambda: a @ a, 1e5)
    assert set(parts) == {LAYERS, GAPS}
    assert sum(kernels.values()) == pytest.approx(parts[LAYERS], rel=0.01)
    assert 0 < parts[LAYERS] <= us
    assert us == pytest.approx(sum(parts.values()))
