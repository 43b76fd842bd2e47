"""The compiled step: the eager run's losses and gains, exact resume, refusals and fallbacks.

The backend is "aot_eager", which compiles within a second, but for one test with Inductor.
"""

import shutil

import pytest
import torch

from mhc_tile.__main__ import main
from mhc_tile.models import Decoder
from mhc_tile.training import TrainConfig, compilation, loop, read_metrics, resume, train
from mhc_tile.training.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from mhc_tile.training.compilation import choose_mode
from mhc_tile.training.demo import DemoSettings
from mhc_tile.training.progress import Progress
from tiny_models import EXPERTS, TINY

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _compiles_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fast(monkeypatch):
    """A backend that compiles without Inductor."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


@pytest.fixture
def failing(monkeypatch):
    """A backend that fails in the backward pass, after the forward pass has run."""

    def backend(graph, inputs):
        def fail(graph, inputs):
            raise OSError("there is no compiler")

        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fail)(graph, inputs)

    monkeypatch.setattr(compilation, "BACKEND", backend)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {index}: {index * index}\n" for index in range(200)))
    small = {"batch_size": 2, "sequence_length": 16, "eval_batches": 2, "device": "cpu"}
    often = {"log_every": 1, "monitor_every": 2, "eval_every": 2, "checkpoint_every": 2}
    return TrainConfig(
        model=TINY, corpus=str(text), steps=4, warmup_steps=0, compile="default", **small, **often
    )


def rows_of(run_dir, *kinds: str) -> list[dict]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if key != "ms_per_step"}
        for row in rows
        if row["kind"] in kinds
    ]


def numbers(row: dict) -> list[float]:
    values = [row[key] for key in sorted(row) if key not in ("kind", "step")]
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


# modes


def test_auto_is_eager_on_a_cpu_and_cuda_graphs_on_cuda(config):
    def modes(**changes):
        changed = config.replace(**changes)
        return choose_mode(changed, CPU), choose_mode(changed, CUDA)

    assert modes(compile="auto") == ("off", "graphs")
    assert modes(compile="auto", model=EXPERTS) == ("off", "default")
    assert modes(compile="off") == ("off", "off")
    assert modes(compile="default") == ("default", "default")
    assert choose_mode(config.replace(compile="graphs"), CUDA) == "graphs"


def test_graphs_without_cuda_are_refused_before_anything_is_written(config, tmp_path):
    said = r"train: compile must be 'auto', 'off' or 'default' on cpu, .* got 'graphs'"
    with pytest.raises(ValueError, match=said):
        train(config.replace(compile="graphs"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"TrainConfig: compile must be one of .* got 'fast'"):
        config.replace(compile="fast")


def test_a_checkpoint_without_the_field_goes_on_as_it_began(config, tmp_path, monkeypatch):
    train(config.replace(compile="off", steps=2), tmp_path / "run")
    path = find_checkpoint(tmp_path / "run")
    state = load_checkpoint(path)
    del state["config"]["compile"]
    torch.save(state, path)
    monkeypatch.setattr(loop, "compile_loss", None)
    assert resume(tmp_path / "run", steps=3).step == 3
    assert load_checkpoint(find_checkpoint(tmp_path / "run"))["config"]["compile"] == "off"


def test_the_demo_is_eager():
    assert {leg.compile for leg in DemoSettings().legs().values()} == {"off"}


# results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("residual", "model"), [("residual", TINY), ("hc", TINY), ("mhc", EXPERTS)]
)
def test_losses_gains_and_names_are_the_eager_ones(
    fast, config, tmp_path, residual, model, precision
):
    config = config.replace(residual=residual, model=model, precision=precision)
    with torch._dynamo.config.patch(error_on_recompile=True):  # gains and validation included
        compiled = train(config, tmp_path / "compiled")
    eager = train(config.replace(compile="off"), tmp_path / "eager")
    kinds = ("step", "gain", "validation")
    found, expected = (rows_of(tmp_path / name, *kinds) for name in ("compiled", "eager"))
    assert [(row["kind"], row["step"]) for row in found] == [
        (row["kind"], row["step"]) for row in expected
    ]
    noise = 1e-4 if precision == "fp32" else 2e-2
    for row, other in zip(found, expected, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=noise, abs=1e-6)
    states = [load_checkpoint(find_checkpoint(tmp_path / name)) for name in ("compiled", "eager")]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, value in compiled.model.named_buffers():
        if "expert" in name:  # compiling has counted no tokens
            assert torch.equal(value, dict(eager.model.named_buffers())[name])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_resumed_run_has_the_same_bits(config, tmp_path, monkeypatch, backend):
    monkeypatch.setattr(compilation, "BACKEND", backend)
    whole = train(config, tmp_path / "run")
    expected = rows_of(tmp_path / "run", "step", "gain", "validation")
    shutil.copytree(tmp_path / "run", tmp_path / "part")
    older = list_checkpoints(tmp_path / "part")[0]
    assert older.stem == "step_00000002"
    torch._dynamo.reset()
    part = resume(older)
    assert part.step == 4
    train(config.replace(compile="off"), tmp_path / "eager")
    eager = rows_of(tmp_path / "eager", "step", "gain", "validation")
    for row, other in zip(expected, eager, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-4, abs=1e-6)
    assert rows_of(tmp_path / "part", "step", "gain", "validation") == expected
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name])
    compiles = rows_of(tmp_path / "part", "compile")
    assert [(row["step"], row["mode"]) for row in compiles] == [(0, "default"), (2, "default")]


def test_a_finished_run_is_not_compiled(fast, config, tmp_path, monkeypatch):
    train(config.replace(steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(loop, "compile_loss", None)
    assert resume(tmp_path / "run").status == "done"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_every_compiled_step_hears_views_that_are_gone_before_its_backward_pass(
    fast, config, tmp_path
):
    """Views of what the backward pass keeps: no kernel. CUDA graphs need the same ones alive."""
    run = loop._Run(config, tmp_path / "run", None, None)
    run.monitor._max_tokens = 8
    run._compile()
    compiled, heard, in_backward = run.loss, [], []

    def loss(*arguments):
        result = compiled(*arguments)
        heard.append([sample for _, sample in run.monitor._samples])
        result.register_hook(lambda _grad: in_backward.append(len(run.monitor._samples)))
        return result

    run.loss = loss
    for _ in range(2):  # the second is recorded
        run._train_step()
    assert in_backward == [0, 0]
    assert [len(samples) for samples in heard] == [4, 4]
    for sample in heard[0] + heard[1]:
        assert len(sample) <= 8
        assert sample.untyped_storage().nbytes() == 32 * 16 * 4  # of all tokens


def test_losses_that_are_kept_are_copies(config, tmp_path):
    """CUDA graphs write the next step's loss into the same memory."""
    run = loop._Run(config.replace(compile="off"), tmp_path / "run", None, None)
    memory = torch.zeros((), requires_grad=True)
    run.loss = lambda *_: memory.view_as(memory)
    run._train_step()
    with torch.no_grad():
        memory.add_(1)
    assert run.pending[0][2].item() == 0


