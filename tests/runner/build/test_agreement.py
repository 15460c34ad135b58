"""What a comparison that failed advises."""

import pytest
import torch

from runner.build.agreement import advice
from runner.config.schema import CompileConfig

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "dtype", "device", "cosine", "told"),
    [
        ({"backend": "tensorrt"}, torch.float32, CUDA, 0.99997, True),
        ({"backend": "tensorrt"}, torch.float32, CUDA, 0.9, False),
        ({"backend": "tensorrt"}, torch.float32, CUDA, float("nan"), False),
        ({"backend": "tensorrt", "allow_tf32": True}, torch.float32, CUDA, 0.99997, False),
        ({"backend": "inductor"}, torch.float32, CUDA, 0.99997, False),
        ({"backend": "tensorrt"}, torch.bfloat16, CUDA, 0.99997, False),
        ({"backend": "tensorrt"}, torch.float32, CPU, 0.99997, False),
    ],
)
def test_who_fails_because_of_tf32_is_told_what_to_set(
    settings: dict[str, object],
    dtype: torch.dtype,
    device: torch.device,
    cosine: float,
    told: bool,
) -> None:
    """And nobody else is: a lost all-reduce is no matter of rounding."""
    said = advice(CompileConfig.model_validate(settings), dtype, device, cosine=cosine)
    assert bool(said) == told
    assert not told or "compile.allow_tf32" in said
