"""What the helper warps do with a group of 16 tokens in `pre_backward_team`, as macros.

They fetch, form dot products, exchange them and complete the records. A word of the exchange is a
float whose last bit is a flag, as in `_team_roles`. Chunks of 8 elements are swizzled with their
token's number, so that neither a row nor the four tokens of a lane's warp meet in a bank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tilelang.language as T

from ._mapping_records import record_width
from ._pairs import WORD, lower, upper
from ._programs import F32, ceil_div, logits_per_token

WARP = 32
GROUP = 16  # tokens that travel together: K of the products for grad_phi
CHUNK = 8  # elements of 16 bytes
WARP_CHUNKS = 16  # of a warp's columns
STREAMS = 4  # n: a team holds 24 rows of phi and grad_phi in registers
ROW_TILES = 3  # of 8 rows
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
    def chunks(self) -> int:
        """Of a token's E elements."""
        return STREAMS * self.width // CHUNK

    @property
    def warps(self) -> int:
        """Warps that form columns."""
        return ceil_div(self.chunks, WARP_CHUNKS)

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        tiles = self.depth * (STREAMS + 1) + 2 * STREAMS * bool(self.part)
        return GROUP * tiles * self.width * 2 + WARP * 24 * 2 + 2 * WARP * 8 * 2 + GROUP * 8 * 4


def swizzled(chunk: object, token: object) -> object:
    """First element of a chunk of a token and stream."""
    return (chunk ^ (2 * (token % 4))) * CHUNK


def exponent_of(value: object) -> object:
    """The biased exponent of a float, within what the scales by powers of two can express."""
    bits = T.reinterpret(value, "int32") >> 23 & 255
    return T.min(T.max(bits, 15), 253)


