"""grad_x and grad_phi from one state a token: the part of mapping's backward that moves bytes.

    grad_x[i, c]         = sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]
                           + h_pre[i] * grad_layer_input[c] + grad_x_part[i, c]
                           [or + sum_o h_res[o, i] * grad_x_part[o, c], where it is grad_x_next]
    grad_phi[k, i*C + c] = sum_t grad_raw[t, k] * x[t, i, c]

Per token 2n C elements move, (3n + 1) C with all terms of `pre`, whose line each may be left out. A
block owns `columns` columns of phi (the same channels of every stream) and passes over the tokens
of its group, `tile` at a time. docs/kernels/mapping.md has the precision of the products.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from ..common.architectures import shared_limit
from ..common.knobs import check, knob, knobs_of
from ..common.problem import Problem, Target
from ..common.programs import F32, ITEM_BYTES, PASS_CONFIGS, ceil_div, logits_per_token, program
from ..common.split import rest, round_rest, round_tf32
from .token_state import NOT_READY, state_size

# What `part` says of grad_x_part; "" leaves it out.
ADDED, MIXED = "added", "mixed"
WIDE_SHARED_BYTES = 112640  # of 64 tokens in flight, at most; 48 fit every supported GPU
TENSOR_CORE_PASS_CONFIGS = {**PASS_CONFIGS, "tl.disable_wgmma": True}


@dataclass(frozen=True)
class Config:
    """Launch knobs."""

    columns: int = knob(256, reduction_order=True)  # of phi, over all streams, that a block owns
    tile: int = knob(32, reduction_order=True)  # tokens of a step
    threads: int = knob(128, reduction_order=True)
    stages: int = 2  # steps whose operands are in shared memory or on their way
    groups: int = 6  # blocks that share a slice's tokens
    min_blocks: int = 2  # blocks that the registers must allow per multiprocessor

    def __post_init__(self):
        """Reject what cannot launch."""
        warps, columns = self.threads // 32, self.columns
        # other widths than powers of two have no swizzle
        power = columns >= 1 and not columns & (columns - 1) and not columns % max(1, 16 * warps)
        check(
            "mapping_backward",
            self,
            "groups",
            "min_blocks",
            threads=(self.threads == 32 * warps > 0, "a multiple of 32 and at least that"),
            columns=(power, f"a power of two and a multiple of {16 * warps}, 16 a warp"),
            tile=(self.tile in (16, 32), "16 or 32"),
            stages=(self.stages in (2, 3, 4), "2 to 4"),
        )


def default_config(problem: Problem, target: Target, *, batch_invariant: bool = False) -> Config:
    """Two blocks a multiprocessor in one wave, and never more groups than tiles of tokens.

    Three stages of 16 tokens leave registers for the launch that runs beside; two of 32 do not.
    fp16 and fp32 hold tf32 operands as well, n = 8 more rows of phi: narrower.
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
    problem: Problem, target: Target, columns: int, tile: int, threads: int, stages: int, ctas: int
) -> Config:
    """With so many blocks a multiprocessor in one wave."""
    slices = ceil_div(problem.channels, columns // problem.n)
    groups = max(1, ctas * target.multiprocessors // slices)
    tiles = max(1, ceil_div(problem.tokens, tile))
    if tiles < groups:  # a power of two: every number of groups is a compilation
        groups = 1 << (tiles.bit_length() - 1)
    return Config(columns, tile, threads, stages, groups, ctas)


def is_aligned(C: int, dtype: str) -> bool:
    """Whether every row begins at a multiple of the 16 bytes that an asynchronous copy takes."""
    return C * ITEM_BYTES[dtype] % 16 == 0


def _fetch_macro(
    C: int, n: int, dtype: str, with_pre: bool, part: str, tile: int, width: int
) -> Any:
    """The macro `fetch`, which asks for the operands of a tile of tokens."""
    copy = T.async_copy if is_aligned(C, dtype) else T.copy
    with_part = bool(part)

    @T.macro
    def fetch(
        x, grad_layer_input, grad_x_part, states,
        streams, grad_input, staged, state, token, first, slot,
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
        T.async_copy(states[token : token + tile, 0 : state_size(n)], state[slot, :, :])
        if with_part:
            for i in T.serial(n):
                copy(
                    grad_x_part[token : token + tile, i, first : first + width],
                    staged[slot, :, i * width : (i + 1) * width],
                )

    return fetch


def _operand_macros(n: int, dtype: str, tile: int, width: int, threads: int, polls: bool) -> Any:
    """The macros `load_state`, from states to operands, and `add_grad_phi`."""
    # bf16 goes to the tensor cores as it is, fp16 as tf32, which holds it, fp32 as pairs of tf32
    narrow, exact = dtype == "bfloat16", dtype == "float32"
    full_row = {"transpose_A": True, "policy": T.GemmWarpPolicy.FullRow}
    logits, size = logits_per_token(n), state_size(n)
    rows, words = ceil_div(logits, 8) * 8, tile * size

    def high(value):
        """What tensor cores keep of a value."""
        return T.cast(value, dtype) if narrow else round_tf32(value)

    def low(value):
        """What they lose."""
        left = rest(value, high(value))
        return T.cast(left, dtype) if narrow else round_rest(left)

    @T.macro
    def load_state(
        word, state, states, grad_raw, grad_raw_high, grad_raw_low, weights, now, token, thread
    ):
        """A tile's grad_raw as operands; h_pre and radial into `weights`.

        Where `polls`, states are still being written: a thread waits for each of its words.
        """
        value = T.alloc_var(F32)
        for p in T.unroll(ceil_div(words, threads)):
            entry = p * threads + thread
            if entry < words:
                word[p] = state[now, entry // size, entry % size]
                if polls:
                    while T.reinterpret(word[p], "int32") == NOT_READY:
                        word[p] = T.atomic_load(
                            states[token + entry // size, entry % size], memory_order="relaxed"
                        )
        for p in T.unroll(ceil_div(words, threads)):
            t = (p * threads + thread) // size
            k = (p * threads + thread) % size
            if (p * threads + thread < words) and (k < rows):
                value = T.if_then_else(k < logits, word[p], 0.0)
                grad_raw[t, k] = round_tf32(value)
                if narrow:
                    grad_raw_high[t, k] = high(value)
                grad_raw_low[t, k] = low(value)
            if (p * threads + thread < words) and logits <= k <= logits + n:
                weights[t, k - logits] = word[p]

    @T.macro
    def add_grad_phi(streams, x_high, x_low, grad_raw_high, grad_raw_low, grad_phi, now):
        """grad_phi[k, i*C + c] += sum_t grad_raw[t, k] * x[t, i, c]."""
        if narrow:
            T.gemm(streams[now, :, :], grad_raw_high, grad_phi, **full_row)
            T.gemm(streams[now, :, :], grad_raw_low, grad_phi, **full_row)
        else:
            for t, c in T.Parallel(tile, n * width):
                if exact:
                    x_high[t, c] = high(streams[now, t, c])
                    x_low[t, c] = round_rest(streams[now, t, c] - high(streams[now, t, c]))
                else:
                    x_high[t, c] = T.cast(streams[now, t, c], F32)
            T.gemm(x_high, grad_raw_high, grad_phi, **full_row)
            T.gemm(x_high, grad_raw_low, grad_phi, **full_row)
            if exact:
                T.gemm(x_low, grad_raw_high, grad_phi, **full_row)

    return load_state, add_grad_phi


def _grad_x_macro(C: int, n: int, dtype: str, with_pre: bool, part: str, tokens: Any) -> Any:
    """The macro `add_grad_x`: all of a tile's grad_x, in the accumulators."""
    exact = dtype == "float32"

    def pre_term(weights, grad_input, now, t, c, width):
        if not with_pre:
            return 0.0
        return weights[t, c // width] * T.cast(grad_input[now, t, c % width], F32)

    def part_term(h_res, staged, now, token, t, c, width):
        if part != MIXED:
            return T.cast(staged[now, t, c], F32) if part else 0.0
        row = T.min(token + t, tokens - 1)
        terms = (
            h_res[row, o, c // width] * T.cast(staged[now, t, o * width + c % width], F32)
            for o in range(n)
        )
        return sum(terms, 0.0)

    @T.macro
    def add_grad_x(
        grad_streams, streams, grad_input, staged, h_res, weights,
        grad_raw, grad_raw_low, phi_tile, phi_low, now, token, shape,
    ):  # fmt: skip
        tile, width = shape
        # grad_x[i, c] = radial * x[i, c] + h_pre[i] * grad_layer_input[c] + part[i, c] + ..
        for t, c in T.Parallel(tile, n * width):
            grad_streams[t, c] = (
                weights[t, n] * T.cast(streams[now, t, c], F32)
                + pre_term(weights, grad_input, now, t, c, width)
                + part_term(h_res, staged, now, token, t, c, width)
            )
        # .. + sum_k grad_raw[k] * phi[k, i*C + c]
        T.gemm(grad_raw, phi_tile, grad_streams, policy=T.GemmWarpPolicy.FullCol)
        if exact:
            T.gemm(grad_raw_low, phi_tile, grad_streams, policy=T.GemmWarpPolicy.FullCol)
            T.gemm(grad_raw, phi_low, grad_streams, policy=T.GemmWarpPolicy.FullCol)

    return add_grad_x


@program(TENSOR_CORE_PASS_CONFIGS)
def grad_x_program(
    C: int, n: int, dtype: str, with_pre: bool, part: str, overlap: bool, config: Config
) -> Any:
    """A block a slice of phi's columns and a group of tokens; see the module's docstring.

    Where launches overlap, `pre`'s states are still being written when this one begins.
    """
    columns, tile, threads, stages, groups, min_blocks = knobs_of(config)
    tokens = T.dynamic("tokens")
    logits, width = logits_per_token(n), columns // n
    slices = ceil_div(C, width)
    rows = ceil_div(logits, 8) * 8  # of the matrix products
    narrow, exact = dtype == "bfloat16", dtype == "float32"
    # asynchronous ones, a tile of tokens
    copies = 1 + is_aligned(C, dtype) * (n + int(with_pre) + n * bool(part))
    fetch = _fetch_macro(C, n, dtype, with_pre, part, tile, width)
    load_state, add_grad_phi = _operand_macros(n, dtype, tile, width, threads, with_pre and overlap)
    add_grad_x = _grad_x_macro(C, n, dtype, with_pre, part, tokens)

    @T.prim_func
    def mapping_backward_grad_x(
        x: T.Tensor((tokens, n, C), dtype),
        grad_layer_input: T.Tensor((tokens, C), dtype),
        grad_x_part: T.Tensor((tokens, n, C), dtype),
        h_res: T.Tensor((tokens, n, n), F32),
        states: T.Tensor((tokens, state_size(n)), F32),
        phi: T.Tensor((logits, n, C), F32),
        grad_x: T.Tensor((tokens, n, C), dtype),
        grad_phi_partials: T.Tensor((groups, logits, n, C), F32),
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
            state = T.alloc_shared((stages, tile, state_size(n)), F32)
            weights = T.alloc_shared((tile, n + 1), F32)
            grad_raw = T.alloc_shared((tile, rows), F32)
            grad_raw_high = T.alloc_shared((tile, rows), dtype) if narrow else grad_raw
            grad_raw_low = T.alloc_shared((tile, rows), dtype if narrow else F32)
            x_high = T.alloc_shared((tile, columns), F32)
            x_low = T.alloc_shared((tile, columns), F32)
            grad_phi = T.alloc_fragment((columns, rows), F32)
            grad_streams = T.alloc_fragment((tile, columns), F32)
            word = T.alloc_local((ceil_div(tile * state_size(n), threads),), F32)
            thread = T.get_thread_binding()

            # Swizzled, not padded: an asynchronous copy whose 128 bytes straddle two lines of
            # shared memory costs L2 half as much again.
            T.annotate_layout({b: make_swizzled_layout(b) for b in (grad_input, staged, state)})
            T.clear(grad_phi)
            # phi_tile[k, i, c] = phi[k, i*C + first + c], rounded to tf32
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
                    x, grad_layer_input, grad_x_part, states,
                    streams, grad_input, staged, state, token, first, slot,
                )  # fmt: skip

            # grad_x[i, c] = sum_k grad_raw[k] * phi[k, i*C + c] + ..
            # grad_phi[k, i*C + c] += sum_t grad_raw[t, k] * x[t, i, c]
            for step in T.serial(T.ceildiv(T.ceildiv(tokens, tile) - group, groups)):
                token = (step * groups + group) * tile
                now = step % stages
                after = token + (stages - 1) * groups * tile
                free = (step + stages - 1) % stages
                fetch(
                    x, grad_layer_input, grad_x_part, states,
                    streams, grad_input, staged, state, after, first, free,
                )  # fmt: skip
                T.ptx_wait_group((stages - 1) * copies)
                T.sync_threads()
                load_state(
                    word, state, states, grad_raw, grad_raw_high, grad_raw_low, weights, now,
                    token, thread,
                )  # fmt: skip
                add_grad_x(
                    grad_streams, streams, grad_input, staged, h_res, weights,
                    grad_raw, grad_raw_low, phi_tile, phi_low, now, token, (tile, width),
                )  # fmt: skip
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
                if first + c % width < C and k < logits:
                    grad_phi_partials[group, k, c // width, first + c % width] = grad_phi[c, k]

    return mapping_backward_grad_x
