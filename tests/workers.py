"""What the tests run on several processes: ``python -m torch.distributed.run ... -m tests.workers FUNCTION JSON``.

A function gets keywords from the JSON; what it returns on the first process is written to ``output`` as JSON.
:func:`together` starts them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import TrainerCallback

from hf_elra import ELRA, ElraTrainer
from tests.conftest import ROOT, arguments, llama, logged, token_rows

FUNCTIONS: dict[str, Any] = {}


def together(function, processes, folder, **given):
    """Run a function of this module on so many processes; return what it returned on the first one."""
    output = Path(folder, f"{function.__name__}-{processes}.json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
            *("-m", "tests.workers", function.__name__, json.dumps({**given, "folder": str(folder)}), str(output)),
        ],
        env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def worker(function):
    """Make a function callable by name."""
    FUNCTIONS[function.__name__] = function
    return function


def same_everywhere(tensor):
    """Whether a tensor has the same bits on every process."""
    told = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(told, tensor.contiguous())
    return all(torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)) for other in told)


def flat_weights(model):
    """All parameters in one vector, shards put together."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


# ---- DistributedDataParallel in a Trainer ----


class Watch(TrainerCallback):
    """Counts whole reductions of gradients, and updates after which processes differ; breaks gradients."""

    def __init__(self, trainer, broken_at):
        self.trainer, self.broken_at = trainer, broken_at
        self.reductions = self.differing = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if dist.is_initialized():
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)
        if args.process_index == 0:
            next(self.trainer.model.parameters()).register_hook(self.break_gradient)

    def reduce(self, group, bucket):
        self.reductions += bucket.is_last()
        return allreduce_hook(group, bucket)

    def break_gradient(self, gradient):
        """A NaN in one element, on the first process, before gradients meet."""
        if self.trainer.state.global_step in self.broken_at:
            gradient = gradient.clone()
            gradient.view(-1)[3] = float("nan")
        return gradient

    def on_step_end(self, args, state, control, **kwargs):
        if dist.is_initialized():
            self.differing += not same_everywhere(flat_weights(self.trainer.model))


class SpikeTrainer(ElraTrainer):
    """Loss (and gradients) ten times too high at some updates."""

    spikes: tuple[int, ...] = ()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * 10 if self.state.global_step in self.spikes else loss


@worker
def data_parallel(folder, batch, **more):
    """Train for 50 updates with growing batches, spikes, cropped steps and a NaN on one process."""
    trainer = SpikeTrainer(
        llama(),
        arguments(
            f"{folder}/{os.environ.get('WORLD_SIZE', 1)}",
            per_device_train_batch_size=batch, max_steps=50, elra_control_cycle="5ba", elra_max_batch_size=32, **more,
        ),
        train_dataset=token_rows(256, unequal=True),
    )  # fmt: skip
    trainer.spikes = (12, 33)
    watch = Watch(trainer, broken_at=(20,))
    trainer.add_callback(watch)
    trainer.train()
    weights = flat_weights(trainer.model)
    if trainer.is_world_process_zero():
        torch.save(weights, f"{folder}/weights-{os.environ.get('WORLD_SIZE', 1)}.pt")
    return {
        "updates": trainer.state.global_step,
        "reductions": watch.reductions,
        "differing": watch.differing,
        "restarts": trainer.elra_optimizer.restarts,
        "non_finite": trainer.elra_optimizer.metrics["non_finite"],
        "longest_step": max(logged(trainer, "step_norm")),
        "batches": logged(trainer, "batch_size"),
        "finite": bool(weights.isfinite().all()),
    }


@worker
def one_reads_garbage(folder):
    """A NaN that one process alone sees, after gradients met; with and without kernels (in Triton's interpreter)."""
    dist.init_process_group("gloo")
    return [broken_on_one(kernels) for kernels in (False, True)]


def broken_on_one(kernels):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = ELRA(model.parameters(), fused=kernels)
    optimizer.process_group = dist.group.WORLD
    differing = 0
    for number in range(12):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        loss = (model(inputs) - inputs[:, :3]).square().mean()
        loss.backward()
        if number in (3, 7, 8) and dist.get_rank() == 1:
            model.bias.grad[1] = float("nan")
        optimizer.step(loss=loss)
        differing += not same_everywhere(flat_weights(model))
    finite = bool(flat_weights(model).isfinite().all())
    return {"differing": differing, "finite": finite, "non_finite": optimizer.metrics["non_finite"]}


# ---- shards ----


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def data_sharded(model, mesh):
    return fully_shard(model, mesh=mesh)


def tensor_sharded(model, mesh):
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@worker
def meshes(folder, cases):
    """ELRA on sharded parameters beside ELRA on whole ones; a case is (shape of the mesh, data or tensor, memory).

    A mesh of two dimensions replicates over the first (HSDP). Returns the largest difference of any parameter after 20
    updates, and both numbers of restarts.
    """
    dist.init_process_group("gloo")
    return [on_mesh(*case) for case in cases], error_of_sharded_offload()


def on_mesh(shape, parallel, memory):
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("replicate", "shard")[-len(shape) :])
    plain, sharded = network(), (data_sharded if parallel == "data" else tensor_sharded)(network(), mesh)
    one = ELRA(plain.parameters(), weight_decay=1e-3)
    other = ELRA(sharded.parameters(), weight_decay=1e-3, memory=memory)
    rank, processes = dist.get_rank(), dist.get_world_size()
    share = 8 // processes
    for number in range(20):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).double()
        part = inputs[share * rank : share * (rank + 1)] if parallel == "data" else inputs
        for model, optimizer, own in ((plain, one, inputs), (sharded, other, part)):
            optimizer.zero_grad()
            outputs = model(own)
            loss = (outputs**2 + outputs.sum(1, keepdim=True)).mean()
            loss.backward()
            told = loss.detach().clone()
            if model is sharded:
                dist.all_reduce(told)
                told /= processes
            optimizer.step(loss=told * (50 if number % 7 == 6 else 1))
    apart = (flat_weights(plain) - flat_weights(sharded)).abs().max().item()
    return apart, one.restarts, other.restarts


def error_of_sharded_offload():
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = ELRA(model.parameters(), memory="offload")
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    try:
        optimizer.step(loss=1.0)
    except ValueError as error:
        return str(error)


def accelerate_shards_on_cpu():
    """Let Accelerate use FSDP without a GPU, for which it takes DDP otherwise: for gloo both are the same to it."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    stock = PartialState.__init__

    def patched(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


@worker
def fsdp_trainer(folder, resume=None, state="SHARDED_STATE_DICT"):
    """Ten updates of a Trainer with FSDP2 through Accelerate, checkpoint after five; or go on from one."""
    accelerate_shards_on_cpu()
    processes = int(os.environ["WORLD_SIZE"])
    settings = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": state}
    trainer = ElraTrainer(
        llama().double(),
        arguments(
            f"{folder}/{state}-{processes}", fsdp=True, fsdp_config=settings,
            per_device_train_batch_size=8 // processes, save_strategy="steps", save_steps=5, elra_control_cycle="2ba",
        ),
        train_dataset=token_rows(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return {
        "sharded": type(next(trainer.model_wrapped.parameters())).__name__,
        "loss": logged(trainer, "loss"),
        "alpha": logged(trainer, "alpha"),
        "batches": logged(trainer, "batch_size"),
        "restarts": logged(trainer, "restarts"),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, given, output = sys.argv[1:]
    result = FUNCTIONS[name](**json.loads(given))
    if int(os.environ.get("RANK", 0)) == 0:
        Path(output).write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
