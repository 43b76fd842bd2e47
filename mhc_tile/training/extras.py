"""Third-party packages of the extra `mhc-tile[train]`, imported where they are used."""

import functools

from mhc_tile.autotune import _extras

require = functools.partial(_extras.require, extra="train")
