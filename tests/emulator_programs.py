"""TileLang programs of the kinds that kernels are made of, for tests of the emulator.

The `broken_` ones each carry one mistake.
"""

import tilelang.language as T

F32 = "float32"
UNSYNCHRONISED = {"tl.disable_thread_storage_sync": True}
UNGUARDED = {"tl.disable_safe_memory_legalize": True}


def pre_apply(channels, dtype, n=4, columns=128, threads=64):
    """layer_input[c] = sum_i h_pre[i] * x[i, c], in fragments."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(
        x: T.Tensor((tokens, n, channels), dtype),
        h_pre: T.Tensor((tokens, n), F32),
        layer_input: T.Tensor((tokens, channels), dtype),
    ):
        with T.Kernel(tokens, T.ceildiv(channels, columns), threads=threads) as (token, part):
            streams = T.alloc_fragment((n, columns), dtype)
            weights = T.alloc_fragment((n,), F32)
            total = T.alloc_fragment((columns,), F32)
            T.copy(h_pre[token, 0:n], weights)
            T.copy(x[token, 0:n, part * columns : (part + 1) * columns], streams)
            T.clear(total)
            for i in T.serial(n):
                for c in T.Parallel(columns):
                    total[c] += weights[i] * T.cast(streams[i, c], F32)
            T.copy(total, layer_input[token, part * columns : (part + 1) * columns])

    return program


def sinkhorn_threads(iterations=20, n=4, threads=32):
    """One thread a token: softmax over `out`, then rows and columns in turn."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(logits: T.Tensor((tokens, n, n), F32), h_res: T.Tensor((tokens, n, n), F32)):
        with T.Kernel(T.ceildiv(tokens, threads), threads=threads) as block:
            token = block * threads + T.get_thread_binding()
            matrix = T.alloc_local((n, n), F32)
            total = T.alloc_var(F32, 0.0)
            if token < tokens:
                for o in T.unroll(n):
                    for i in T.vectorized(n):
                        matrix[o, i] = T.exp(logits[token, o, i])
                for _ in T.serial(iterations):
                    for i in T.unroll(n):
                        total = 0.0
                        for o in T.unroll(n):
                            total = total + matrix[o, i]
                        for o in T.unroll(n):
                            matrix[o, i] = matrix[o, i] / total
                    for o in T.unroll(n):
                        total = 0.0
                        for i in T.unroll(n):
                            total = total + matrix[o, i]
                        total = T.call_extern(F32, "__frcp_rn", total)
                        for i in T.unroll(n):
                            matrix[o, i] = matrix[o, i] * total
                for o in T.unroll(n):
                    for i in T.vectorized(n):
                        h_res[token, o, i] = matrix[o, i]

    return program


