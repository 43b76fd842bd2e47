"""What the stability monitor costs: `python -m mhc_tile.perf.monitor_cost`.

A step is a forward and backward pass of a named decoder with mHC on random bytes. The monitor is
timed by itself, because its cost is less than the spread of whole steps: the hooks of a step that
records nothing, and one record (hooks, gains, their copy to the host). The share is
`(idle + record / every) / step`. Whole steps with and without the monitor are a check.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from mhc_tile.autotune import _arguments as given
from mhc_tile.models import CONFIGS, Decoder, model_config
from mhc_tile.nn import ManifoldHyperConnection
from mhc_tile.training.monitor import GainMonitor, gain_row, measure_gains


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - start) * 1000


def measure(
    name: str, *, tokens: tuple[int, int], every: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of a named model's parts, and the share of a step in percent.

    `tokens` are B and S, `every` the steps between records.
    """
    torch.manual_seed(0)
    decoder = Decoder(model_config(name), residual="mhc").to(device)
    batch = torch.randint(256, tokens, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = decoder(batch)
        F.cross_entropy(logits.float().flatten(0, 1), batch.flatten()).backward()

    taps = [m.tap for m in decoder.modules() if isinstance(m, ManifoldHyperConnection)]
    h_res = torch.full((*tokens, 4, 4), 1 / 4, device=device)

    def pass_taps() -> None:
        for tap in taps:
            tap(h_res)

    times: dict[str, list[float]] = {key: [] for key in ("off", "on", "bare", "idle", "record")}
    for round_ in range(rounds + 1):  # the first one warms up
        taken = {"off": _milliseconds(step, device), "bare": _milliseconds(pass_taps, device)}
        monitor = GainMonitor(decoder)
        taken["idle"] = _milliseconds(pass_taps, device)

        def record(call: Callable[[], None], monitor: GainMonitor = monitor) -> None:
            with monitor.listen():
                call()
            gain_row(0, measure_gains(monitor.samples()))

        taken["record"] = _milliseconds(lambda: record(pass_taps), device)
        taken["on"] = _milliseconds(lambda: record(step), device)
        monitor.remove()
        for key, value in taken.items():
            if round_:
                times[key].append(value)
    median = {key: statistics.median(values) for key, values in times.items()}
    idle, recording = median["idle"] - median["bare"], median["record"] - median["bare"]
    return {
        "step without (ms)": median["off"],
        "recorded step (ms)": median["on"],
        "idle hooks (ms)": idle,
        "one record (ms)": recording,
        f"share, every {every} (%)": 100 * (idle + recording / every) / median["off"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What the stability monitor costs.")
    parser.add_argument("--model", default="1m", choices=CONFIGS)
    parser.add_argument("--tokens", type=given.count, nargs=2, default=(8, 128), metavar=("B", "S"))
    parser.add_argument("--every", type=given.count, default=10, help="steps between records")
    parser.add_argument("--rounds", type=given.count, default=15)
    here = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=here, default=here[0])
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    tokens = tuple(args.tokens)
    result = measure(args.model, tokens=tokens, every=args.every, rounds=args.rounds, device=device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [f"{args.model}, mhc, {tokens[0]} x {tokens[1]} tokens, {where}, medians"]
    lines += [f"{column:>24}  {value:10.3f}" for column, value in result.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
