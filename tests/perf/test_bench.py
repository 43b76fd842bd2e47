"""Timers, turns and what a device says of a call."""

import os
import time

import pytest
import torch

from mhc_tile.autotune.bench import MOST_SETS, ROTATED_BYTES
from mhc_tile.autotune.timing import rounds
from mhc_tile.perf import bench
from mhc_tile.perf.bench import CpuBench, bench_of


def forbidden(name, error):
    raise AssertionError(name) from error


def test_turns_rotate_turn_round_and_every_round_is_told():
    called = []
    timers = {name: lambda name=name: called.append(name) or float(len(called)) for name in "abc"}
    found = list(rounds(timers, 4, forbidden))
    assert "".join(called) == "abc" + "bac" + "cab" + "acb"
    assert [sample["a"].turns for sample in found] == [1, 2, 3, 4]
    assert found[-1]["a"].us == 6.5  # it was called 1st, 5th, 8th and 10th
    assert list(rounds({}, 2, forbidden)) == [{}, {}]


def test_one_that_fails_takes_no_further_turns():
    calls, told = 0, []

    def fails():
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("full")
        return 1.0

    found = list(rounds({"a": lambda: 2.0, "b": fails}, 3, lambda *what: told.append(what)))
    assert [sorted(sample) for sample in found] == [["a", "b"], ["a"], ["a"]]
    assert found[-1]["a"].turns == 3
    ((name, error),) = told
    assert (name, calls, str(error)) == ("b", 2, "full")
    assert error.__traceback__ is None  # its frames would hold memory


def test_an_interrupt_passes():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(rounds({"a": stop}, 1, forbidden))


def test_the_cpu():
    device = bench_of("cpu")
    assert device.bandwidth() > 1e8
    timed = device.timed(lambda value: time.sleep(2e-3), [[torch.ones(1)]] * 2)
    assert (timed.captured, timed.launches) == (None, None)
    assert 2000 <= timed.timer() < 200_000
    assert device.sets(10**12) == 1
    assert device.memory(lambda: (), None) == (None, None)
    assert device.host_us(time.sleep, []) is None
    assert device.recover()
    assert isinstance(device, CpuBench)


@pytest.mark.parametrize("size", [2**10, 2**20, 2**24, 2**27, 2**30, 2**34])
@pytest.mark.parametrize("memory", [2**34, 140 * 2**30])
def test_sets_exceed_every_cache_and_leave_memory(size, memory):
    count = bench.sets_of(size, memory, bench.FEWEST_SETS)
    assert 2 <= count <= MOST_SETS
    assert count == MOST_SETS or count * size > ROTATED_BYTES
    assert count <= max(2, memory / 16 / size, ROTATED_BYTES / size + 1)
    assert count >= min(bench.FEWEST_SETS, int(memory / 16 / size))
    assert bench.sets_of(size, memory, 2) == max(2, min(32, int(ROTATED_BYTES / size) + 1))


def test_other_devices_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="perf: --device must be cuda or cpu, got tpu"):
        bench_of("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda must have a GPU, got none"):
        bench_of("cuda")


def test_tritons_cache_stays_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "CudaBench", lambda fewest_sets: CpuBench())
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")  # noticed by monkeypatch, so that it is put back
    bench_of("cuda")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / ".triton" / "cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    bench_of("cuda")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


@pytest.mark.gpu
def test_a_gpu():
    device = bench_of("cuda")
    sets = [[torch.ones(2**20, device="cuda")] for _ in range(device.sets(2**22))]
    assert len(sets) == MOST_SETS
    timed = device.timed(torch.neg, sets)
    assert timed.captured
    assert timed.launches in (1, 2)  # the tests fill its result with NaN before
    assert 0.5 < timed.timer() < 1000

    def waits(value):
        return value.sum().item()

    assert device.timed(waits, sets).captured is False
    assert torch.randn(1, device="cuda").isfinite()  # what had begun a capture has ended it
    assert device.host_us(waits, sets[0]) is None
    assert 0.5 < device.host_us(torch.neg, sets[0]) < 1000
    peak, saved = device.memory(lambda: (sets[0][0].neg().neg(),), None)
    assert (peak, saved) == (2**23, None)
    assert device.recover()
