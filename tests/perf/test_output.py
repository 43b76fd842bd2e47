"""Where results go: a run that has not ended takes nobody's place."""

import pytest

from mhc_tile.perf import output, records
from results import record, row

ROW = row()


def keep(path, where, *rows):
    parts = [{one.contender: one} for one in rows]
    return output.keep("run", {"gpu": None, **where}, parts, path)


@pytest.mark.parametrize("before", ["whole", "other"])
def test_what_is_whole_stays_until_the_run_has_ended(tmp_path, capsys, before):
    path, partial = tmp_path / "run.json", tmp_path / "run.partial.json"
    if before == "whole":
        records.write(record(row(80)), path)
    else:
        path.write_text("somebody's notes")
    old = path.read_bytes()
    kept = keep(path, {"cases_left": 2}, ROW)
    assert path.read_bytes() == old
    assert records.read(partial).rows == [ROW]
    output.say_unfinished(kept, path)
    assert capsys.readouterr().err == f"\n2 cases left; what was measured is in {partial}\n"
    kept = keep(path, {}, ROW, row(case="merge/forward/64x7168/n4/bfloat16"))
    assert len(records.read(path).rows) == 2
    assert not partial.exists()
    output.say_unfinished(kept, path)
    assert capsys.readouterr().err == ""


def test_a_run_that_did_not_end_is_replaced(tmp_path, capsys):
    path = tmp_path / "run.json"
    keep(path, {"cases_left": 2}, ROW)
    kept = keep(path, {"cases_left": 1}, row(85))
    assert records.read(path).rows == [row(85)]
    output.say_unfinished(kept, path)
    assert capsys.readouterr().err == f"\n1 case left; what was measured is in {path}\n"
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_pictures_that_there_are_none_of_are_said(tmp_path, capsys):
    output.save({}, tmp_path / "figures")
    assert "no pictures: the result has too few numbers for any" in capsys.readouterr().out
