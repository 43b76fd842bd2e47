"""The demo: tiny runs of the real command, its files, its sentence, its resumption."""

import json
import os
import re
import signal

import pytest
import torch

from mhc_tile.__main__ import main
from mhc_tile.models import ModelConfig
from mhc_tile.training import demo
from mhc_tile.training.demo import DemoSettings, run_legs, start_demo
from mhc_tile.training.report import Leg, sentence, summary

pytest.importorskip("matplotlib")

LEGS_OF = DemoSettings.legs
LEGS = ["residual", "hc", "mhc", "stress-hc", "stress-mhc"]


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Also where the tests run in the background, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {index}: {index * index}\n" for index in range(600)))
    return str(path)


def small_legs(settings: DemoSettings) -> dict:
    """The demo's runs with a model that takes milliseconds."""
    model = ModelConfig(256, 16, 1, 2, 8, 24, 32)
    small = {"model": model, "batch_size": 2, "sequence_length": 16, "eval_batches": 2}
    return {name: config.replace(**small) for name, config in LEGS_OF(settings).items()}


def listen_to_nothing(_name, _config):
    return lambda rows: None


def test_the_command_trains_draws_and_says_what_it_sees(text, tmp_path, capsys):
    out = tmp_path / "demo"
    threads = str(torch.get_num_threads())
    options = ["--steps", "2", "--stress-steps", "2", "--corpus", text, "--threads", threads]
    assert main(["demo", "--out", str(out), *options]) == 0
    stdout = capsys.readouterr().out
    for name in LEGS:
        assert re.search(rf"^{name} +\d", stdout, re.M), f"{name} is not in the table"
    report = (out / "report.md").read_text()
    figures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(figures) == 6
    for name in figures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    said = re.search(r"^With the same seed.*\.$", stdout, re.M).group()
    assert f"**{said}**" in report
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["run"] for row in rows)) == LEGS
    assert main(["demo", "--out", str(out), *options]) != 0
    assert "demo: out must not exist yet or be empty" in capsys.readouterr().err


def test_an_interrupted_demo_continues_to_the_same_numbers(text, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "draw_all", lambda _folder, _legs: [])
    monkeypatch.setattr(DemoSettings, "legs", small_legs)
    settings = DemoSettings(steps=12, stress_steps=2, corpus=text)

    def losses(out):
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [(row["run"], row["step"], row["loss"]) for row in rows if "loss" in row]

    def interrupt(leg_name, step):
        def listener(name, _config):
            sent = []

            def on_rows(rows):
                if name == leg_name and rows[0]["step"] == step and not sent:
                    sent.append(os.kill(os.getpid(), signal.SIGINT))

            return on_rows

        return listener

    whole, part = tmp_path / "whole", tmp_path / "part"
    start_demo(whole, settings)
    assert run_legs(whole, listen_to_nothing).report is not None
    start_demo(part, settings)
    with pytest.raises(KeyboardInterrupt):  # before the first step there is nothing to save
        run_legs(part, interrupt("hc", step=0))

    assert [leg.name for leg in run_legs(part, interrupt("mhc", step=1)).legs] == LEGS[:3]
    result = run_legs(part, listen_to_nothing)
    assert [leg.name for leg in result.legs] == LEGS
    assert losses(part) == losses(whole)


def test_ctrl_c_in_the_last_validation_of_a_leg_ends_the_demo(text, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "draw_all", lambda _folder, _legs: [])
    monkeypatch.setattr(DemoSettings, "legs", small_legs)
    start_demo(tmp_path, DemoSettings(steps=6, stress_steps=3, corpus=text))

    def listener(name, _config):
        def on_rows(rows):
            last = rows[-1]
            if name == "residual" and (last["kind"], last["step"]) == ("validation", 6):
                os.kill(os.getpid(), signal.SIGINT)

        return on_rows

    result = run_legs(tmp_path, listener)
    assert ([leg.name for leg in result.legs], result.report) == (["residual"], None)
    result = run_legs(tmp_path, listen_to_nothing)
    assert [leg.name for leg in result.legs] == LEGS
    assert result.report is not None