def sinkhorn_fragment(iterations=20, n=4, tile=16, threads=64):
    """A tile of tokens in a fragment: sums cross threads through shuffles."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(logits: T.Tensor((tokens, n, n), F32), h_res: T.Tensor((tokens, n, n), F32)):
        with T.Kernel(T.ceildiv(tokens, tile), threads=threads) as block:
            matrix = T.alloc_fragment((tile, n, n), F32)
            rows = T.alloc_fragment((tile, n), F32)
            columns = T.alloc_fragment((tile, n), F32)
            T.copy(logits[block * tile, 0, 0], matrix)
            for t, o, i in T.Parallel(tile, n, n):
                matrix[t, o, i] = T.exp(matrix[t, o, i])
            for _ in T.serial(iterations):
                T.reduce_sum(matrix, columns, dim=1)
                for t, o, i in T.Parallel(tile, n, n):
                    matrix[t, o, i] = matrix[t, o, i] / columns[t, i]
                T.reduce_sum(matrix, rows, dim=2)
                for t, o, i in T.Parallel(tile, n, n):
                    matrix[t, o, i] = matrix[t, o, i] / rows[t, o]
            T.copy(matrix, h_res[block * tile, 0, 0])

    return program


def project(width, dtype, rows=24, tile=32, step=64, stages=2, threads=128, weights="same"):
    """out = x @ phi^T: bf16 or fp16 operands, or tf32 ones (weights="tfloat32"), cp.async ahead."""
    tokens = T.dynamic("tokens")
    padded = 32
    kind = dtype if weights == "same" else T.tfloat32

    @T.prim_func
    def program(
        x: T.Tensor((tokens, width), dtype),
        phi: T.Tensor((rows, width), kind),
        out: T.Tensor((tokens, rows), F32),
    ):
        with T.Kernel(T.ceildiv(tokens, tile), threads=threads) as block:
            x_tile = T.alloc_shared((tile, step), dtype)
            operand = T.alloc_fragment((tile, step), dtype)
            wide = T.alloc_fragment((tile, step), kind)
            phi_tile = T.alloc_shared((padded, step), kind)
            total = T.alloc_fragment((tile, padded), F32)
            T.clear(total)
            for k in T.Pipelined(width // step, num_stages=stages):
                T.copy(x[block * tile, k * step], x_tile)
                T.copy(phi[0, k * step], phi_tile)
                if weights == "same":
                    T.gemm(x_tile, phi_tile, total, transpose_B=True)
                else:
                    T.copy(x_tile, operand)
                    T.copy(operand, wide)
                    T.gemm(wide, phi_tile, total, transpose_B=True)
            for t, r in T.Parallel(tile, padded):
                if block * tile + t < tokens and r < rows:
                    out[block * tile + t, r] = total[t, r]

    return program


def grad_weights(width, dtype, rows=32, tile=32, threads=64):
    """grad_phi = grad^T @ x: the token axis is summed, so both operands load transposed."""
    tokens = T.dynamic("tokens")
    columns = 64

    @T.prim_func
    def program(
        x: T.Tensor((tokens, width), dtype),
        grad: T.Tensor((tokens, rows), dtype),
        grad_phi: T.Tensor((rows, width), dtype),
    ):
        with T.Kernel(width // columns, threads=threads) as block:
            x_tile = T.alloc_shared((tile, columns), dtype)
            grad_tile = T.alloc_shared((tile, rows), dtype)
            out_tile = T.alloc_shared((rows, columns), dtype)
            total = T.alloc_fragment((rows, columns), F32)
            T.clear(total)
            for k in T.Pipelined(T.ceildiv(tokens, tile), num_stages=2):
                T.copy(x[k * tile, block * columns], x_tile)
                T.copy(grad[k * tile, 0], grad_tile)
                T.gemm(grad_tile, x_tile, total, transpose_A=True)
            T.copy(total, out_tile)
            T.copy(out_tile, grad_phi[0, block * columns])

    return program


def outer_sums(channels, n=4, columns=128, threads=128):
    """grad_h_res[o, i] = sum_c grad[o, c] * x[i, c]: a reducer across the warps of a block."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(
        grad: T.Tensor((tokens, n, channels), "bfloat16"),
        x: T.Tensor((tokens, n, channels), "bfloat16"),
        grad_h_res: T.Tensor((tokens, n, n), F32),
    ):
        with T.Kernel(tokens, threads=threads) as token:
            left = T.alloc_fragment((n, columns), "bfloat16")
            right = T.alloc_fragment((n, columns), "bfloat16")
            total = T.alloc_reducer((n, n), F32, op="sum")
            result = T.alloc_fragment((n, n), F32)
            T.reducer_init(total)
            for k in T.serial(channels // columns):
                T.copy(grad[token, 0:n, k * columns : (k + 1) * columns], left)
                T.copy(x[token, 0:n, k * columns : (k + 1) * columns], right)
                for o, i, c in T.Parallel(n, n, columns):
                    product = T.cast(left[o, c], F32) * T.cast(right[i, c], F32)
                    T.reducer_update(total[o, i], product)
            T.finalize_reducer(total, result)
            T.copy(result, grad_h_res[token, 0:n, 0:n])

    return program


def squares_beside_gemm(width, policy, tile=64, step=64, threads=128):
    """Sums of squares of a matrix product's operand, through a reducer.

    With warps split along N, TileLang 0.1.15 leaves out the combine across lanes.
    """
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(
        x: T.Tensor((tokens, width), "bfloat16"),
        phi: T.Tensor((32, width), "bfloat16"),
        out: T.Tensor((tokens, 32), F32),
        squares: T.Tensor((tokens,), F32),
    ):
        with T.Kernel(T.ceildiv(tokens, tile), threads=threads) as block:
            x_tile = T.alloc_shared((tile, step), "bfloat16")
            phi_tile = T.alloc_shared((32, step), "bfloat16")
            operand = T.alloc_fragment((tile, step), "bfloat16")
            total = T.alloc_fragment((tile, 32), F32)
            sums = T.alloc_reducer((tile,), F32, op="sum")
            result = T.alloc_fragment((tile,), F32)
            T.clear(total)
            T.reducer_init(sums)
            for k in T.serial(width // step):
                T.copy(x[block * tile, k * step], x_tile)
                T.copy(phi[0, k * step], phi_tile)
                T.copy(x_tile, operand)
                T.gemm(operand, phi_tile, total, transpose_B=True, policy=policy)
                for t, c in T.Parallel(tile, step):
                    value = T.cast(operand[t, c], F32)
                    T.reducer_update(sums[t], value * value)
            T.finalize_reducer(sums, result)
            T.copy(total, out[block * tile, 0])
            T.copy(result, squares[block * tile])

    return program


def scale_then_sum(channels, threads=64):
    """Two kernels in one program: the second reads what the first wrote."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(
        x: T.Tensor((tokens, channels), F32),
        scaled: T.Tensor((tokens, channels), F32),
        sums: T.Tensor((tokens,), F32),
        factor: T.float32,
    ):
        with T.Kernel(tokens, threads=threads) as token:
            for c in T.Parallel(channels):
                scaled[token, c] = x[token, c] * factor
        with T.Kernel(tokens, threads=threads) as token:
            row = T.alloc_fragment((channels,), F32)
            total = T.alloc_fragment((1,), F32)
            T.copy(scaled[token, 0:channels], row)
            T.reduce_sum(row, total, dim=0)
            sums[token] = total[0]

    return program


def mirror(channels, threads=128):
    """y[c] = x[channels - 1 - c] through shared memory.

    broken with UNSYNCHRONISED: TileLang then leaves out the barrier.
    """
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(x: T.Tensor((tokens, channels), F32), y: T.Tensor((tokens, channels), F32)):
        with T.Kernel(tokens, threads=threads) as token:
            line = T.alloc_shared((channels,), F32)
            for c in T.Parallel(channels):
                line[c] = x[token, c]
            for c in T.Parallel(channels):
                y[token, c] = line[channels - 1 - c]

    return program


def double_rows(rows=8, threads=32):
    """y = 2 x by tiles of rows; broken with UNGUARDED where tokens is no multiple of rows."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(x: T.Tensor((tokens, 4), F32), y: T.Tensor((tokens, 4), F32)):
        with T.Kernel(T.ceildiv(tokens, rows), threads=threads) as block:
            for t, c in T.Parallel(rows, 4):
                y[block * rows + t, c] = 2.0 * x[block * rows + t, c]

    return program


def broken_half_written(channels, threads=128):
    """Half of a shared line is never written, and the maximum hides the NaN."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(x: T.Tensor((tokens, channels), F32), y: T.Tensor((tokens, channels), F32)):
        with T.Kernel(tokens, threads=threads) as token:
            line = T.alloc_shared((channels,), F32)
            for c in T.Parallel(channels):
                if c < channels // 2:
                    line[c] = x[token, c]
            for c in T.Parallel(channels):
                y[token, c] = T.max(line[c], 0.0)

    return program


def broken_short_wait(width, threads=128):
    """Two cp.async groups in flight and a wait that leaves the one which is read."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(x: T.Tensor((tokens, 2, width), F32), y: T.Tensor((tokens, width), F32)):
        with T.Kernel(tokens, threads=threads) as token:
            lines = T.alloc_shared((2, width), F32)
            for s in T.serial(2):
                T.async_copy(x[token, s, 0:width], lines[s, 0:width])
            T.ptx_wait_group(1)
            T.sync_threads()
            for c in T.Parallel(width):
                y[token, c] = lines[0, c] + lines[1, c]

    return program


def spilling(values=300, threads=256):
    """Reverses columns in place: more live values per thread than there are registers."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def program(x: T.Tensor((tokens, values, threads), F32)):
        with T.Kernel(tokens, threads=threads) as token:
            lane = T.get_thread_binding()
            line = T.alloc_local((values,), F32)
            for i in T.unroll(values):
                line[i] = x[token, i, lane]
            for i in T.unroll(values):
                x[token, values - 1 - i, lane] = line[i]

    return program