def test_a_listener_hears_of_compiling_before_and_after(fast, config, tmp_path):
    heard = []
    train(config.replace(steps=1), tmp_path / "run", on_rows=heard.extend)
    assert heard[0] == {"kind": "compile", "step": 0, "mode": "default", "seconds": None}
    assert heard[1:] == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["kind"] for row in heard[1:3]] == ["run", "compile"]
    assert heard[2]["seconds"] > 0
    heard.clear()
    resume(tmp_path / "run", steps=2, on_rows=heard.extend)
    assert heard[0]["seconds"] is None
    assert heard[1:] == read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_progress_names_cuda_graphs(capsys):
    progress, row = Progress("mhc", 8), {"kind": "compile", "step": 0, "mode": "graphs"}
    progress([{**row, "seconds": None}])
    progress([{"kind": "run", "step": 0, "config": {"steps": 8}}, {**row, "seconds": 21.4}])
    said = "forward and backward for CUDA graphs"
    assert capsys.readouterr().out == f"mhc: compiling {said}\nmhc: compiled {said} in 21 s\n"


# failures


@pytest.mark.parametrize("model", [TINY, EXPERTS], ids=["dense", "experts"])
def test_auto_goes_on_without_a_compiler_with_one_warning(
    failing, config, tmp_path, monkeypatch, model
):
    config = config.replace(model=model)
    train(config.replace(compile="off"), tmp_path / "eager")
    monkeypatch.setattr(loop, "choose_mode", lambda *_: "default")
    said = (
        r"'off' \(--compile\) where .* got 'default' \(.*no compiler.*\); the run goes on without"
    )
    with pytest.warns(RuntimeWarning, match=said) as warned:
        train(config.replace(compile="auto"), tmp_path / "run")
    assert len([w for w in warned if "compile" in str(w.message)]) == 1
    kinds = ("step", "gain", "validation", "compile")
    assert rows_of(tmp_path / "run", *kinds) == rows_of(tmp_path / "eager", *kinds)


