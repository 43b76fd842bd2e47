"""The page and the pictures of a result: what they say, and that nothing breaks them."""

import base64
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from mhc_tile import __main__
from mhc_tile.autotune import _extras
from mhc_tile.perf import compare, figures, records, report, slices, suite
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.breakdown import GAPS, KERNELS, LAYERS
from mhc_tile.perf.operations import OPERATIONS
from mhc_tile.perf.report import glossary
from mhc_tile.perf.slices import PLAIN
from mhc_tile.perf.steps import PARTS
from results import EAGER, PEER, TILE, full, overhead, record, row

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects text, and fails on tags that do not match and on anything from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        for name, value in attributes:
            assert not name.startswith("on")
            assert name not in ("src", "href") or value.startswith("data:image/svg+xml;base64,")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


@pytest.fixture(scope="module")
def result():
    return full()


@pytest.fixture(scope="module")
def page(result):
    text = report.page(result)
    return text, Page(text).text


def test_it_says_what_was_measured_where_and_how(page):
    _, text = page
    for part in (
        "mhc_tile: op times on NVIDIA H200",
        "commit 0123456789ab",
        "168 of 168 cases of mhc_tile correct and measured",
        "of the roofline from 4096 tokens on",
        "4.20 TB/s bandwidth of a copy",
        "the bytes that the op must read and write at least once",
        "driver 580.65.06",
        "tilelang 0.1.15",
        "liger-kernel not installed",
        "mhc-tile perf run",
        "p20 to p80",
    ):
        assert part in text, part
    assert "slower in none" in text


def test_faults_are_said_in_words_and_escaped(page):
    html, text = page
    assert f"{PEER} failed at merge/forward/64x7168/n4/bfloat16: <b>no & no</b>" in text
    assert f"{TILE} gave wrong results at merge/forward/4096x7168/n4/bfloat16: error 1e-1" in text
    assert "<b>no" not in html
    assert "†" in text  # no CUDA graph


def test_pictures_are_in_the_page(page, result):
    html, _ = page
    found = [base64.b64decode(data) for data in re.findall(r"svg\+xml;base64,([^']+)'", html)]
    assert len(found) == len(figures.draw(result)) == 3
    assert all(picture.startswith(b"<?xml") and b"</svg>" in picture for picture in found)


def test_numbers_of_a_row():
    ours = row(50.0, bytes=105_000_000, launches=2, error=2e-3, host_us=8.25, peak_bytes=3_000_000)
    slow = row(100.0, contender=PEER, bytes=105_000_000)
    text = Page(report.page(record(ours, slow))).text
    assert "mhc_tile 50.0 [49.5 to 50.5] 2100 50 1.00 2.0e-03 2 8.2 3.0" in text
    assert f"{PEER} 100.0 [99.0 to 101.0] 1050 25 2.00" in text
    assert "2.00x as fast as the best other package (geometric mean of 1 cases), more" in text
    assert "as fast as the reference" not in text


@pytest.mark.parametrize(
    ("us", "said"), [(49.5, "none"), (49.1, "none"), (49.01, "1"), (48.0, "1")]
)
def test_a_tie_is_not_slower(us, said):
    rows = row(50.0), row(us, contender=PEER), row(400.0, contender=EAGER)
    text = Page(report.page(record(*rows))).text
    assert f"best other package (geometric mean of 1 cases), more than 2% slower in {said}" in text
    assert "8.00x as fast as the reference in PyTorch (geometric mean of 1 cases)" in text


def test_the_best_other_is_correct():
    wrong = row(1.0, contender=TILE, status="wrong")
    rows = [row(50.0), row(90.0, contender=PEER), row(200.0, contender=EAGER), wrong]
    assert report.best_other(rows, reference=False).contender == PEER
    assert report.best_other(rows, reference=True).contender == EAGER
    assert report.best_other(rows[:1], reference=False) is None


@pytest.mark.parametrize(
    "result",
    [
        record(),
        record(row(None, status="failed", fault="no")),
        record(row(None)),
        record(row(1.0, p20=None, p80=None), copy_bytes_per_s=None, gpu=None, packages={}),
        records.Record("run", {}, [row(1.0, captured=None)]),
        record(row(1.0, contender=PEER)),
        record(kind="overhead"),
        record(row(5e6, bytes=1), row(0.02, case="merge/forward/1x8/n1/float32", bytes=10**9)),
    ],
)
def test_results_with_holes_have_a_page(result):
    Page(report.page(result))
    Page(report.page(result, compare.compare(result, result)))


