"""What the contract tests run on two processes, by ``lib.ready.together``."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_elra import ConfigurationError
from lib.many_processes import flat_weights, network, same_everywhere
from tests.contract.cases import CASES, step

EVENTS = {8: "spike", 14: "nan_loss", 19: "nan_gradient"}


def two_processes():
    """Every case in DDP, where one process alone meets trouble; and on shards."""
    dist.init_process_group("gloo")
    return {case.name: {"differing": differing(case), "shards": on_shards(case)} for case in CASES if not case.brief}


def differing(case):
    """After how many updates the weights of the processes are not the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    together = nn.parallel.DistributedDataParallel(model)
    optimizer = case.make(model.parameters())
    optimizer.process_group = dist.group.WORLD
    found = 0
    for number in range(26):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(2 * number + dist.get_rank()))
        optimizer.zero_grad()
        loss = (together(inputs) - inputs[:, :3]).square().mean()
        loss.backward()
        event, told = EVENTS.get(number) if dist.get_rank() == 1 else None, loss.item()
        if event == "nan_gradient":
            model[0].bias.grad[1] = float("nan")
        step(optimizer, loss=told * 1e4 if event == "spike" else float("nan") if event == "nan_loss" else told)
        found += not same_everywhere(flat_weights(model))
    assert optimizer.restarts >= 3
    return found


def on_shards(case):
    """What becomes of sharded parameters: ``"finite"``, or the error."""
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    try:
        optimizer = case.make(model.parameters())
        optimizer.process_group = dist.group.WORLD
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.ones(3, 6, dtype=torch.float64)).square().mean()
            loss.backward()
            step(optimizer, loss=loss.detach())
    except ConfigurationError as error:
        return str(error)
    return "finite" if flat_weights(model).isfinite().all() else "not finite"
