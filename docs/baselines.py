"""A hook of mkdocs: writes the tables of measurements into the pages, from perf/baselines/.

A line `{{ baseline <gpu> }}` of a page becomes the table of perf/baselines/<gpu>.json.
"""

import json
import re
from pathlib import Path
from typing import Any

BASELINES = Path(__file__).resolve().parent.parent / "perf" / "baselines"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables; mkdocs calls it."""
    return re.sub(r"^\{\{ baseline (\w+) \}\}$", lambda m: baseline(m[1]), markdown, flags=re.M)


def baseline(gpu: str) -> str:
    """What was measured, and a table: op, mode, shape, time, floor and percent of the floor."""
    result = json.loads((BASELINES / f"{gpu}.json").read_text())
    where, copy = result["environment"], result["environment"]["copy_bytes_per_s"]
    command = " ".join(where["command"]).partition(" --out ")[0]
    lines = [
        f"{where['gpu']}, {where['date'][:10]}, torch {where['torch']}, TileLang "
        f"{where['packages']['tilelang']}, commit {where['commit']}. A copy moves "
        f"{copy / 1e12:.2f} TB/s. Command: `{command}`.",
        "",
        "| op | mode | T x C | us | floor, us | percent of the floor | launches |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in sorted(result["rows"], key=_order):
        floor = row["bytes"] / copy * 1e6
        shape = f"{row['tokens']} x {row['hidden_size']}" if row["hidden_size"] else row["tokens"]
        lines.append(
            f"| `{row['op']}` | {row['mode']} | {shape} | {row['us']:.1f} | {floor:.1f} "
            f"| {100 * floor / row['us']:.0f} | {row['launches']} |"
        )
    return "\n".join(lines)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["mode"], row["hidden_size"] or 0, row["tokens"]
