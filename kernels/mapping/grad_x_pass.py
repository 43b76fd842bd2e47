"""The part of mapping's backward that moves bytes: grad_x and grad_phi from one record per token.

    grad_x[i, c]        = sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]
                          + h_pre[i] * grad_layer_input[c] + grad_x_part[i, c]
                          [or + sum_o h_res[o, i] * grad_x_part[o, c], where it is grad_x_next]
    grad_phi[k, i*C + c] = sum_t grad_raw[t, k] * x[t, i, c]

The second line of grad_x holds the terms that `pre` needs, each left out where there is none. A
record holds grad_raw, h_pre and radial; `_mapping_records` and, for `pre`, `pre_backward` write it.

A block owns a slice of `columns` columns of phi (the same channels of every stream) and walks over
the tokens of its group, `tile` at a time. phi's slice stays in shared memory and grad_phi's slice
in the accumulators for the whole walk, so both cross the chip once a block instead of once a tile.
Per token x is read and grad_x written, with the terms of `pre` (2n + 1) C elements read and n C
written: 13 C at n = 4. The groups' parts of grad_phi are added by the next launch. There is no
atomic on data, and a token's row of a matrix product does not depend on the rows beside it.

Where launches overlap, `pre`'s records are still being written when the columns begin: each word
validates itself, being `PENDING` until it is there.

Products with phi run in tf32 on operands rounded to nearest, for fp32 x on pairs of them. Those for
grad_phi run in bf16 with grad_raw as a pair high + low (x is bf16 already), so 16 mantissa bits
count; for fp16, whose range is too small for grad_raw, in tf32 with grad_raw as a pair, and for
fp32 with both as pairs.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from ..common.architectures import shared_limit
from ..common.knobs import knob
from ..common.problem import Problem, Target
from ..common.programs import F32, ITEM_BYTES, PASS_CONFIGS, ceil_div, logits_per_token, program
from ..common.split import rest, round_rest, round_tf32
from .token_state import PENDING, record_width

# What `part` says of grad_x_part; "" leaves it out.
ADDED, MIXED = "added", "mixed"
WIDE_SHARED_BYTES = 112640  # of 64 tokens in flight, at most; 48 fit every supported GPU
TENSOR_CORE_PASS_CONFIGS = {**PASS_CONFIGS, "tl.disable_wgmma": True}


@dataclass(frozen=True)
class Config:
    """Launch knobs of the backward.

    Attributes:
        columns: columns of phi, over all streams, that a block owns. A power of two: other widths
            have no swizzle (320 took 354 us where 256 takes 150; 8192 x 2560, H200, 2026-11-22).
        tile: tokens per step.
        threads: per block.
        stages: steps whose operands are in shared memory or on their way.
        groups: blocks that share a slice's tokens.
        min_blocks: blocks that the registers must allow per multiprocessor.
    """

    columns: int = knob(256, reduction_order=True)
    tile: int = knob(32, reduction_order=True)
    threads: int = knob(128, reduction_order=True)
    stages: int = 2
    groups: int = 6
    min_blocks: int = 2

    def __post_init__(self):
        """Reject what cannot launch."""
        if self.threads < 32 or self.threads % 32:
            raise ValueError(
                "mapping_backward: config.threads must be a multiple of 32 and at least that, got "
                f"{self.threads}"
            )
        for name in ("columns", "groups", "min_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"mapping_backward: config.{name} must be positive, got {getattr(self, name)}"
                )
        if self.tile not in (16, 32):
            raise ValueError(f"mapping_backward: config.tile must be 16 or 32, got {self.tile}")
        if self.stages not in (2, 3, 4):
            raise ValueError(f"mapping_backward: config.stages must be 2 to 4, got {self.stages}")
        if self.columns & (self.columns - 1) or self.columns % (self.threads // 32 * 16):
            raise ValueError(
                "mapping_backward: config.columns must be a power of two and a multiple of 16 a "
                f"warp, got {self.columns} for {self.threads} threads"
            )


def default_config(problem: Problem, target: Target, *, batch_invariant: bool = False) -> Config:
    """Two blocks a multiprocessor in one wave, and never more groups than tiles of tokens.

    H200, 2026-11-22, columns and parts alone, n = 4, bf16: three stages of 16 tokens (87 KB of
    shared memory) take 147 us at 8192 x 2560 and 220 us at 8192 x 4096, two stages of 32 (110 KB)
    take 150 and 238 us; at 4096 x 7168 it is 219 and 214 us, but 32 tokens leave no registers for
    the launch that runs beside. fp16 and fp32 hold tf32 parts as well, n = 8 more rows of phi:
    narrower.
    """
    n = problem.n
    if problem.dtype == "bfloat16" and n < 8:
        return _config(problem, target, 256, 16, 128, 3, 2)
    columns = 64 if problem.dtype == "float32" and n == 8 else 128
    return _config(problem, target, columns, 16, 64 if n < 8 else 128, 2, 2)


def candidates(problem: Problem, target: Target) -> Iterator[Config]:
    """Configurations worth measuring."""
    shapes = ((256, 16, 128, 2, 3), (256, 16, 128, 3, 2))
    if problem.dtype != "bfloat16" or problem.n == 8:
        shapes = ((128, 16, 64, 2, 2), (128, 16, 64, 2, 3))
    elif shared_limit(target.arch) >= WIDE_SHARED_BYTES:
        shapes = ((256, 32, 128, 2, 2), *shapes, (256, 16, 128, 4, 2))
    for shape in shapes:
        yield _config(problem, target, *shape)


@functools.lru_cache(maxsize=1024)
def _config(
    problem: Problem,
    target: Target,
    columns: int,
    tile: int,
    threads: int,
    stages: int,
    resident: int,
) -> Config:
    slices = ceil_div(problem.channels, columns // problem.n)
    groups = max(1, resident * target.multiprocessors // slices)
    tiles = max(1, ceil_div(problem.tokens, tile))
    if tiles < groups:  # a power of two: every number of groups is a compilation
        groups = 1 << (tiles.bit_length() - 1)
    return Config(columns, tile, threads, stages, groups, resident)


def is_aligned(channels: int, dtype: str) -> bool:
    """Whether every row begins at a multiple of the 16 bytes that an asynchronous copy takes."""
    return channels * ITEM_BYTES[dtype] % 16 == 0


def _macros(
    channels: int, n: int, dtype: str, with_pre: bool, part: str, tile: int, width: int
) -> tuple[Any, Any, Any, Any]:
    """Parts of `columns_program`: fetch, high and low (what tensor cores keep, lose), products."""
    # bf16 goes to the tensor cores as it is, fp16 as tf32, which holds it, fp32 as pairs of tf32
    narrow, exact = dtype == "bfloat16", dtype == "float32"
    rows = {"transpose_A": True, "policy": T.GemmWarpPolicy.FullRow}
    copy = T.async_copy if is_aligned(channels, dtype) else T.copy
    with_part = bool(part)

    @T.macro
    def fetch(
        x, grad_layer_input, grad_x_part, records,
        streams, grad_input, staged, record, token, first, slot,
    ):  # fmt: skip
        for i in T.serial(n):
            copy(
                x[token : token + tile, i, first : first + width],
                streams[slot, :, i * width : (i + 1) * width],
            )
        if with_pre:
            copy(
                grad_layer_input[token : token + tile, first : first + width],
                grad_input[slot, :, :],
            )
        T.async_copy(records[token : token + tile, 0 : record_width(n)], record[slot, :, :])
        if with_part:
            for i in T.serial(n):
                copy(
                    grad_x_part[token : token + tile, i, first : first + width],
                    staged[slot, :, i * width : (i + 1) * width],
                )

    def high(value):
        return T.cast(value, dtype) if narrow else round_tf32(value)

    def low(value):
        left = rest(value, high(value))
        return T.cast(left, dtype) if narrow else round_rest(left)

    @T.macro
    def add_grad_phi(streams, x_high, x_low, grad_raw_high, grad_raw_low, grad_phi, now):
        if narrow:
            T.gemm(streams[now, :, :], grad_raw_high, grad_phi, **rows)
            T.gemm(streams[now, :, :], grad_raw_low, grad_phi, **rows)
        else:
            for t, c in T.Parallel(tile, n * width):
                if exact:
                    x_high[t, c] = high(streams[now, t, c])
                    x_low[t, c] = round_rest(streams[now, t, c] - high(streams[now, t, c]))
                else:
                    x_high[t, c] = T.cast(streams[now, t, c], F32)
            T.gemm(x_high, grad_raw_high, grad_phi, **rows)
            T.gemm(x_high, grad_raw_low, grad_phi, **rows)
            if exact:
                T.gemm(x_low, grad_raw_high, grad_phi, **rows)

    return fetch, high, low, add_grad_phi


@program(TENSOR_CORE_PASS_CONFIGS)
def columns_program(
    channels, n, dtype, with_pre, part, overlap,
    columns, tile, threads, stages, groups, min_blocks,
):  # fmt: skip
    """A slice of channels walks over the tokens of its group; see the module's docstring."""
    tokens = T.dynamic("tokens")
    logits = logits_per_token(n)
    width = columns // n
    slices = ceil_div(channels, width)
    rows = ceil_div(logits, 8) * 8  # of the matrix products
    narrow, exact = dtype == "bfloat16", dtype == "float32"
    # asynchronous ones, a tile of tokens
    copies = 1 + is_aligned(channels, dtype) * (n + int(with_pre) + n * bool(part))
    record_row = record_width(n)
    record_words = tile * record_row
    fetch, high, low, add_grad_phi = _macros(channels, n, dtype, with_pre, part, tile, width)

    def pre_term(weights, grad_input, now, t, c):
        if not with_pre:
            return 0.0
        return weights[t, c // width] * T.cast(grad_input[now, t, c % width], F32)

    def part_term(h_res, staged, now, token, t, c):
        if part != MIXED:
            return T.cast(staged[now, t, c], F32) if part else 0.0
        row = T.min(token + t, tokens - 1)
        terms = (
            h_res[row, o, c // width] * T.cast(staged[now, t, o * width + c % width], F32)
            for o in range(n)
        )
        return sum(terms, 0.0)

    @T.prim_func
    def mapping_backward_columns(
        x: T.Tensor((tokens, n, channels), dtype),
        grad_layer_input: T.Tensor((tokens, channels), dtype),
        grad_x_part: T.Tensor((tokens, n, channels), dtype),
        h_res: T.Tensor((tokens, n, n), F32),
        records: T.Tensor((tokens, record_width(n)), F32),
        phi: T.Tensor((logits, n, channels), F32),
        grad_x: T.Tensor((tokens, n, channels), dtype),
        grad_phi_parts: T.Tensor((groups, logits, n, channels), F32),
    ):
        with T.Kernel(slices * groups, threads=threads) as block:
            T.annotate_min_blocks_per_sm(min_blocks)
            first = block % slices * width
            group = block // slices
            phi_tile = T.alloc_shared((rows, columns), F32)
            phi_low = T.alloc_shared((rows, columns), F32)
            streams = T.alloc_shared((stages, tile, columns), dtype)
            grad_input = T.alloc_shared((stages, tile, width), dtype)
            staged = T.alloc_shared((stages, tile, columns), dtype)  # grad_x_part in, grad_x out
            record = T.alloc_shared((stages, tile, record_width(n)), F32)
            weights = T.alloc_shared((tile, n + 1), F32)
            grad_raw = T.alloc_shared((tile, rows), F32)
            grad_raw_high = T.alloc_shared((tile, rows), dtype) if narrow else grad_raw
            grad_raw_low = T.alloc_shared((tile, rows), dtype if narrow else F32)
            x_high = T.alloc_shared((tile, columns), F32)
            x_low = T.alloc_shared((tile, columns), F32)
            grad_phi = T.alloc_fragment((columns, rows), F32)
            grad_streams = T.alloc_fragment((tile, columns), F32)
            word = T.alloc_local((ceil_div(record_words, threads),), F32)
            value = T.alloc_var(F32)
            thread = T.get_thread_binding()

            # Swizzled, not padded: an asynchronous copy whose 128 bytes straddle two lines of
            # shared memory costs L2 half as much again.
            T.annotate_layout({b: make_swizzled_layout(b) for b in (grad_input, staged, record)})
            T.clear(grad_phi)
            for i in T.serial(n):
                T.copy(
                    phi[0:rows, i, first : first + width],
                    phi_tile[:, i * width : (i + 1) * width],
                )
            for k, c in T.Parallel(rows, columns):
                if exact:
                    phi_low[k, c] = round_rest(phi_tile[k, c] - round_tf32(phi_tile[k, c]))
                phi_tile[k, c] = round_tf32(phi_tile[k, c])
            if overlap and not with_pre:
                T.pdl_sync()
            for slot in T.unroll(stages - 1):
                token = (slot * groups + group) * tile
                fetch(
                    x, grad_layer_input, grad_x_part, records,
                    streams, grad_input, staged, record, token, first, slot,
                )  # fmt: skip

            for step in T.serial(T.ceildiv(T.ceildiv(tokens, tile) - group, groups)):
                token = (step * groups + group) * tile
                now = step % stages
                after = token + (stages - 1) * groups * tile
                free = (step + stages - 1) % stages
                fetch(
                    x, grad_layer_input, grad_x_part, records,
                    streams, grad_input, staged, record, after, first, free,
                )  # fmt: skip
                T.ptx_wait_group((stages - 1) * copies)
                T.sync_threads()
                for p in T.unroll(ceil_div(record_words, threads)):
                    entry = p * threads + thread
                    if entry < record_words:
                        word[p] = record[now, entry // record_row, entry % record_row]
                        if with_pre and overlap:
                            while T.reinterpret(word[p], "int32") == PENDING:
                                word[p] = T.atomic_load(
                                    records[token + entry // record_row, entry % record_row],
                                    memory_order="relaxed",
                                )
                for p in T.unroll(ceil_div(record_words, threads)):
                    t = (p * threads + thread) // record_row
                    k = (p * threads + thread) % record_row
                    if (p * threads + thread < record_words) and (k < rows):
                        value = T.if_then_else(k < logits, word[p], 0.0)
                        grad_raw[t, k] = round_tf32(value)
                        if narrow:
                            grad_raw_high[t, k] = high(value)
                        grad_raw_low[t, k] = low(value)
                    if (p * threads + thread < record_words) and logits <= k <= logits + n:
                        weights[t, k - logits] = word[p]
                # grad_x[i, c] = radial * x[i, c] + h_pre[i] * grad_layer_input[c] + part[i, c] + ..
                for t, c in T.Parallel(tile, columns):
                    grad_streams[t, c] = (
                        weights[t, n] * T.cast(streams[now, t, c], F32)
                        + pre_term(weights, grad_input, now, t, c)
                        + part_term(h_res, staged, now, token, t, c)
                    )
                # .. + sum_k grad_raw[k] * phi[k, i*C + c]
                T.gemm(grad_raw, phi_tile, grad_streams, policy=T.GemmWarpPolicy.FullCol)
                if exact:
                    T.gemm(grad_raw_low, phi_tile, grad_streams, policy=T.GemmWarpPolicy.FullCol)
                    T.gemm(grad_raw, phi_low, grad_streams, policy=T.GemmWarpPolicy.FullCol)
                # grad_phi[k, i*C + c] = sum_t grad_raw[t, k] * x[t, i, c]
                add_grad_phi(streams, x_high, x_low, grad_raw_high, grad_raw_low, grad_phi, now)
                T.copy(grad_streams, staged[now, :, :])
                for i in T.serial(n):
                    T.copy(
                        staged[now, :, i * width : (i + 1) * width],
                        grad_x[token : token + tile, i, first : first + width],
                    )

            if overlap:
                T.pdl_trigger()
                if with_pre:
                    T.pdl_sync()
            for c, k in T.Parallel(columns, rows):
                if first + c % width < channels and k < logits:
                    grad_phi_parts[group, k, c // width, first + c % width] = grad_phi[c, k]

    return mapping_backward_columns
