"""Is one constant times the line's minimum at the start the best constant rate? Over widths, depths, batches and tasks.

    python scripts/experiments/rate_scan.py --output runs/rate --bundle gpu-bundle/rate --workers 6 --seconds 440
    python scripts/experiments/rate_scan.py --output runs/try --bundle gpu-bundle/rate --tiny --workers 1    # on a CPU
    python scripts/experiments/rate_scan_report.py --input runs/rate/rate_scan.jsonl                         # tables

In every setting:

- ``line``: along the direction of ``elra_spectral`` (the polar factors of the mean gradient of 4 batches) losses of 16
  other batches at 33 points and at none, each batch by itself, for three seeds; also along parts of the direction, from
  a fresh and from a fitted head, and after 20 updates. What the minimum of such a line is, is settled by its reader.
- ``constant``: that direction with momentum 0.9 at a constant rate, with the weight average t^8. The grid is of factor
  2 around 0.45 of the line's lowest point, goes on where its best is at its edge, and ends with a factor of √2 on both
  sides of the best. The mean is evaluated after an eighth, a quarter, half and all of the updates.
- ``today``: ``ELRASpectral`` with nothing chosen. ``adamw``: AdamW with schedule and clipping, on a grid of rates.

Small models are bound by the launches of kernels, so that an update on a GPU is captured in a CUDA graph, and runs that
differ in rate and seed are replayed side by side, each in a stream of its own. Where capturing fails, updates are made
one by one, and there are fewer of them. Every run is a line of ``OUTPUT/rate_scan.jsonl``, written at once; the same
command makes what is missing. The settings are taken in the order of :data:`JOBS` by ``--workers`` processes.
``--bundle``: see ``rate_scan_bundle.py``.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import functools
import gc
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional

from hf_elra.optim.averaging import WeightAverage, recompute_batch_norm
from hf_elra.optim.directions.spectral import OVER, embeddings_of, outputs_of, spectral_direction
from hf_elra.optim.spectral import ELRASpectral
from hf_elra.report.environment import environment

FACTOR = 0.45
"""Of the line's minimum: where the grid of constant rates has its middle."""
MOMENTUM, POWER = 0.9, 8
POINTS = [float(f"{1e-5 * 2 ** (k / 2):.5g}") for k in range(33)]
GRADIENT_BATCHES, OTHER_BATCHES = 4, 16
WARM_UP = 20
"""Updates before the line is measured again."""
HEAD_UPDATES, HEAD_RATE = 60, 1e-2
"""Of Adam on a fresh head alone."""
LINE_SEEDS = 3
FILE = "rate_scan.jsonl"
SIDE_BY_SIDE = 12
"""Most runs at once."""
LORA_ALPHA = 16


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        name, task: ``task`` is ``"stories"``, ``"sst2"`` or ``"cifar"``.
        batch, updates, seeds: of every run.
        width, depth: of the Llama.
        examples: how many training examples there are; all for None.
        rank: of LoRA; 0 for none.
        adamw: rates of AdamW.
    """

    name: str
    task: str
    batch: int
    updates: int
    width: int = 128
    depth: int = 4
    examples: int | None = None
    rank: int = 0
    seeds: int = 2
    adamw: tuple[float, ...] = ()


SETTINGS = {
    setting.name: setting
    for setting in (
        *(
            Setting(f"llama-width{width}", "stories", 16, 1024, width=width, adamw=(1e-3, 3e-3, 1e-2))
            for width in (64, 128, 256, 512)
        ),
        Setting("minilm-4000", "sst2", 16, 750, examples=4000, adamw=(5e-5, 1e-4, 2e-4, 4e-4)),
        Setting("minilm-500", "sst2", 16, 96, examples=500, adamw=(5e-5, 1e-4, 2e-4, 4e-4)),
        Setting("minilm-4000-lora8", "sst2", 16, 750, examples=4000, rank=8, adamw=(5e-4, 1e-3, 2e-3, 4e-3)),
        Setting("llama-batch4", "stories", 4, 2048, adamw=(1e-3, 3e-3)),
        Setting("llama-batch64", "stories", 64, 512, adamw=(3e-3, 1e-2)),
        Setting("llama-batch256", "stories", 256, 256, seeds=1, adamw=(3e-3, 1e-2)),
        Setting("llama-depth2", "stories", 16, 1024, depth=2),
        Setting("llama-depth12", "stories", 16, 1024, depth=12, seeds=1),
        Setting("resnet20", "cifar", 64, 624, adamw=(1e-3, 3e-3, 1e-2)),
        Setting("llama-long", "stories", 16, 8192, seeds=1),
    )
}
JOBS = [
    ("llama-width128", "constant"), ("minilm-4000", "constant"), ("llama-width256", "constant"),
    ("llama-width64", "constant"), ("llama-width512", "constant"), ("minilm-500", "constant"),
    ("llama-width128", "today"), ("minilm-4000", "adamw"), ("minilm-4000", "today"), ("llama-width512", "today"),
    ("llama-batch4", "constant"), ("llama-batch64", "constant"), ("minilm-4000-lora8", "constant"),
    ("llama-width64", "today"), ("llama-width256", "today"), ("llama-width128", "adamw"),
    ("llama-batch256", "constant"), ("resnet20", "constant"), ("llama-depth12", "constant"),
    ("llama-depth2", "constant"), ("llama-width512", "adamw"), ("minilm-500", "adamw"), ("minilm-500", "today"),
    ("minilm-4000-lora8", "adamw"), ("minilm-4000-lora8", "today"), ("resnet20", "today"), ("resnet20", "adamw"),
    ("llama-batch64", "today"), ("llama-batch4", "today"), ("llama-long", "constant"), ("llama-batch256", "today"),
    ("llama-width64", "adamw"), ("llama-width256", "adamw"), ("llama-batch64", "adamw"), ("llama-batch4", "adamw"),
    ("llama-batch256", "adamw"), ("llama-depth12", "today"), ("llama-depth2", "today"),
]  # fmt: skip
"""What is measured, in the order of its worth; ``constant`` begins with the lines."""


# ---- models and data ----


class Rows(nn.Embedding):
    """An embedding whose backward pass never waits for the host, whatever the version of torch."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up."""
        return self.weight.index_select(0, ids.flatten()).view(*ids.shape, -1)


