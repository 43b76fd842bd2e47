"""What the roles of the team kernel do in a round, as macros; `pre_team` puts them together.

A word of the exchange is a float whose last bit is a flag that flips whenever its slot is reused:
it validates itself. `words` are a lane's words, asked for one round before they are needed.
"""

from collections.abc import Callable

import tilelang.language as T

from ..common.pairs import WORD, lower, upper
from ..common.programs import F32, ceil_div, logits_per_token
from ..common.projection import WARP, Segment, add, inverse_rms, sigmoid, sinkhorn_registers


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
    words_each, answers_each = slots * G * stride, slots * G * segment.n

    @T.macro
    def clear(exchange, answers, team, member, tx):
        """No message yet: the first use of a slot expects an even word."""
        for p in T.unroll(ceil_div(answers_each, threads)):
            entry = p * threads + tx
            if (member == 0) and (entry < answers_each):
                answers[
                    team, entry // (G * segment.n), entry // segment.n % G, entry % segment.n
                ] = 1
        for p in T.unroll(ceil_div(words_each, threads * 4)):
            entry = (p * threads + tx) * 4
            if entry < words_each:
                for v in T.vectorized(4):
                    exchange[
                        team, entry // (G * stride), member, entry // stride % G, entry % stride + v
                    ] = 1  # fmt: skip

    @T.macro
    def send(sums, exchange, team, member, group, index, senders, lane):
        """Publish the member's parts of a group: the sum over its warps, last bit = flag."""
        for p in T.unroll(ceil_div(G, senders)):
            slot_token = p * senders + index
            for q in T.unroll(ceil_div(columns, WARP)):
                part = T.alloc_var(F32, 0.0)
                if (slot_token < G) and (q * WARP + lane < columns):
                    for w in T.unroll(warps):
                        part = add(part, sums[0, w, slot_token, q * WARP + lane])
                    T.atomic_store(
                        exchange[
                            team, T.cast(group % slots, "int64"), member, slot_token,
                            q * WARP + lane,
                        ],
                        (T.reinterpret(part, "int32") & -2) | (group // slots % 2),
                        memory_order="relaxed",
                    )  # fmt: skip

    return clear, send


def owner_macro(
    segment: Segment, members: int, slots: int, norm_eps: float, pre_eps: float, post_scale: float
) -> Callable[..., None]:
    """The macro `own(exchange, answers, outputs .., team, group, place, token, tokens, lane)`."""
    n, columns = segment.n, segment.columns
    lanes = ceil_div(columns, WARP)

    @T.macro
    def own(
        exchange, answers, h_post, projection, inv_rms, alpha, bias, team, group, place, token,
        tokens, lane,
    ):  # fmt: skip
        """Add the members' parts of a token, one column a lane, and answer with h_pre.

        The answer is for every member; the rest of the maps goes to memory, h_res later.
        """
        words = T.alloc_local((lanes, members), "int32")
        totals = T.alloc_local((lanes,), F32)
        stale = T.alloc_var("int32", 1)
        scale = T.alloc_var(F32, 0.0)
        value = T.alloc_var(F32, 0.0)
        slot = T.cast(group % slots, "int64")
        stale = 1
        while stale != 0:
            for q in T.unroll(lanes):
                for m in T.unroll(members):
                    words[q, m] = T.atomic_load(
                        exchange[team, slot, m, place, T.min(q * WARP + lane, columns - 1)],
                        memory_order="relaxed",
                    )
            stale = 0
            for q in T.unroll(lanes):
                for m in T.unroll(members):
                    stale = stale | (words[q, m] ^ (group // slots))
            stale = stale & 1
        for q in T.unroll(lanes):
            totals[q] = T.reinterpret(words[q, 0] & -2, F32)
            for m in T.unroll(1, members):
                totals[q] = add(totals[q], T.reinterpret(words[q, m] & -2, F32))
        scale = T.shfl_sync(totals[0], 0)
        inverse_rms(scale, n * segment.channels, norm_eps)
        for q in T.unroll(lanes):
            r = q * WARP + lane - 1
            # projection = (vec(x) @ phi^T) * inv_rms
            totals[q] = totals[q] * scale
            if (r >= 0) and (r < 2 * n):
                value = totals[q] * T.if_then_else(r < n, alpha[0], alpha[1]) + bias[r]
                sigmoid(value)
                # h_pre = sigmoid(logits_pre) + pre_eps
                if r < n:
                    T.atomic_store(
                        answers[team, slot, place, r],
                        (T.reinterpret(value + pre_eps, "int32") & -2) | (group // slots % 2),
                        memory_order="relaxed",
                    )
                # h_post = post_scale * sigmoid(logits_post)
                if (r >= n) and (token < tokens):
                    h_post[token, r - n] = value * post_scale
            if (r >= 0) and (r < columns - 1) and (token < tokens):
                projection[token, r] = totals[q]
        if (lane == 0) and (token < tokens):
            inv_rms[token] = scale

    return own


def receive_macros(segment: Segment, slots: int) -> tuple[Callable[..., None], ...]:
    """The macros `request(words, answers, ...)` and `receive(words, weights, answers, ...)`."""
    G, n = segment.group, segment.n
    each = ceil_div(G * n, WARP)

    @T.macro
    def request(words, answers, team, group, lane):
        """Ask for h_pre of a group."""
        for p in T.unroll(each):
            entry = T.min(p * WARP + lane, G * n - 1)
            words[p] = T.atomic_load(
                answers[team, T.cast(group % slots, "int64"), entry // n, entry % n],
                memory_order="relaxed",
            )

    @T.macro
    def receive(words, weights, answers, team, group, lane):
        """weights[group] = h_pre of a group, whose words were asked for in the previous round."""
        stale = T.alloc_var("int32", 1)
        stale = 1
        while stale != 0:
            stale = 0
            for p in T.unroll(each):
                stale = stale | (words[p] ^ (group // slots))
            stale = stale & 1
            if stale != 0:
                request(words, answers, team, group, lane)
        for p in T.unroll(each):
            entry = p * WARP + lane
            if entry < G * n:
                weights[group % 2, entry // n, entry % n] = T.reinterpret(words[p] & -2, F32)

    return request, receive


def apply_macro(
    segment: Segment, depth: int, dtype: str, tokens: object, threads: int
) -> Callable[..., None]:
    """The macro `pre_apply(layer_input, x_tile, weights, group, first, member, tx)`."""
    G, n, C, width = segment.group, segment.n, segment.channels, segment.width
    chunks = width // 8
    rows = max(1, threads // chunks)

    @T.macro
    def pre_apply(layer_input, x_tile, weights, group, first, member, tx):
        """layer_input[c] = sum_i h_pre[i] * x[i, c] for the member's channels of a group."""
        x_lane = T.alloc_local((8,), dtype)
        words = T.view(x_lane, (4,), WORD)
        applied = T.alloc_local((8,), F32)
        weight = T.alloc_var(F32)
        present = T.min(tokens - first, G)
        inner = tx % chunks * 8
        channel = member * width + inner
        if (tx < rows * chunks) and (channel < C):
            for row in T.unroll(ceil_div(G, rows)):
                place = row * rows + tx // chunks
                if (place < G) and (place < present):
                    for v in T.unroll(8):
                        applied[v] = 0.0
                    for i in T.unroll(n):
                        for v in T.vectorized(8):
                            x_lane[v] = x_tile[group % depth, place, i * width + inner + v]
                        weight = weights[group % 2, place, i]
                        if dtype == "bfloat16":
                            for k in T.unroll(4):
                                applied[2 * k] += weight * lower(words[k])
                                applied[2 * k + 1] += weight * upper(words[k])
                        else:
                            for v in T.unroll(8):
                                applied[v] += weight * T.cast(x_lane[v], F32)
                    for v in T.vectorized(8):
                        layer_input[first + place, channel + v] = T.cast(applied[v], dtype)

    return pre_apply


def help_macro(
    segment: Segment, members: int, teams: int, owners: int, slots: int, lag: int, meeting: int,
    tokens: object, constants: tuple[float, float, float, int, float],
) -> Callable[..., None]:  # fmt: skip
    """The macro `help(exchange, answers, weights, outputs .., team, member, rounds, .., lane)`.

    One warp receives h_pre and meets the others every round, `meeting` threads at barrier 2;
    `owners` warps own tokens and run freely.
    """
    norm_eps, pre_eps, post_scale, iters, sinkhorn_eps = constants
    G, n = segment.group, segment.n
    most = ceil_div(G, members)  # tokens of a group that a member owns, at most
    own = owner_macro(segment, members, slots, norm_eps, pre_eps, post_scale)
    request, receive = receive_macros(segment, slots)
    residual = residual_macro(segment, iters, sinkhorn_eps)

    @T.macro
    def help(
        exchange, answers, weights, h_post, h_res, projection, inv_rms, alpha, bias, team, member,
        rounds, last, role, lane,
    ):  # fmt: skip
        """All rounds of a warp that receives or owns."""
        if role == 0:
            words = T.alloc_local((ceil_div(G * n, WARP),), "int32")
            for p in T.unroll(ceil_div(G * n, WARP)):
                words[p] = 0
            for j in T.serial(rounds + lag):
                T.sync_threads(2, meeting)
                group = j + 1 - lag
                if (group >= 0) and (group < rounds):
                    receive(words, weights, answers, team, group, lane)
                if (group >= -1) and (group < rounds - 1):
                    request(words, answers, team, group + 1, lane)
        elif role <= owners:
            shares = (rounds * most + owners - role) // owners
            for turn in T.serial(shares):
                share = turn * owners + role - 1
                group = share // most
                first = (member + members - group * G % members) % members
                place = first + share % most * members
                token = T.cast(last - group * teams, "int64") * G + place
                if place < G:
                    own(
                        exchange, answers, h_post, projection, inv_rms, alpha, bias, team,
                        group, place, token, tokens, lane,
                    )  # fmt: skip
            # h_res of the warp's tokens, a lane a token, while the last groups are applied
            T.sync_warp()
            share = T.alloc_var("int32", lane * owners + role - 1)
            while share < rounds * most:
                group = share // most
                first = (member + members - group * G % members) % members
                place = first + share % most * members
                token = (last - group * teams) * G + place
                if (place < G) and (token < tokens):
                    residual(token, alpha, bias, projection, h_res)
                share = share + owners * WARP

    return help


def residual_macro(segment: Segment, iters: int, sinkhorn_eps: float) -> Callable[..., None]:
    """The macro `residual(token, alpha, bias, projection, h_res)`."""
    n = segment.n

    @T.macro
    def residual(token, alpha, bias, projection, h_res):
        """h_res = sinkhorn(logits_res) of a token; one thread."""
        matrix = T.alloc_local((n * n,), F32)
        for v in T.vectorized(n * n):
            matrix[v] = projection[token, 2 * n + v]
        for v in T.unroll(n * n):
            matrix[v] = matrix[v] * alpha[2] + bias[2 * n + v]
        sinkhorn_registers(matrix, n, iters, sinkhorn_eps)
        for v in T.vectorized(n * n):
            h_res[token, v] = matrix[v]

    return residual
