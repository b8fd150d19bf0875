"""hf_elra.optim.tensors: sums over memory orders, types and shards."""

import math
import os
import subprocess
import sys

import pytest
import torch

from hf_elra.optim import tensors
from hf_elra.optim.tensors import dot, flat, squares_and_products, stochastically_rounded
from tests.conftest import ROOT


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


SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_elra import ELRA

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()

for memory in ("gradient", "point"):
    plain, sharded = network(), fully_shard(network(), mesh=mesh)
    one = ELRA(plain.parameters(), weight_decay=1e-3)
    other = ELRA(sharded.parameters(), weight_decay=1e-3, memory=memory)
    for number in range(20):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).double()
        for model, optimizer, part in ((plain, one, inputs), (sharded, other, inputs[4 * rank : 4 * rank + 4])):
            optimizer.zero_grad()
            outputs = model(part)
            loss = (outputs**2 + outputs.sum(1, keepdim=True)).mean()
            loss.backward()
            told = loss.detach().clone()
            if model is sharded:
                dist.all_reduce(told)
                told /= 2
            optimizer.step(loss=told * (50 if number % 7 == 6 else 1))
    assert one.restarts == other.restarts > 1
    apart = max((p - q.full_tensor()).abs().max().item() for p, q in zip(plain.parameters(), sharded.parameters()))
    if rank == 0:
        print(memory, apart)
try:
    other = ELRA(sharded.parameters(), memory="offload")
    other.step(loss=1.0)
except ValueError as error:
    if rank == 0:
        print(str(error).replace(" ", "_"), "nan")
dist.destroy_process_group()
"""


def test_shards_of_two_processes_walk_the_path_of_one(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert float(found.pop("gradient")) < 1e-12
    assert float(found.pop("point")) < 1e-8
    assert "memory='offload'_cannot_be_used_with_sharded_parameters" in "".join(found)
