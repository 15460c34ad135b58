"""What a comparison allows in float32, and what it advises."""

import pytest
import torch

from runner.build.agreement import LEAST_ERROR, advice, least_error
from runner.config.schema import CompileConfig

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_only_float32_may_be_as_coarse_as_tf32() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        strict, loose = (least_error(dtype, allow_tf32=allow) for allow in (False, True))
        assert strict == LEAST_ERROR
        assert loose == (2.0**-6 if dtype == torch.float32 else strict)


@pytest.mark.parametrize(
    ("settings", "dtype", "device", "error", "told"),
    [
        ({"backend": "tensorrt"}, torch.float32, CUDA, 3e-3, True),
        ({"backend": "tensorrt"}, torch.float32, CUDA, 0.5, False),
        ({"backend": "tensorrt"}, torch.float32, CUDA, float("nan"), False),
        ({"backend": "tensorrt", "allow_tf32": True}, torch.float32, CUDA, 3e-3, False),
        ({"backend": "inductor"}, torch.float32, CUDA, 3e-3, False),
        ({"backend": "tensorrt"}, torch.bfloat16, CUDA, 3e-3, False),
        ({"backend": "tensorrt"}, torch.float32, CPU, 3e-3, False),
    ],
)
def test_who_fails_because_of_tf32_is_told_what_to_set(
    settings: dict[str, object],
    dtype: torch.dtype,
    device: torch.device,
    error: float,
    told: bool,
) -> None:
    """And nobody else is: a lost all-reduce is no matter of rounding."""
    said = advice(CompileConfig.model_validate(settings), dtype, device, error=error)
    assert bool(said) == told
    assert not told or "compile.allow_tf32" in said
