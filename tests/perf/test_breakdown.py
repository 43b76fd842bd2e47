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
    PRODUCTS,
    busy,
    lasting,
    part_of,
    split,
    steps_under_load,
)

RECORD = Path(__file__).parents[2] / "perf" / "static" / "sm_90a.json"


def test_every_kernel_of_ours_has_a_part():
    names = list(json.loads(RECORD.read_text())["kernels"])
    parts = {name: part_of(name) for name in names}
    # No slice has an expand or a collapse.
    assert {n.split("_")[0] for n, p in parts.items() if p == LAYERS} <= {"expand", "collapse"}
    for name, part in parts.items():
        if part != LAYERS:
            assert ("backward" in name) == ("backward" in part), name
    assert part_of("void at::native::vectorized_elementwise_kernel<4>") == LAYERS


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("mhc_boundary_kernel", "merge and pre, forward"),
        ("mhc_pre_big_fuse_kernel", "pre, forward"),
        ("_mhc_pre_norm_fn_fwd_mul_kernel_kernel", "mapping, forward"),
        ("_mhc_pre_norm_fn_bwd_norm_kernel_kernel", "mapping, backward"),
        ("mhc_pre_split_mixes_bwd_kernel_kernel", "mapping, backward"),
        ("mhc_sinkhorn_kernel_kernel", "sinkhorn, forward"),
        ("mhc_sinkhorn_backward_kernel_kernel", "sinkhorn, backward"),
        ("_mhc_pre_apply_mix_fwd_kernel_kernel", "pre_apply, forward"),
        ("_mhc_pre_apply_mix_bwd_kernel_kernel", "pre_apply, backward"),
        ("_mhc_post_fwd_kernel_kernel", "merge, forward"),
        ("_mhc_post_bwd_kernel_kernel", "merge, backward"),
        ("_mhc_mm_norm_bwd_fused_kernel", "mapping, backward"),
        ("_mhc_split_sinkhorn_fwd_kernel", "sinkhorn, forward"),
        ("_mhc_sinkhorn_bwd_hist_kernel", "sinkhorn, backward"),
        ("_mhc_pre_fwd_kernel", "pre_apply, forward"),
        ("_mhc_pre_bwd_kernel", "pre_apply, backward"),
        ("_mhc_post_res_fwd_kernel", "merge, forward"),
        ("_mhc_post_res_bwd_kernel", "merge, backward"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8", PRODUCTS),
        ("void gemmk1_kernel<int, float, 256>", PRODUCTS),
        ("void pytorch_flash::flash_bwd_dot_do_o_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("AttentionBackwardKernel<cutlass::gemm::GemmShape<64, 64, 32>>", "attention"),
        ("triton_per_fused_gemm_attention_pre_backward_0", LAYERS),
    ],
)
def test_other_packages_and_pytorchs_kernels_have_parts(kernel, part):
    assert part_of(kernel) == part


def test_spans_that_overlap_count_once():
    assert busy([]) == 0
    assert busy([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7
    assert busy([(5, 6), (0, 2)]) == 3


RECORDED = [  # two steps of 20 us
    ("mhc_pre_persistent_kernel", 0.0, 3.0),
    ("nvjet_tst_128x256", 3.0, 8.0),
    ("merge_forward_kernel", 7.0, 9.0),  # begins before the one before has ended
    ("merge_backward_kernel", 10.0, 14.0),
    ("mhc_pre_persistent_kernel", 20.0, 25.0),
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
        PRODUCTS: 5.0,
        LAYERS: 0.0,
        GAPS: (36 - 13 - 16) / 2,
    }
    assert list(parts) == [n for n in (*KERNELS, LAYERS, GAPS) if n in parts]
    assert sum(parts.values()) == 36 / 2 + 1 / 2  # the overlap counts for both


def test_steps_without_a_kernel_are_nothing():
    assert split([], 1) == {LAYERS: 0.0, GAPS: 0.0}
    assert lasting([]) == 0.0
    assert lasting([("a", 1, 2), ("b", 5, 8)]) == 7


def test_steps_load_the_gpu():
    assert steps_under_load(64_000.0) == 5
    assert steps_under_load(10e6) == breakdown.LEAST_STEPS
    assert steps_under_load(0.0) == breakdown.MOST_STEPS


@pytest.mark.gpu
def test_a_step_on_a_gpu():
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    us, parts, kernels = breakdown.breakdown(lambda: a @ a, 1e5)
    assert set(parts) == {PRODUCTS, LAYERS, GAPS}
    assert sum(kernels.values()) == pytest.approx(parts[PRODUCTS] + parts[LAYERS], rel=0.01)
    assert 0 < parts[PRODUCTS] <= us
    assert us == pytest.approx(sum(parts.values()))
