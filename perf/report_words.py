"""The words of a report: what its numbers, contenders and ops are."""

from collections.abc import Iterable

from .markup import text
from .records import OURS, Record

READING = {
    "case": "op, mode, T tokens x C channels of each of n streams, dtype. An <i>inference</i> "
    "call is the forward alone, a <i>forward</i> call also keeps what gradients will need, a "
    "<i>training</i> call is forward and backward.",
    "time": "microseconds of one call on the GPU, the median of several turns, and behind it the "
    "20th and 80th percentile. Contenders take turns, with inputs that are not in the cache. "
    "A time marked † includes the CPU's, because no CUDA graph could be captured.",
    "roofline": "The shortest time that this GPU allows: the bytes that the op must read and write "
    "at least once, at the bandwidth of a large copy, measured in the same run. 100% is a call "
    "that takes no longer. Few tokens do not fill a GPU, and stay far below. Other "
    "implementations are held against the same bytes, whatever they move themselves.",
    "GB/s": "those bytes over the time.",
    "x ours": "time over that of mhc_tile: 2.00 takes twice as long.",
    "error": "relative root mean square error against the definition in float64, the largest over "
    "all results and gradients. bfloat16 itself rounds by 2e-3.",
    "launches": "GPU kernels that one call starts.",
    "host": "microseconds of CPU time until the call returns.",
    "peak, kept": "device memory in MB that the call needs at most beyond its inputs, and that it "
    "keeps from forward to backward.",
}
READING_STEPS = {
    "case": "model, what a step is, batch x sequence length, L layers of the model.",
    "time": "milliseconds of one step, the median of several turns, and behind it the 20th and "
    "80th percentile. Contenders take turns.",
    "overhead": "what the step takes longer than the plain one of the same round, the mean over "
    "the rounds without an eighth at either end, and behind ± its standard error.",
    "us a sublayer": "what the step takes longer than the plain one, over its sublayers, of which "
    "a layer has two.",
    "peak": "device memory in GB that the step needs at most.",
    "error": "of output and gradient against the definition, relative; the layers are in bfloat16.",
    "more than with plain residuals": "the time of each part, less that of the same part with "
    "plain residuals; the part that costs most is coloured. <i>as timed</i> is without the "
    "profiler.",
    "where the time goes": "GPU time by kernel, of steps in a row under the profiler. <i>Matrix "
    "products</i>, <i>attention</i> and <i>other kernels</i> are the layers' and PyTorch's, what "
    "PyTorch computes of a connection included; <i>no kernel</i> is what none fills; the rest is "
    "the connection's kernels, each direction.",
}
CAPTIONS = {
    "roofline": "Share of the roofline by op: bars and the numbers at the right are mhc_tile, "
    "marks are other implementations. The dashed line is 100%. Longer is better.",
    "tokens": "Time by number of tokens. The dashed line is the roofline; a flat line is the time "
    "that launches take, however little there is to do. Lower is better.",
    "hidden_size": "Time by width. The dashed line is the roofline. Lower is better.",
    "parts": "What a step's time is made of, under the profiler. The black line and the number are "
    "the whole step as timed.",
    "added": "What a step has more than one with plain residuals, by part under the profiler; to "
    "the left is what it has less, such as additions that the connection's own kernels do, or "
    "products during which the GPU has more power left. The black line and the number are what "
    "the step was timed to take longer.",
    "changes": "The largest changes against the older result, at most 40; to the right is slower.",
}
INTRODUCTION = {
    "run": "Manifold-Constrained Hyper-Connections (mHC, arXiv 2512.24880) widen a transformer's "
    "residual stream to n parallel ones and mix them around every layer. mhc_tile computes that "
    "mixing by kernels. This page shows how long each of its ops takes, next to the shortest time "
    "that the GPU's memory allows and to other implementations.",
    "overhead": "Manifold-Constrained Hyper-Connections (mHC, arXiv 2512.24880) widen a "
    "transformer's residual stream to n parallel ones and mix them around every layer. This page "
    "shows how much longer a training step takes with them than with plain residual connections, "
    "where one stream runs past every layer, by mhc_tile and by other implementations.",
}
STATUSES = {
    "wrong": "gave wrong results",
    "failed": "failed",
    "out of memory": "ran out of memory",
}
CONTENDERS = {
    OURS: "this library's kernels",
    "reference": "the definition of mHC in plain PyTorch",
    "residual": "plain residual connections; residual (compiled) is what 100% is",
    "hc": "Hyper-Connections without mHC's constraint, their maps computed in PyTorch",
    "tile-kernels": "the package of that name, by DeepSeek",
    "liger-kernel": "the package of that name",
    "hyper-connections": "the package of that name, which computes its maps in another way",
}
STEPS = {  # how a contender without brackets is compiled
    OURS: "all layers and connections in one torch.compile where no brackets say otherwise",
    "tile-kernels": "the layers under torch.compile, its connections around them not",
    "liger-kernel": "the layers under torch.compile, its connections around them not",
}
FORMS = {
    "(eager)": "PyTorch op by op, without torch.compile",
    "(compiled": "under torch.compile",
    "(sublayers compiled": "every layer with its connection in a torch.compile of its own",
    "(layers compiled": "the layers under torch.compile, the connections around them not",
    "tf32)": "PyTorch may multiply fp32 on tensor cores in tf32, as after "
    'torch.set_float32_matmul_precision("high"); elsewhere it multiplies in full fp32, its default',
}
STEP_FORMS = {"(compiled": "all layers and connections in one torch.compile"}
MAPS = {
    "h_pre": "n weights, which the token sets like those below: the layer's input is the sum of "
    "the streams by them",
    "h_post": "n weights: how much of the layer's output is added to each stream",
    "h_res": "n x n weights that mix the streams; in mHC rows and columns sum to 1, so that no "
    "number of layers amplifies a signal",
}
OPS = {
    "mapping": "h_pre, h_post and the logits of h_res, by a norm and a projection of a token's "
    "streams",
    "sinkhorn": "h_res from its logits, made doubly stochastic: 20 times columns, then rows to "
    "sum 1",
    "pre_apply": "the layer's input: the streams, weighted by h_pre",
    "merge": "the next streams: h_res mixes the old ones, h_post writes the layer's output to each",
    "expand": "one stream copied to n",
    "collapse": "n streams summed to one",
    "pre": "mapping, sinkhorn and pre_apply",
    "boundary": "merge of a sublayer, then pre of the next one",
    "sublayer": "pre, a layer that does nothing, merge: all that mHC adds to one layer",
}


