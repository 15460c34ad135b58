# Triton's decorator and kernel arguments have no types that mypy could check, and its constants are
# written in capitals.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803
"""The Triton kernel of one decoding step: write a token's key and value, attend to all of its
sequence in the paged cache, and join the splits.

Imported only where Triton is installed; `runner.models.triton_attention` decides how it is
launched.

A program takes one row (token), one KV head and one split of the sequence: consecutive tiles of
BLOCK_N tokens, found through the block table. The query heads that read the KV head are the rows of
one matrix product. How many splits a sequence has depends on its length on the device, so that one
launch, and one CUDA graph, serves all lengths: what a sequence does not need ends at once, and the
last of its splits to finish joins them.

Of a mixed step, only the sequences of one token that come first are taken, whose rows are their
places. How many they are is read on the device, too, and with it how many splits each may have.
"""

import triton
import triton.language as tl

from runner.models.attention_tile import SEQUENCES, take_in


@triton.jit(
    do_not_specialize=["num_seqs", "spread", "table_stride", "window"],
    do_not_specialize_on_alignment=["slots", "block_tables", "query_offsets", "kv_lengths"],
)
def decode_kernel(
    q,  # (num_tokens, num_query, HEAD_DIM)
    k,  # (num_tokens, NUM_KV, HEAD_DIM)
    v,  # as k
    keys,  # (num_blocks * BLOCK_SIZE, NUM_KV, HEAD_DIM), written at `slots`
    values,  # as keys
    out,  # (num_tokens, num_query, HEAD_DIM), contiguous
    partial_out,  # (rows, num_query, num_splits, BLOCK_D) float32: outputs of the splits
    partial_lse,  # (rows, num_query, num_splits) float32: log2 of their softmax sums
    finished,  # (num_tokens * NUM_KV,) int32: splits that are done; zero before and after
    slots,  # (num_tokens,) int64
    block_tables,  # (num_seqs, max_blocks) int32
    query_offsets,  # (num_seqs + 1,) int32; see IS_MIXED
    kv_lengths,  # (num_seqs,) int32
    groups,  # (NUM_KV, GROUP) int32: query heads of a KV head, then -1
    num_seqs,
    spread,  # of a mixed step: over how many programs few sequences are spread, for each KV head
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
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM up to a power of two
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,  # rows of the product
    LARGEST_GROUP: tl.constexpr,  # of these, in use at most
    ONE_SPLIT: tl.constexpr,  # tiles of a sequence that is not split
    MAX_SPLITS: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    kv_head = tl.program_id(0)
    if IS_MIXED:
        num_alone = 0
        for tile in tl.range(0, num_seqs, SEQUENCES):
            indices = tile + tl.arange(0, SEQUENCES)
            in_step = indices < num_seqs
            ends = tl.load(query_offsets + 1 + indices, mask=in_step, other=0)
            lengths = tl.load(kv_lengths + indices, mask=in_step, other=0)
            num_alone += tl.sum(((ends == indices + 1) & (lengths > 0)).to(tl.int32), axis=0)
        num_splits = tl.minimum(tl.maximum(spread // tl.maximum(num_alone, 1), 1), MAX_SPLITS)
        split = tl.program_id(1) % num_splits
        row = (tl.program_id(1) // num_splits).to(tl.int64)
        if row >= num_alone:
            return
    else:
        split = tl.program_id(1)
        row = tl.program_id(2).to(tl.int64)
        num_splits = tl.num_programs(1)

    # What needs no length is on its way before the length is known.
    kv_length = tl.load(kv_lengths + row, mask=row < num_seqs, other=0)
    offsets_d = tl.arange(0, BLOCK_D)
    in_head = offsets_d < HEAD_DIM
    heads = tl.load(groups + kv_head * GROUP + tl.arange(0, GROUP))
    in_group = (heads >= 0)[:, None] & in_head[None, :]
    new_k = tl.load(k + row * k_row + kv_head * k_head + offsets_d, mask=in_head, other=0.0)
    new_v = tl.load(v + row * v_row + kv_head * v_head + offsets_d, mask=in_head, other=0.0)
    queries = tl.load(
        q + row * q_row + heads[:, None] * q_head + offsets_d[None, :], mask=in_group, other=0.0
    )

    cached = tl.maximum(kv_length - 1, 0)  # tokens before this one, which is in k and v
    first_seen = tl.maximum(kv_length - window, 0)
    first_tile = first_seen // BLOCK_N
    num_tiles = (cached + BLOCK_N - 1) // BLOCK_N - first_tile
    tiles = tl.maximum((num_tiles + num_splits - 1) // num_splits, 1)  # of a split
    tiles = tl.where(num_tiles <= ONE_SPLIT, ONE_SPLIT, tiles)
    used_splits = tl.maximum((num_tiles + tiles - 1) // tiles, 1)
    if split >= used_splits:
        return

    if split == 0:
        place = tl.load(slots + row) * cache_row + kv_head * cache_head + offsets_d
        tl.store(keys + place, new_k, mask=in_head)
        tl.store(values + place, new_v, mask=in_head)
    to_row = out + row * NUM_QUERY * HEAD_DIM
    to_heads = to_row + heads[:, None] * HEAD_DIM + offsets_d[None, :]
    if kv_length == 0:
        zeros = tl.full((GROUP, BLOCK_D), 0.0, out.dtype.element_ty)
        tl.store(to_heads, zeros, mask=in_group)
        return

    # The new token's key and value are at hand. The first split begins with them; they leave no
    # trace in the others, where what comes next is infinitely higher.
    new_score = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], axis=1) * scale
    highest = tl.where(split == 0, new_score, float("-inf"))
    total = tl.full((GROUP,), 1.0, tl.float32)
    mixed = tl.full((GROUP, BLOCK_D), 0.0, tl.float32) + new_v.to(tl.float32)[None, :]

    table = block_tables + row * table_stride
    from_head = kv_head * cache_head + offsets_d
    start = (first_tile + split * tiles) * BLOCK_N
    stop = tl.minimum(start + tiles * BLOCK_N, cached)
    for tile in tl.range(start, stop, BLOCK_N):
        places = tile + tl.arange(0, BLOCK_N)
        is_seen = (places >= first_seen) & (places < stop)
        blocks = tl.load(table + places // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        rows = (blocks * BLOCK_SIZE + places % BLOCK_SIZE) * cache_row
        where = rows[:, None] + from_head[None, :]
        to_load = is_seen[:, None] & in_head[None, :]
        tile_k = tl.load(keys + where, mask=to_load, other=0.0)
        tile_v = tl.load(values + where, mask=to_load, other=0.0)
        highest, total, mixed = take_in(
            queries, tile_k, tile_v, is_seen[None, :], scale, highest, total, mixed
        )
    mixed = mixed / total[:, None]
    if used_splits == 1:
        tl.store(to_heads, mixed.to(out.dtype.element_ty), mask=in_group)
        return

    part = (row * NUM_QUERY + heads) * num_splits + split
    tl.store(partial_out + part[:, None] * BLOCK_D + offsets_d[None, :], mixed, mask=in_group)
    tl.store(partial_lse + part, highest + tl.log2(total), mask=heads >= 0)
    # Every thread's part must be out before one of them counts this split as finished.
    tl.debug_barrier()
    counter = finished + row * NUM_KV + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") < used_splits - 1:
        return
    tl.store(counter, 0)
    splits = tl.arange(0, MAX_SPLITS)
    is_used = splits < used_splits
    for member in tl.static_range(LARGEST_GROUP):
        head = tl.load(groups + kv_head * GROUP + member)
        # Past the first-level cache, which other processors' writes do not reach.
        parts = (row * NUM_QUERY + head) * num_splits + splits
        is_wanted = is_used & (head >= 0)
        lse = tl.load(partial_lse + parts, mask=is_wanted, other=0.0, cache_modifier=".cg")
        lse = tl.where(is_used, lse, float("-inf"))
        shares = tl.exp2(lse - tl.max(lse, axis=0))
        shares = shares / tl.sum(shares, axis=0)
        mixes = tl.load(
            partial_out + parts[:, None] * BLOCK_D + offsets_d[None, :],
            mask=is_wanted[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        joined = tl.sum(mixes * shares[:, None], axis=0)
        tl.store(
            to_row + head * HEAD_DIM + offsets_d,
            joined.to(out.dtype.element_ty),
            mask=in_head & (head >= 0),
        )
