"""Tables of an invented GPU, and what an op is given from them."""

from mhc_tile.autotune import lookup, table
from mhc_tile.autotune.configs import encode
from mhc_tile.autotune.device import Device
from mhc_tile.autotune.lookup import Tables, decide
from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.registry import Target

DEVICE = Device("NVIDIA Test 1", (9, 0), 132, 80 * 2**30, 50 * 10**6)
TARGET = Target("sm_90a", 132)


def problem(kernel: str, tokens: int = 8192, width: int = 2560) -> Problem:
    return Problem(kernel, 4, width, "bfloat16", tokens)


def entry(config, default: bool = False) -> table.Entry:
    return table.Entry(encode(config), default, 9.0, 10.0)


def key(kernel: str, width: int = 2560, regime: str = "many") -> table.Key:
    return table.Key(kernel, 4, width, "bfloat16", regime)


def tables_of(**families) -> Tables:
    """Tables of families given as kernel={tokens: entry}, or (key, entries) under any name."""
    found = {}
    for name, value in families.items():
        own, entries = value if isinstance(value, tuple) else (key(name), value)
        found[own] = table.Family(own, "", "0.1.15", "", "", dict(entries), f"{name}.json")
    return Tables(DEVICE, found)


def ask(tables: Tables, *asked, batch_invariant: bool = False) -> lookup.Decision:
    return decide(tables, problem(*asked), arch="sm_90a", batch_invariant=batch_invariant)


def family(
    kernel: str = "merge", width: int = 2560, order: str = "()", us: float = 9.0, at: int = 64
) -> table.Family:
    config = {"type": "merge.ForwardConfig", "threads": 160, "vectors": 2}
    entry = table.Entry(config, False, us, 10.0)
    found = table.Key(kernel, 4, width, "bfloat16", "many")
    return table.Family(found, order, "0.1.15", "580.1", "2026-11-24", {at: entry})
