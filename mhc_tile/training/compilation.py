"""The loss of a training step, eager or under torch.compile."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .config import TrainConfig
from .monitor import GainMonitor

BACKEND = "inductor"

Loss = Callable[[nn.Module, Tensor, bool], Tensor]


def forward_loss(model: nn.Module, tokens: Tensor, bf16: bool) -> Tensor:
    """Cross entropy of the next byte, [] in nats, in fp32.

    Args:
        model: token ids [B, S] to logits [B, S, vocab_size].
        tokens: [B, S + 1], uint8.
        bf16: whether the model runs under bf16 autocast.
    """
    tokens = tokens.long()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def choose_mode(config: TrainConfig, device: torch.device) -> str:
    """The mode that `config.compile` stands for on a device: "off", "default" or "graphs".

    Raises:
        ValueError: CUDA graphs are asked for on another device.
    """
    if config.compile == "graphs" and device.type != "cuda":
        raise ValueError(
            f"train: compile must be 'auto', 'off' or 'default' on {device.type}, for CUDA graphs "
            "need CUDA, got 'graphs'"
        )
    if config.compile != "auto":
        return config.compile
    if device.type != "cuda":
        return "off"  # Inductor's C++ takes longer to compile than a small run to train
    # Of a small model the GPU takes less time than the host: graphs leave the host nothing to do.
    # Of a large one both modes take the same time. Experts may wait for the host, as on GPUs
    # without torch's grouped matmul, and no CUDA graph can capture that.
    return "default" if config.model.moe is not None else "graphs"


def compile_loss(
    mode: str, model: nn.Module, monitor: GainMonitor, tokens: Tensor, bf16: bool
) -> Loss:
    """`forward_loss` under torch.compile, compiled forward and backward for one shape of tokens.

    The model keeps its parameters' names and its buffers' values. In every call the monitor must
    listen, and be cleared before the backward pass: CUDA graphs are captured for the tensors that
    are alive then. Other arguments as of `forward_loss`. An exception is torch.compile's, or the
    model's.
    """
    from torch._dynamo import config as dynamo

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    # One graph, for one shape: what would break it is an exception, never a slow run.
    loss = torch.compile(
        forward_loss,
        fullgraph=True,
        dynamic=False,
        backend=BACKEND,
        mode="reduce-overhead" if mode == "graphs" else None,
    )

    def run() -> None:
        if mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with monitor.listen():
            result = loss(model, tokens, bf16)
        monitor.clear()
        result.backward()
        model.zero_grad(set_to_none=True)

    try:
        # Every run of a process compiles this function again, for a model of its own.
        with dynamo.patch(recompile_limit=64, accumulated_recompile_limit=1024):
            # With CUDA graphs the first call warms up, the second is captured, the third replays.
            for _ in range(3 if mode == "graphs" else 1):
                run()
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:  # experts have counted their tokens
                buffer.copy_(before)
    return loss


def refusal(mode: str, error: Exception) -> str:
    """What a user reads where torch.compile failed in a mode."""
    others = "'default' or 'off'" if mode == "graphs" else "'off'"
    return (
        f"train: compile must be {others} (--compile) where torch.compile fails, got {mode!r} "
        f"({_checks.reason(error)})"
    )
