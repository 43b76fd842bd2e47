"""What the helper warps do with a group of 16 tokens in `pre_backward_team`, as macros.

They fetch, form dot products, exchange them and complete the records. A word of the exchange is a
float whose last bit is a flag, as in `_team_roles`. Chunks of 8 elements are swizzled with their
token's number, so that neither a row nor the four tokens of a lane's warp meet in a bank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import tilelang.language as T

from ..common.pairs import WORD
from ..common.programs import F32, ceil_div, logits_per_token
from ..common.split import exponent_of, rest, scale_of, unscale_of
from ..mapping.token_state import state_size, sums_width

WARP = 32
GROUP = 16  # tokens that travel together: K of the products for grad_phi
CHUNK = 8  # elements of 16 bytes
WARP_CHANNELS = 32  # of all streams that a warp forms columns of
STREAMS = 4  # n: a team holds 24 rows of phi and grad_phi in registers
ROW_TILES = 3  # of 8 rows
RADIAL = 6  # column of a token's weights, before what undoes its scale
ROW_WORDS = 24  # of a token's h_res: streams 0 and 1 (4 each), 4 zeros, streams 2 and 3, 4 zeros
SUM_WARPS = STREAMS  # that sum grad_phi, a stream each
HELPERS = 4  # warps that fetch, form dot products and complete records; tokens 4d .. 4d + 3 each
BF16, F16 = "bfloat16", "float16"


@dataclass(frozen=True)
class Share:
    """A member's share of the channels.

    Attributes:
        channels: C.
        width: channels of a member, 64 to 256: whole lines of 128 bytes, to swizzle and to copy.
        depth: tiles in the ring of x and grad_layer_input.
        part: what is added of merge's backward, as in `_mapping_columns`.
    """

    channels: int
    width: int
    depth: int
    part: str

    @property
    def warps(self) -> int:
        """Warps that form columns."""
        return self.width // WARP_CHANNELS

    @property
    def whole(self) -> bool:
        """Whether every member has all of its channels."""
        return self.channels % self.width == 0

    def chunks(self, member: Any) -> Any:
        """Chunks of a stream from the member's first to the last."""
        return (self.channels - member * self.width) // CHUNK

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        tiles = self.depth * (STREAMS + 1) + 2 * STREAMS
        return GROUP * tiles * self.width * 2 + WARP * 24 * 2 + 2 * WARP * 8 * 2 + GROUP * 8 * 4


