"""hf_elra.optim.tensors: sums over memory orders and types; shards are in trainer/test_processes.py."""

import math

import pytest
import torch

from hf_elra.optim import tensors
from hf_elra.optim.tensors import dot, flat, squares_and_products, stochastically_rounded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_over_pieces_and_memory_orders(dtype, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", 7)
    torch.manual_seed(0)
    image = torch.randn(2, 3, 4, 5).to(dtype)
    lefts = [torch.randn(20).to(dtype), image.to(memory_format=torch.channels_last), torch.randn(6, 4).to(dtype).T]
    rights = [torch.randn(20).to(dtype), image.flip(0), torch.randn(4, 6).to(dtype)]
    square, product = squares_and_products(lefts, rights)
    assert square == pytest.approx(sum(float((x.double() ** 2).sum()) for x in lefts), rel=1e-6)
    expected = sum(float((x.double() * y.double()).sum()) for x, y in zip(lefts, rights, strict=True))
    assert product == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert dot(lefts, rights) == product
    assert squares_and_products(lefts, [None, rights[1], None])[0] == pytest.approx(square, rel=1e-6)
    assert squares_and_products([], []) == (0.0, 0.0)


def test_dense_memory_is_not_copied():
    x, y = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(2, 3, 4, 5)
    own = x.clone()
    assert flat(x, own)[0].data_ptr() == x.data_ptr()
    a, b = flat(x, y)  # not in one order: what is left of a pair must stay a pair
    assert torch.equal(a.view(2, 3, 4, 5), x)
    assert torch.equal(b, y.reshape(-1))


def test_stochastic_rounding():
    generator = torch.Generator().manual_seed(0)
    values = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way between two neighbours in bfloat16
    rounded = stochastically_rounded(values, generator)
    assert rounded.float().unique().tolist() == [1.0, 1 + 2**-7]
    assert rounded.double().mean().item() == pytest.approx(1 + 2**-9, abs=1e-4)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -2.0])
    assert torch.equal(stochastically_rounded(special, generator).float()[[0, 1, 3, 4]], special[[0, 1, 3, 4]])
    assert stochastically_rounded(special, generator)[2].isnan()
