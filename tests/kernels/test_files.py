"""Files that are replaced in one step."""

import os
import stat
from pathlib import Path

import pytest

from mhc_tile.kernels.common.files import replacing, write


def test_texts_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "file"
    for content, expected in (("é\n", "é\n".encode()), (b"\xff", b"\xff")):
        write(path, content)
        assert path.read_bytes() == expected
        assert os.listdir(tmp_path) == ["file"]


def test_the_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write(tmp_path / "file", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")}
    assert len(modes) == 1


@pytest.mark.parametrize("draft", [None, "step.partial"])
def test_an_error_leaves_the_old_file_alone(tmp_path, draft):
    path = tmp_path / "step"
    write(path, "old")

    def interrupted() -> None:
        with replacing(path, draft and tmp_path / draft) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["step"]
    assert path.read_text() == "old"


def test_a_draft_of_a_killed_process_is_used_again(tmp_path):
    draft = tmp_path / "step.partial"
    draft.write_text("a longer text of another process")
    with replacing(tmp_path / "step", draft) as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == ["step"]
    assert (tmp_path / "step").read_text() == "new"


def test_a_device_is_not_replaced():
    with pytest.raises(FileExistsError, match="/dev/null must be a file, got something else"):
        write(Path("/dev/null"), "")
