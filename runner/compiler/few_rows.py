"""How inductor multiplies few rows on a GPU: it chooses between the library's kernel and Triton's,
in tiles that read weights fast.

Such a product takes as long as reading its weights. The library cuts the sum of a product with few
columns in parts, which another kernel adds up, and copies what is to be added to the product first;
Triton's kernel does neither. Inductor's own list of tiles is for many rows.
"""

from typing import Any, NamedTuple

import torch

from runner.compiler.segment import Segment

_MOST_ROWS = 64
"""With more, the library's kernel is the faster one."""
_FEWEST_PROCESSORS = 68
"""With fewer, inductor leaves all products to the library, and warns of it."""


class Tile(NamedTuple):
    """What a program of the kernel computes, and how.

    Attributes:
        num_rows, num_columns: of the output; inductor takes fewer rows where there are fewer.
        depth: terms of the sum that are loaded at once.
        num_stages: loads that are under way at once.
    """

    num_rows: int
    num_columns: int
    depth: int
    num_stages: int
    num_warps: int


TILES = (
    Tile(_MOST_ROWS, 16, 256, 6, 2),
    Tile(_MOST_ROWS, 32, 256, 6, 4),
    Tile(_MOST_ROWS, 32, 256, 4, 2),
    Tile(_MOST_ROWS, 128, 128, 3, 2),
)
"""For products from narrow to wide: those of 32 columns and of 128 won on an H200."""

OPTIONS: dict[str, Any] = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "ATEN,TRITON",
    "max_autotune_conv_backends": "ATEN",
    "max_autotune_prune_choices_based_on_shared_mem": True,
    "max_autotune_report_choices_stats": False,
    "autotune_num_choices_displayed": 0,
}
"""Of inductor, for a segment for which they `may_pay`."""


def may_pay(segment: Segment, device: torch.device) -> bool:
    """Whether one of these kernels may be the fastest: for several rows, but not many."""
    if not 1 < segment.num_rows <= _MOST_ROWS:
        return False
    first = segment.activations[0]
    is_table = len(first.shape) == 2 and first.dtype in (torch.float16, torch.bfloat16)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if is_table else 0
    return bool(processors >= _FEWEST_PROCESSORS)


def use_tiles() -> None:
    """Have inductor try `TILES`, and no others, in this process."""
    from torch._inductor.template_heuristics.triton import (
        CUDAAddMMTemplateConfigHeuristic,
        CUDAMMTemplateConfigHeuristic,
        GemmConfig,
    )

    for heuristic in (CUDAMMTemplateConfigHeuristic(), CUDAAddMMTemplateConfigHeuristic()):
        heuristic.mm_configs = [GemmConfig(*tile) for tile in TILES]
