"""Examples run, public functions are documented, the README stays short."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import mhc_tile
from mhc_tile import nn, ops
from test_layout import modules

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(n for n, p in modules().items() if ">>> " in p.read_text()))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    names = {key: getattr(mhc_tile, key) for key in mhc_tile.__all__}
    results = doctest.testmod(module, extraglobs={**names, "torch": torch, **vars(module)})
    assert results.attempted > results.failed == 0


@pytest.mark.parametrize(
    "function", [f for name in ops.__all__ if inspect.isfunction(f := getattr(ops, name))]
)
def test_public_functions_say_what_they_take_return_and_raise(function):
    text = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in text, f"{function.__name__} has no {section}"
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^    {parameter}: ", text, re.M), f"{parameter} is not documented"


@pytest.mark.parametrize("module", [getattr(nn, name) for name in nn.__all__])
def test_public_modules_have_examples(module):
    assert "Example:" in inspect.getdoc(module)


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        torch.manual_seed(0)
        exec(compile(block, "README.md", "exec"), {})


def test_readme_is_short_and_starts_with_an_example():
    lines = README.splitlines()
    assert len(lines) <= 90
    assert any(line.startswith("```python") for line in lines[:30])
    for command in ("make demo", "make test"):
        assert command in README


def test_readme_links_point_at_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
