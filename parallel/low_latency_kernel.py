# Triton's decorator and kernel arguments have no types that mypy could check, and its constants are
# written in capitals.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803, N806, SIM300
"""The Triton kernel by which ranks add up small tensors without waiting for one another's kernels
to begin or end. Imported only where Triton is installed; `parallel.low_latency` launches it.

A message is a word of 64 bits: 32 of data, and the number of the call. A rank writes its words into
the inboxes of all ranks, its own as well, and takes each word from its inbox once that carries the
number of this call. Inboxes have two halves, used in turn: before a rank writes into a half again
it has received words of the call between, which their sender wrote after it had read that half.
"""

import triton
import triton.language as tl


@triton.jit
def _send(inbox, data, call, is_there):
    """Write words into a rank's inbox, each in one piece, for all GPUs to see."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred there;
            .reg .b64 word;
            setp.ne.s32 there, $4, 0;
            mov.b64 word, {$2, $3};
            @there st.relaxed.sys.global.b64 [$1], word;
            mov.b32 $0, 0;
        }
        """,
        "=r,l,r,r,r",
        [inbox.to(tl.int64), data, call, is_there.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _receive(inbox, call, is_there):
    """The data of words in this rank's inbox, as soon as all are of this call."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred there, old;
            .reg .b32 number;
            .reg .b64 word;
            setp.ne.s32 there, $3, 0;
            mov.b32 $0, 0;
            @!there bra done;
        look:
            ld.relaxed.sys.global.b64 word, [$1];
            mov.b64 {$0, number}, word;
            setp.ne.b32 old, number, $2;
            @old bra look;
        done:
        }
        """,
        "=&r,l,r,r",
        [inbox.to(tl.int64), call, is_there.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _low(data, DTYPE: tl.constexpr):
    """The lower 16 of 32 bits, as the number that they are."""
    return (data & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _bits(number, DTYPE: tl.constexpr):
    """The bits of a number of 16, rounded to that, as the lower ones of 32."""
    return number.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit(
    do_not_specialize=["num_words"], do_not_specialize_on_alignment=["x", "total", "num_words"]
)
def low_latency_kernel(
    x,  # this rank's tensor: words of 32 bits, each of one number or of two
    total,  # as x
    outboxes,  # (SIZE,) int64: where this rank's words go, within each rank's inbox
    inbox,  # (2, SIZE, MAX_WORDS) int64: of this rank; zero before the first call
    calls,  # (blocks of the largest tensor,) int32: calls in which a program took part
    num_words,
    SIZE: tl.constexpr,  # ranks
    MAX_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,  # words of a program
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    is_there = at < num_words
    mine = tl.load(x.to(tl.pointer_type(tl.int32)) + at, mask=is_there, other=0)
    call = tl.load(calls + program) + 1
    call = tl.where(call == 0, 2, call)  # After 2**32 calls; zero is in what was never written.
    # No thread may count this call before all have read the number.
    tl.debug_barrier()
    half = (call & 1) * SIZE * MAX_WORDS
    for rank in tl.static_range(SIZE):
        outbox = tl.load(outboxes + rank).to(tl.pointer_type(tl.int64))
        _send(outbox + half + at, mine, call, is_there)
    # In the order of the ranks, so that the sum is the same on all of them.
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(SIZE):
        data = _receive(inbox + half + rank * MAX_WORDS + at, call, is_there)
        if DTYPE == tl.float32:
            low += data.to(tl.float32, bitcast=True)
        else:
            low += _low(data, DTYPE)
            high += _low(data >> 16, DTYPE)
    if DTYPE == tl.float32:
        data = low.to(tl.int32, bitcast=True)
    else:
        data = _bits(low, DTYPE) | (_bits(high, DTYPE) << 16)
    tl.store(total.to(tl.pointer_type(tl.int32)) + at, data, mask=is_there)
    tl.store(calls + program, call)
