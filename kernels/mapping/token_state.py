"""The state of each token that the rest of mapping's backward reads.

    grad_raw[k] = alpha[gate of k] * grad_logits[k] * inv_rms             n*n + 2n floats
    h_pre[i]                                                              n floats
    radial      = -inv_rms^2 / (n*C) * sum_k alpha[gate of k] * grad_logits[k] * projection[k]

`backward.py` defines grad_logits. About 3 (n*n + 2n) floats a token cross device memory. One thread
owns one token. For `pre` the states are incomplete: grad_h_pre, which decides the first n floats
and a part of radial, comes from a later launch.
"""

from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ..common.architectures import overlaps, shared_limit
from ..common.constants import Sinkhorn
from ..common.programs import (
    F32,
    PASS_CONFIGS,
    architecture,
    ceil_div,
    logits_per_token,
    macro,
    program,
)
from ..common.sinkhorn_on_chip import (
    check_sums,
    logits_again,
    sigmoid,
    sinkhorn_replay,
    sinkhorn_reverse,
    softmax_out_back,
    sums_shape,
)

TOKENS_PER_BLOCK = 32
# A word of a state that is still to come: a NaN that no arithmetic makes.
NOT_READY = 0x7FC5EED5
NO_MESSAGE = 1  # in a mailbox, whose first messages are even words


def state_size(n: int) -> int:
    """Floats of a token's state, a multiple of 4: grad_raw [n*n + 2n], h_pre [n], radial."""
    return ceil_div(logits_per_token(n) + n + 1, 4) * 4


def sums_width(n: int) -> int:
    """Floats of a block's sums, a multiple of 32: grad_bias [n*n + 2n], grad_alpha [3]."""
    return ceil_div(logits_per_token(n) + 3, 32) * 32


@macro
def _residual_logits(matrix, projection, gate, bias, n):
    """logits_res[o, i] = alpha_res * projection[2n + o*n + i] + bias[2n + o*n + i]."""
    for o in T.unroll(n):
        for i in T.unroll(n):
            k = 2 * n + o * n + i
            matrix[o, i] = projection[k] * gate[2] + bias[k]


@macro
def _maps_back(
    grad_pre, grad_post, grad_res, projection, gate, bias, scale, state, gate_sums, constants
):
    """Turn cotangents of h_pre and h_post into those of logits; fill `state` except `radial`.

    `constants`: n, pre_eps, post_scale and whether the cotangent of h_pre is known. Where it is
    not, its rows of the state hold s * (1 - s), and what they add to other sums is left out.
    """
    n, pre_eps, post_scale, complete = constants
    value = T.alloc_var(F32)
    for g in T.unroll(3):
        gate_sums[g] = 0.0
    for i in T.unroll(n):
        # h_pre = sigmoid(logits_pre) + pre_eps ; grad_logits = grad_h_pre * s * (1 - s)
        value = sigmoid(projection[i] * gate[0] + bias[i])
        state[logits_per_token(n) + i] = value + pre_eps
        if complete:
            grad_pre[i] *= value * (1.0 - value)
            state[i] = grad_pre[i] * gate[0] * scale
            gate_sums[0] += grad_pre[i] * projection[i]
        else:
            grad_pre[i] = 0.0
            state[i] = value * (1.0 - value)
        # h_post = post_scale * sigmoid(logits_post) ; grad_logits likewise
        value = sigmoid(projection[n + i] * gate[1] + bias[n + i])
        grad_post[i] *= post_scale * value * (1.0 - value)
        state[n + i] = grad_post[i] * gate[1] * scale
        gate_sums[1] += grad_post[i] * projection[n + i]
    # grad_raw[k] = alpha_res * grad_logits[k] * inv_rms
    for o in T.unroll(n):
        for i in T.unroll(n):
            state[2 * n + o * n + i] = grad_res[o, i] * gate[2] * scale
            gate_sums[2] += grad_res[o, i] * projection[2 * n + o * n + i]


