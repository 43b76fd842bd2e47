"""An extension of griffe: docstrings as this package writes them, read as Markdown."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Names the section `Example:` as griffe does; the asterisk of `n*C` is no emphasis."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring; griffe calls it for every object."""
        if not obj.docstring:
            return
        section, lines = "", []
        for line in obj.docstring.value.splitlines():
            if title := re.fullmatch(r"(\w+):", line):
                section = title[1]
            code = section == "Example" or (not section and line.startswith("    "))
            lines.append("Examples:" if line == "Example:" else line if code else _escaped(line))
        obj.docstring.value = "\n".join(lines)


def _escaped(line: str) -> str:
    parts = line.split("`")  # every second one is code
    parts[::2] = [re.sub(r"(?<=\w)\*(?=\w)", r"\*", part) for part in parts[::2]]
    return "`".join(parts)