def test_damaged_records_are_named(text, tmp_path, monkeypatch):
    monkeypatch.setattr(DemoSettings, "legs", small_legs)
    monkeypatch.setattr(demo, "draw_all", lambda _folder, _legs: [])
    start_demo(tmp_path, DemoSettings(steps=6, stress_steps=3, corpus=text))
    run_legs(tmp_path, listen_to_nothing)
    metrics = tmp_path / "residual" / "metrics.jsonl"
    metrics.unlink()
    with pytest.raises(ValueError, match="demo: metrics must hold the steps of residual") as error:
        run_legs(tmp_path, listen_to_nothing)
    assert str(metrics) in str(error.value)
    for settings in ('{"st', '{"stops": 3}'):
        (tmp_path / "demo.json").write_text(settings)
        with pytest.raises(ValueError, match=r"demo: resume must be .* with its settings, got"):
            run_legs(tmp_path, listen_to_nothing)


def test_resume_refuses_what_it_would_ignore(tmp_path, capsys):
    resume = ["demo", "--resume", str(tmp_path)]
    assert main([*resume, "--stress-steps", "7"]) == 1
    said = capsys.readouterr().err
    assert "demo: --stress-steps must be left out with --resume, got 7" in said
    assert main([*resume, "--threads", str(torch.get_num_threads())]) == 1
    assert "demo: resume must be the folder of a demo" in capsys.readouterr().err


def test_resuming_what_is_no_demo_is_refused(tmp_path, capsys):
    assert main(["demo", "--resume", str(tmp_path)]) != 0
    assert "demo: resume must be the folder of a demo" in capsys.readouterr().err


def test_the_three_runs_share_everything_but_the_residual():
    legs = DemoSettings(seed=3).legs()
    assert list(legs) == LEGS
    for names in (LEGS[:3], LEGS[3:]):
        assert len({legs[name].replace(residual="mhc") for name in names}) == 1
    assert legs["stress-hc"].model.num_layers > legs["hc"].model.num_layers
    assert legs["stress-hc"].learning_rate > legs["hc"].learning_rate


# the sentence follows the numbers


def leg(name: str, loss: float | None, gain: float = 1.0, **changes) -> Leg:
    config = DemoSettings().legs()[name]
    rows = [{"kind": "step", "step": 1, "loss": loss, "ms_per_step": 50.0}]
    composite = {"composite_forward": gain, "composite_backward": 1.0}
    rows += [{"kind": "gain", "step": 1, **composite}] if config.residual != "residual" else []
    if gain > 3:
        rows.append({"kind": "warning", "step": 1, "loss_looks_normal": True, "message": ""})
    values = {"status": "done", "parameters": 1000, "validation_loss": loss, "mean_h_res": None}
    return Leg(name=name, config=config, rows=rows, **{**values, **changes})


def legs(residual=1.7, hc=1.6, mhc=1.6, hc_gain=4000.0, mhc_gain=1.1, **stress_hc) -> list[Leg]:
    return [
        leg("residual", residual),
        leg("hc", hc),
        leg("mhc", mhc),
        leg("stress-hc", 2.5, hc_gain, **stress_hc),
        leg("stress-mhc", 2.6, mhc_gain),
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mhc": 1.6}, "mHC's 0.100 below the plain residual's at 1.0 times its time"),
        ({"mhc": 1.9}, "mHC's 0.200 above the plain residual's"),
        ({"mhc": 1.705}, "mHC's within 0.01 of the plain residual's"),
        ({"mhc": None}, "mHC did not reach a validation loss"),
        ({}, "HC's unconstrained mixing reached 4,000 while its loss looked normal"),
        ({}, "mHC's doubly stochastic mixing stayed at 1.10 (validation losses 2.500 and 2.600)"),
        ({"hc_gain": 1.2}, "neither mixing left 1 in these few steps"),
        ({"mhc_gain": 7.0}, "mHC's doubly stochastic mixing reached 7.00"),
        ({"status": "diverged"}, "reached 4,000 and its loss diverged"),
        ({"hc_gain": None}, "mixing reached not finite"),
    ],
)
def test_the_sentence_follows_the_numbers(changes, said):
    if changes.get("hc_gain", 1) is None:
        changes = {"hc_gain": float("inf")}
    assert said in sentence(legs(**changes))


def test_the_table_has_a_row_per_run():
    rows = summary(legs())
    assert [row["run"] for row in rows] == LEGS
    assert rows[3]["largest\ncomposite"] == "4,000"
    assert rows[0]["largest\ncomposite"] == "1.00"
