"""What the warps that sum grad_phi do in `pre_backward_team`, as macros.

A warp owns one stream, in tiles of 16 channels; all sums stay in registers. The products are
`mma.m16n8k16` with A = x, K = the 16 tokens of a group, and B = grad_raw as a pair high + low of
bf16. A lane is 4 * g + q; K = 8u + 2q + b is token 8u + 4b + q.
"""

from collections.abc import Callable

import tilelang.language as T

from ..common.pairs import WORD, lower, upper
from ..common.programs import F32, logits_per_token
from ..common.split import rest
from ..mapping.grad_x_pass import MIXED
from .mailbox import (
    BF16,
    CHUNK,
    GROUP,
    ROW_TILES,
    ROW_WORDS,
    STREAMS,
    SUM_WARPS,
    WARP,
    Share,
    load_macro,
    swizzled,
)


def sums_macros(share: Share, tokens: object) -> tuple[Callable[..., None], ...]:
    """The macros `fetch_part`, `mixing_words`, `add_group` and `flush`."""
    C, width, logits = share.channels, share.width, logits_per_token(STREAMS)
    token_size = (STREAMS + 1) * width
    load = load_macro(transposed=True)

    @T.macro
    def fetch_part(part, staged, slot, first, member, tx):
        """The warp's stream of a group of part, on its way; zeros beyond the tokens and C.

        A lane has tokens t and t + 8, so that places of its chunks differ by constants.
        """
        lane, stream = tx % WARP, tx // WARP
        # lanes of a quarter of the warp: tokens t and t + 2, so that they meet in no bank
        token, chunk = lane // 4 % 2 * 2 + lane // 8 % 2 + lane // 16 * 4, lane % 4
        flat = T.view(staged, (2 * GROUP * STREAMS * width,), BF16)
        origin = T.alloc_var("int64", 0)
        at = T.alloc_var("int32", 0)
        inner = T.alloc_var("int32", 0)
        present = T.alloc_var("int32", 0)
        chunks = T.alloc_var("int32", 0)
        inner = (token * STREAMS + stream) * C + member * width + chunk * CHUNK
        origin = first * (STREAMS * C) + T.cast(inner, "int64")
        present = T.cast(T.min(tokens - first, GROUP), "int32") - token
        present = T.if_then_else(first < 0, 0, present)
        chunks = share.chunks(member) - chunk
        at = ((slot * GROUP + token) * STREAMS + stream) * width + swizzled(chunk, token, stream)
        for half in T.unroll(2):
            for k in T.unroll(width // 32):
                T.ptx_cp_async(
                    T.access_ptr(
                        flat[(at ^ (k % 2 * 32)) + half * (8 * STREAMS * width) + k // 2 * 64],
                        "w", CHUNK,
                    ),
                    T.access_ptr(part[origin + (half * (8 * STREAMS * C) + k * 32)], "r", CHUNK),
                    CHUNK,
                    predicate=(half * 8 < present) and (share.whole or (k * 4 < chunks)),
                )  # fmt: skip

    @T.macro
    def mixing_words(mixing, h_res, first, tx):
        """Two weights of h_res of a group, which need not be one yet: high parts, low ones."""
        pair = T.alloc_local((2,), F32)
        both_words = T.alloc_local((1,), WORD)
        both = T.view(both_words, (2,), BF16)
        for o in T.unroll(2):
            pair[o] = T.atomic_load(
                h_res[
                    T.max(T.min(first + tx // 8, tokens - 1), 0),
                    (tx // STREAMS % 2 * 2 + o) * STREAMS + tx % STREAMS,
                ],
                memory_order="relaxed",
            )
        for v in T.vectorized(2):
            both[v] = T.cast(pair[v], BF16)
        mixing[0] = both_words[0]
        pair[0] = rest(pair[0], lower(mixing[0]))
        pair[1] = rest(pair[1], upper(mixing[0]))
        for v in T.vectorized(2):
            both[v] = T.cast(pair[v], BF16)
        mixing[1] = both_words[0]

    @T.macro
    def leave_words(high_low, mixing, tx):
        """Leave the words of h_res as the products want them."""
        words = T.view(high_low, (GROUP * ROW_WORDS,), WORD)
        i = tx % STREAMS
        entry = tx // 8 * ROW_WORDS + i // 2 * 12 + i % 2 * 4 + tx // STREAMS % 2
        words[entry] = mixing[0]
        words[entry + 2] = mixing[1]
        if tx < GROUP * 2:
            for v in T.vectorized(4):
                words[(tx // 2 * (ROW_WORDS // 4) + tx % 2 * 3 + 2) * 4 + v] = T.uint32(0)

    @T.macro
    def add_group(grad_phi, tiles, high_low, mixing, slot, tx, meeting):
        """grad_phi[k, e] += sum_t grad_raw[t, k] * x[t, e], high parts, then low ones."""
        lane, stream = tx % WARP, tx // WARP
        row = lane % 8  # of what the lane names to ldmatrix
        flat = T.view(tiles, (share.depth * GROUP * token_size,), BF16)
        pairs = T.alloc_local((ROW_TILES * 8,), BF16)
        source = T.alloc_local((8,), BF16)
        at = T.alloc_var("int32", 0)  # in bits 3 to 5 a chunk: that of token and stream
        for k in T.vectorized(ROW_TILES * 8):
            pairs[k] = high_low[lane, k]
        if share.part == MIXED:
            T.sync_threads(4, SUM_WARPS * WARP)  # whose place it is, grad_raw, has been read
            leave_words(high_low, mixing, tx)
            T.named_barrier_arrive(5, meeting)
        at = (slot * GROUP + lane // 16 * 8 + row % 2 * 4 + row // 2) * (STREAMS + 1) + stream
        at = at * width + (lane // 8 % 2 ^ row ^ stream % 2) * CHUNK
        for block in T.unroll(width // 64):
            for k in T.unroll(4):
                load(source, 0, flat, (at ^ (k * 2 * CHUNK)) + block * 64)
                for low in T.unroll(2):
                    for r in T.unroll(ROW_TILES):
                        T.ptx_mma(
                            F32, "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
                            source.data, 0, pairs.data, (low * ROW_TILES + r) * 4,
                            grad_phi.data, ((block * 4 + k) * ROW_TILES + r) * 4, T.bool(False),
                        )  # fmt: skip

    @T.macro
    def flush(grad_phi_parts, grad_phi, again, team, member, tx):
        """The team's part of grad_phi for the warp's stream, added to what is there `again`."""
        lane, stream = tx % WARP, tx // WARP
        inner = (lane % 4 * 2 * STREAMS + stream) * C + member * width + lane // 4
        origin = T.cast(team, "int64") * (logits * STREAMS * C) + T.cast(inner, "int64")
        present = share.chunks(member)  # to the whole warp or not
        for tile in T.unroll(width // 16):
            for h in T.unroll(2):
                T.sync_warp()  # else loads of all tiles come first, and spill
                if share.whole or (tile * 2 + h < present):
                    for r in T.unroll(ROW_TILES):
                        for k in T.unroll(2):
                            at = origin + ((r * 8 + k) * STREAMS * C + tile * 16 + h * 8)
                            if again:
                                grad_phi[(tile * ROW_TILES + r) * 4 + h * 2 + k] += grad_phi_parts[
                                    at
                                ]
                            grad_phi_parts[at] = grad_phi[(tile * ROW_TILES + r) * 4 + h * 2 + k]
        for v in T.unroll(width // 16 * ROW_TILES * 4):
            grad_phi[v] = 0.0

    return fetch_part, mixing_words, add_group, flush
