"""PyTorch's products made as coarse as TensorRT-RTX's."""

import pytest
import torch
from torch import nn

from runner.build.tf32 import products_in_tf32

STEP = 2.0**-10
"""Between neighbouring numbers of TF32 from 1 to 2."""


def test_a_factor_keeps_eleven_bits() -> None:
    exact = torch.tensor([1 + STEP, -(1 + STEP), 3.0, 0.0, torch.inf, 2.0**-130])
    between = torch.tensor([1 + STEP / 2, -(1 + 0.4 * STEP), 3 + 0.9 * STEP, 0.0, torch.inf, 0.0])
    rounded = torch.tensor([1 + STEP, -1.0, 3.0, 0.0, torch.inf, 0.0])
    one = torch.ones(1, 1)
    with products_in_tf32():
        assert torch.equal((exact[:, None] @ one)[:, 0], exact)
        assert torch.equal((between[:, None] @ one)[:, 0], rounded)
        assert (torch.tensor([[torch.nan]]) @ one).isnan()


def test_sums_and_other_dtypes_are_as_they_were() -> None:
    x = torch.tensor([[1 + STEP / 4]])
    zero = torch.zeros(1, 1)
    with products_in_tf32():
        assert torch.equal(x + x, 2 * x)
        assert torch.equal(torch.addmm(x, zero, zero), x)
        assert torch.equal(x.double() @ x.double(), x.double() * x.double())
    with products_in_tf32(False):
        assert torch.equal(x @ x, x * x)


PRODUCTS = {
    "linear": (nn.Linear(64, 8), torch.randn(4, 5, 64)),
    "vector": (nn.Linear(64, 8), torch.randn(64)),
    "convolution": (nn.Conv2d(8, 8, 3), torch.randn(2, 8, 9, 9)),
    "transposed": (nn.ConvTranspose1d(8, 8, 3), torch.randn(2, 8, 9)),
    "attention": (nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(2, 7, 64)),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_is_coarse(name: str, mode: type) -> None:
    """Inference mode hands over linear layers whole."""
    module, x = PRODUCTS[name]
    inputs = (x, x, x) if name == "attention" else (x,)
    with mode():
        exact = module.double()(*(y.double() for y in inputs))
        module.float()
        fine = module(*inputs)
        with products_in_tf32():
            coarse = module(*inputs)
    exact, fine, coarse = (y[0] if isinstance(y, tuple) else y for y in (exact, fine, coarse))
    fine_error, coarse_error = ((y - exact).norm() / exact.norm() for y in (fine, coarse))
    assert fine_error < 1e-6
    assert 5e-5 < coarse_error < 2e-3
