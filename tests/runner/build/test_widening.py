"""A module in a wider dtype than it names."""

import pytest
import torch
from torch import nn

from runner.build.widening import run_widened, wider_than


class Stubborn(nn.Module):
    """Names float32 in its code, has a constant that is no buffer, and normalizes a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)
        self.table = nn.Embedding(5, 4)
        self.shift = torch.linspace(0, 1, 6)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.conv(x)) + self.shift
        y = y.float() @ torch.ones(6, 6, dtype=torch.float32, device=x.device)
        y = y + torch.arange(6, dtype=torch.float32) * torch.tensor(0.1)
        return {"y": (y + self.table(ids)[..., None]).to(x.dtype), "best": y.argmax(-1)}


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Stubborn().eval()


INPUTS = [torch.linspace(-1, 1, 48).view(2, 3, 8), torch.tensor([1, 4])]


def test_every_operation_is_computed_in_it(module: nn.Module) -> None:
    narrow = module(*INPUTS)
    wide, best = run_widened(module, INPUTS, torch.float64)
    assert (wide.dtype, best.dtype) == (torch.float64, torch.int64)
    torch.testing.assert_close(wide.float(), narrow["y"])
    # Narrower anywhere, the sums would be off by about 1e-7.
    module.double()
    module.shift = module.shift.double()
    y = module.norm(module.conv(INPUTS[0].double())) + module.shift
    y = y.sum(-1, keepdim=True) + torch.arange(6).double() * torch.tensor(0.1).double()
    expected = y + module.table(INPUTS[1])[..., None]
    torch.testing.assert_close(wide, expected, rtol=0, atol=1e-12)


def test_the_module_stays_as_it_is(module: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run_widened(module, INPUTS, torch.float64)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_widened_to_float32_alone(dtype: torch.dtype) -> None:
    assert wider_than(dtype) == torch.float32
    linear = nn.Linear(4, 4).to(dtype)
    (found,) = run_widened(linear, [torch.ones(1, 4, dtype=dtype)], torch.float32)
    weight, bias = linear.weight.float(), linear.bias.float()
    torch.testing.assert_close(found, weight.sum(1)[None] + bias)
