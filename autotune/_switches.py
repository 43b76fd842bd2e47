"""Switches in the environment: MHC_TILE_<name>=1, and what else people write for yes and no."""

import os

YES = ("1", "true", "yes", "on")
NO = ("0", "false", "no", "off", "")


def switch(variable: str, *, unset: bool = False) -> bool:
    """Whether an environment variable switches something on.

    ValueError if it says neither yes nor no: a guess would run something else than was meant.
    """
    given = os.environ.get(variable, YES[0] if unset else "")
    word = given.strip().lower()
    if word not in (*YES, *NO):
        raise ValueError(
            f"{variable} must be one of {', '.join(YES)} or one of {', '.join(NO[:-1])}, empty or "
            f"unset, got {given!r}"
        )
    return word in YES
