"""What compiled kernels take, read from the cubins that are embedded in TileLang's library.

A cubin is an ELF file. Its section `.nv.info` holds registers and stack frame of each kernel as
tagged records, `.nv.info.<kernel>` the threads of a block, and the size of `.nv.shared.<kernel>` is
the static shared memory, from sm_90 on with the system's KiB. ptxas -v prints the same numbers, but
only while it compiles.
"""

import io
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from ._extras import require

_MAGIC = b"\x7fELF\x02\x01"
_REGISTERS, _FRAME, _MAX_THREADS = 0x2F, 0x11, 0x05  # tags in .nv.info
_RESERVE, _RESERVED = ".nv.shared.reserved.0", 1024  # where a cubin has it, in each kernel's bytes
_SIZED = 4  # format of a record whose payload follows; the others end after four bytes


class Usage(NamedTuple):
    """Registers and bytes of stack of a thread, threads and bytes of static shared memory."""

    registers: int
    stack: int
    threads: int
    static_smem: int


def usage(binary: bytes) -> dict[str, Usage]:
    """Every kernel by name, of a cubin or of a library that cubins are embedded in."""
    elf_file = require("elftools.elf.elffile", "autotune").ELFFile
    found: dict[str, Usage] = {}
    start = binary.find(_MAGIC)
    while start >= 0:
        elf = elf_file(io.BytesIO(binary[start:]))
        if elf["e_machine"] == "EM_CUDA":
            found |= _of_cubin(elf)
        start = binary.find(_MAGIC, start + 1)
    return found


def _of_cubin(elf: Any) -> dict[str, Usage]:
    sections = {section.name: section for section in elf.iter_sections()}
    symbols = sections[".symtab"]
    taken: dict[int, dict[str, int]] = {_REGISTERS: {}, _FRAME: {}}
    for tag, payload in _records(sections[".nv.info"].data()):
        if tag in taken:
            index, value = struct.unpack("<II", payload)
            taken[tag][symbols.get_symbol(index).name] = value
    found = {}
    for name, registers in taken[_REGISTERS].items():
        if (info := sections.get(f".nv.info.{name}")) is None:
            continue  # a device function, not a kernel
        payload = dict(_records(info.data())).get(_MAX_THREADS, bytes(12))
        x, y, z = struct.unpack("<III", payload)
        shared = sections.get(f".nv.shared.{name}")
        reserved = _RESERVED if _RESERVE in sections else 0
        static = max(0, shared.data_size - reserved) if shared else 0
        found[name] = Usage(registers, taken[_FRAME].get(name, 0), x * y * z, static)
    return found


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        form, tag, size = struct.unpack_from("<BBH", data, at)
        size = size if form == _SIZED else 0
        yield tag, data[at + 4 : at + 4 + size]
        at += 4 + size
