# Triton's decorator and kernel arguments have no types that mypy could check, and its constants are
# written in capitals.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803
"""The Triton kernel for chunks of prompts in a step whose lengths only the device knows.

Imported only where Triton is installed; `runner.models.triton_attention` decides how it is
launched.

A program takes up to BLOCK_Q consecutive tokens of one sequence, and one KV head. It writes their
keys and values into the paged cache and attends to what the cache held before the step, and then to
the step's own keys and values, so that no program waits for what another one writes. There are as
many programs as any split of the step's rows into sequences could need; each finds its place by the
offsets of all sequences.
"""

import triton
import triton.language as tl

from runner.models.attention_tile import SEQUENCES, take_in

LOWEST = tl.constexpr(-1e30)
"""Below all scores, and finite: a tile of which a row sees nothing leaves it as it is."""


@triton.jit(
    do_not_specialize=["num_rows", "num_seqs", "table_stride", "window"],
    do_not_specialize_on_alignment=["slots", "block_tables", "query_offsets", "kv_lengths"],
)
def chunk_kernel(
    q,  # (num_rows, num_query, HEAD_DIM)
    k,  # (num_rows, num_kv, HEAD_DIM)
    v,  # as k
    keys,  # (num_blocks * BLOCK_SIZE, num_kv, HEAD_DIM), written at `slots`
    values,  # as keys
    out,  # (num_rows, num_query, HEAD_DIM), contiguous
    slots,  # (num_rows,) int64
    block_tables,  # (num_seqs, max_blocks) int32
    query_offsets,  # (num_seqs + 1,) int32
    kv_lengths,  # (num_seqs,) int32
    groups,  # (num_kv, GROUP_STRIDE) int32: query heads of a KV head, then -1
    num_rows,
    num_seqs,
    table_stride,
    window,  # tokens that a token sees, itself included
    scale,  # factor on the scores, times log2(e)
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    cache_row,
    cache_head,
    NUM_QUERY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM up to a power of two
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # keys of a tile
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head at most, up to a power of two
    GROUP_STRIDE: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = tl.program_id(1)

    # Sequence s has programs from offset // BLOCK_Q + s on: at least as many as it needs. Behind
    # the last sequence come the programs of the padding.
    sequence = -1
    for tile in tl.range(0, num_seqs + 1, SEQUENCES):
        indices = tile + tl.arange(0, SEQUENCES)
        offsets = tl.load(query_offsets + indices, mask=indices <= num_seqs, other=0)
        is_before = (indices <= num_seqs) & (offsets // BLOCK_Q + indices <= program)
        sequence += tl.sum(is_before.to(tl.int32), axis=0)
    begin = tl.load(query_offsets + sequence)
    first = (program - begin // BLOCK_Q - sequence) * BLOCK_Q  # of its tokens, within the step

    product_rows = tl.arange(0, BLOCK_Q * GROUP)
    tokens = product_rows // GROUP
    heads = tl.load(groups + kv_head * GROUP_STRIDE + product_rows % GROUP)
    offsets_d = tl.arange(0, BLOCK_D)
    in_head = offsets_d < HEAD_DIM
    if sequence == num_seqs:
        unused = begin // BLOCK_Q * BLOCK_Q + first + tokens
        is_padding = (unused >= begin) & (unused < num_rows) & (heads >= 0)
        to_unused = out + (unused.to(tl.int64) * NUM_QUERY + heads)[:, None] * HEAD_DIM
        zeros = tl.full((BLOCK_Q * GROUP, BLOCK_D), 0.0, out.dtype.element_ty)
        tl.store(to_unused + offsets_d[None, :], zeros, mask=is_padding[:, None] & in_head[None, :])
        return
    end = tl.load(query_offsets + sequence + 1)
    query_len = end - begin
    # What has one token, and only such before it, is `decode_kernel`'s.
    if (first >= query_len) | (end == sequence + 1):
        return
    begin = begin.to(tl.int64)

    own = first + tl.arange(0, BLOCK_Q)
    is_own = (own < query_len)[:, None] & in_head[None, :]
    own_k = tl.load(
        k + (begin + own)[:, None] * k_row + kv_head * k_head + offsets_d[None, :], mask=is_own
    )
    own_v = tl.load(
        v + (begin + own)[:, None] * v_row + kv_head * v_head + offsets_d[None, :], mask=is_own
    )
    own_slots = tl.load(slots + begin + own, mask=own < query_len, other=0)
    to_slots = own_slots[:, None] * cache_row + kv_head * cache_head + offsets_d[None, :]
    tl.store(keys + to_slots, own_k, mask=is_own)
    tl.store(values + to_slots, own_v, mask=is_own)

    tokens += first
    in_product = ((tokens < query_len) & (heads >= 0))[:, None] & in_head[None, :]
    rows = begin + tokens
    queries = tl.load(
        q + rows[:, None] * q_row + heads[:, None] * q_head + offsets_d[None, :],
        mask=in_product,
        other=0.0,
    )
    highest = tl.full((BLOCK_Q * GROUP,), LOWEST, tl.float32)
    total = tl.full((BLOCK_Q * GROUP,), 0.0, tl.float32)
    mixed = tl.full((BLOCK_Q * GROUP, BLOCK_D), 0.0, tl.float32)
    cached = tl.load(kv_lengths + sequence) - query_len  # before the step
    first_seen = cached + first + 1 - window  # by any of the program's tokens

    table = block_tables + tl.cast(sequence, tl.int64) * table_stride
    from_head = kv_head * cache_head + offsets_d
    for tile in tl.range(tl.maximum(first_seen, 0) // BLOCK_N * BLOCK_N, cached, BLOCK_N):
        places = tile + tl.arange(0, BLOCK_N)
        in_cache = places < cached
        blocks = tl.load(table + places // BLOCK_SIZE, mask=in_cache, other=0).to(tl.int64)
        where = (blocks * BLOCK_SIZE + places % BLOCK_SIZE)[:, None] * cache_row
        to_load = in_cache[:, None] & in_head[None, :]
        tile_k = tl.load(keys + where + from_head[None, :], mask=to_load, other=0.0)
        tile_v = tl.load(values + where + from_head[None, :], mask=to_load, other=0.0)
        in_window = places[None, :] > (cached + tokens)[:, None] - window
        highest, total, mixed = take_in(
            queries, tile_k, tile_v, in_cache[None, :] & in_window, scale, highest, total, mixed
        )

    stop = tl.minimum(first + BLOCK_Q, query_len)
    start = tl.maximum(first_seen - cached, 0) // BLOCK_N * BLOCK_N
    from_k = k + begin * k_row + kv_head * k_head + offsets_d
    from_v = v + begin * v_row + kv_head * v_head + offsets_d
    for tile in tl.range(start, stop, BLOCK_N):
        places = tile + tl.arange(0, BLOCK_N)
        to_load = (places < stop)[:, None] & in_head[None, :]
        tile_k = tl.load(from_k[None, :] + places[:, None] * k_row, mask=to_load, other=0.0)
        tile_v = tl.load(from_v[None, :] + places[:, None] * v_row, mask=to_load, other=0.0)
        is_past = places[None, :] <= tokens[:, None]
        in_window = places[None, :] > tokens[:, None] - window
        highest, total, mixed = take_in(
            queries, tile_k, tile_v, is_past & in_window, scale, highest, total, mixed
        )

    to_rows = out + (rows * NUM_QUERY + heads)[:, None] * HEAD_DIM
    mixed = mixed / total[:, None]
    tl.store(to_rows + offsets_d[None, :], mixed.to(out.dtype.element_ty), mask=in_product)
