"""Tokens from text: a split by path, batches by (seed, step), clear refusals."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from mhc_tile.training import Corpus, load_corpus
from mhc_tile.training.corpus import HELD_OUT, is_held_out


@pytest.fixture
def folder(tmp_path):
    for index in range(60):
        path = tmp_path / "text" / f"part{index % 3}" / f"{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {index}: " + "words " * 40)
    return tmp_path / "text"


def documents(tokens: torch.Tensor) -> set[bytes]:
    return set(bytes(tokens.tolist()).split(b"\0"))


def test_every_file_is_in_one_part_and_the_path_alone_decides(folder):
    corpus = load_corpus(folder)
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert not train & validation
    assert len(train) + len(validation) == 60
    expected = {
        path.read_bytes()
        for path in folder.rglob("*.txt")
        if is_held_out(path.relative_to(folder).as_posix())
    }
    assert validation == expected
    new = folder / "another.txt"
    new.write_text("x" * 50)
    again = load_corpus(folder)
    assert documents(again.validation) - {new.read_bytes()} == validation
    assert again.fingerprint != corpus.fingerprint


def test_about_one_path_in_twenty_is_held_out():
    held_out = sum(is_held_out(f"folder/file{index}.py") for index in range(4000))
    assert 0.8 * 4000 / HELD_OUT < held_out < 1.2 * 4000 / HELD_OUT


def test_a_small_folder_still_holds_out_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 30)
    (tmp_path / "b.txt").write_text("b" * 30)
    corpus = load_corpus(tmp_path)
    assert len(corpus.train) == len(corpus.validation) == 30
    assert not documents(corpus.train) & documents(corpus.validation)


def test_the_end_of_a_single_file_is_held_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{index:4d}\n" for index in range(400)))
    corpus = load_corpus(path)
    assert bytes(corpus.train.tolist()) + bytes(corpus.validation.tolist()) == path.read_bytes()
    assert len(corpus.validation) == 2000 // HELD_OUT


def test_binary_hidden_and_empty_files_of_a_folder_are_left_out(folder):
    before = load_corpus(folder)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text(" \n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    assert load_corpus(folder).fingerprint == before.fingerprint


@pytest.mark.parametrize("record", ["metrics.jsonl", "demo.json"])
def test_runs_below_the_folder_are_left_out(folder, record):
    before = load_corpus(folder)
    run = folder / "runs" / "first"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "note.txt").write_text("of the run")
    (run / record).write_text("{}")
    assert load_corpus(folder).fingerprint == before.fingerprint
    (folder / "runs" / "note.txt").write_text("of no run")
    assert load_corpus(folder).fingerprint != before.fingerprint


def test_files_are_counted(folder, tmp_path):
    before = load_corpus(folder)
    assert (before.files, before.left_out) == (60, 0)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_text("hidden")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("{}")
    after = load_corpus(folder)
    assert (after.files, after.left_out) == (60, 4)
    assert after.fingerprint == before.fingerprint
    only = load_corpus(folder / "part0" / "0.txt")
    assert (only.files, only.left_out) == (1, 0)


def test_a_file_that_goes_while_the_folder_is_read_is_left_out(folder, monkeypatch):
    (folder / "editor.tmp").write_text("for a moment")
    read = Path.read_bytes

    def vanish(path):
        if path.name == "editor.tmp":
            path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", vanish)
    assert load_corpus(folder).files == 60


def test_the_fingerprint_is_of_the_bytes():
    train, validation = (torch.arange(start, 200, dtype=torch.uint8) for start in (0, 100))
    corpus = Corpus("bytes", train, validation)
    expected = hashlib.sha256(bytes(range(200)) + b"|" + bytes(range(100, 200))).hexdigest()
    assert corpus.fingerprint == expected
    doubled = train.repeat_interleave(2)
    assert Corpus("strided", doubled[::2], validation).fingerprint == expected
    assert Corpus("empty", train, validation[:0]).fingerprint != expected


def test_a_folder_that_is_asked_for_by_name_may_be_a_run(folder):
    before = load_corpus(folder)
    (folder / "metrics.jsonl").write_text("{}")
    assert len(load_corpus(folder).train) + len(load_corpus(folder).validation) > len(
        before.train
    ) + len(before.validation)


def test_the_default_is_the_standard_library():
    corpus = load_corpus()
    assert len(corpus.train) > 5_000_000
    assert 0.01 < len(corpus.validation) / len(corpus.train) < 0.12
    assert b"import " in bytes(corpus.validation[:50_000].tolist())


def test_a_batch_is_a_function_of_seed_and_step(folder):
    corpus = load_corpus(folder)
    batch = corpus.batch(4, 16, seed=3, step=7)
    assert batch.shape == (4, 16)
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, corpus.batch(4, 16, seed=3, step=7))
    for seed, step in ((3, 8), (4, 7), (4, 6)):
        assert not torch.equal(batch, corpus.batch(4, 16, seed=seed, step=step))
    text = bytes(corpus.train.tolist())
    assert all(bytes(window) in text for window in batch.tolist())


def test_validation_windows_are_spread_over_all_of_it(folder):
    corpus = load_corpus(folder)
    batches = corpus.validation_batches(4, 16, 3)
    assert [batch.shape for batch in batches] == [(4, 16)] * 3
    assert torch.equal(batches[0][0], corpus.validation[:16])
    assert torch.equal(batches[-1][-1], corpus.validation[-16:])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="corpus: path must be a file or folder that exists"):
        load_corpus(tmp_path / "missing")
    with pytest.raises(ValueError, match="at least 2 text files that are not empty, got 0 among 0"):
        load_corpus(tmp_path)
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="got 0 among 2 files"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="must be UTF-8 text, got the binary file"):
        load_corpus(tmp_path / "a.bin")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    with pytest.raises(ValueError, match="must be UTF-8 text, got bytes that are not UTF-8 in"):
        load_corpus(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="must hold at least 20 bytes of text, got 0"):
        load_corpus(tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("short text " * 4)
    with pytest.raises(ValueError, match="train tokens must be at least 64 for one window, got 42"):
        load_corpus(tmp_path / "short.txt").batch(1, 64, seed=0, step=1)
    with pytest.raises(ValueError, match=r"validation tokens must be at least 8 .* got 2"):
        load_corpus(tmp_path / "short.txt").validation_batches(1, 8, 1)


def test_batches_ignore_the_default_device_and_dtype(folder):
    def batches():
        corpus = load_corpus(folder)
        return [corpus.batch(2, 9, seed=0, step=3), *corpus.validation_batches(2, 5, 2)]

    expected = batches()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = batches()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    def scandir(path):
        if str(path).endswith("part1"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"corpus: every folder must be readable, got .*part1"):
        load_corpus(folder)