def glossary(record: Record) -> dict[str, list[tuple[str, str]]]:
    """What occurs in a result: headings, with names and what they are, as HTML.

    Args:
        record: the result.
    """
    names = list(dict.fromkeys(row.contender for row in record.rows))
    ops = [op for op in dict.fromkeys(row.op for row in record.rows) if op in OPS]
    versions = record.environment.get("packages") or {}
    steps, forms = (STEPS, FORMS | STEP_FORMS) if record.kind == "overhead" else ({}, FORMS)
    who = []
    for key, what in CONTENDERS.items():
        if _any(names, key):
            version = f", {versions[key]}" if versions.get(key) else ""
            who.append((key, what + version + (f"; {steps[key]}" if key in steps else "")))
    found = {
        "Contenders": who,
        "What is in brackets": [
            (key.strip("()"), what) for key, what in forms.items() if _has(names, key)
        ],
        "Maps": list(MAPS.items()) if ops else [],
        "Ops": [(op, OPS[op]) for op in ops],
    }
    return {
        heading: [(text(key), text(what)) for key, what in rows]
        for heading, rows in found.items()
        if rows
    }


def _any(names: Iterable[str], begin: str) -> bool:
    return any(name == begin or name.startswith(f"{begin} ") for name in names)


def _has(names: Iterable[str], form: str) -> bool:
    return any(form in name for name in names)
