"""Small trainings on several processes beside the same on one: data parallel, sharded, and with faults.

``scripts/experiments/stress.py`` prints what they find and the tests hold it against its limits. :mod:`lib.ready`
starts the processes.
"""

from __future__ import annotations

import tempfile
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_elra.optim import ELRA
from hf_elra.trainer import ElraTrainer, ElraTrainingArguments

UPDATES = 50
SPIKES, BROKEN = (12, 33), (20,)
"""Updates with a loss ten times too high, and with a NaN in the gradient of the first process."""


def flat_weights(model: nn.Module) -> Tensor:
    """All parameters in one vector, shards put together."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def same_everywhere(tensor: Tensor) -> bool:
    """Whether a tensor has the same bits on every process."""
    told = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(told, tensor.contiguous())
    return all(torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)) for other in told)


# ---- data parallel, in a Trainer ----


class _Watch(TrainerCallback):
    """Counts whole reductions of gradients, and updates after which processes differ; breaks gradients."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.reductions = self.differing = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)
        if args.process_index == 0:
            next(self.trainer.model.parameters()).register_hook(self.break_gradient)

    def reduce(self, group, bucket):  # type: ignore[no-untyped-def]  # DDP does not understand postponed annotations
        self.reductions += bucket.is_last()
        return allreduce_hook(group, bucket)

    def break_gradient(self, gradient: Tensor) -> Tensor:
        """A NaN in one element, before gradients meet."""
        if self.trainer.state.global_step in BROKEN:
            gradient = gradient.clone()
            gradient.view(-1)[3] = float("nan")
        return gradient

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if dist.is_initialized():
            self.differing += not same_everywhere(flat_weights(self.trainer.model))


class _SpikeTrainer(ElraTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * 10 if self.state.global_step in SPIKES else loss


def _rows(count: int = 256, length: int = 16) -> list[dict[str, Tensor]]:
    """Rows of tokens that count upwards from a random start, with targets masked from a random one on."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        tokens = (torch.randint(0, 64, (1,), generator=generator) + torch.arange(length)) % 64
        labels = tokens.clone()
        labels[int(torch.randint(2, length, (1,), generator=generator)) :] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def data_parallel(batch: int) -> dict[str, Any]:
    """Train a small Llama for 50 updates, with restarts, cropped steps, growing batches and a NaN on one process.

    Args:
        batch: of every process; batch times processes should be the same in runs that are compared.

    Returns:
        ``weights`` at the end, ``reductions`` of gradients, updates after which processes were ``differing``, and more.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = ElraTrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=UPDATES, elra_control_cycle="5ba",
            elra_max_batch_size=32, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = _SpikeTrainer(LlamaForCausalLM(LlamaConfig(**sizes, **layers)), arguments, train_dataset=_rows())
        watch = _Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "updates": trainer.state.global_step,
        "reductions": watch.reductions,
        "differing": watch.differing,
        "restarts": trainer.elra_optimizer.restarts,
        "non_finite": trainer.elra_optimizer.metrics["non_finite"],
        "longest_step": max(entry["step_norm"] for entry in logs),
        "batches": [entry["batch_size"] for entry in logs],
        "weights": flat_weights(cast(nn.Module, trainer.model)).tolist(),
    }


def apart(weights: list[float], others: list[float]) -> float:
    """Distance of two vectors, relative to the norm of the first."""
    first, second = torch.tensor(weights, dtype=torch.float64), torch.tensor(others, dtype=torch.float64)
    return float((first - second).norm() / first.norm())


# ---- shards ----


def network() -> nn.Module:
    """A small network in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def sharded(cases: list[tuple[list[int], str, str]]) -> list[dict[str, Any]]:
    """ELRA on sharded parameters beside ELRA on whole ones, for 20 updates with restarts.

    Args:
        cases: shape of the mesh (of two dimensions, the first one replicates: HSDP), ``"data"`` for FSDP2 or
            ``"tensor"`` for tensor parallelism, and ELRA's memory layout.

    Returns:
        Of every case the largest difference of any parameter, ``apart``, and the ``restarts`` of both.
    """
    dist.init_process_group("gloo")
    return [_on_mesh(*case) for case in cases]


def _on_mesh(shape: list[int], parallel: str, memory: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("replicate", "shard")[-len(shape) :])
    plain, split = network(), network()
    if parallel == "data":
        fully_shard(split, mesh=mesh)
    else:
        parallelize_module(split, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    one = ELRA(plain.parameters(), weight_decay=1e-3)
    other = ELRA(split.parameters(), weight_decay=1e-3, memory=memory)
    rank, processes = dist.get_rank(), dist.get_world_size()
    share = 8 // processes
    for number in range(20):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).double()
        part = inputs[share * rank : share * (rank + 1)] if parallel == "data" else inputs
        for model, optimizer, own in ((plain, one, inputs), (split, other, part)):
            optimizer.zero_grad()
            outputs = model(own)
            loss = (outputs**2 + outputs.sum(1, keepdim=True)).mean()
            loss.backward()
            told = loss.detach().clone()
            if model is split:
                dist.all_reduce(told)
                told /= processes
            optimizer.step(loss=told * (50 if number % 7 == 6 else 1))
    furthest = (flat_weights(plain) - flat_weights(split)).abs().max().item()
    return {"apart": furthest, "restarts": [one.restarts, other.restarts]}
