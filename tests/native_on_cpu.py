"""A plugin of pytest: autograd of the ops in C++ on CPU tensors as well, for every test."""

from mhc_tile.ops import _native

_native.load(on_cpu=True)