def test_a_mode_that_is_asked_for_and_fails_is_refused(failing, config, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"train: compile must be 'off' .* got 'default' \(.*"):
        train(config, tmp_path / "run")
    again = train(config.replace(compile="off", steps=1), tmp_path / "run")  # it is empty
    assert again.status == "done"
    words = ["--corpus", config.corpus, "--device", "cpu", "--compile", "default", "--steps", "1"]
    assert main(["train", "--no-tensorboard", *words, "--out", str(tmp_path / "other")]) == 1
    assert (
        "train: compile must be 'off' (--compile) where torch.compile fails"
        in capsys.readouterr().err
    )


def test_a_full_memory_is_no_fault_of_the_compiler(config, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "compile_loss", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(config, tmp_path / "run")


# the command line


def test_the_command_says_what_was_compiled(fast, config, tmp_path, capsys):
    words = ["--corpus", config.corpus, "--device", "cpu", "--batch-size", "2", "--steps", "2"]
    out = ["--sequence-length", "16", "--no-tensorboard", "--out", str(tmp_path / "run")]
    assert main(["train", *words, *out, "--compile", "default"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("mhc: compiling forward and backward\nmhc: 1 file read from ")
    assert "\nmhc: compiled forward and backward in " in said
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert capsys.readouterr().out.count("compiled forward and backward in ") == 1
    assert main(["train", "--resume", str(tmp_path / "run"), "--compile", "off"]) == 1
    assert "--compile must be left out with --resume" in capsys.readouterr().err


# on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("residual", ["residual", "hc", "mhc"])
@pytest.mark.parametrize("mode", ["default", "graphs"])
def test_the_gpu_learns_the_same_in_every_mode(config, tmp_path, residual, mode):
    config = config.replace(residual=residual, device="cuda", steps=20, eval_every=10)
    torch.use_deterministic_algorithms(False)  # they keep CUDA graphs from some kernels
    counters = torch._dynamo.utils.counters["inductor"]
    skips = counters["cudagraph_skips"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(config.replace(compile=mode), tmp_path / mode)
    assert counters["cudagraph_skips"] == skips
    train(config.replace(compile="off"), tmp_path / "off")
    found, expected = (rows_of(tmp_path / name, "step", "gain") for name in (mode, "off"))
    for row, other in zip(found, expected, strict=True):
        if row["kind"] == "step":
            assert row["loss"] == pytest.approx(other["loss"], rel=2e-2)
        else:
            assert numbers(row) == pytest.approx(numbers(other), rel=2e-2, abs=5e-4)
    assert len({row["loss"] for row in found if row["kind"] == "step"}) == 20  # no memory reused
    assert rows_of(tmp_path / mode, "compile")[0]["mode"] == mode


def test_models_stay_plain_modules(fast, config, tmp_path):
    model = train(config.replace(steps=1), tmp_path / "run").model
    assert type(model) is Decoder
    assert not any("_orig_mod" in name for name in model.state_dict())