class Task:
    """Data on the device, models, losses of examples, evaluation.

    Attributes:
        size: number of training examples.
        head: part of the names of a fresh head's parameters on a trained body; None where all is new.
        whole_batches: whether losses depend on the other examples of the batch.
    """

    head: str | None = None
    whole_batches = False
    size: int

    def model(self, seed: int) -> nn.Module:
        """Make a model."""
        raise NotImplementedError

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Losses of training examples, one each."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation loss, and accuracy if there are classes."""
        raise NotImplementedError

    def batch_norm_batches(self) -> Iterator[Tensor]:
        """Rows of training examples, for the statistics of BatchNorm."""
        return iter(())


class Stories(Task):
    """A small Llama from scratch, on blocks as they are in the bundle, or put together to a length."""

    def __init__(self, setting: Setting, bundle: Path, device: str, *, tiny: bool, length: int | None = None) -> None:
        self.setting, self.device = setting, device
        with np.load(bundle / "text.npz") as arrays:
            self.pieces = int(arrays["pieces"])
            number = 64 if tiny else 512
            self.train, self.validation = (
                torch.from_numpy(arrays[name][: 512 if tiny else None].astype(np.int64)).to(device)
                for name in ("train", "validation")
            )
        self.validation = self.validation[:number]
        if length is not None:
            self.train, self.validation = (
                blocks.flatten()[: blocks.numel() // length * length].view(-1, length)
                for blocks in (self.train, self.validation)
            )
        self.size, self.positions = self.train.shape
        self.mask = torch.full((1, 1, self.positions, self.positions), -1e30, device=device).triu(1)
        self.places = torch.arange(self.positions, device=device)[None]

    def model(self, seed: int) -> nn.Module:
        """Make a Llama."""
        torch.manual_seed(seed)
        width = self.setting.width
        config = transformers.LlamaConfig(
            vocab_size=self.pieces, hidden_size=width, intermediate_size=width * 43 // 16,
            num_hidden_layers=self.setting.depth, num_attention_heads=max(width // 32, 1), tie_word_embeddings=True,
            max_position_embeddings=self.positions, use_cache=False,
        )  # fmt: skip
        return _with_rows(transformers.LlamaForCausalLM(config)).to(self.device).train()

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Nats a token, one number a block."""
        return self._of(model, self.train.index_select(0, rows))

    def _of(self, model: nn.Module, ids: Tensor) -> Tensor:
        mask, places = self.mask.expand(len(ids), -1, -1, -1), self.places.expand(len(ids), -1)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1).mean(1)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation loss."""
        return {"loss": self._of(model, self.validation).mean().item()}


class Sentences(Task):
    """MiniLM with a fresh head, fine-tuned on SST-2, whole or by LoRA."""

    head = "classifier"

    def __init__(self, setting: Setting, bundle: Path, device: str, *, tiny: bool) -> None:
        self.setting, self.device = setting, device
        self.config = json.loads((bundle / "minilm.json").read_text(encoding="utf-8"))
        self.weights = load_file(bundle / "minilm.safetensors")
        with np.load(bundle / "sst2.npz") as arrays:
            self.train = self._on_device(arrays, "train", 400 if tiny else setting.examples)
            self.validation = self._on_device(arrays, "dev", 32 if tiny else None)
        self.size = len(self.train[0])

    def _on_device(self, arrays: Any, name: str, number: int | None) -> tuple[Tensor, Tensor, Tensor]:
        ids, lengths, labels = (
            torch.from_numpy(arrays[key][:number].astype(np.int64)).to(self.device)
            for key in (name, f"{name}_lengths", f"{name}_labels")
        )
        return ids, torch.arange(ids.shape[1], device=self.device)[None] < lengths[:, None], labels

    def model(self, seed: int) -> nn.Module:
        """Load MiniLM; only the head, and LoRA's A, depend on the seed."""
        torch.manual_seed(seed)
        config = transformers.BertConfig(**{**self.config, "num_labels": 2})
        config._attn_implementation = "eager"  # whose dropout keeps its masks: graphs side by side share a generator
        model = transformers.BertForSequenceClassification(config)
        missing, unexpected = model.bert.load_state_dict(self.weights, strict=False)
        if [name for name in missing if "position_ids" not in name and "token_type_ids" not in name] or unexpected:
            raise ValueError(f"minilm.safetensors: missing {missing}, unexpected {unexpected}")
        if self.setting.rank:
            add_lora(model, self.setting.rank)
        return _with_rows(model).to(self.device).train()

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Cross-entropies."""
        ids, mask, labels = (data.index_select(0, rows) for data in self.train)
        return functional.cross_entropy(self._logits(model, ids, mask), labels, reduction="none")

    def _logits(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        whole = mask[:, None, None, :].logical_not().float() * -1e30
        logits: Tensor = model(input_ids=ids, attention_mask=whole, token_type_ids=torch.zeros_like(ids)).logits
        return logits

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy."""
        ids, mask, labels = self.validation
        return _of_classes(self._logits(model, ids, mask), labels)


class Pictures(Task):
    """ResNet-20 with BatchNorm on pictures of 32 x 32, not augmented."""

    whole_batches = True

    def __init__(self, setting: Setting, bundle: Path, device: str, *, tiny: bool) -> None:
        self.device = device
        with np.load(bundle / "cifar.npz") as arrays:
            files = {name: arrays[name] for name in arrays}
        self.train = self._decoded(files, "train", 1400 if tiny else None)
        self.validation = self._decoded(files, "test", 64 if tiny else None)
        self.size = len(self.train[0])

    def _decoded(self, files: dict[str, Any], name: str, number: int | None) -> tuple[Tensor, Tensor]:
        from PIL import Image

        bounds, data = files[f"{name}_offsets"], files[f"{name}_bytes"]
        labels = files[f"{name}_labels"][:number].astype(np.int64)
        pixels = np.stack(
            [
                np.asarray(Image.open(io.BytesIO(data[bounds[k] : bounds[k + 1]].tobytes())).convert("RGB"))
                for k in range(len(labels))
            ]
        )
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        return (images - 0.47) / 0.25, torch.from_numpy(labels).to(self.device)

    def model(self, seed: int) -> nn.Module:
        """Make a ResNet-20."""
        torch.manual_seed(seed)
        return resnet20().to(self.device).train()

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Cross-entropies."""
        images, labels = (data.index_select(0, rows) for data in self.train)
        return functional.cross_entropy(model(images), labels, reduction="none")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy."""
        images, labels = self.validation
        return _of_classes(model(images), labels)

    def batch_norm_batches(self) -> Iterator[Tensor]:
        """The first pictures."""
        rows = torch.arange(min(self.size, 2048), device=self.device)
        return iter(self.train[0].index_select(0, part) for part in rows.split(256))


TASKS: dict[str, Callable[..., Task]] = {"stories": Stories, "sst2": Sentences, "cifar": Pictures}


def _with_rows(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.__class__ = Rows
    return model


def _of_classes(logits: Tensor, labels: Tensor) -> dict[str, float]:
    hits = (logits.argmax(1) == labels).float().mean().item()
    return {"loss": functional.cross_entropy(logits, labels).item(), "accuracy": hits}


class LoRALinear(nn.Module):
    """A frozen linear layer and B·A beside it, with B = 0 at first."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.scale = base, LORA_ALPHA / rank
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        beside: Tensor = functional.linear(functional.linear(x, self.A), self.B)
        return self.base(x) + self.scale * beside


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze all but the head, and put pairs beside all other linear layers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "classifier":
                setattr(parent, name, LoRALinear(child, rank))


def resnet20() -> nn.Module:
    """ResNet-20 of He et al. (2016): three stages of three blocks with 16, 32 and 64 filters."""
    from hf_elra.recipes.image_models import BasicBlock

    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for outputs in (16, 32, 64):
        for position in range(3):
            layers.append(BasicBlock(width, outputs, 2 if outputs > 16 and position == 0 else 1))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


# ---- what is followed ----


def along(gradients: Sequence[Tensor], newest: Sequence[Tensor], embeddings: Sequence[bool]) -> list[Tensor]:
    """The direction of ``elra_spectral`` with its frozen rows, without a wait for the host.

    Args:
        gradients: averaged.
        newest: of this update.
        embeddings: of each, whether its rows are taken one by one.
    """
    is_matrix = [g.dim() > 1 and not embedding for g, embedding in zip(gradients, embeddings, strict=True)]
    matrices = [g for g, matrix in zip(gradients, is_matrix, strict=True) if matrix]
    factors = iter(spectral_direction(matrices, [False] * len(matrices)))
    directions = []
    for g, new, matrix, embedding in zip(gradients, newest, is_matrix, embeddings, strict=True):
        if matrix:
            directions.append(next(factors))
            continue
        rows = g if embedding else g.view(1, -1)
        norms = vector_norm(rows, dim=1, keepdim=True)
        unit = rows * (rows.shape[1] ** 0.5 / norms.clamp_min(1e-30))
        if embedding:
            idle = (new.abs().amax(1, keepdim=True) == 0) & (norms < OVER * norms.max())
            unit = unit * idle.logical_not()
        directions.append(unit.view_as(g))
    return directions


class Lane:
    """One run, whose updates never wait for the host: they read what they need from tensors on the device.

    Args:
        task (Task): what is trained.
        model (Module): where it begins; belongs to the lane.
        batch, updates (int): of the run.
        adamw (bool): AdamW with clipping instead of the spectral direction.
    """

    def __init__(self, task: Task, model: nn.Module, batch: int, updates: int, *, adamw: bool = False) -> None:
        self.task, self.model, self.batch, self.updates, self.adamw = task, model, batch, updates, adamw
        self.params = [p for p in model.parameters() if p.requires_grad]
        marked = {id(p) for p in embeddings_of(model)}
        self.embeddings = [id(p) in marked for p in self.params]
        self.start = [t.detach().clone() for t in self._tensors()]
        self.momenta, self.squares, self.mean = ([torch.zeros_like(p) for p in self.params] for _ in range(3))
        device = self.params[0].device
        self.counter = torch.zeros(1, dtype=torch.long, device=device)
        self.order = torch.zeros(updates, batch, dtype=torch.long, device=device)
        self.numbers = torch.zeros(updates, 4, device=device)  # rate, Adam's two corrections, the newest point's weight
        self.losses = torch.zeros(updates, device=device)
        self.graph: Any = None
        self.stream: Any = None

    def _tensors(self) -> list[Tensor]:
        return [*self.params, *self.model.buffers()]

    @torch.no_grad()
    def reset(self, rates: Sequence[float], seed: int, decay: float = 0.0, beta2: float = 0.999) -> None:
        """Go back to where the run begins."""
        for t, start in zip(self._tensors(), self.start, strict=True):
            t.copy_(start)
        for t in (*self.momenta, *self.squares, *self.mean, self.counter, self.losses):
            t.zero_()
        self.decay, self.beta2 = decay, beta2  # constants of a captured update: the same in all runs of a lane
        self.order.copy_(order(self.task.size, self.batch, self.updates, seed))
        self.numbers.copy_(
            torch.tensor(
                [
                    [rate, 1 - 0.9 ** (t + 1), 1 - beta2 ** (t + 1), (POWER + 1) / (t + POWER + 1)]
                    for t, rate in enumerate(rates)
                ]
            )
        )

    def update(self) -> None:
        """Make one update, or capture it."""
        rows = self.order.index_select(0, self.counter)[0]
        rate, *corrections, weight = self.numbers.index_select(0, self.counter)[0].unbind()
        loss = self.task.losses(self.model, rows).mean()
        gradients = list(torch.autograd.grad(loss, self.params, materialize_grads=True))
        with torch.no_grad():
            if self.adamw:
                self._adamw(gradients, rate, *corrections)
            else:
                torch._foreach_lerp_(self.momenta, gradients, 1 - MOMENTUM)
                averaged = torch._foreach_lerp(self.momenta, gradients, 1 - MOMENTUM)
                directions = along(averaged, gradients, self.embeddings)
                torch._foreach_mul_(directions, rate)
                torch._foreach_sub_(self.params, directions)
            away = torch._foreach_sub(self.params, self.mean)
            torch._foreach_mul_(away, weight)
            torch._foreach_add_(self.mean, away)
            self.losses.index_copy_(0, self.counter, loss.detach().view(1))
            self.counter.add_(1)

    def _adamw(self, gradients: list[Tensor], rate: Tensor, first: Tensor, second: Tensor) -> None:
        norm = vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (1 / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_lerp_(self.momenta, gradients, 0.1)
        torch._foreach_mul_(self.squares, self.beta2)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - self.beta2)
        roots = torch._foreach_div(self.squares, second)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, 1e-8)
        steps = torch._foreach_div(self.momenta, roots)
        torch._foreach_mul_(steps, rate / first)
        if self.decay:
            torch._foreach_mul_(self.params, 1 - rate * self.decay)
        torch._foreach_sub_(self.params, steps)

    def capture(self) -> None:
        """Make a CUDA graph of an update; the lane has to be reset afterwards."""
        self.stream = torch.cuda.Stream()
        self.graph = captured(self.update, self.stream)

    def next(self) -> None:
        """Make an update, replayed if it was captured."""
        if self.graph is None:
            self.update()
        else:
            self.graph.replay()

    def evaluate(self, *, last: bool) -> dict[str, Any]:
        """Losses at the mean, and at the last point if asked for."""
        found = {"mean": evaluated(self.task, self.model, self.params, self.mean)}
        if last:
            found["last"] = evaluated(self.task, self.model, self.params, None)
        return found


class CaptureError(RuntimeError):
    """No CUDA graph could be made; nothing more can be done on the device in this process."""


def captured(work: Callable[[], Any], stream: Any) -> Any:
    """Make a CUDA graph of what a function does, after having called it twice."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            work()
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}") from error
    return graph


@torch.no_grad()
def evaluated(task: Task, model: nn.Module, params: list[Any], values: list[Tensor] | None) -> dict[str, float]:
    """Evaluate a model, with other values of its parameters if they are given."""
    kept = [t.detach().clone() for t in (*params, *model.buffers())]
    if values is not None:
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    recompute_batch_norm(model, task.batch_norm_batches())
    model.eval()
    found = task.evaluate(model)
    model.train()
    for t, value in zip((*params, *model.buffers()), kept, strict=True):
        t.copy_(value)
    return {name: round(value, 5) if math.isfinite(value) else math.inf for name, value in found.items()}


def order(size: int, batch: int, updates: int, seed: int) -> Tensor:
    """Rows of every update: one epoch after the other, each in an order of its own."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows: list[Tensor] = []
    while sum(map(len, rows)) < batch * updates:
        rows.append(torch.randperm(size, generator=generator))
    return torch.cat(rows)[: batch * updates].view(updates, batch)


# ---- the line ----


def line(
    task: Task, lane: Lane, seed: int, points: Sequence[float], kinds: Sequence[str],
    directions: list[Tensor] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Losses of other batches along a direction: that of the mean gradient of some batches, if none is given.

    Returns:
        ``losses[kind][point][batch]``, whose first point is none; ``kind`` is the part of the direction that is
        followed.
    """
    generator = torch.Generator().manual_seed(77 + seed)
    number = (GRADIENT_BATCHES + OTHER_BATCHES) * lane.batch
    rows = torch.randperm(task.size, generator=generator)[:number].to(lane.counter.device).view(-1, lane.batch)
    total = [torch.zeros_like(p) for p in lane.params]
    for part in rows[:GRADIENT_BATCHES]:
        torch._foreach_add_(total, list(torch.autograd.grad(task.losses(lane.model, part).mean(), lane.params)))
    directions = directions or along(total, total, lane.embeddings)
    others = rows[GRADIENT_BATCHES:]
    losses = {
        kind: [_losses_at(task, lane, others, _part(task, lane, directions, kind), s) for s in (0.0, *points)]
        for kind in kinds
    }
    return {"points": [0.0, *points], "losses": losses}


def _part(task: Task, lane: Lane, directions: list[Tensor], kind: str) -> list[Tensor | None]:
    named = {id(p): name for name, p in lane.model.named_parameters()}

    def belongs(p: Tensor, embedding: bool) -> bool:
        is_head = task.head is not None and task.head in named[id(p)]
        vector = p.dim() < 2
        return {
            "all": True, "head": is_head, "body": not is_head, "embeddings": embedding, "vectors": vector,
            "matrices": not embedding and not vector and not is_head,
        }[kind]  # fmt: skip

    parts = zip(lane.params, lane.embeddings, directions, strict=True)
    return [u if belongs(p, embedding) else None for p, embedding, u in parts]


@torch.no_grad()
def _losses_at(task: Task, lane: Lane, rows: Tensor, directions: list[Tensor | None], s: float) -> list[float]:
    kept = [t.detach().clone() for t in lane._tensors()]
    for p, u in zip(lane.params, directions, strict=True):
        if u is not None:
            p.sub_(u, alpha=s)
    torch.manual_seed(5)  # the same dropout masks at every point
    if task.whole_batches:
        losses = torch.stack([task.losses(lane.model, part).mean() for part in rows])
    else:
        losses = torch.cat([task.losses(lane.model, part) for part in rows.flatten().split(1024)])
        losses = losses.view(len(rows), -1).mean(1)
    for t, value in zip(lane._tensors(), kept, strict=True):
        t.copy_(value)
    return [round(value, 6) if math.isfinite(value) else math.inf for value in losses.tolist()]


def minimum(points: Sequence[float], losses: Sequence[Sequence[float]], batches: slice = slice(8)) -> float:
    """Where the mean loss of some batches is least: the vertex of a parabola in log s around the lowest point."""
    curve = [statistics.fmean(of_point[batches]) for of_point in losses[1:]]
    points = points[1:]
    lowest = min(range(len(curve)), key=lambda k: curve[k])
    if not 2 <= lowest < len(curve) - 2 or not all(map(math.isfinite, curve[lowest - 2 : lowest + 3])):
        return points[lowest]
    left, middle, right = curve[lowest - 2], curve[lowest], curve[lowest + 2]
    bend = left - 2 * middle + right
    shift = (left - right) / (2 * bend) if bend > 0 else 0.0  # in units of two points, a factor of 2
    return points[lowest] * 2 ** min(max(shift, -1.0), 1.0)


def half_point(points: Sequence[float], losses: Sequence[Sequence[float]], batches: slice = slice(8)) -> float:
    """The first point where the mean loss has fallen by only half of what the slope at the start promises.

    That is the minimum of a parabola, and unlike the lowest point it is not led away where a line goes down again far
    out. Not a number where the loss does not fall at first.
    """
    curve = [statistics.fmean(of_point[batches]) for of_point in losses]
    falls = [(curve[0] - loss) / point for point, loss in zip(points[1:], curve[1:], strict=True)]
    slope = statistics.median(falls[4:8])  # not the very first points, whose falls are lost in rounding
    for k in range(6, len(falls)):
        if slope > 0 and not falls[k] >= slope / 2:
            share = (falls[k - 1] - slope / 2) / (falls[k - 1] - falls[k])
            return points[k] * (points[k + 1] / points[k]) ** (share if math.isfinite(share) else 1.0)
    return math.nan


# ---- the jobs ----


class Job:
    """One setting in one process: what was measured of it, and what is still to be."""

    def __init__(self, setting: Setting, given: argparse.Namespace) -> None:
        if given.tiny:
            setting = replace(setting, updates=4, seeds=1, width=32, depth=1, adamw=setting.adamw[:1])
            setting = replace(setting, batch=2)
        elif given.eager:  # some ten times slower
            setting = replace(setting, updates=setting.updates // 2, seeds=1)
        self.setting, self.given, self.file = setting, given, given.output / FILE
        self.task = task_of(replace(setting, name="", adamw=()), given.bundle, given.device, given.tiny)
        self.entries = [entry for entry in read(self.file) if entry.get("setting") == setting.name]
        self.graphs = given.device == "cuda" and not given.eager
        self.ready: dict[tuple[str, int], list[Lane]] = {}  # lanes for the next runs, by kind of run and seed

    def write(self, **entry: Any) -> None:
        """Append a line."""
        entry = {"setting": self.setting.name, **entry, "at": round(time.time() - self.given.begun, 1)}
        self.entries.append(entry)
        append(self.file, entry)

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """The entries with these values."""
        return [entry for entry in self.entries if all(entry.get(key) == value for key, value in wanted.items())]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a job lives as long as its process works on it
    def base(self, seed: int, fitted: bool = True) -> nn.Module:
        """The model that runs of this seed begin with, its head fitted alone where it is the only fresh part."""
        model = self.task.model(seed)
        if fitted and self.task.head is not None:
            head = [p for name, p in model.named_parameters() if self.task.head in name]
            optimizer = torch.optim.Adam(head, lr=HEAD_RATE)
            for rows in order(self.task.size, self.setting.batch, HEAD_UPDATES, 500 + seed).to(self.given.device):
                for p, gradient in zip(
                    head, torch.autograd.grad(self.task.losses(model, rows).mean(), head), strict=True
                ):
                    p.grad = gradient
                optimizer.step()
            for p in head:
                p.grad = None
        return model

    def lane(self, seed: int, *, fitted: bool = True, updates: int | None = None, adamw: bool = False) -> Lane:
        """A run to be made."""
        model = copy.deepcopy(self.base(seed, fitted))
        return Lane(self.task, model, self.setting.batch, updates or self.setting.updates, adamw=adamw)

    def marks(self) -> list[int]:
        """After how many updates the mean is evaluated."""
        return sorted({max(1, self.setting.updates // part) for part in (32, 16, 8, 4, 2, 1) if part <= 8 or
                       self.setting.updates > 2048})  # fmt: skip

    # -- the lines --

    def lines(self) -> None:
        """Measure the lines that are missing."""
        fresh_heads = [False, True] if self.task.head is not None else [True]
        for seed in range(1 if self.given.tiny else LINE_SEEDS):
            for fitted in fresh_heads:
                if not self.find(row="line", seed=seed, fitted=fitted, phase="start"):
                    self._line(seed, fitted, "start", self.lane(seed, fitted=fitted, updates=WARM_UP))
            if not self.find(row="line", seed=seed, phase="later"):
                (before,) = self.find(row="line", seed=seed, fitted=True, phase="start")
                lane = self.lane(seed, updates=WARM_UP)
                lane.reset([FACTOR * before["minimum"]] * WARM_UP, seed=300 + seed)
                for _ in range(WARM_UP):
                    lane.update()
                self._line(seed, True, "later", lane)
                averaged = along(lane.momenta, lane.momenta, lane.embeddings)
                self._line(seed, True, "later, along the averaged gradient", lane, averaged)

    def _line(self, seed: int, fitted: bool, phase: str, lane: Lane, directions: list[Tensor] | None = None) -> None:
        kinds = ["all"]
        if phase == "start" and seed == 0:
            kinds += ["matrices", "vectors"] if fitted else []
            kinds += ["body", "head"] if self.task.head is not None else []
            kinds += ["embeddings"] if any(lane.embeddings) and fitted else []
        points = POINTS[::6] if self.given.tiny else POINTS
        found = line(self.task, lane, seed, points, kinds, directions)
        matrices = [p for p, e in zip(lane.params, lane.embeddings, strict=True) if p.dim() > 1 and not e]
        size = (sum(p.square().sum().item() for p in matrices) / sum(p.numel() for p in matrices)) ** 0.5
        self.write(
            row="line", seed=seed, fitted=fitted, phase=phase, size=size,
            minimum=minimum(found["points"], found["losses"]["all"]), **found,
        )  # fmt: skip

    # -- constant rates --

    def constant(self) -> None:
        """Lines first, then the grid of constant rates."""
        self.lines()
        starts = [entry["minimum"] for entry in self.find(row="line", fitted=True, phase="start")]
        middle = 2.0 ** round(math.log2(FACTOR * statistics.median(starts) / 1e-3))
        steps = (0, 1) if self.given.tiny else (0, -1, 1, -2, 2)
        self.rates([middle * 2.0**k for k in sorted(steps)])
        for _ in range(0 if self.given.tiny else 3):
            found = self.by_rate()
            best = min(found, key=lambda rate: found[rate])
            if best not in (min(found), max(found)):
                break
            self.rates([best * (2 if best == max(found) else 0.5)])
        if self.given.tiny:
            return
        found = self.by_rate()
        best = min(found, key=lambda rate: found[rate])
        self.rates([best * 2**0.5, best / 2**0.5])
        if self.task.head is not None:
            self.rates([best / 2, best, best * 2], "constant from a fresh head")

    def by_rate(self) -> dict[float, float]:
        """Mean final losses of the means, by the rate in thousandths."""
        found: dict[float, list[float]] = {}
        for entry in self.find(row="constant"):
            found.setdefault(entry["rate"], []).append(entry["end"]["mean"]["loss"])
        return {rate: statistics.fmean(losses) for rate, losses in found.items()}

    def rates(self, rates: list[float], row: str = "constant") -> None:
        """Make runs at constant rates, given in thousandths, that are missing."""
        wanted = [
            (round(rate, 6), seed)
            for seed in range(self.setting.seeds)
            for rate in rates
            if not self.find(row=row, rate=round(rate, 6), seed=seed)
        ]
        self.together(row, wanted, lambda rate: [rate * 1e-3] * self.setting.updates)

    def together(
        self, row: str, wanted: list[tuple[float, int]], schedule: Callable[[float], list[float]], **more: float
    ) -> None:
        """Make runs of one kind side by side."""
        for begin in range(0, len(wanted), SIDE_BY_SIDE):
            several = wanted[begin : begin + SIDE_BY_SIDE]
            begun = time.perf_counter()
            ready = {key: list(lanes) for key, lanes in self.ready.items()}
            lanes = []
            for rate, seed in several:
                if not ready.get((row, seed)):
                    lane = self.lane(seed, adamw=row == "adamw", fitted=row == "constant")
                    lane.reset(schedule(rate), seed, **more)
                    if self.graphs:
                        lane.capture()
                    self.ready.setdefault((row, seed), []).append(lane)
                    ready.setdefault((row, seed), []).append(lane)
                lanes.append(ready[row, seed].pop())
                lanes[-1].reset(schedule(rate), seed, **more)
            prepared = time.perf_counter() - begun
            found = self.run(lanes)
            seconds = (time.perf_counter() - begun) / len(several)
            for lane, (rate, seed), results in zip(lanes, several, found, strict=True):
                losses = lane.losses.tolist()
                every = max(1, len(losses) // 20)
                self.write(
                    row=row, rate=rate, seed=seed, updates=self.setting.updates, batch=self.setting.batch,
                    end=results.pop(self.setting.updates), before=results, seconds=round(seconds, 2),
                    prepared=round(prepared / len(several), 2), graph=self.graphs,
                    training_loss=[round(statistics.fmean(losses[k : k + every]), 4)
                                   for k in range(0, len(losses), every)],
                )  # fmt: skip
            print(f"{self.setting.name}: {row} {several}: {seconds:.2f} s each", flush=True)

    def run(self, lanes: list[Lane]) -> list[dict[int, Any]]:
        """Make all updates; evaluate at the marks."""
        found: list[dict[int, Any]] = [{} for _ in lanes]
        done = 0
        for mark in self.marks():
            self.wait()  # for what was done outside of the lanes' streams
            for _ in range(mark - done):
                for lane in lanes:
                    if lane.stream is None:
                        lane.next()
                    else:
                        with torch.cuda.stream(lane.stream):
                            lane.next()
            done = mark
            self.wait()
            for lane, results in zip(lanes, found, strict=True):
                results[mark] = lane.evaluate(last=mark == self.setting.updates)
        return found

    def wait(self) -> None:
        """Wait for the device."""
        if self.given.device == "cuda":
            torch.cuda.synchronize()

    # -- the others --

    def adamw_rows(self) -> None:
        """AdamW with its usual schedules: cosine with warm-up from scratch, linear on a trained model."""
        updates, from_scratch = self.setting.updates, self.task.head is None

        def schedule(rate: float) -> list[float]:
            if not from_scratch:
                return [rate * (1 - t / updates) for t in range(updates)]
            warm = max(1, updates // 20)
            shape = [0.5 * (1 + math.cos(math.pi * (t - warm) / max(1, updates - warm))) for t in range(updates)]
            return [rate * (min((t + 1) / warm, 1.0) if t < warm else shape[t]) for t in range(updates)]

        wanted = [
            (rate, seed)
            for seed in range(self.setting.seeds)
            for rate in self.setting.adamw
            if not self.find(row="adamw", rate=rate, seed=seed)
        ]
        more = {"decay": 0.1, "beta2": 0.95} if from_scratch else {"decay": 0.0, "beta2": 0.999}
        self.together("adamw", wanted, schedule, **more)

    def today(self) -> None:
        """ELRASpectral as it is; one seed, as it waits for the device all the time."""
        if not self.find(row="today", seed=0):
            self._today(0)

    def _today(self, seed: int) -> None:
        begun = time.perf_counter()
        model, setting = copy.deepcopy(self.base(seed, False)), self.setting
        params = [p for p in model.parameters() if p.requires_grad]
        tables, outputs = ([p for p in find(model) if p.requires_grad] for find in (embeddings_of, outputs_of))
        optimizer = ELRASpectral(params, embeddings=tables, outputs=outputs)
        average = WeightAverage(model, power=POWER)
        rows = order(self.task.size, setting.batch, setting.updates, seed).to(self.given.device)
        results: dict[int, Any] = {}
        an_epoch = max(1, self.task.size // setting.batch)
        chosen, loss = rows[0].clone(), torch.zeros((), device=rows.device)

        def measure() -> None:
            measured = self.task.losses(model, chosen).mean()
            gradients = torch.autograd.grad(measured, params)
            loss.copy_(measured.detach())
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient

        replay = captured(measure, torch.cuda.Stream()).replay if self.graphs else measure
        for number, part in enumerate(rows, start=1):
            chosen.copy_(part)
            replay()
            optimizer.step(loss=loss)
            average.add()
            if number % an_epoch == 0:
                optimizer.end_cycle()
            if number in self.marks() and average.count:
                names = {id(p): name for name, p in model.named_parameters()}
                mean = [average.mean[names[id(p)]] for p in params]
                results[number] = {
                    "mean": evaluated(self.task, model, params, mean),
                    "last": evaluated(self.task, model, params, None),
                    "alpha": optimizer.alpha,
                }
        self.write(
            row="today", seed=seed, alpha=optimizer.alpha, restarts=optimizer.restarts,
            updates=setting.updates, batch=setting.batch, end=results.pop(setting.updates, None), before=results,
            seconds=round(time.perf_counter() - begun, 1),
        )  # fmt: skip
        print(f"{setting.name}: today, seed {seed}: {time.perf_counter() - begun:.1f} s", flush=True)


@functools.lru_cache(maxsize=4)
def task_of(setting: Setting, bundle: Path, device: str, tiny: bool) -> Task:
    """Data and models of a setting."""
    return TASKS[setting.task](setting, bundle, device, tiny=tiny)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; one that was cut short is left out."""
    entries = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            entries.append(json.loads(text))
        except ValueError:
            continue
    return entries


def append(file: Path, entry: dict[str, Any]) -> None:
    """Append a line, of several processes one after the other."""
    with file.open("a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        print(json.dumps(entry), file=stream, flush=True)


def work(given: argparse.Namespace) -> None:
    """Take jobs until there are none, or until the time is over."""
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1 if given.device == "cuda" else 2)
    transformers.logging.set_verbosity_error()
    gc.freeze()  # a capture begins with a collection
    for name, kind in jobs(given):
        claim = given.claims / f"{name}-{kind}"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        begun = time.monotonic()
        try:
            job = Job(SETTINGS[name], given)
            {"constant": job.constant, "adamw": job.adamw_rows, "today": job.today}[kind]()
            append(given.output / FILE, {"job": [name, kind], "seconds": round(time.monotonic() - begun, 1)})
        except Exception as error:  # the next job may work
            traceback.print_exc()
            text = f"{type(error).__name__}: {str(error)[:400]}"
            append(given.output / FILE, {"job": [name, kind], "error": text, "eager": given.eager})
            if isinstance(error, CaptureError):
                claim.unlink()
                os.execv(sys.executable, [sys.executable, *sys.argv, "--eager"])
        finally:
            Job.base.cache_clear()


def jobs(given: argparse.Namespace) -> list[tuple[str, str]]:
    """What was asked for."""
    return [job for job in JOBS if not given.only or any(part in "/".join(job) for part in given.only)]


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder of the measurements")
    parser.add_argument("--bundle", required=True, type=Path, help="folder of the data, see rate_scan_bundle.py")
    parser.add_argument("--only", nargs="+", help="parts of SETTING/KIND, e.g. llama-width64/constant minilm")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which all is stopped. Default: never.")
    parser.add_argument("--workers", type=int, default=4, help="processes on the one device. Default: 4.")
    parser.add_argument("--tiny", action="store_true", help="everything as small as it gets, to try this script")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    given = parser.parse_args(words)
    if not (given.bundle / "text.npz").is_file():
        parser.error(f"--bundle {given.bundle} has no text.npz; make it with rate_scan_bundle.py")
    if given.workers < 1:
        parser.error(f"--workers {given.workers} must be at least 1")
    return given


def main(words: list[str]) -> int:
    """Start the workers; stop them at the end of the time."""
    given = parse(words)
    if given.worker:
        work(given)
        return 0
    begun = time.monotonic()
    given.output.mkdir(parents=True, exist_ok=True)
    append(given.output / FILE, {"command": ["python", *sys.argv], **environment(given.device)})
    claims = tempfile.mkdtemp()
    command = [sys.executable, __file__, *words, "--worker", "--begun", str(given.begun), "--claims", claims]
    workers = [subprocess.Popen(command) for _ in range(given.workers)]
    try:
        for worker in workers:
            left = given.seconds - (time.monotonic() - begun)
            worker.wait(max(left, 0.1) if math.isfinite(left) else None)
    except subprocess.TimeoutExpired:
        print("the time is over", flush=True)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
    done = [entry for entry in read(given.output / FILE) if "job" in entry and "error" not in entry]
    print(f"{len(done)} jobs of {len(jobs(given))}, {time.monotonic() - begun:.0f} seconds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