def test_nothing_of_a_result_is_markup():
    nasty = "</td><script>alert(1)</script>'\"&"
    rows = [row(contender=nasty, details={nasty: nasty}), row(None, status="failed", fault=nasty)]
    environment = {nasty: nasty, "commit": nasty, "gpu": nasty, "command": [nasty]}
    result = record(*rows, **environment)
    Page(report.page(result, compare.compare(result, result)))


def test_steps_say_what_their_overhead_is_of():
    case = "3b/training/B4xS4096"
    text = Page(report.page(overhead(denominator={case: "4 layers, forward and backward"}))).text
    assert f"100% is {case}: 4 layers, forward and backward" in text
    assert "mhc_tile 50.6 [50.1 to 51.1] +6.6% 391 30.0 4e-02" in text
    said = "what mhc_tile adds to a step; 100% is 3b, 4 x 4096 tokens, with plain residuals"
    assert f"+6.6% {said}" in text
    assert "mHC, compiled ran out of memory at 3b/training/B8xS4096" in text
    assert "GB/s" not in text
    text = Page(report.page(overhead(denominator="one layer"))).text
    assert "100% is one layer" in text
    assert "100% is the step of the same model" in Page(report.page(overhead())).text
    steps = record(row(details={"overhead_percent": 25.0}), kind="overhead")
    assert "+25.0%" in Page(report.page(steps)).text
    steps = record(row(details={"overhead_percent": 25.0, "overhead_error": 0.72}), kind="overhead")
    text = Page(report.page(steps)).text
    assert text.count("+25.0% ± 0.7") == 2  # in the table, and as the number that matters most
    assert "behind ± its standard error" in text


def test_a_step_that_waits_for_the_host_says_so():
    def shown(idle_us):
        parts = {"merge, forward": 100.0 - idle_us, "no kernel": 30.0}
        return Page(report.page(record(row(us=100.0, parts=parts), kind="overhead"))).text

    said = "mhc_tile: the GPU waited for the host for 6% of the step; its kernels take 0.09 ms"
    assert said in shown(6.0)
    assert "what kernels cost" in shown(6.0)
    assert "what kernels cost" not in shown(4.0)


def test_what_steps_are_made_of():
    text = Page(report.page(overhead())).text
    assert "contender as timed matrix products attention optimizer other mHC mhc_tile" in text
    assert "mhc_tile +3.13 +3.10 mHC, eager +44.44 +44.00" in text
    assert "contender step matrix products attention optimizer other mHC" in text
    assert "mhc_tile 50.60 30.50 9.00 4.50 3.00 3.10" in text
    (axis,) = figures.added(overhead()).axes
    lines = [line.get_xdata()[0] for line in axis.lines[:-1]]  # the last one is at 0
    assert lines == pytest.approx([88.88, 6.262, 44.44, 3.131])  # as timed
    ends = [
        max(bar.get_x() + bar.get_width() for bar in axis.patches if round(bar.get_y()) == i)
        for i in range(4)
    ]
    assert ends == pytest.approx([88.0, 6.2, 44.0, 3.1])
    plain, ours, *_ = overhead().rows
    less = ours.replace(parts={**ours.parts, "other": plain.parts["other"] - 1e3})
    (axis,) = figures.added(record(plain, less, kind="overhead")).axes
    assert min(bar.get_x() + bar.get_width() for bar in axis.patches) == pytest.approx(-1.0)
    assert figures.added(record(ours, kind="overhead")) is None
    other = plain.replace(contender="residual (layers compiled)", us=plain.us * 1.1)
    failed = plain.replace(us=None, p20=None, p80=None, parts={}, status="failed")
    lost = record(failed, other, ours, kind="overhead")  # the others are not what 100% is
    assert figures.added(lost) is None
    assert "More than with plain" not in Page(report.page(lost)).text
    assert "Where the time goes" not in Page(report.page(record(row(), kind="overhead"))).text


def test_a_fault_of_many_cases_is_a_line():
    cases = [f"merge/forward/{tokens}x2560/n4/bfloat16" for tokens in (1, 2, 3)]
    rows = [row(None, case=c, contender=PEER, status="failed", fault="no") for c in cases]
    text = Page(report.page(record(row(), *rows))).text
    assert text.count("failed at") == 1
    assert f"{PEER} failed at {cases[0]} and 2 more: no" in text