def swizzled(chunk: Any, token: Any, stream: Any) -> Any:
    """First element of a chunk of a token and stream, the fifth being grad_layer_input."""
    return (chunk ^ (token % 4 * 2 + (token // 4 + stream) % 2)) * CHUNK


def largest_of(maxima: Any, count: int) -> Any:
    """The largest of the first values."""
    return reduce(T.max, (maxima[w] for w in range(count)))


def unknown(weights: Any, thread: Any) -> Any:
    """A thread's number, added to a zero in shared memory.

    The compiler cannot know it. Else it keeps what follows from it, two dozen registers of a thread
    that mixes, for the whole walk, and spills.
    """
    return thread + T.reinterpret(weights[0, STREAMS], "int32")


def first_token(group: Any, teams: int, team: Any) -> Any:
    """Of a team's group, none below zero.

    Products that may wrap as far as the compiler knows: else it takes the sum apart, keeps the
    parts for the whole walk, and spills.
    """
    number = T.cast(group, WORD) * T.uint32(teams) + T.cast(team, WORD)
    return T.cast(number, "int64") * GROUP


def load_macro(*, transposed: bool) -> Callable[..., None]:
    """The macro `load`: four matrices of 8 x 8 by `ldmatrix`."""

    @T.macro
    def load(fragment, begin, tiles, at):
        """Of the rows that the lanes name."""
        T.ptx_ldmatrix(
            T.bool(transposed), 4,
            T.access_ptr(tiles[at], "r", CHUNK),
            T.access_ptr(fragment[begin], "w", 8),
        )  # fmt: skip

    return load


def fetch_macro(share: Share, tokens: object) -> Callable[..., None]:
    """The macro `fetch` (of x and grad_layer_input)."""
    C, width = share.channels, share.width
    segment_chunks = width // CHUNK

    @T.macro
    def copy_rows(source, target, slot, origin, count, stream, chunk, places, guarded, present):
        """Rows of 16 bytes a thread; `places` is (how many, distance, first one)."""
        for turn in (T.serial if guarded else T.unroll)(places[0]):
            place = turn * places[1] + places[2]
            if guarded:
                T.ptx_cp_async(
                    T.access_ptr(
                        target[slot, place, stream, swizzled(chunk, place, stream)], "w", CHUNK
                    ),
                    T.access_ptr(source[(origin + place * count) * CHUNK], "r", CHUNK),
                    CHUNK,
                    predicate=place < present,
                )
            else:
                T.ptx_cp_async(
                    T.access_ptr(
                        target[slot, place, stream, swizzled(chunk, place, stream)], "w", CHUNK
                    ),
                    T.access_ptr(source[(origin + place * count) * CHUNK], "r", CHUNK),
                    CHUNK,
                )

    @T.macro
    def fetch_rows(source, target, slot, first, member, tx, streams, behind, places):
        """source[first : first + 16, :, segment] on its way into target[slot, :, behind:].

        Zeros beyond it.
        """
        stream, chunk = tx // segment_chunks, tx % segment_chunks
        inner = T.alloc_var("int32", stream * (C // CHUNK) + member * segment_chunks + chunk)
        origin = T.alloc_var("int64", 0)  # in chunks
        present = T.alloc_var("int32", 0)
        origin = first * (streams * C // CHUNK) + T.cast(inner, "int64")
        if stream < streams:
            if (first + GROUP <= tokens) and (share.whole or ((member + 1) * width <= C)):
                copy_rows(
                    source, target, slot, origin, streams * C // CHUNK, stream + behind, chunk,
                    places, False, 0,
                )  # fmt: skip
            else:
                present = T.cast(T.min(tokens - first, GROUP), "int32")
                if (not share.whole) and (chunk >= share.chunks(member)):
                    present = 0
                copy_rows(
                    source, target, slot, origin, streams * C // CHUNK, stream + behind, chunk,
                    places, True, present,
                )  # fmt: skip

    @T.macro
    def fetch(x, grad_layer_input, tiles, slot, first, member, tx):
        """A group of x, and grad_layer_input as its last stream."""
        fetch_rows(x, tiles, slot, first, member, tx, STREAMS, 0, (GROUP, 1, 0))
        places = (GROUP // HELPERS, HELPERS, tx // WARP)
        fetch_rows(grad_layer_input, tiles, slot, first, member, tx % WARP, 1, STREAMS, places)

    return fetch


def dots_macro(share: Share, slots: int) -> Callable[..., None]:
    """The macro `send_dots(tiles, slot, exchange, team, member, group, tx)`."""
    load = load_macro(transposed=False)

    @T.macro
    def send_dots(tiles, slot, exchange, team, member, group, tx):
        """grad_h_pre[t, i] = sum_c grad_layer_input[t, c] * x[t, i, c], the member's channels.

        A warp has the products of all its tokens and streams of x (rows g: token g // 2, stream
        g % 2; rows 8 + g: two streams on) with grad_layer_input of its tokens (columns, twice), and
        sends those of equal tokens.
        """
        lane, warp = tx % WARP, tx // WARP
        g, q = lane // 4, lane % 4
        row = lane % 8  # of what the lane names to ldmatrix
        flat = T.view(tiles, (share.depth * GROUP * (STREAMS + 1) * share.width,), BF16)
        x_lane = T.alloc_local((16,), BF16)
        grad = T.alloc_local((8,), BF16)
        dots = T.alloc_local((2 * 4,), F32)
        total = T.alloc_var(F32, 0.0)
        # in bits 3 to 5 a chunk: that of token and stream, see `swizzled`
        at_x = T.alloc_var("int32", 0)
        at_grad = T.alloc_var("int32", 0)
        at_grad = (slot * GROUP + warp * 4) * (STREAMS + 1)
        at_x = at_grad + row // 2 * (STREAMS + 1) + lane // 8 % 2 * 2 + row % 2
        at_grad = at_grad + row % 4 * (STREAMS + 1) + STREAMS
        at_x = at_x * share.width + (lane // 16 ^ row ^ warp % 2) * CHUNK
        at_grad = at_grad * share.width + (lane // 8 ^ row % 4 * 2 ^ warp % 2) * CHUNK
        for v in T.unroll(2 * 4):
            dots[v] = 0.0
        for block in T.unroll(share.width // 64):  # a chunk's place differs within 64 channels
            if block > 0:
                T.sync_warp()  # else loads come earlier than there are registers
            for half in T.unroll(2):
                load(grad, 0, flat, (at_grad ^ (half * 4 * CHUNK)) + block * 64)
                for k in T.unroll(2):
                    load(x_lane, k * 8, flat, (at_x ^ ((half * 2 + k) * 2 * CHUNK)) + block * 64)
                for k in T.unroll(2):
                    T.ptx_mma(
                        F32, "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
                        x_lane.data, k * 8, grad.data, k * 4, dots.data, k * 4, T.bool(False),
                    )  # fmt: skip
        for v in T.unroll(4):
            dots[v] = dots[v] + dots[4 + v]
        total = T.if_then_else(
            q < 2,
            T.if_then_else(g // 2 % 2 == 0, dots[0], dots[1]),
            T.if_then_else(g // 2 % 2 == 0, dots[2], dots[3]),
        )
        if q % 2 == g // 4:
            T.atomic_store(
                exchange[
                    team, T.cast(group % slots, "int64"), member,
                    (warp * 4 + g // 2) * STREAMS + q // 2 * 2 + g % 2,
                ],
                (T.reinterpret(total, "int32") & -2) | (group // slots % 2),
                memory_order="relaxed",
            )  # fmt: skip

    return send_dots


def receive_macros(share: Share, members: int, slots: int) -> tuple[Callable[..., None], ...]:
    """The macros `ask`, `request`, `receive`, `publish` and `leave_sums`.

    Lane 8 * t + k of warp d has rows k, k + 8 and k + 16 of token 4 * d + t.
    """
    half = ceil_div(members, 2)
    logits = logits_per_token(STREAMS)
    assert state_size(STREAMS) >= logits + STREAMS + 1

    @T.macro
    def ask(words, exchange, team, group, tx):
        """The members' words of a token and stream, half of them."""
        for m in T.unroll(half):
            words[m] = T.atomic_load(
                exchange[
                    team, T.cast(group % slots, "int64"),
                    T.min(tx % 2 * half + m, members - 1), tx // 2,
                ],
                memory_order="relaxed",
            )  # fmt: skip

    @T.macro
    def request(record, unfinished, projection, inv_rms, first, tokens, tx):
        """Ask for what `receive` needs of a group besides the words."""
        row = tx % 8
        token = T.min(first + tx // 8, tokens - 1)
        for r in T.unroll(ROW_TILES):
            record[r] = unfinished[token, r * 8 + row]
        record[3] = unfinished[token, logits + T.min(row, STREAMS)]  # h_pre, then radial
        record[4] = projection[token, row]
        record[5] = inv_rms[token]

    @T.macro
    def receive(words, record, ready, exchange, gate, sums, team, group, first, tokens, tx):
        """Complete the record of a token: ready = grad_raw of the lane's rows, weight, exponent."""
        stale = T.alloc_var("int32", 1)
        total = T.alloc_var(F32, 0.0)
        grad = T.alloc_var(F32, 0.0)
        product = T.alloc_var(F32, 0.0)
        row, lane = tx % 8, tx % WARP
        stale = 1
        while stale != 0:
            stale = 0
            for m in T.unroll(half):
                stale = stale | (words[m] ^ (group // slots))
            stale = stale & 1
            if stale != 0:
                ask(words, exchange, team, group, tx)
        # grad_h_pre[row // 2], in the order of the members, both halves alike
        total = T.reinterpret(words[0] & -2, F32)
        for m in T.unroll(1, half):
            if tx % 2 * half + m < members:
                total = total + T.reinterpret(words[m] & -2, F32)
        total = total + T.shfl_xor(total, 1)
        total = T.shfl_sync(total, lane // 8 * 8 + row % STREAMS * 2)
        # grad_logits[i] = grad_h_pre[i] * s * (1 - s) ; the record holds s * (1 - s)
        grad = T.if_then_else(row < STREAMS, total * record[0], 0.0)
        product = grad * record[4]
        # grad_raw[i] = alpha * grad_logits[i] * inv_rms
        ready[0] = T.if_then_else(row < STREAMS, grad * gate * record[5], record[0])
        ready[1] = record[1]
        ready[2] = record[2]
        if first + tx // 8 < tokens:
            sums[0] += grad
            sums[1] += product
        else:
            for r in T.unroll(ROW_TILES):
                ready[r] = 0.0
        # radial -= inv_rms^2 / (n*C) * sum_i alpha * grad_logits[i] * projection[i]
        product = product + T.shfl_xor(product, 1)
        product = product + T.shfl_xor(product, 2)
        product = product + T.shfl_xor(product, 4)
        product *= gate * (-1.0 / (STREAMS * share.channels)) * record[5] * record[5]
        ready[3] = record[3] + T.if_then_else(row == STREAMS, product, 0.0)
        # the largest |grad_raw[k]| of the token
        total = T.max(T.max(T.abs(ready[0]), T.abs(ready[1])), T.abs(ready[2]))
        total = T.max(total, T.shfl_xor(total, 1))
        total = T.max(total, T.shfl_xor(total, 2))
        ready[4] = T.max(total, T.shfl_xor(total, 4))

    @T.macro
    def publish(ready, high_low, scaled, weights, tx):
        """Leave the records of a group as the products want them.

        weights[token] is h_pre, two unused, radial and what undoes the token's scale and phi's.
        """
        exponent = T.alloc_var("int32", 0)
        scale = T.alloc_var(F32, 0.0)
        row, warp = tx % 8, tx // WARP
        quarter = tx % WARP // 8  # token % 4; the token is 4 * warp + quarter
        # a power of two that brings the largest to 2^14 or a little more
        exponent = exponent_of(ready[4])
        scale = scale_of(exponent)
        if row <= STREAMS + 1:
            unscale = unscale_of(exponent)
            unscale *= T.view(scaled, (2 * WARP * 4,), F32)[3]
            column = T.if_then_else(row < STREAMS, row, row + 2)
            weights[tx // 8, column] = T.if_then_else(row <= STREAMS, ready[3], unscale)
        for r in T.unroll(ROW_TILES):
            high_low[row * 4 + quarter, r * 4 + warp] = T.cast(ready[r], BF16)
            high_low[row * 4 + quarter, (ROW_TILES + r) * 4 + warp] = T.cast(
                rest(ready[r], T.cast(ready[r], BF16)), BF16
            )
            scaled[
                warp // 2, (quarter * 2 + warp % 2) * 4 + row // 2, r * 2 + row % 2
            ] = T.cast(ready[r] * scale, F16)  # fmt: skip

    @T.macro
    def leave_sums(block_sums, sums, first_row, tx):
        """grad_bias of h_pre's logits and their part of grad_alpha, of every token once."""
        lane = tx % WARP
        for v in T.unroll(2):
            sums[v] = sums[v] + T.shfl_xor(sums[v], 8)
            sums[v] = sums[v] + T.shfl_xor(sums[v], 16)
        sums[1] = sums[1] + T.shfl_xor(sums[1], 1)
        sums[1] = sums[1] + T.shfl_xor(sums[1], 2)
        sums[1] = T.shfl_sync(sums[1], 0)
        for q in T.unroll(sums_width(STREAMS) // WARP):
            column = q * WARP + lane
            block_sums[first_row + tx // WARP, column] = T.if_then_else(
                column == logits, sums[1], T.if_then_else(column < STREAMS, sums[0], 0.0)
            )

    return ask, request, receive, publish, leave_sums
