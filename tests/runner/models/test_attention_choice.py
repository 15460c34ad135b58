"""What decodes on a GPU, chosen where there is none: the attentions are stand-ins or on the CPU."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from parallel.slicing import HeadShare, split_heads
from runner.models import attention_choice, varlen_attention
from runner.models.attention import Attention, GatherAttention
from runner.models.attention_choice import (
    StepAttention,
    choose_decode,
    fit_block_size,
    is_capturable,
    make_attention,
)
from runner.models.varlen_attention import VarlenAttention

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EVEN, UNEVEN = split_heads(8, 2, 1)[0], split_heads(10, 2, 3)[1]


@dataclass
class Meeting:
    """A rank's context on a GPU, whose other ranks say `others`."""

    others: bool = True
    device: torch.device = GPU
    setup: None = None
    said: list[bool] = field(default_factory=list)

    def minimum(self, value: int, _: None) -> int:
        self.said.append(bool(value))
        return min(value, self.others)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
    def choose(meeting: Meeting, obstacle: str | None) -> str:
        monkeypatch.setattr(attention_choice, "find_obstacle", lambda: obstacle)
        monkeypatch.setattr(attention_choice, "minimum", meeting.minimum)
        context: Any = meeting
        return choose_decode(context)

    return choose


def test_triton_decodes_where_it_starts(chosen: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(Meeting(), None) == "triton"
    assert not caplog.messages


def test_without_a_compiler_flash_attention_does_and_a_line_says_so(
    chosen: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert chosen(Meeting(), "Failed to find C compiler") == "varlen"
    (line,) = caplog.messages
    assert "FlashAttention" in line
    assert "(Failed to find C compiler)" in line


def test_all_ranks_choose_the_same(chosen: Any, caplog: pytest.LogCaptureFixture) -> None:
    meeting = Meeting(others=False)
    assert chosen(meeting, None) == "varlen"
    assert meeting.said == [True]
    assert "another rank" in caplog.text


def test_a_cpu_asks_nobody(chosen: Any) -> None:
    meeting = Meeting(device=CPU)
    assert chosen(meeting, "no GPU") == "triton"
    assert not meeting.said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_takes_chunks_decodes_without_triton(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    class Varlen(VarlenAttention):
        def __init__(self, heads: HeadShare, _: torch.device) -> None:
            super().__init__(heads, CPU)

    class Gather(GatherAttention):
        def __init__(self, heads: HeadShare, _: torch.device) -> None:
            super().__init__(heads, CPU)

    monkeypatch.setattr(varlen_attention, "VarlenAttention", Varlen)
    monkeypatch.setattr(varlen_attention, "supports", lambda dtype, *_: dtype == torch.bfloat16)
    monkeypatch.setattr(attention_choice, "GatherAttention", Gather)
    attend = make_attention(EVEN, GPU, dtype=dtype, block_size=16, head_dim=64, decode="varlen")
    assert isinstance(attend, StepAttention)
    assert isinstance(attend.decode, Varlen if dtype == torch.bfloat16 else Gather)
    block_size = fit_block_size(attend, 16)
    assert block_size == (256 if dtype == torch.bfloat16 else 16)
    assert is_capturable(attend, block_size) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("decode", "fitting", "capturable"),
    [
        (VarlenAttention(EVEN, CPU), 256, True),
        (VarlenAttention(UNEVEN, CPU), 256, False),
        (GatherAttention(EVEN, CPU), 16, False),
        (lambda *_: None, 16, True),  # Triton's has no cast here; it takes blocks of any size.
    ],
    ids=["flash", "flash-uneven", "gather", "triton"],
)
def test_blocks_and_graphs_follow_what_decodes(
    decode: Attention, fitting: int, capturable: bool
) -> None:
    attend = StepAttention(decode, GatherAttention(EVEN, CPU))
    assert fit_block_size(attend, 16) == fitting
    assert fit_block_size(attend, 512) == 512
    assert is_capturable(attend, fitting) == capturable


def test_flash_attention_gathers_small_blocks() -> None:
    assert not is_capturable(VarlenAttention(EVEN, CPU), 16)
