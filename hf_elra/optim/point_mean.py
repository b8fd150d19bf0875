"""The running mean of a training's points, and how to evaluate a model at it (ELRA, section 3.7).

When points are taken, and what a Trainer does with their mean, is not here but in ``trainer/boosting.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn, update_bn

from hf_elra.errors import ConfigurationError

BOOSTED, BOOSTING = "boosted.safetensors", "boosting.json"
BATCH_NORM_SAMPLES = 4096
"""Training samples from which the BatchNorm statistics of the mean are computed."""


class PointMean:
    """The mean of the points that parameters went through in the running, or just finished, control cycle.

    It keeps one number per parameter, in float32 where the parameter has fewer bits.

    Args:
        parameters (dict of str to Parameter): what to average, by name.
        power (int, optional): the mean is over all points from the first one on, whatever cycles there are, and the
            t-th has the weight t^power. (polynomial-decay averaging: O. Shamir and T. Zhang, 2013)

    Raises:
        ConfigurationError: an argument cannot be used.

    Attributes:
        count: how many points are in the mean.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], power: int | None = None) -> None:
        is_dict = isinstance(parameters, dict) and all(isinstance(p, Tensor) for p in parameters.values())
        if not is_dict or not parameters:
            what = "an empty dict" if is_dict else type(parameters).__name__
            raise ConfigurationError(
                f"parameters must be a dict of parameters by name, not {what}; pass dict(model.named_parameters())."
            )
        if power is not None and (isinstance(power, bool) or not isinstance(power, int) or power < 0):
            raise ConfigurationError(f"power={power!r} must be a whole number >= 0, e.g. 8, or None for cycles.")
        self.parameters = parameters
        self.power = power
        self.mean = {name: self._wide(p).clone() for name, p in parameters.items()}
        self.count = 0
        self._cycle_is_over = False
        self._average = get_swa_multi_avg_fn()

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    @torch.no_grad()
    def add(self) -> None:
        """Take the present point into the mean; the first one after a cycle's end begins a new mean."""
        if self._cycle_is_over:
            self.count, self._cycle_is_over = 0, False
        points = [self._wide(p) for p in self.parameters.values()]
        for means, of_same_type in _by_type(list(self.mean.values()), points):
            if self.power is None:
                self._average(means, of_same_type, self.count)
            else:
                torch._foreach_lerp_(means, of_same_type, (self.power + 1) / (self.count + self.power + 1))
        self.count += 1

    def end_cycle(self) -> None:
        """Declare the cycle over; its mean stays until the next point is added."""
        self._cycle_is_over = self.power is None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the mean into the parameters for the length of a ``with`` block; without points they stay."""
        if self.count == 0:
            yield
            return
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self.parameters.items()}
            for name, p in self.parameters.items():
                p.copy_(self.mean[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(kept[name])

    def save(self, folder: str) -> None:
        """Write the mean, and what it is, into a folder or checkpoint; nothing while there are no points."""
        if self.count == 0:
            return
        os.makedirs(folder, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.mean.items()}, os.path.join(folder, BOOSTED))
        content = {
            "model.safetensors": "the point that training goes on from",
            BOOSTED: f"the mean of {self.count} points of the control cycle"
            if self.power is None
            else f"the mean of {self.count} points of the run, the t-th with weight t^{self.power}",
            "count": self.count,
            "cycle_is_over": self._cycle_is_over,
        }
        Path(folder, BOOSTING).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str) -> bool:
        """Take the mean from a checkpoint; without one there begin anew with no points, and return False."""
        if not Path(folder, BOOSTED).is_file():
            self.count, self._cycle_is_over = 0, False
            return False
        saved = load_file(os.path.join(folder, BOOSTED))
        for name, tensor in self.mean.items():
            tensor.copy_(saved[name])
        content = json.loads(Path(folder, BOOSTING).read_text(encoding="utf-8"))
        self.count, self._cycle_is_over = content["count"], content["cycle_is_over"]
        return True


def _by_type(means: list[Tensor], points: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Lists of one dtype and device each, as foreach functions want them."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for mean, point in zip(means, points, strict=True):
        group = groups.setdefault((mean.dtype, mean.device), ([], []))
        group[0].append(mean)
        group[1].append(point)
    return list(groups.values())


@contextlib.contextmanager
def at_the_mean(mean: PointMean, model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Put the mean into the model, with BatchNorm statistics of its own, for the length of a ``with`` block.

    Args:
        mean: of the model's parameters.
        model: called with a batch.
        batches: training batches for the statistics; not asked for where the model has no BatchNorm.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with mean.in_place():
            recompute_batch_norm(model, batches)
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@torch.no_grad()
def recompute_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Take the statistics of all BatchNorm layers anew from ``batches``; without such layers do nothing."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        update_bn(batches, model)
