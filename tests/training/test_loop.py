"""The loop: schedule, optimizer, exact resume, Ctrl-C, refusals, the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_tile.__main__ import main
from mhc_tile.models import RESIDUALS, Decoder, MLAConfig, ModelConfig, MoEConfig, model_config
from mhc_tile.training import TrainConfig, loop, read_metrics, resume, train
from mhc_tile.training.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from mhc_tile.training.demo import DemoSettings
from mhc_tile.training.metrics import MetricsLog
from mhc_tile.training.optimizer import build_optimizer
from mhc_tile.training.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelConfig(
    vocab_size=256,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    head_size=8,
    ffn_size=24,
    context_length=32,
)
EXPERTS = TINY.replace(
    moe=MoEConfig(num_experts=4, expert_ffn_size=8, experts_per_token=2, leading_dense_layers=0),
    mla=MLAConfig(kv_rank=8, rope_size=4),
)
both_models = pytest.mark.parametrize("model", [TINY, EXPERTS], ids=["dense", "experts"])


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Also where the tests run in the background, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {index}: {index * index}\n" for index in range(400)))
    return str(path)


@pytest.fixture
def config(text) -> TrainConfig:
    return TrainConfig(
        model=TINY,
        corpus=text,
        steps=8,
        batch_size=2,
        sequence_length=16,
        learning_rate=1e-2,
        warmup_steps=2,
        device="cpu",
        log_every=3,
        monitor_every=2,
        eval_every=4,
        eval_batches=2,
        checkpoint_every=2,
    )


def without_times(run_dir: Path) -> list[dict]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{key: row[key] for key in row if key != "ms_per_step"} for row in rows]


def same_tensors(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_tensors(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same_tensors, left, right))
    return left == right


# schedule and optimizer


def test_learning_rate_warms_up_and_steps_down_twice():
    rates = [learning_rate(step, peak=2.0, warmup_steps=10, steps=100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert set(rates[9:80]) == {2.0}
    assert rates[80:90] == pytest.approx([0.632] * 10)
    assert rates[90:] == pytest.approx([0.2] * 10)


def test_a_schedule_without_warm_up_starts_at_the_peak():
    assert learning_rate(1, peak=0.5, warmup_steps=0, steps=10) == 0.5


@pytest.mark.parametrize("residual", RESIDUALS)
def test_only_matrices_decay(residual):
    model = Decoder(TINY, residual)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5)
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        vector = name.rpartition(".")[2] in ("alpha", "bias") or "norm" in name
        assert decay[id(parameter)] == (0.0 if vector else 0.5), name
    assert optimizer.defaults["betas"] == (0.9, 0.95)


# training


def test_training_learns_and_records(config, tmp_path):
    seen = []
    result = train(config.replace(steps=40), tmp_path / "run", on_rows=seen.extend)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert seen == rows
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 41))
    assert steps[0]["loss"] == pytest.approx(5.545, abs=0.1)  # log 256
    assert result.validation_loss < 4.0
    assert result.validation_loss == [r["loss"] for r in rows if r["kind"] == "validation"][-1]
    assert [row["step"] for row in rows if row["kind"] == "gain"] == list(range(2, 41, 2))
    assert [row["step"] for row in rows if row["kind"] == "validation"] == list(range(4, 41, 4))
    assert rows[0]["config"] == json.loads(json.dumps(config.replace(steps=40).to_dict()))


def test_the_gradient_norm_is_the_one_before_clipping(config, tmp_path):
    norms = {}
    for clip in (0.0, 1e-3):
        run_dir = tmp_path / str(clip)
        train(config.replace(steps=1, clip=clip), run_dir)
        norms[clip] = read_metrics(run_dir / "metrics.jsonl")[1]["grad_norm"]
    assert norms[0.0] == norms[1e-3] > 0.1


def test_training_leaves_the_random_state_alone(config, tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train(config.replace(steps=1), tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), before)


@both_models
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_residual_trains_in_every_precision(config, tmp_path, residual, precision, model):
    changed = config.replace(residual=residual, precision=precision, steps=3, model=model)
    result = train(changed, tmp_path / "run")
    assert result.status == "done"
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())


def test_every_step_balances_the_experts(config, tmp_path):
    """Training counts and moves the bias by 0.001 at most 8 times; validation does not count."""
    model = train(config.replace(model=EXPERTS), tmp_path / "run").model
    (router,) = [module for module in model.modules() if hasattr(module, "expert_bias")]
    assert not router.expert_load.any()
    assert 0 < router.expert_bias.abs().max() <= 8.001e-3
    moves = router.expert_bias / 1e-3
    assert (moves - moves.round()).abs().max() < 1e-3


def test_tensorboard_events_are_written(config, tmp_path):
    pytest.importorskip("tensorboard")
    train(config.replace(tensorboard=True, steps=2), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_step_reads_no_value_of_a_tensor(config, tmp_path, residual):
    """Each would wait for the device, on CUDA."""
    run = loop._Run(config.replace(residual=residual), tmp_path / "run", None, None)
    ops = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ops.append(str(function))
            return function(*args, **kwargs or {})

    with Recorded():
        run._train_step()
        run._train_step()  # which records gains
    assert "aten._fused_adamw_.default" in ops
    assert not [name for name in ops if "_local_scalar_dense" in name]


@pytest.mark.gpu
@both_models
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("mode", ["off", "default", "graphs"])
def test_a_step_on_the_gpu_waits_for_nothing(config, tmp_path, residual, model, mode):
    if model is EXPERTS and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("torch's grouped matmul waits before compute capability 9.0")
    config = config.replace(residual=residual, device="cuda", model=model, compile=mode)
    run = loop._Run(config, tmp_path / "run", None, None)
    if mode != "off":
        torch._dynamo.reset()
        torch.use_deterministic_algorithms(False)  # they keep CUDA graphs from some kernels
        run._compile()
    run._start_clock()
    for _ in range(3):
        run._train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):  # two of them record gains
            run._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _, finite = run._collect()
    assert finite


@pytest.mark.gpu
@pytest.mark.parametrize("residual", RESIDUALS)
def test_training_on_the_gpu_learns_and_resumes(config, tmp_path, residual):
    config = config.replace(residual=residual, device="cuda", steps=40, checkpoint_every=20)
    whole = train(config, tmp_path / "run")
    assert whole.validation_loss < 4.0
    older = list_checkpoints(tmp_path / "run")[0]
    resumed = resume(older)
    assert resumed.validation_loss == pytest.approx(whole.validation_loss, rel=0.02)


# resume


@both_models
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_run_is_bit_identical(config, tmp_path, residual, step, model):
    config = config.replace(residual=residual, model=model)
    whole = train(config, tmp_path / "whole")

    def stop(rows, sent=[]):  # noqa: B006 - remembers that it was sent
        if not sent and any(row["step"] >= step and row["kind"] == "step" for row in rows):
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    part = train(config, tmp_path / "part", on_rows=stop)
    assert part.status == "interrupted"
    assert step <= part.step < 8
    resumed = resume(tmp_path / "part")
    assert (resumed.status, resumed.step) == ("done", 8)
    assert resumed.validation_loss == whole.validation_loss
    assert without_times(tmp_path / "part") == without_times(tmp_path / "whole")
    first, second = (load_checkpoint(find_checkpoint(tmp_path / n)) for n in ("whole", "part"))
    assert same_tensors(first, second)


def test_resuming_from_an_older_checkpoint_drops_the_lines_beyond_it(config, tmp_path):
    train(config, tmp_path / "run")
    expected = without_times(tmp_path / "run")
    older = list_checkpoints(tmp_path / "run")[0]
    assert older.stem == "step_00000006"
    kept = []
    resume(older, on_rows=lambda rows: kept.append([row["step"] for row in rows]))
    assert max(kept[0]) == 6
    assert without_times(tmp_path / "run") == expected


def test_going_back_drops_newer_checkpoints_with_their_rows(config, tmp_path, monkeypatch):
    whole = train(config, tmp_path / "run")
    expected = without_times(tmp_path / "run")
    older = list_checkpoints(tmp_path / "run")[0]

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        resume(older)
    assert list_checkpoints(tmp_path / "run") == [older]
    monkeypatch.undo()
    assert resume(tmp_path / "run").validation_loss == whole.validation_loss
    assert without_times(tmp_path / "run") == expected


def test_going_back_in_damaged_metrics_is_refused_and_drops_nothing(config, tmp_path):
    train(config, tmp_path / "run")
    checkpoints = list_checkpoints(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("{\n" + metrics.read_text())
    with pytest.raises(ValueError, match="metrics: every line must be"):
        resume(checkpoints[0])
    assert list_checkpoints(tmp_path / "run") == checkpoints


@pytest.mark.parametrize("step", [3, 4, 8])
def test_rows_that_the_disk_did_not_take_are_in_the_checkpoint(config, tmp_path, monkeypatch, step):
    whole = train(config, tmp_path / "whole")
    write = MetricsLog.write

    def full(self, rows):
        if rows[-1]["step"] >= step:
            raise OSError(28, "No space left on device")
        write(self, rows)

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path / "run")
    assert load_checkpoint(find_checkpoint(tmp_path / "run"))["step"] == step
    monkeypatch.undo()

    def killed(self):
        raise KeyboardInterrupt

    if step < 8:  # written once, however often it is resumed
        monkeypatch.setattr(loop._Run, "_train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "run")
        monkeypatch.undo()
    shown = []
    assert resume(tmp_path / "run", on_rows=shown.extend).validation_loss == whole.validation_loss
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")
    assert shown == read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_rows_that_the_disk_takes_at_the_next_write_end_nothing(config, tmp_path, monkeypatch):
    train(config, tmp_path / "whole")
    write, failed = MetricsLog.write, []

    def full(self, rows):
        if rows[-1]["step"] == 4 and not failed:
            failed.append(rows)
            raise OSError(28, "No space left on device")
        write(self, rows)

    monkeypatch.setattr(MetricsLog, "write", full)
    assert train(config, tmp_path / "run").status == "done"
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


def test_a_checkpoint_without_rows_is_resumed(config, tmp_path):
    train(config.replace(steps=2), tmp_path / "run")
    path = find_checkpoint(tmp_path / "run")
    state = load_checkpoint(path)
    del state["rows"]
    torch.save(state, path)
    assert resume(tmp_path / "run", steps=4).step == 4


def test_a_finished_run_is_resumed_as_it_is(config, tmp_path):
    whole = train(config, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = resume(tmp_path / "run")
    assert (again.status, again.step) == ("done", 8)
    assert again.validation_loss == whole.validation_loss
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert same_tensors(again.model.state_dict(), whole.model.state_dict())


def test_a_changed_corpus_is_refused(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one text " * 100)
    train(config.replace(corpus=str(text), steps=2), tmp_path / "run")
    text.write_text("two text " * 100)
    with pytest.raises(ValueError, match="resume: corpus must be the one that"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("poisoned", ["weight", "gradient"])
def test_what_is_not_finite_ends_the_run_and_never_reaches_a_checkpoint(
    config, tmp_path, monkeypatch, poisoned
):
    forward, calls = Decoder.forward, []

    def poisonous(self, tokens):
        logits = forward(self, tokens)
        if self.training:
            calls.append(1)
        if len(calls) == 4 and poisoned == "weight":
            return logits * torch.nan
        if len(calls) == 4:
            logits.register_hook(lambda grad_logits: grad_logits * torch.nan)
        return logits

    monkeypatch.setattr(Decoder, "forward", poisonous)
    result = train(config, tmp_path / "run")
    assert (result.status, result.step) == ("diverged", 4)
    last = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row][-1]
    assert last["grad_norm"] is None
    assert (last["loss"] is None) == (poisoned == "weight")
    saved = load_checkpoint(find_checkpoint(tmp_path / "run"))
    assert saved["step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


# bad input


def test_a_run_directory_is_never_overwritten(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="train: run_dir must not exist yet or be empty"):
            train(config, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_input_is_refused_before_anything_is_written(config, tmp_path):
    for changes, message in (
        ({"corpus": str(tmp_path / "none")}, "corpus: path must be"),
        ({"device": "abacus"}, "train: device must be a torch device, got 'abacus'"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config.replace(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "TrainConfig: steps must be an int of at least 1, got 0"),
        ({"steps": 2.5}, "TrainConfig: steps must be an int of at least 1, got 2.5"),
        ({"steps": "5"}, "TrainConfig: steps must be an int of at least 1, got '5'"),
        ({"batch_size": 2.0}, "TrainConfig: batch_size must be an int of at least 1, got 2.0"),
        ({"eval_every": True}, "TrainConfig: eval_every must be an int of at least 0, got True"),
        ({"clip": "1"}, "TrainConfig: clip must be a number, got '1'"),
        ({"model": "1m"}, "TrainConfig: model must be of ModelConfig, got '1m'"),
        ({"connection": None}, "TrainConfig: connection must be of MHCConfig, got None"),
        ({"corpus": 3}, "TrainConfig: corpus must be of str or Path or None, got 3"),
        ({"device": torch.device("cpu")}, "TrainConfig: device must be of str, got device"),
        ({"tensorboard": "no"}, "TrainConfig: tensorboard must be True or False, got 'no'"),
        ({"seed": -1}, "TrainConfig: seed must be an int of at least 0, got -1"),
        ({"seed": 2**64}, r"TrainConfig: seed must be below 2\*\*64, got 18446744073709551616"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and at least 0, got nan"),
        ({"residual": "mch"}, "TrainConfig: residual must be one of .* got 'mch'"),
        ({"precision": "fp8"}, "TrainConfig: precision must be one of .* got 'fp8'"),
        ({"sequence_length": 33}, "at most the model's context_length 32, got 33"),
        ({"model": TINY.replace(vocab_size=100)}, "vocab_size must be at least 256"),
    ],
)
def test_bad_settings(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config.replace(**changes)


# the command line


def command(text: str, out: Path, *more: str) -> list[str]:
    options = {"corpus": text, "out": out, "batch-size": 2, "sequence-length": 16, "device": "cpu"}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["train", "--no-tensorboard", *flags, *more]


def test_train_from_the_command_line(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(text, out, "--steps", "2", "--residual", "hc")) == 0
    assert f"written to {out}" in capsys.readouterr().out
    assert main(command(text, out, "--steps", "2")) != 0
    assert "run_dir must not exist yet" in capsys.readouterr().err
    assert main(command(text, tmp_path / "moe", "--steps", "2", "--model", "2m-moe")) == 0
    stored = load_checkpoint(find_checkpoint(tmp_path / "moe"))["config"]
    assert TrainConfig.from_dict(stored).model == model_config("2m-moe")
    assert main(command(text, tmp_path / "other", "--model", "1n")) != 0
    assert "did you mean '1m'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "x"], "--steps"),
        (["--residual", "mch"], "'residual', 'hc', 'mhc'"),
        (["--corpus", "--steps", "2"], "--corpus"),
        (["--step", "2"], "--steps INT"),
        (["more"], "more"),
    ],
)
def test_wrong_usage_names_the_option(capsys, words, said):
    with pytest.raises(SystemExit) as end:
        main(["train", *words])
    assert end.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_every_setting_of_a_run_is_an_option(capsys):
    for command in ("train", "demo"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        said = capsys.readouterr().out
        settings = DemoSettings() if command == "demo" else TrainConfig()
        for setting in vars(settings).keys() - {"connection"}:
            assert f"--{setting.replace('_', '-')}" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_valid_files_and_the_command_to_resume(
    text, tmp_path, number, code
):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "mhc_tile", *command(text, out, "--steps", "100000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert f"mhc-tile train --resume {out}" in stdout
    assert "Traceback" not in stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    step = load_checkpoint(find_checkpoint(out))["step"]
    assert rows[-1]["step"] == step > 0
