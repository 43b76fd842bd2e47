"""What the roles of the team kernel do in a round, as macros; `pre_team` puts them together.

A word of the exchange is a float whose last bit is a flag that flips whenever its slot is reused:
it validates itself. `words` are a lane's words, asked for one round before they are needed.
"""

from collections.abc import Callable

import tilelang.language as T

from ._programs import F32, ceil_div, logits_per_token
from ._projection import WARP, Segment, inverse_rms, sigmoid, sinkhorn_registers


def word_columns(n: int) -> int:
    """Words of a token and member: the partial sums, padded to 32 bytes."""
    return ceil_div(logits_per_token(n) + 1, 8) * 8


def send_macros(segment: Segment, slots: int, threads: int) -> tuple[Callable[..., None], ...]:
    """The macros `clear(exchange, team, member, tx)` and `send(sums, exchange, ...)`."""
    G, warps, columns, stride = (
        segment.group,
        segment.warps,
        segment.columns,
        word_columns(segment.n),
    )
    words_each = slots * G * stride

    @T.macro
    def clear(exchange, team, member, tx):
        """No message yet: the first use of a slot expects an even word."""
        for p in T.unroll(ceil_div(words_each, threads * 4)):
            entry = (p * threads + tx) * 4
            if entry < words_each:
                for v in T.vectorized(4):
                    exchange[
                        team, entry // (G * stride), member, entry // stride % G, entry % stride + v
                    ] = 1  # fmt: skip

    @T.macro
    def send(sums, exchange, team, member, j, rounds, index, senders, lane):
        """Publish the member's parts of group j - 1: the sum over its warps, last bit = flag."""
        if (j >= 1) and (j <= rounds):
            for p in T.unroll(ceil_div(G, senders)):
                slot_token = p * senders + index
                for q in T.unroll(ceil_div(columns, WARP)):
                    part = T.alloc_var(F32, 0.0)
                    if (slot_token < G) and (q * WARP + lane < columns):
                        for w in T.unroll(warps):
                            part = part + sums[(j - 1) % 2, w, slot_token, q * WARP + lane]
                        slot = T.cast((j - 1) % slots, "int64")
                        T.atomic_store(
                            exchange[team, slot, member, slot_token, q * WARP + lane],
                            (T.reinterpret(part, "int32") & -2) | ((j - 1) // slots % 2),
                            memory_order="relaxed",
                        )

    return clear, send


def receive_macro(
    segment: Segment, members: int, lag: int, slots: int, norm_eps: float, pre_eps: float
) -> Callable[..., None]:
    """The macro `receive(words, sums, exchange, team, j, rounds, gate, offset, index, lane)`."""
    G, n, columns = segment.group, segment.n, segment.columns
    quantities = n + 1  # what pre-apply waits for: the sum of squares and the pre logits
    tokens_per_warp = WARP // quantities

    @T.macro
    def receive(words, sums, exchange, team, j, rounds, gate, offset, index, lane):
        """Receive group j + 1 - lag, whose words were asked for in the previous round."""
        stale = T.alloc_var("int32", 0)
        scale = T.alloc_var(F32, 0.0)
        value = T.alloc_var(F32, 0.0)
        arriving = j + 1 - lag
        slot_token = index * tokens_per_warp + lane // quantities
        quantity = lane % quantities
        receives = (lane < tokens_per_warp * quantities) and (slot_token < G)
        if (arriving >= 0) and (arriving < rounds):
            value = 0.0
            if receives:
                stale = 1
                while stale != 0:
                    stale = 0
                    for m in T.unroll(members):
                        stale = stale | (words[0, 0, m] ^ (arriving // slots))
                    stale = stale & 1
                    if stale != 0:
                        for m in T.unroll(members):
                            words[0, 0, m] = T.atomic_load(
                                exchange[
                                    team, T.cast(arriving % slots, "int64"), m, slot_token, quantity
                                ],
                                memory_order="relaxed",
                            )  # fmt: skip
                for m in T.unroll(members):
                    value = value + T.reinterpret(words[0, 0, m] & -2, F32)
        # ask for the next group; words that come too early are asked for again in the next round
        if receives and (arriving >= -1) and (arriving < rounds - 1):
            for m in T.unroll(members):
                words[0, 0, m] = T.atomic_load(
                    exchange[
                        team, T.cast((arriving + 1) % slots, "int64"), m, slot_token, quantity
                    ],
                    memory_order="relaxed",
                )  # fmt: skip
        scale = T.shfl_sync(value, lane // quantities * quantities)
        inverse_rms(scale, n * segment.channels, norm_eps)
        # h_pre = sigmoid(logits_pre) + pre_eps
        if receives and (quantity > 0):
            value = value * scale * gate + offset
            sigmoid(value)
            sums[arriving % 2, quantity - 1, slot_token, columns] = value + pre_eps

    return receive


def owner_macros(
    segment: Segment, members: int, slots: int, tokens: object
) -> tuple[Callable[..., None], ...]:
    """The macros `request(words, ...)` and `own(words, ...)` of the owner warp."""
    G, columns = segment.group, segment.columns
    lanes = ceil_div(columns, WARP)
    owned_tokens = ceil_div(G, members)

    @T.macro
    def request(words, exchange, team, group, owned, lane):
        """Ask for the parts of the tokens owned + s * members of a group.

        The address is clamped: what does not exist is not used.
        """
        for s in T.unroll(owned_tokens):
            for q in T.unroll(lanes):
                for m in T.unroll(members):
                    words[q, s, m] = T.atomic_load(
                        exchange[
                            team, T.cast(group % slots, "int64"), m,
                            T.min(owned + s * members, G - 1), T.min(q * WARP + lane, columns - 1),
                        ],
                        memory_order="relaxed",
                    )  # fmt: skip

    @T.macro
    def own(words, projection, inv_rms, exchange, team, group, first, owned, lane):
        """Add the parts of every members-th token, one column a lane; the maps follow at the end.

        Until then projection holds the sums with phi, inv_rms the sum of squares.
        """
        stale = T.alloc_var("int32", 1)
        value = T.alloc_var(F32, 0.0)
        stale = 1
        while stale != 0:
            stale = 0
            for s in T.unroll(owned_tokens):
                for q in T.unroll(lanes):
                    for m in T.unroll(members):
                        stale = stale | (words[q, s, m] ^ (group // slots))
            stale = stale & 1
            if stale != 0:
                request(words, exchange, team, group, owned, lane)
        for s in T.unroll(owned_tokens):
            token = first + owned + s * members
            for q in T.unroll(lanes):
                value = T.reinterpret(words[q, s, 0] & -2, F32)
                for m in T.unroll(1, members):
                    value = value + T.reinterpret(words[q, s, m] & -2, F32)
                if (owned + s * members < G) and (token < tokens):
                    if q * WARP + lane == 0:
                        inv_rms[token] = value
                    elif q * WARP + lane < columns:
                        projection[token, q * WARP + lane - 1] = value

    return request, own


def apply_macro(segment: Segment, depth: int, dtype: str, tokens: object) -> Callable[..., None]:
    """The macro `pre_apply(layer_input, x_tile, sums, group, first, member, tx)`."""
    G, n, C, width = segment.group, segment.n, segment.channels, segment.width
    chunks = G * width // 8

    @T.macro
    def pre_apply(layer_input, x_tile, sums, group, first, member, tx):
        """layer_input[c] = sum_i h_pre[i] * x[i, c] for the member's channels of a group."""
        x_lane = T.alloc_local((8,), dtype)
        applied = T.alloc_local((8,), F32)
        present = T.min(tokens - first, G)
        for a in T.unroll(ceil_div(chunks, segment.threads)):
            chunk = a * segment.threads + tx
            slot_token = chunk // (width // 8)
            inner = chunk % (width // 8) * 8
            channel = member * width + inner
            if (chunk < chunks) and (slot_token < present) and (channel < C):
                for v in T.unroll(8):
                    applied[v] = 0.0
                for i in T.unroll(n):
                    for v in T.vectorized(8):
                        x_lane[v] = x_tile[group % depth, slot_token, i * width + inner + v]
                    for v in T.unroll(8):
                        weight = sums[group % 2, i, slot_token, segment.columns]
                        applied[v] += weight * T.cast(x_lane[v], F32)
                for v in T.vectorized(8):
                    layer_input[first + slot_token, channel + v] = T.cast(applied[v], dtype)

    return pre_apply


def maps_macro(
    segment: Segment, norm_eps: float, post_scale: float, iters: int, sinkhorn_eps: float
) -> Callable[..., None]:
    """The macro `maps(token, alpha, bias, h_post, h_res, projection, inv_rms)`."""
    n = segment.n

    @T.macro
    def maps(token, alpha, bias, h_post, h_res, projection, inv_rms):
        """From the sums that `own` left to a token's results; one thread."""
        matrix = T.alloc_local((n * n,), F32)
        vectors = T.alloc_local((2 * n,), F32)
        scale = T.alloc_var(F32, 0.0)
        value = T.alloc_var(F32, 0.0)
        for v in T.vectorized(n * n):
            matrix[v] = projection[token, 2 * n + v]
        for v in T.vectorized(2 * n):
            vectors[v] = projection[token, v]
        scale = inv_rms[token]
        inverse_rms(scale, n * segment.channels, norm_eps)
        inv_rms[token] = scale
        # projection = (vec(x) @ phi^T) * inv_rms
        for v in T.unroll(n * n):
            matrix[v] = matrix[v] * scale
        for v in T.vectorized(n * n):
            projection[token, 2 * n + v] = matrix[v]
        for v in T.unroll(2 * n):
            vectors[v] = vectors[v] * scale
        for v in T.vectorized(2 * n):
            projection[token, v] = vectors[v]
        # h_post = post_scale * sigmoid(logits_post)
        for v in T.unroll(n):
            value = vectors[n + v] * alpha[1] + bias[n + v]
            sigmoid(value)
            vectors[v] = value * post_scale
        for v in T.vectorized(n):
            h_post[token, v] = vectors[v]
        # h_res = sinkhorn(logits_res)
        for v in T.unroll(n * n):
            matrix[v] = matrix[v] * alpha[2] + bias[2 * n + v]
        sinkhorn_registers(matrix, n, iters, sinkhorn_eps)
        for v in T.vectorized(n * n):
            h_res[token, v] = matrix[v]

    return maps