def fetch_macros(share: Share, tokens: object) -> tuple[Callable[..., None], ...]:
    """The macros `fetch` (of x and grad_layer_input) and `fetch_streams` (of part)."""
    C, width = share.channels, share.width
    segment_chunks = width // CHUNK

    @T.macro
    def copy_rows(source, target, slot, origin, count, stream, chunk, places, guarded, present):
        """Rows of 16 bytes a thread; `places` is (how many, distance, first one)."""
        for turn in (T.serial if guarded else T.unroll)(places[0]):
            place = turn * places[1] + places[2]
            if guarded:
                T.ptx_cp_async(
                    T.access_ptr(target[slot, place, stream, swizzled(chunk, place)], "w", CHUNK),
                    T.access_ptr(source[(origin + place * count) * CHUNK], "r", CHUNK),
                    CHUNK,
                    predicate=place < present,
                )
            else:
                T.ptx_cp_async(
                    T.access_ptr(target[slot, place, stream, swizzled(chunk, place)], "w", CHUNK),
                    T.access_ptr(source[(origin + place * count) * CHUNK], "r", CHUNK),
                    CHUNK,
                )

    @T.macro
    def fetch_rows(source, target, slot, first, member, tx, streams, places):
        """source[first : first + 16, :, segment] on its way into target[slot], zeros beyond it."""
        stream, chunk = tx // segment_chunks, tx % segment_chunks
        inner = T.alloc_var("int32", stream * (C // CHUNK) + member * segment_chunks + chunk)
        origin = T.alloc_var("int64", 0)  # in chunks
        present = T.alloc_var("int32", 0)
        origin = first * (streams * C // CHUNK) + T.cast(inner, "int64")
        if stream < streams:
            if (first + GROUP <= tokens) and ((member + 1) * width <= C):
                copy_rows(
                    source, target, slot, origin, streams * C // CHUNK, stream, chunk, places,
                    False, 0,
                )  # fmt: skip
            else:
                present = T.cast(T.min(tokens - first, GROUP), "int32")
                if member * width + chunk * CHUNK >= C:
                    present = 0
                copy_rows(
                    source, target, slot, origin, streams * C // CHUNK, stream, chunk, places,
                    True, present,
                )  # fmt: skip

    @T.macro
    def fetch_streams(source, target, slot, first, member, tx):
        """A group of x, or of part."""
        fetch_rows(source, target, slot, first, member, tx, STREAMS, (GROUP, 1, 0))

    @T.macro
    def fetch(x, grad_layer_input, streams, inputs, slot, first, member, tx):
        """A group of x and of grad_layer_input."""
        fetch_streams(x, streams, slot, first, member, tx)
        places = (GROUP // HELPERS, HELPERS, tx // WARP)
        fetch_rows(grad_layer_input, inputs, slot, first, member, tx % WARP, 1, places)

    return fetch, fetch_streams


def dots_macro(share: Share, slots: int) -> Callable[..., None]:
    """The macro `send_dots(streams, inputs, slot, exchange, team, member, group, tx)`."""
    input_chunks = share.width // CHUNK

    @T.macro
    def halve(values, count, distance, lane):
        """Half of the values, each with what the lane at `distance` has of it."""
        for v in T.unroll(count):
            upper = T.alloc_var(F32)
            lower = T.alloc_var(F32)
            lower = T.if_then_else(lane & distance == 0, values[v], values[v + count])
            upper = T.if_then_else(lane & distance == 0, values[v + count], values[v])
            values[v] = lower + T.shfl_xor(upper, distance)

    @T.macro
    def send_dots(streams, inputs, slot, exchange, team, member, group, tx):
        """grad_h_pre[t, i] = sum_c grad_layer_input[t, c] * x[t, i, c], the member's channels."""
        lane, warp = tx % WARP, tx // WARP
        grad = T.alloc_local((CHUNK,), BF16)
        stream = T.alloc_local((CHUNK,), BF16)
        grad_words = T.view(grad, (CHUNK // 2,), WORD)
        stream_words = T.view(stream, (CHUNK // 2,), WORD)
        dots = T.alloc_local((4 * STREAMS,), F32)
        for v in T.unroll(4 * STREAMS):
            dots[v] = 0.0
        if lane < input_chunks:
            for turn in T.unroll(4):
                for v in T.vectorized(CHUNK):
                    grad[v] = inputs[slot, warp * 4 + turn, 0, swizzled(lane, turn) + v]
                for i in T.unroll(STREAMS):
                    for v in T.vectorized(CHUNK):
                        stream[v] = streams[slot, warp * 4 + turn, i, swizzled(lane, turn) + v]
                    for k in T.unroll(CHUNK // 2):
                        dots[turn * STREAMS + i] += lower(grad_words[k]) * lower(stream_words[k])
                        dots[turn * STREAMS + i] += upper(grad_words[k]) * upper(stream_words[k])
        # 16 sums over the lanes at once; those of lanes 2v and 2v + 1 are sum v
        halve(dots, 8, 16, lane)
        halve(dots, 4, 8, lane)
        halve(dots, 2, 4, lane)
        halve(dots, 1, 2, lane)
        dots[0] = dots[0] + T.shfl_xor(dots[0], 1)
        if lane % 2 == 0:
            T.atomic_store(
                exchange[
                    team, T.cast(group % slots, "int64"), member, warp * 4 * STREAMS + lane // 2
                ],
                (T.reinterpret(dots[0], "int32") & -2) | (group // slots % 2),
                memory_order="relaxed",
            )

    return send_dots


def receive_macros(share: Share, members: int, slots: int) -> tuple[Callable[..., None], ...]:
    """The macros `ask`, `request`, `receive` and `publish`.

    Lane 8 * t + k of warp d has rows k, k + 8 and k + 16 of token 4 * d + t.
    """
    half = ceil_div(members, 2)
    logits = logits_per_token(STREAMS)
    assert record_width(STREAMS) >= logits + STREAMS + 1

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
        """Leave the records of a group as the products want them."""
        exponent = T.alloc_var("int32", 0)
        scale = T.alloc_var(F32, 0.0)
        row, warp = tx % 8, tx // WARP
        column = tx % WARP // 8  # token % 4; the token is 4 * warp + column
        # a power of two that brings the largest to 2^14 or a little more
        exponent = exponent_of(ready[4])
        scale = T.reinterpret((268 - exponent) << 23, F32)
        if row <= STREAMS + 1:
            unscale = T.reinterpret((exponent - 14) << 23, F32)
            weights[tx // 8, row] = T.if_then_else(row <= STREAMS, ready[3], unscale)
        for r in T.unroll(ROW_TILES):
            high_low[row * 4 + column, r * 4 + warp] = T.cast(ready[r], BF16)
            high_low[row * 4 + column, (ROW_TILES + r) * 4 + warp] = T.cast(
                ready[r] - T.cast(T.cast(ready[r], BF16), F32), BF16
            )
            scaled[
                warp // 2, (column * 2 + warp % 2) * 4 + row // 2, r * 2 + row % 2
            ] = T.cast(ready[r] * scale, F16)  # fmt: skip

    return ask, request, receive, publish