def test_the_part_that_costs_most_stands_out():
    spent = {"merge, backward": 20e3, "merge, forward": 9e3, "attention": 5e3}
    plain = row(100e3, contender=PLAIN, parts={"attention": 50e3})
    html = report.page(record(plain, row(130e3, parts=spent), kind="overhead"))
    assert re.findall(r"<b class='most'>([^<]*)</b>", html) == ["+20.00"]
    text = Page(html).text
    assert "attention merge, forward merge, backward mhc_tile +30.00 -45.00 +9.00 +20.00" in text
    assert set(PARTS) == {*KERNELS, LAYERS, GAPS}


def test_contenders_and_ops_are_explained_where_they_occur():
    text = Page(report.page(record(row(), row(contender="reference (compiled, tf32)")))).text
    assert "widen a transformer's residual stream" in text
    assert "mhc_tile this library's kernels reference the definition of mHC in plain Py" in text
    assert 'in tf32, as after torch.set_float32_matmul_precision("high")' in text
    assert "h_res n x n weights that mix the streams" in text
    assert "merge the next streams" in text
    for absent in ("DeepSeek", "doubly stochastic", "layers under torch.compile", "op by op"):
        assert absent not in text
    names, words = [*slices.NAMES, *slices.ON_REQUEST, *suite.NAMES], report.words()
    found = glossary(record(*(row(contender=name) for name in names)))
    assert dict(found["Contenders"]).keys() == words.CONTENDERS.keys()
    assert dict(found["What is in brackets"]).keys() == {form.strip("()") for form in words.FORMS}
    assert set(words.OPS) == set(OPERATIONS)


def test_how_a_step_is_compiled_is_said():
    steps = [row(case="3b/step/8x8/n4/bfloat16", contender=n) for n in ("mhc_tile", PLAIN, TILE)]
    result = record(*steps, kind="overhead", packages={"tile-kernels": "1.0", "triton": None})
    found = glossary(result)
    ours, _, peer = (what for _, what in found["Contenders"])
    assert ours.endswith("in one torch.compile where no brackets say otherwise")
    assert peer.startswith("the package of that name, by DeepSeek, 1.0; the layers under torch")
    assert found["What is in brackets"] == [
        ("compiled", "all layers and connections in one torch.compile")
    ]
    assert "Ops" not in found


def test_a_run_that_did_not_end_says_so():
    assert "did not end, 3 cases are" in Page(report.page(record(row(), cases_left=3))).text
    assert "did not end" not in Page(report.page(record(row()))).text


def test_where_it_was_measured_reads_as_text():
    settings = {"MHC_TILE_TABLES": "off", "MHC_TILE_REFERENCE": None}
    where = {"settings": settings, "tables": ["a.json 01", "b.json 02"], "driver": None}
    text = Page(report.page(record(row(), **where))).text
    assert "settings MHC_TILE_TABLES off, MHC_TILE_REFERENCE not set" in text
    assert "tables a.json 01, b.json 02" in text
    where = {"clocks": ["a", None], "switch": {}, "on": True, "caps": {"power": [1, 2]}}
    said = Page(report.page(record(row(), **where))).text
    assert "clocks a, none switch none on yes caps power 1, 2" in said
    assert "tables none" in Page(report.page(record(row(), tables=[]))).text
    for python in ("{", "[]", "None"):
        assert python not in text + said


def test_a_comparison_is_shown(result):
    old = [r.replace(us=r.us / 1.2) if r.us and r.op == "merge" else r for r in result.rows]
    found = compare.compare(record(*old, commit="older"), result)
    html = report.page(record(*result.rows[:20]), found)
    text = Page(html).text
    assert f"Against the older result: {len(found.faults())} regressions of 168 cases" in text
    assert "differs: commit: older -> 0123456789ab" in text
    assert "regression merge/forward/64x7168" in text


def test_colours_and_markers_are_those_of_contenders(result):
    styles = figures.labels(result)
    assert next(iter(styles)) == "mhc_tile"
    assert len(set(styles.values())) == len(styles) == 5
    assert len({marker for _, marker in styles.values()}) == 5


def test_the_shapes_shown_are_those_with_most_rows(result):
    shapes = figures.main_shapes([r for r in result.rows if r.us])
    assert [shape[:2] for shape in shapes] == [
        (64, 7168), (4096, 7168), (8192, 1280), (8192, 2560), (8192, 4096)
    ]  # fmt: skip
    assert figures.main_shapes([]) == []


