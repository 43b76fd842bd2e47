"""What the steps of `mhc-tile perf overhead` are made of."""

import re
from collections.abc import Iterable, Sequence

from .breakdown import ATTENTION, GAPS, LAYERS, PRODUCTS
from .records import Row, overhead, plain_of

# Parts in the order of tables and figures, with their colours: what the layers do is grey; of an
# op the forward is dark and the backward light.
PARTS = {
    PRODUCTS: "#7A7A7A", ATTENTION: "#A3A3A3", LAYERS: "#CACACA", GAPS: "#EEEEEE",
    "merge and pre, forward": "#332288",
    "pre, forward": "#0072B2", "pre, backward": "#56B4E9",
    "merge, forward": "#D55E00", "merge, backward": "#F0A35E",
    "mapping, forward": "#00694C", "mapping, backward": "#4DC3A0",
    "pre_apply, forward": "#8E3A6B", "pre_apply, backward": "#D99CC0",
    "sinkhorn, forward": "#8A7F00", "sinkhorn, backward": "#F0E442",
}  # fmt: skip


def in_order(names: Iterable[str]) -> list[str]:
    """Names of parts in the order of `PARTS`, each once; other names come last.

    Example:
        >>> in_order(["merge, backward", "copies", "merge, forward", "attention"])
        ['attention', 'merge, forward', 'merge, backward', 'copies']
    """
    order = list(PARTS)
    return sorted(
        dict.fromkeys(names), key=lambda name: order.index(name) if name in PARTS else len(order)
    )


def more_than_plain(rows: Sequence[Row]) -> list[tuple[Row, dict[str, float], float]]:
    """What each other step of a case has more than the one with plain residuals.

    Returns:
        For every other row with parts: the row, the difference in microseconds by part, and the
        difference as timed. Empty if the plain step has no parts.
    """
    spent = [row for row in rows if row.parts and row.us]
    plain = plain_of(rows)  # what 100% is, even if another plain step has parts
    if plain is None or plain not in spent:
        return []
    found = []
    for row in spent:
        if row is not plain:
            names = dict.fromkeys((*plain.parts, *row.parts))
            more = {n: row.parts.get(n, 0.0) - plain.parts.get(n, 0.0) for n in names}
            found.append((row, more, (overhead(row, spent) or 0.0) * (plain.us or 0.0)))
    return found


def in_words(case: str) -> str:
    """The key of a step's case in words; a key of another form stays as it is.

    Example:
        >>> in_words("paper-27b/step/B2xS4096/L4")
        '4 layers of paper-27b, 2 x 4096 tokens,'
    """
    found = re.fullmatch(r"([^/]+)/([^/]+)/B(\d+)xS(\d+)(?:/L(\d+))?", case)
    if not found:
        return case
    model, step, batch, sequence, layers = found.groups()
    of = f"{layers} layer{'s' * (layers != '1')} of {model}" if layers else model
    return f"{of}, {batch} x {sequence} tokens," + " with AdamW," * step.endswith("adamw")
