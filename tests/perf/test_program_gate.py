"""The static gate: what shipped programs take, and when it believes the record."""

import dataclasses
import json
import warnings

import pytest

from mhc_tile.kernels.common import static as _static

if reason := _static.available():
    pytest.skip(reason, allow_module_level=True)

import emulator_programs as emulated
from mhc_tile.kernels.common.architectures import CHECKED
from mhc_tile.perf import program_gate as _gate
from mhc_tile.perf.program_gate import Program, Record


@pytest.mark.parametrize("arch", CHECKED)
def test_shipped_programs_neither_spill_nor_grow(arch):
    record = Record.read(_gate.RECORDS / f"{arch}.json")
    now = _gate.named(_gate.take(program, record) for program in _gate.programs(arch))
    assert _gate.faults(arch, now) == []
    assert _gate.differences(record, now) == []
    if names := _gate.unrecorded(record, now):
        warnings.warn(_gate.reminder(arch, names), stacklevel=1)


PROGRAM = Program("", "sm_80", emulated.mirror, (256,), {})


@pytest.fixture
def record():
    return _gate.named([_gate.take(PROGRAM, Record())])


@pytest.fixture
def compilations(monkeypatch):
    """The sources that went to nvcc."""
    compiled, sources = _static._compile, []

    def note(source, *others):
        sources.append(source)
        return compiled(source, *others)

    monkeypatch.setattr(_static, "_compile", note)
    monkeypatch.delenv("MHC_TILE_STATIC_CACHE", raising=False)
    return sources


def edited(record: Record, **values) -> Record:
    """With other values of every kernel."""
    return Record(record.nvcc, {name: {**old, **values} for name, old in record.kernels.items()})


def test_a_recorded_program_is_neither_lowered_nor_compiled(record, compilations, monkeypatch):
    monkeypatch.setattr(_gate.lowering, "lower", None)
    assert _gate.named([_gate.take(PROGRAM, record)]) == record
    assert compilations == []


def test_a_program_of_a_recorded_source_is_not_compiled(record, compilations):
    old = edited(record, program="of another wording", registers=99)
    now = _gate.named([_gate.take(PROGRAM, old)])
    assert now == edited(record, registers=99)
    assert compilations == []
    assert _gate.unrecorded(old, now) == list(record.kernels)


@pytest.mark.parametrize("change", ["program", "nvcc", "fresh"])
def test_what_is_new_is_compiled(record, compilations, change):
    old = edited(record, registers=99)
    if change == "program":
        old = edited(old, program="", source="")
    if change == "nvcc":
        old = dataclasses.replace(old, nvcc="12.9.0")
    now = _gate.named([_gate.take(PROGRAM, old, fresh=change == "fresh")])
    assert now == record
    assert len(compilations) == 1


def test_one_architecture_is_compiled_always(compilations):
    program = dataclasses.replace(PROGRAM, arch=_gate.COMPILED)
    record = _gate.named([_gate.take(program, Record())])
    assert _gate.named([_gate.take(program, record)]) == record
    assert len(compilations) == 2


def test_growth_names_the_command_that_records_it(record):
    old = edited(record, program="", source="", registers=1)
    (grown,) = _gate.differences(old, record)
    assert "program_kernel: registers 1 -> " in grown
    assert grown.endswith("mhc-tile perf gate --static --write")
    less = edited(old, registers=99)
    assert _gate.differences(less, record) == []
    assert _gate.unrecorded(less, record) == list(record.kernels)


@pytest.mark.parametrize(("key", "value"), [("registers", 99), ("threads", 999), ("source", "")])
def test_an_edited_record_is_found_out(record, key, value):
    (found,) = _gate.differences(edited(record, **{key: value}), record)
    assert f"got another {key}; " in found
    assert found.endswith("--write --fresh")
    other_compiler = dataclasses.replace(edited(record, **{key: value}), nvcc="12.9.0")
    assert _gate.differences(other_compiler, record) == []
    assert _gate.unrecorded(other_compiler, record) == list(record.kernels)


def test_recorded_numbers_are_judged(record):
    assert _gate.faults("sm_80", record) == []
    (fault,) = _gate.faults("sm_80", edited(record, spill_stores=8))
    assert fault == "program_kernel: spills 8 bytes to local memory"


def test_kernels_are_named_by_group_and_number(record):
    wider = dataclasses.replace(PROGRAM, constants=(128,))
    few = dataclasses.replace(PROGRAM, group="few tokens: ", constants=(64,))
    taken = [_gate.take(program, record) for program in (PROGRAM, wider, PROGRAM, few)]
    now = _gate.named(taken)
    names = ["program_kernel", "program_kernel 2", "few tokens: program_kernel"]
    assert list(now.kernels) == names
    assert [_gate.take(program, now) for program in (PROGRAM, wider, PROGRAM, few)] == taken
    assert _gate.unrecorded(now, record) == sorted(names[1:])


def test_a_record_is_read_as_it_was_written(record, tmp_path):
    path = tmp_path / "static" / "sm_80.json"
    with pytest.raises(ValueError, match=r"must hold nvcc and kernels, got .*No such file.*write"):
        Record.read(path)
    path.parent.mkdir()
    record.write(path)
    assert Record.read(path) == record
    assert [file.name for file in path.parent.iterdir()] == ["sm_80.json"]
    kernels = ('{"program_kernel": {}}', '{"program_kernel": 1}', "[]")
    others = [f'{{"nvcc": "13.0.88", "kernels": {value}}}' for value in kernels]
    for other in (json.dumps(record.kernels), "<<<<<<< ours", "[]", *others):
        path.write_text(other)
        with pytest.raises(ValueError, match="must hold nvcc and kernels"):
            Record.read(path)