def test_which_pictures_there_are(result):
    names = {name for name in figures.draw(result, compare.compare(result, result))}
    assert names == {"roofline", "tokens", "hidden_size", "changes"}
    assert set(figures.draw(overhead())) == {"parts", "added"}
    assert figures.draw(record(row())) == {}


def test_the_roofline_has_a_panel_only_where_ops_can_be_compared():
    size = "8192x2560/n4/bfloat16"
    cases = [f"merge/inference/{size}", f"pre/inference/{size}", f"pre/forward/{size}"]
    few = record(*(row(case=case, bytes=10**8) for case in cases))
    (panel,) = figures.roofline(few).axes
    assert panel.get_title() == "8192 x 2560, inference"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["pre", "merge"]
    one = record(row(case=cases[2], bytes=10**8))
    assert [axis.get_title() for axis in figures.roofline(one).axes] == ["8192 x 2560, forward"]


@pytest.mark.parametrize("factor", [1.1, 4, 100, 10_000, 1e6])
def test_every_panel_of_scaling_has_labels(factor):
    rows = [
        row(17.0 * factor ** (i / 2), case=f"pre/training/8192x{c}/n4/bfloat16")
        for i, c in enumerate((1280, 2560, 4096))
    ]
    (panel,) = figures.scaling(record(*rows), "hidden_size").axes
    low, high = panel.get_ylim()
    shown = [label for label in panel.get_yticks() if low <= label <= high]
    assert 2 <= len(shown) <= 9
    panel.figure.canvas.draw()
    assert [t.get_text() for t in panel.get_xticklabels()] == ["1280", "2560", "4096"]


def test_parts_are_told_apart():
    parts = {name: 10.0 for name in (*KERNELS, LAYERS, GAPS, *"abcdefghij")}
    rows = [row(contender=PLAIN, parts=parts), row(parts=parts)]
    (axis,) = figures.parts(record(*rows, kind="overhead")).axes
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in axis.patches}
    assert len(looks) == len(parts)


def test_numbers_and_marks_of_the_roofline_stand_out():
    rows = [row(bytes=10**8), row(180.0, contender=PEER, bytes=10**8)]
    (panel,) = figures.roofline(record(*rows)).axes
    (number,) = panel.texts
    assert number.get_bbox_patch().get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert number.xy[0] == 1  # of the axes: right of the bars, marks and the line at 100%
    assert panel.get_xlim()[1] > 112
    (mark,) = (line for line in panel.lines if line.get_marker() == "s")
    assert mark.get_path_effects()


def test_scaling_has_a_panel_only_where_there_are_sizes_to_compare():
    def at(tokens, op="sublayer"):
        return row(case=f"{op}/inference/{tokens}x2560/n4/bfloat16")

    figure = figures.scaling(record(at(64), at(512), at(8192), at(8192, "merge")), "tokens")
    (panel,) = figure.axes
    assert panel.get_title() == "sublayer, inference"
    assert list(panel.get_xticks()) == [64, 512, 8192]
    assert figures.scaling(record(at(64), at(512, "merge"), at(8192, "pre")), "tokens") is None


def test_the_commands(tmp_path, capsys):
    few = record(*[r for r in full().rows if r.op == "merge"])
    records.write(few, tmp_path / "run.json")
    records.write(record(*few.rows, gpu="NVIDIA A100"), tmp_path / "other.json")
    assert __main__.main(["perf", "report", str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.html'}\n"
    Page((tmp_path / "run.html").read_text())
    out, pictures = tmp_path / "a" / "page.html", tmp_path / "b"
    command = ["report", str(tmp_path / "run.json"), "--out", str(out), "--figures", str(pictures)]
    assert main([*command, "--baseline", str(tmp_path / "run.json")]) == 0
    assert out.is_file()
    for name in ("roofline", "tokens", "hidden_size", "changes"):
        assert (pictures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--baseline", str(tmp_path / "other.json")]) == 1
    assert "gpu: NVIDIA A100 -> NVIDIA H200; --force" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    records.write(record(row()), tmp_path / "run.json")
    monkeypatch.setattr(_extras.importlib, "import_module", missing)
    assert main(["report", str(tmp_path / "run.json")]) == 1
    assert "pip install 'mhc-tile[perf]' brings it" in capsys.readouterr().err
