"""The documents: links and paths exist, lines wrap, blocks of code run, tables are complete."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from mhc_tile import models, nn, ops, training
from test_layout import ROOT

DOCUMENTS = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if (ROOT / name).exists()
)
FOLDERS = "autotune|docs|kernels|mhc_tile|perf|tests"
# What a block of code must not be, to be run here: it needs a GPU or a checkpoint.
NOT_RUN = "no-run"


def prose(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that are neither code nor tables."""
    found, code = [], False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.startswith("|"):
            found.append((number, line))
    return found


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_point_at_files_and_headings(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_that_are_named_exist(path):
    if path.parent.name == "lab":  # an entry speaks of its day
        return
    for named in re.findall(rf"`((?:{FOLDERS})/[\w./<>-]*)`", path.read_text()):
        pattern = re.sub(r"<\w+>", "*", named.rstrip("/"))
        assert list(ROOT.glob(pattern)), named


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_prose_wraps(path):
    if path.name == "CHANGELOG.md":  # an entry is one line
        return
    long = [number for number, line in prose(path) if len(line) > 100]
    assert not long, f"lines {long} have more than 100 characters"


def test_pages_are_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in config, page


@pytest.mark.parametrize(
    "path",
    [page for page in DOCUMENTS if "```python\n" in page.read_text()],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_code_runs_and_prints_what_stands_behind_it(path):
    blocks = re.findall(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", path.read_text(), re.S)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, path.name, "exec"), names)
        assert printed.getvalue() == expected


@pytest.mark.parametrize("module", [ops, nn, models, training])
def test_the_reference_has_every_public_name(module):
    page = (ROOT / "docs" / "reference" / f"{module.__name__.partition('.')[2]}.md").read_text()
    names = set(re.findall(r"^::: [\w.]+\.(\w+)$", page, re.M))
    assert names == set(module.__all__) - {"RESIDUALS"}


@pytest.mark.parametrize("path", sorted((ROOT / "perf" / "baselines").glob("*.json")), ids=str)
def test_every_baseline_becomes_a_table(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import baselines

    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"\n{{{{ baseline {path.stem} }}}}\n" in page
    table = baselines.on_page_markdown(page)
    assert "{{" not in table
    for row in json.loads(path.read_text())["rows"]:
        assert f"| `{row['op']}` | {row['mode']} |" in table
        assert f" | {row['us']:.1f} | " in table


def test_every_switch_is_in_the_table_of_the_environment():
    table = (ROOT / "docs" / "environment.md").read_text()
    listed = set(re.findall(r"`(MHC_TILE_\w+)`", table))
    sources = [p for f in FOLDERS.split("|") for p in (ROOT / f).rglob("*.py")]
    used = {n for p in sources for n in re.findall(r"\bMHC_TILE_[A-Z_]+\b", p.read_text())}
    used -= {"MHC_TILE_NO_SUCH_SWITCH"}  # of a doctest
    assert listed == used
    for name in re.findall(
        r"environ(?:\.get|\.setdefault)?[\[(]\"(\w+)\"",
        "".join(p.read_text() for p in sources if p.parts[-2] != "tests"),
    ):
        assert f"`{name}`" in table, name


def test_lines_of_the_changelog_are_short():
    for line in (ROOT / "CHANGELOG.md").read_text().splitlines():
        assert not line.startswith("-") or len(line.split()) <= 26, line  # and the dash
