"""One record for each GPU architecture, and no number of one anywhere else."""

from pathlib import Path

import pytest

from mhc_tile.kernels.common import architectures
from mhc_tile.kernels.common.architectures import (
    CHECKED,
    LEAST_SHARED_BYTES,
    architecture_of,
    multiprocessors_of,
    overlaps,
    shared_limit,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arch", "shared"),
    [
        ("sm_80", 166_912), ("sm_86", 101_376), ("sm_87", 166_912), ("sm_89", 101_376),
        ("sm_90a", 232_448), ("sm_100a", 232_448), ("sm_103a", 232_448), ("sm_110a", 232_448),
        ("sm_120a", 101_376), ("sm_121a", 101_376),
    ],
)  # fmt: skip
def test_shared_memory_of_a_block(arch, shared):
    assert architecture_of(arch).shared_bytes == shared_limit(arch) == shared
    assert overlaps(arch) is (int(arch[3:].rstrip("a")) >= 90)


def test_an_architecture_without_a_record():
    assert shared_limit("sm_999a") == LEAST_SHARED_BYTES == 101_376
    with pytest.raises(ValueError, match=r"architecture: arch must be one of sm_80, .* got sm_75"):
        architecture_of("sm_75")
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, sm_89, .* got sm_86"):
        multiprocessors_of("sm_86")
    assert all(multiprocessors_of(arch) > 100 for arch in CHECKED)


def test_its_numbers_are_nowhere_else():
    for package in ("mhc_tile", "kernels", "autotune", "perf"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name == Path(architectures.__file__).name:
                continue
            text = path.read_text().replace("_", "")
            assert not any(number in text for number in ("166912", "101376", "232448")), path
