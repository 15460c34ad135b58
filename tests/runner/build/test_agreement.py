"""What a comparison allows in float32, and what it advises."""

import pytest
import torch

from runner.build.agreement import advice, eps_of
from runner.config.schema import CompileConfig

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_only_float32_is_rounded_to_tf32() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        strict, loose = (eps_of(dtype, allow_tf32=allow) for allow in (False, True))
        assert strict == torch.finfo(dtype).eps
        assert loose == (2.0**-10 if dtype == torch.float32 else strict)


@pytest.mark.parametrize(
    ("settings", "dtype", "device", "told"),
    [
        ({"backend": "tensorrt"}, torch.float32, CUDA, True),
        ({"backend": "tensorrt", "allow_tf32": True}, torch.float32, CUDA, False),
        ({"backend": "inductor"}, torch.float32, CUDA, False),
        ({"backend": "tensorrt"}, torch.bfloat16, CUDA, False),
        ({"backend": "tensorrt"}, torch.float32, CPU, False),
    ],
)
def test_who_fails_because_of_tf32_is_told_what_to_set(
    settings: dict[str, object], dtype: torch.dtype, device: torch.device, told: bool
) -> None:
    said = advice(CompileConfig.model_validate(settings), dtype, device)
    assert bool(said) == told
    assert not told or "compile.allow_tf32" in said
