"""The running mean of the points of a training, and how to evaluate a model at it (ELRA, section 3.7).

``trainer/averaging.py`` decides when points are taken, and what a Trainer does with their mean.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_elra.errors import ConfigurationError
from hf_elra.optim.shards import parted, whole
from hf_elra.optim.snapshot import unchanged
from hf_elra.optim.tensors import local

BOOSTED, BOOSTING = "boosted.safetensors", "boosting.json"
POWER = 8
"""The power of a point's number that weights the point in the mean of a whole run: while every batch is new a point is
better than those before it."""
POWER_AGAIN = 2
"""The same where a trained model goes over its data again. What the last points gain there is in part about examples
that are learned by heart, and more points make a better mean (docs/results/no_rate.md)."""
BATCH_NORM_SAMPLES = 4096
"""How many training samples the BatchNorm statistics of the mean are computed from."""


def power_after_first_pass(optimizer: Any) -> int:
    """Return the power for the mean of a whole run from the second pass over the data on.

    To be asked once, when the first pass is over: it waits for the device where updates are made there.

    Args:
        optimizer: what trains; of this package ``elra_spectral`` tells whether it fine-tunes, others count as not.
    """
    return POWER_AGAIN if getattr(optimizer, "fine_tunes", False) else POWER


class WeightAverage:
    """The mean of the points that parameters went through.

    With ``power`` it is that of a whole run, weighted towards the last ones; without, that of the running, or just
    finished, control cycle.

    It keeps one number per parameter, in float32 if the parameter has fewer bits. The parameters are looked up at every
    point. The mean of a parameter that is trained later begins there. A parameter that is frozen again stays in the
    mean. The mean of one that is gone, or has another shape than before, is dropped.

    Args:
        parameters (Module, or dict of str to Parameter): what to average: the trained parameters of a model, or all
            parameters of a dict by name.
        power (int, optional): average all points from the first one on, whatever cycles there are; the t-th has the
            weight t^power (polynomial-decay averaging: O. Shamir and T. Zhang, 2013).

    Raises:
        ConfigurationError: an argument cannot be used.

    Attributes:
        count: how many points are in the mean.
        mean: the mean itself, by the names of the parameters; empty before the first point.
        last_power: that of the last point; None before there is one.
    """

    def __init__(self, parameters: nn.Module | dict[str, nn.Parameter], power: int | None = None) -> None:
        is_model = isinstance(parameters, nn.Module)
        is_dict = isinstance(parameters, dict) and all(isinstance(p, Tensor) for p in parameters.values())
        if not is_model and (not is_dict or not parameters):
            what = "an empty dict" if is_dict else type(parameters).__name__
            raise ConfigurationError(f"parameters must be a model, or a dict of its parameters by name, not {what}.")
        self._check(power, "None for cycles")
        self._of = parameters
        self.power = power
        self.mean: dict[str, Tensor] = {}
        self.count = 0
        self.last_power: int | None = None
        self._joined: dict[str, int] = {}  # the count when a parameter came, if it came later than the first point
        self._cycle_is_over = False
        if not self._averaged():
            raise ConfigurationError(
                "parameters: nothing of this model is trained, so that there is nothing to average; set "
                "requires_grad=True on some of its parameters."
            )

    @staticmethod
    def _check(power: Any, otherwise: str) -> None:
        if power is not None and (isinstance(power, bool) or not isinstance(power, int) or power < 0):
            raise ConfigurationError(f"power={power!r} must be a whole number >= 0, e.g. 8, or {otherwise}.")

    def _averaged(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are averaged now."""
        if isinstance(self._of, dict):
            return self._of
        return {name: p for name, p in self._of.named_parameters() if p.requires_grad or name in self.mean}

    def _known(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the present parameters that have a mean, each with its mean."""
        found = self._averaged()
        return [(p, m) for name, m in self.mean.items() if (p := found.get(name)) is not None and p.shape == m.shape]

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    @staticmethod
    def _beside(mean: Tensor, point: Tensor) -> Tensor:
        """A mean where the point is: the model may have been moved, or split over processes."""
        return parted(mean.to(point.device, point.dtype), point)

    @torch.no_grad()
    def add(self, power: int | None = None) -> None:
        """Add the present point to the mean; the first one after the end of a cycle begins a new mean.

        Args:
            power (int, optional): for this point, in place of that of the mean; see :data:`POWER_AGAIN`.

        Raises:
            ConfigurationError: ``power`` is no whole number >= 0.
        """
        self._check(power, "None for that of the mean")
        if self._cycle_is_over:
            self._forget_points()
        parameters = self._averaged()
        for name in self.mean.keys() - parameters.keys():
            del self.mean[name]
        lots: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}  # all of one type, as foreach functions need them
        for name, p in parameters.items():
            point, mean = self._wide(p), self.mean.get(name)
            if mean is None or mean.shape != point.shape:
                mean = point.clone()
                if self.count:
                    self._joined[name] = self.count
            self.mean[name] = mean = self._beside(mean, point)
            count = self.count - self._joined.get(name, 0)
            means, points = lots.setdefault((mean.dtype, mean.device, count), ([], []))
            means.append(local(mean))
            points.append(local(point))
        self.last_power = power = (self.power or 0) if power is None else power
        for (_, _, count), (means, points) in lots.items():
            torch._foreach_lerp_(means, points, (power + 1) / (count + power + 1))
        self.count += 1

    def _forget_points(self) -> None:
        self.count, self._cycle_is_over = 0, False
        self._joined.clear()

    def end_cycle(self) -> None:
        """Declare the cycle over; its mean stays until the next point is added."""
        self._cycle_is_over = self.power is None

    @torch.no_grad()
    def put(self) -> None:
        """Put the mean into the parameters; without points they stay as they are."""
        for p, mean in self._known() if self.count else ():
            p.copy_(self._beside(mean, p))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the mean into the parameters for the length of a ``with`` block; without points they stay as they are."""
        kept = [(p, p.detach().clone()) for p, _ in self._known()] if self.count else []
        try:
            self.put()
            yield
        finally:
            with torch.no_grad():
                for p, values in kept:
                    p.copy_(values)

    def save(self, folder: str, *, writes: bool = True) -> None:
        """Write the mean and its description into a folder or checkpoint; write nothing while there are no points.

        Args:
            folder: it is made if need be.
            writes: whether this process is the one that writes. If parameters are split over processes, all of them
                have to call this, as they fetch the mean from each other.
        """
        if self.count == 0:
            return
        tensors = {}
        for name, mean in self.mean.items():
            values = whole(mean)
            if writes:
                tensors[name] = values.contiguous() if values is mean else values.cpu()
        if not writes:
            return
        from safetensors.torch import save_file

        os.makedirs(folder, exist_ok=True)
        save_file(tensors, os.path.join(folder, BOOSTED))
        content = {
            "model.safetensors": "the point that training goes on from",
            BOOSTED: f"the mean of {self.count} points of the control cycle"
            if self.power is None
            else f"the mean of {self.count} points of the run, the t-th with weight t^{self.power}",
            "count": self.count,
            "power": self.power,
            "last_power": self.last_power,
            "joined": self._joined,
            "cycle_is_over": self._cycle_is_over,
        }
        Path(folder, BOOSTING).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str) -> bool:
        """Read the mean from a checkpoint; if it has none, begin anew without points and return False.

        Parameters that were not trained then have no points yet; those that were trained then stay in the mean.

        Raises:
            ConfigurationError: it is the mean of another model, or was made with another ``power``.
        """
        self._forget_points()
        self.mean.clear()
        self.last_power = None
        if not Path(folder, BOOSTED).is_file():
            return False
        from safetensors.torch import load_file

        present = self._of if isinstance(self._of, dict) else dict(self._of.named_parameters())
        saved = load_file(os.path.join(folder, BOOSTED))
        content = json.loads(Path(folder, BOOSTING).read_text(encoding="utf-8"))
        if (power := content.get("power", self.power)) != self.power:
            raise ConfigurationError(
                f"power={self.power!r}: the mean in {folder} was made with power={power!r}; pass that, to a Trainer as "
                f"elra_boost_mean={'cycle' if power is None else 'run'}."
            )
        for name, p in present.items():
            if name in saved:
                if saved[name].shape != p.shape:
                    raise ConfigurationError(
                        f"{name} has shape {tuple(p.shape)}, and {tuple(saved[name].shape)} in the mean in {folder}, "
                        "which is that of another model."
                    )
                self.mean[name] = self._beside(saved[name], self._wide(p))
        if not self.mean:
            raise ConfigurationError(f"{folder} has the mean of another model, with no parameter of this one.")
        self.count, self._cycle_is_over = content["count"], content["cycle_is_over"]
        self.last_power = content.get("last_power")
        self._joined = dict(content.get("joined", {}))
        return True


@contextlib.contextmanager
def at_the_mean(mean: WeightAverage, model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Put the mean into the model, with BatchNorm statistics of its own, for the length of a ``with`` block.

    Args:
        mean: mean of the model's parameters.
        model: a model that is called with a batch.
        batches: training batches for the statistics; not used if the model has no BatchNorm.
    """
    with mean.in_place(), unchanged(model):
        recompute_batch_norm(model, batches)
        yield


@torch.no_grad()
def recompute_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Compute the statistics of all BatchNorm layers anew from ``batches``; nothing else of the model changes.

    Layers that stay in evaluation mode when the model trains keep theirs. Without batches all layers keep theirs.
    """
    modes = {module: module.training for module in model.modules()}
    momenta: dict[nn.modules.batchnorm._BatchNorm, float | None] = {}
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
                momenta[module], module.momentum = module.momentum, None  # a plain mean over the batches
        if momenta:
            with unchanged(model, but=momenta.keys(), random_state=True):
                for number, batch in enumerate(batches):
                    if number == 0:
                        for norm in momenta:
                            norm.reset_running_stats()
                    model(batch)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
