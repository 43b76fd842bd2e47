"""Byte-level tokens from any text file or folder, with held-out data for validation.

A token is a byte of UTF-8 text, so the vocabulary is 256. Documents are joined by one zero byte,
which no text contains. The batch of a step is a pure function of (seed, step): nothing about the
data has to be stored to resume a run exactly.
"""

import ctypes
import hashlib
import os
import sysconfig
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .folder import full_path

HELD_OUT = 20  # one file in HELD_OUT, or the last 1 / HELD_OUT of a single file, is held out
_OF_A_RUN = {"metrics.jsonl", "demo.json"}
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens.

    Args:
        name: where they come from.
        train: [tokens], uint8.
        validation: [tokens], uint8.
        files: number of files that were read.
        left_out: number of files that do not count.
    """

    name: str
    train: Tensor
    validation: Tensor
    files: int = 1
    left_out: int = 0
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        """Hash the tokens, so that a resumed run can tell whether they are the same."""
        digest = hashlib.sha256()
        _hash(self.train, digest)
        digest.update(b"|")
        _hash(self.validation, digest)
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def describe(self) -> dict[str, str | int]:
        """What was read, for the records of a run."""
        sizes = {"train": len(self.train), "validation": len(self.validation)}
        return {"name": self.name, "files": self.files, "left_out": self.left_out, **sizes}

    def require(self, length: int) -> None:
        """Refuse windows of more tokens than there are, with a ValueError."""
        for part, tokens in (("train", self.train), ("validation", self.validation)):
            if len(tokens) < length:
                raise ValueError(
                    f"corpus: {part} tokens must be at least {length} for one window, "
                    f"got {len(tokens)} from {self.name}"
                )

    def batch(self, batch_size: int, length: int, *, seed: int, step: int) -> Tensor:
        """Random windows of the training tokens, [batch_size, length], uint8.

        They are the same for the same seed and step. Errors as of `require`.
        """
        self.require(length)
        # Hashed, because a CPU generator takes 32 bits of its seed: seed + step would overlap.
        key = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        last = len(self.train) - length + 1
        starts = torch.randint(last, (batch_size, 1), generator=generator, device="cpu")
        return self.train[starts + torch.arange(length, device="cpu")]

    def validation_batches(self, batch_size: int, length: int, batches: int) -> list[Tensor]:
        """Windows at even distances in the validation tokens, always the same ones.

        They are `batches` tensors [batch_size, length], uint8. Errors as of `require`.
        """
        self.require(length)
        last = len(self.validation) - length
        starts = torch.linspace(0, last, batches * batch_size, dtype=torch.float64, device="cpu")
        windows = self.validation[starts.long().unsqueeze(1) + torch.arange(length, device="cpu")]
        return list(windows.split(batch_size))


def is_held_out(relative_path: str) -> bool:
    """Whether a file is held out, by the hash of its POSIX path inside the folder alone."""
    digest = hashlib.blake2b(relative_path.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") % HELD_OUT == 0


def load_corpus(path: str | Path | None = None) -> Corpus:
    """Read a text file, a folder of text files, or the sources of Python's standard library.

    Of a folder, every text file counts, in the order of the paths, except hidden files and every
    directory below it with a run's `metrics.jsonl` or `demo.json`. One file in twenty is held out,
    by the hash of its path; the last one, where that would be none or all. Of a single file, the
    last twentieth is held out. Text is UTF-8 without zero bytes.

    Args:
        path: a file or folder, `~` for the home directory; None for the standard library's `.py`
            files (tests left out).

    Raises:
        ValueError: Nothing is there, it holds no text, or a folder of it cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = list(root.rglob("*.py"))
        files = [file for file in found if not _SKIPPED & set(file.relative_to(root).parts)]
        if not files:
            raise ValueError(
                f"corpus: path must be given where Python has no sources, got none in {root}"
            )
        return _from_folder(root, files, "the Python standard library")
    root = full_path(path, "corpus: path")
    if root.is_file():
        return _from_file(root)
    if not root.is_dir():
        raise ValueError(f"corpus: path must be a file or folder that exists, got {str(path)!r}")
    found = _files_below(root)
    hidden = {file for file in found if any(p[0] == "." for p in file.relative_to(root).parts)}
    # Runs are recorded under the working directory. Where that is the corpus, it must not grow.
    runs = {file.parent for file in found if file.name in _OF_A_RUN} - {root}
    files = [file for file in found if file not in hidden and runs.isdisjoint(file.parents)]
    return _from_folder(root, files, str(root), len(found) - len(files))


def _files_below(root: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(
            f"corpus: every folder must be readable, got {error.filename!r} ({error.strerror})"
        ) from error

    walked = os.walk(root, onerror=refuse)
    found = (Path(folder) / name for folder, _, names in walked for name in names)
    return [file for file in found if file.is_file()]


def _hash(tokens: Tensor, digest: Any) -> None:
    """Hash a tensor's bytes in place, without NumPy."""
    tokens = tokens.cpu().contiguous()
    if tokens.numel():
        size = tokens.numel() * tokens.element_size()
        digest.update((ctypes.c_char * size).from_address(tokens.data_ptr()))


def _is_text(content: bytes) -> bool:
    with suppress(UnicodeDecodeError):
        return "\0" not in content.decode("utf-8")
    return False


def _tokens(documents: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\0".join(documents)), dtype=torch.uint8)


def _from_file(path: Path) -> Corpus:
    content = path.read_bytes()
    if not _is_text(content):
        kind = "the binary file" if b"\0" in content else "bytes that are not UTF-8 in"
        raise ValueError(f"corpus: path must be UTF-8 text, got {kind} {str(path)!r}")
    cut = len(content) - len(content) // HELD_OUT
    if cut == len(content):
        raise ValueError(
            f"corpus: path must hold at least {HELD_OUT} bytes of text, "
            f"got {len(content)} in {str(path)!r}"
        )
    return Corpus(str(path), _tokens([content[:cut]]), _tokens([content[cut:]]))


def _from_folder(root: Path, files: list[Path], name: str, left_out: int = 0) -> Corpus:
    contents = {}
    for file in sorted(files):
        with suppress(FileNotFoundError):  # it has gone since the folder was listed
            contents[file.relative_to(root).as_posix()] = file.read_bytes()
    texts = {path: text for path, text in contents.items() if text.strip() and _is_text(text)}
    if len(texts) < 2:
        raise ValueError(
            f"corpus: path must hold at least 2 text files that are not empty, "
            f"got {len(texts)} among {len(files)} files in {str(root)!r}"
        )
    held_out = {path for path in texts if is_held_out(path)}
    if len(held_out) in (0, len(texts)):
        held_out = {max(texts)}
    train = [text for path, text in texts.items() if path not in held_out]
    validation = [texts[path] for path in sorted(held_out)]
    left_out += len(contents) - len(texts)
    return Corpus(name, _tokens(train), _tokens(validation), len(texts), left_out)
