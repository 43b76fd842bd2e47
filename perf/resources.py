"""What every kernel takes of a GPU, read without one, against the record in perf/static/.

    python -m mhc_tile.perf.resources [--arch sm_90a] [--write]

Compiles every program with its default configuration (n = 4, C = 2560, bf16, many tokens and few)
and reads registers, spills, stack and shared memory from the compiler. A spill, a kernel that could
not be launched, or growth against the record is an error; --write makes the record anew.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mhc_tile.kernels import _shipped, _static

RECORDS = Path(__file__).parent / "static"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a kernel, then what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=_static.ARCHITECTURES, help="this one only")
    parser.add_argument("--write", action="store_true", help="make the record anew")
    args = parser.parse_args(argv)
    if why := _static.available():
        parser.error(why)
    wrong = []
    for arch in [args.arch] if args.arch else _static.ARCHITECTURES:
        taken = _shipped.record(arch)
        for kernel, values in taken.items():
            shared = values["dynamic_smem"] + values["static_smem"]
            sys.stdout.write(
                f"{arch:8} {kernel:44} {values['registers']:4} registers {shared:7} bytes shared "
                f"{values['threads']:4} threads\n"
            )
        found = _shipped.faults(arch, taken)
        path = RECORDS / f"{arch}.json"
        if args.write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(taken, indent=1) + "\n")
        elif path.is_file():
            found += _static.regressions(json.loads(path.read_text()), taken)
        else:
            found.append(f"{path} must exist, got nothing; --write makes it")
        wrong += [f"{arch}: {fault}" for fault in found]
    for fault in wrong:
        sys.stderr.write(f"{fault}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