@macro
def _add_block(
    block_sums, value: T.Ref, present: T.Ref, grad_pre, grad_post, grad_res, gate_sums,
    block, lane, n,
):  # fmt: skip
    """The sums over a block's tokens, `present` of them: grad_bias and grad_alpha."""
    logits = logits_per_token(n)
    # grad_bias[k] = sum_t grad_logits[t, k]
    for i in T.unroll(n):
        value = T.warp_reduce_sum(grad_pre[i] * present)
        if lane == 0:
            block_sums[block, i] = value
        value = T.warp_reduce_sum(grad_post[i] * present)
        if lane == 0:
            block_sums[block, n + i] = value
        for o in T.unroll(n):
            value = T.warp_reduce_sum(grad_res[i, o] * present)
            if lane == 0:
                block_sums[block, 2 * n + i * n + o] = value
    # grad_alpha[g] = sum_t sum_{k of g} grad_logits[t, k] * projection[t, k]
    for g in T.unroll(3):
        value = T.warp_reduce_sum(gate_sums[g] * present)
        if lane == 0:
            block_sums[block, logits + g] = value
    # the padding, which is read with the rest
    for q in T.unroll(sums_width(n) // TOKENS_PER_BLOCK):
        if q * TOKENS_PER_BLOCK + lane >= logits + 3:
            block_sums[block, q * TOKENS_PER_BLOCK + lane] = 0.0


@program({**PASS_CONFIGS, "tl.device_compile_flags": ["-ftz=true"]})
def token_state_program(
    C: int,
    n: int,
    pre_eps: float,
    post_scale: float,
    manifold: Sinkhorn | None,
    complete: bool,
    clear_mailbox: bool,
    overlap: bool,
) -> Any:
    """From the cotangents of the maps to the states of tokens and the sums of blocks of tokens.

    Without `complete` grad_h_pre is not read: see `_maps_back`. With `clear_mailbox` every word of
    the next launch's mailbox is set to NO_MESSAGE.
    """
    words = T.dynamic("words")
    tokens, blocks = T.dynamic("tokens"), T.dynamic("blocks")
    logits, size = logits_per_token(n), state_size(n)
    lanes = TOKENS_PER_BLOCK
    load = T.unroll if n == 1 else T.vectorized  # 3 floats are no vector

    @T.prim_func
    def mapping_backward_token_state(
        grad_h_pre: T.Tensor((tokens, n), F32),
        grad_h_post: T.Tensor((tokens, n), F32),
        grad_h_res: T.Tensor((tokens, n, n), F32),
        projection: T.Tensor((tokens, logits), F32),
        inv_rms: T.Tensor((tokens,), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((logits,), F32),
        states: T.Tensor((tokens, size), F32),
        block_sums: T.Tensor((blocks, sums_width(n)), F32),
        mailbox: T.Tensor((words,), "int32"),
    ):
        with T.Kernel(T.ceildiv(tokens, lanes), threads=lanes) as block:
            if overlap:
                T.pdl_trigger()
            lane = T.get_thread_binding()
            if clear_mailbox:
                for step in T.serial(T.ceildiv(words, blocks * lanes)):
                    if (step * blocks + block) * lanes + lane < words:
                        mailbox[(step * blocks + block) * lanes + lane] = NO_MESSAGE
            token = T.alloc_var("int64")
            products = T.alloc_local((logits,), F32)
            grad_pre = T.alloc_local((n,), F32)
            grad_post = T.alloc_local((n,), F32)
            grad_res = T.alloc_local((n, n), F32)
            matrix = T.alloc_local((n, n), F32)
            gate = T.alloc_local((3,), F32)
            gate_sums = T.alloc_local((3,), F32)
            state = T.alloc_local((size,), F32)
            sums = T.alloc_shared(sums_shape(manifold, n, lanes), F32)
            scale = T.alloc_var(F32)
            present = T.alloc_var(F32)
            value = T.alloc_var(F32)
            token = T.min(block * lanes + lane, tokens - 1)
            scale = inv_rms[token]
            present = T.if_then_else(block * lanes + lane < tokens, 1.0, 0.0)
            for k in load(logits):
                products[k] = projection[token, k]
            if complete:
                for i in T.vectorized(n):
                    grad_pre[i] = grad_h_pre[token, i]
            for i in T.vectorized(n):
                grad_post[i] = grad_h_post[token, i]
            for o in T.unroll(n):
                for i in T.vectorized(n):
                    grad_res[o, i] = grad_h_res[token, o, i]
            for g in T.unroll(3):
                gate[g] = alpha[g]
            # h_res = sinkhorn(logits_res), then grad_h_res_logits by the reverse pass
            if manifold is not None:
                _residual_logits(matrix, products, gate, bias, n)
                sinkhorn_replay(matrix, sums, lane, n, manifold)
                sinkhorn_reverse(matrix, grad_res, sums, lane, n, manifold)
                for k in load(logits):  # again: as many registers less until here
                    products[k] = projection[token, k]
                if logits_again(manifold):
                    _residual_logits(matrix, products, gate, bias, n)
                    softmax_out_back(matrix, grad_res, n)
            _maps_back(
                grad_pre, grad_post, grad_res, products, gate, bias, scale, state, gate_sums,
                (n, pre_eps, post_scale, complete),
            )  # fmt: skip
            # radial = -inv_rms^2 / (n*C) * sum_k alpha[gate of k] * grad_logits[k] * projection[k]
            value = gate_sums[0] * gate[0] + gate_sums[1] * gate[1] + gate_sums[2] * gate[2]
            state[logits + n] = value * (-1.0 / (n * C)) * scale * scale
            for k in T.unroll(logits + n + 1, size):
                state[k] = 0.0
            if block * lanes + lane < tokens:
                for k in T.unroll(size // 4):
                    for v in T.vectorized(4):
                        states[token, k * 4 + v] = state[k * 4 + v]
            _add_block(
                block_sums, value, present, grad_pre, grad_post, grad_res, gate_sums, block, lane, n
            )

    return mapping_backward_token_state


def token_states(
    grad_h_pre: Tensor | None,
    grad_h_post: Tensor,
    grad_h_res: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    C: int,
    pre_eps: float,
    post_scale: float,
    manifold: Sinkhorn | None = None,
    extra_sums: int = 0,
    mailbox: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `token_state_program` on T >= 1 tokens.

    Without grad_h_pre the states are incomplete: `pre_backward` completes them. Without a manifold
    grad_h_res is the cotangent of the logits. `extra_sums` rows of the sums are left to a later
    launch, whose `mailbox`, int32, is cleared. RuntimeError if the sums of so many iterations do
    not fit this GPU's shared memory.

    Returns:
        states [T, state_size(n)], and sums of blocks of tokens [blocks + extra_sums,
        sums_width(n)], fp32.
    """
    tokens, n = grad_h_post.shape
    arch = architecture(projection.device)
    if manifold is not None:
        check_sums("pre_backward", manifold, n, TOKENS_PER_BLOCK, shared_limit(arch))
    states = projection.new_empty(tokens, state_size(n))
    blocks = ceil_div(tokens, TOKENS_PER_BLOCK)
    block_sums = projection.new_empty(blocks + extra_sums, sums_width(n))
    constants = (C, n, float(pre_eps), float(post_scale), manifold)
    terms = (grad_h_pre is not None, mailbox is not None)
    kernel = token_state_program(arch, *constants, *terms, overlaps(arch))
    # what a program does not read still has its shape
    grad_h_pre = grad_h_post if grad_h_pre is None else grad_h_pre
    words = inv_rms.view(torch.int32) if mailbox is None else mailbox.view(-1)
    maps = (grad_h_pre, grad_h_post, grad_h_res, projection, inv_rms, alpha, bias)
    kernel(*maps, states, block_sums[:blocks], words)
    return states, block_sums
