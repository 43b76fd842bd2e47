"""What a compiled kernel takes, read from the cubin that is embedded in TileLang's library.

A cubin is an ELF file of machine 190. Its section `.nv.info` holds registers and stack frame of
each kernel as tagged records, `.nv.info.<kernel>` the threads of a block, and the size of
`.nv.shared.<kernel>` is the static shared memory, from sm_90 on with the system's KiB. ptxas -v
prints the same numbers without that, but only to who compiles again.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = b"\x7fELF\x02\x01"
_CUDA = 190
_SYMBOLS = 2  # section type
_REGISTERS, _FRAME, _MAX_THREADS = 0x2F, 0x11, 0x05  # tags in .nv.info
_RESERVE, _RESERVED = ".nv.shared.reserved.0", 1024  # where a cubin has it, in each kernel's bytes
_SIZED = 4  # format of a record whose payload follows; the others end after four bytes


@dataclass(frozen=True)
class Usage:
    """Registers and bytes of stack of a thread, threads and bytes of static shared memory."""

    registers: int
    stack: int
    threads: int
    static_smem: int


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    link: int
    size: int
    data: bytes


def usage(binary: bytes) -> dict[str, Usage]:
    """Every kernel of every cubin in a file, by name.

    Args:
        binary: a cubin, or a library that cubins are embedded in.
    """
    found: dict[str, Usage] = {}
    start = binary.find(_MAGIC)
    while start >= 0:
        if struct.unpack_from("<H", binary, start + 18)[0] == _CUDA:
            found |= _of_cubin(memoryview(binary)[start:])
        start = binary.find(_MAGIC, start + 1)
    return found


def _of_cubin(elf: memoryview) -> dict[str, Usage]:
    sections = _sections(elf)
    by_name = {section.name: section for section in sections}
    symbols = next(section for section in sections if section.kind == _SYMBOLS)
    names = sections[symbols.link].data

    def symbol(index: int) -> str:
        (offset,) = struct.unpack_from("<I", symbols.data, 24 * index)
        return _text(names, offset)

    taken: dict[int, dict[str, int]] = {_REGISTERS: {}, _FRAME: {}}
    for tag, payload in _records(by_name[".nv.info"].data):
        if tag in taken:
            index, value = struct.unpack("<II", payload)
            taken[tag][symbol(index)] = value
    found = {}
    for name, registers in taken[_REGISTERS].items():
        if (info := by_name.get(f".nv.info.{name}")) is None:
            continue  # a device function, not a kernel
        threads = next((p for tag, p in _records(info.data) if tag == _MAX_THREADS), None)
        x, y, z = struct.unpack("<III", threads) if threads else (0, 0, 0)
        shared = by_name.get(f".nv.shared.{name}")
        static = shared.size if shared else 0
        if _RESERVE in by_name:
            static = max(0, static - _RESERVED)
        found[name] = Usage(registers, taken[_FRAME].get(name, 0), x * y * z, static)
    return found


def _sections(elf: memoryview) -> list[_Section]:
    (offset,) = struct.unpack_from("<Q", elf, 40)
    entry, count, names_index = struct.unpack_from("<HHH", elf, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * entry) for i in range(count)]
    names = bytes(elf[heads[names_index][4] :][: heads[names_index][5]])
    return [
        _Section(_text(names, name), kind, link, size, bytes(elf[start : start + size]))
        for name, kind, _, _, start, size, link, *_ in heads
    ]


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        form, tag, size = struct.unpack_from("<BBH", data, at)
        size = size if form == _SIZED else 0
        yield tag, data[at + 4 : at + 4 + size]
        at += 4 + size


def _text(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()
