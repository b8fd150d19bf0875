"""Boosting (ELRA, section 3.7): evaluate and deploy a mean of the points of training; train on from the last point.

The mean of the paper is that of a control cycle's points. The other mean is for a rate that is never brought down: it
weights the points of the whole run by a power of their number, so that the length of the run need not be known.
``Averaging`` does it for a Trainer; the running mean itself is in ``optim/averaging.py``. With boosting on,
``evaluate``, ``predict`` and ``save_model`` use the mean, with BatchNorm statistics of its own; the training step never
sees it. Checkpoints hold both points: ``model.safetensors`` is the one that training goes on from,
``boosted.safetensors`` the mean. When training is over the mean stays in the model, unless ``load_best_model_at_end``
put the best model there. The last point is kept beside it for a training that goes on. Works with any optimizer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_elra.errors import ConfigurationError
from hf_elra.optim.averaging import (
    BATCH_NORM_SAMPLES,
    POWER,
    WeightAverage,
    at_the_mean,
    power_after_first_pass,
    recompute_batch_norm,
)
from hf_elra.optim.tensors import local
from hf_elra.trainer.accounting import Accounting
from hf_elra.trainer.batch_control import updates_per_cycle
from hf_elra.trainer.update_size import UpdateSize

POINTS_PER_CYCLE = 50
"""How many points of a cycle are in the mean by default, if the length of a cycle is known."""


class _TakesBatches(nn.Module):
    """Calls a model with a batch as keyword arguments."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.model(**batch)


def _holds(tensor: Tensor, value: Tensor) -> bool:
    """Return whether a tensor equals a value, as far as its type can hold it."""
    same_shape = tensor.shape == value.shape and local(tensor).shape == local(value).shape
    return same_shape and torch.equal(local(tensor.detach()), local(value).to(local(tensor)))


class Averaging:
    """Keeps the mean of a Trainer's points; does nothing while ``mean`` is None.

    Args:
        trainer (Trainer): a Trainer with :class:`~hf_elra.trainer.mixin.ElraTrainerMixin`.
        size, accounting: size and counts of its updates.

    Attributes:
        over: ``"cycle"``, ``"run"`` or ``"off"``.
        mean: the mean, once training has begun.
    """

    def __init__(self, trainer: Any, size: UpdateSize, accounting: Accounting) -> None:
        self._trainer = trainer
        self._size = size
        self._accounting = accounting
        self.over = "off"
        self.mean: WeightAverage | None = None
        self._at_the_mean = False  # the model holds the mean, or what was chosen in its place at the end of training
        self._last_point: dict[str, Tensor] | None = None  # the last point, beside a model that was left at the mean
        self._updates_per_cycle: float | None = None  # at the first batch
        self._power_later: int | None = None  # after the first pass over the data, once that is over

    def prepare(self, over: str) -> None:
        """Set which points are averaged: ``"cycle"``, ``"run"`` or ``"off"``.

        Raises:
            ConfigurationError: the Trainer shards its parameters.
        """
        self.over = over
        if over != "off" and self._trainer.is_deepspeed_enabled:
            raise ConfigurationError(
                f"elra_boost_mean={over}, the mean of points, cannot be used with DeepSpeed, which splits points in "
                "its own way; pass --elra_boost_mean off, or use FSDP2."
            )

    def begin(self, resume_from_checkpoint: str | None) -> None:
        """Begin a mean, or read that of a checkpoint, once model and optimizer exist."""
        self.mean = None  # the mean of an earlier training, or of a trial, is of other points
        if self.over == "off":
            return
        self.mean = WeightAverage(self._trainer.model, POWER if self.over == "run" else None)
        self._updates_per_cycle, self._power_later = updates_per_cycle(self._trainer), None
        if resume_from_checkpoint is not None:
            self.mean.load(resume_from_checkpoint)

    def sample(self, update: int, cycle_is_over: bool) -> None:
        """Take every k-th point into the mean, and the last one of every cycle, so that none goes without."""
        if self.mean is None:
            return
        if (cycle_is_over and self.mean.power is None) or update % self.every == 0:
            self.mean.add(None if self.mean.power is None else self._power(update))
        if cycle_is_over:
            self.mean.end_cycle()

    def _power(self, update: int) -> int:
        """Return the power of the next point, that after an update, in the mean of the run."""
        assert self.mean is not None
        optimizer = self._trainer.elra_optimizer
        fresh = getattr(optimizer, "updates_per_epoch", None)
        if fresh is None or update <= fresh:
            return POWER
        if self._power_later is None:
            known = self.mean.last_power if update - self.every > fresh else None  # of a training that was interrupted
            self._power_later = power_after_first_pass(optimizer) if known is None else known
        return self._power_later

    @property
    def every(self) -> int:
        """Return the updates from one point to the next: as asked for, or for about 50 points a cycle."""
        trainer = self._trainer
        if trainer.elra_settings.elra_boost_every is not None:
            return int(trainer.elra_settings.elra_boost_every)
        if self.mean is not None and self.mean.power is not None:
            return 1
        if self._updates_per_cycle is None:
            return 10
        updates, control = self._updates_per_cycle, self._size.control
        in_updates = trainer.elra_settings.control_cycle(trainer.train_dataset).endswith("ba")
        if control is not None and not in_updates:
            updates *= control.controller.initial_accumulation / self._accounting.accumulation
        return max(1, round(updates / POINTS_PER_CYCLE))

    # ---- evaluation and deployment use the mean ----

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the mean, if there is one, for the length of a ``with`` block."""
        if self.mean is None or self.mean.count == 0 or self._at_the_mean:
            yield
            return
        self._at_the_mean = True
        try:
            with at_the_mean(self.mean, _TakesBatches(self._trainer.model), self._batches_for_statistics()):
                yield
        finally:
            self._at_the_mean = False

    def save_beside_last_point(self, folder: str) -> None:
        """Write the mean into a checkpoint, beside the point that training goes on from."""
        if self.mean is not None and not self._at_the_mean:
            self.mean.save(folder, writes=self._trainer.args.should_save)

    def take_best(self, checkpoint: str) -> None:
        """Put the mean of the best checkpoint, which was loaded, into the model: it is what was evaluated."""
        if self.mean is not None and self.mean.load(checkpoint):
            self._put()

    # ---- the end of training, and going on ----

    def end(self) -> None:
        """Leave the mean in the model at the end of training."""
        if self.mean is None or self.mean.count == 0 or self._at_the_mean:
            return
        moved = self.mean.mean.keys() | self._tensors(parameters=False).keys()
        self._last_point = {n: t.detach().clone() for n, t in self._tensors().items() if n in moved}
        self._put()

    def _put(self) -> None:
        assert self.mean is not None
        self.mean.put()
        recompute_batch_norm(_TakesBatches(self._trainer.model), self._batches_for_statistics())
        self._at_the_mean = True

    def go_on(self, resume_from_checkpoint: str | None) -> None:
        """Put the last point into the model again if training goes on where this Trainer ended at the mean.

        The memory of the optimizer belongs to that point. A model that was changed since, made anew or read from a
        checkpoint is taken as it is.
        """
        last, self._last_point, self._at_the_mean = self._last_point, None, False
        anew = self._trainer.model_init is not None or resume_from_checkpoint is not None
        if last is None or self.mean is None or anew:
            return
        now = self._tensors()
        if any(n not in now or not _holds(now[n], mean) for n, mean in self.mean.mean.items()):
            return
        with torch.no_grad():
            for name, value in last.items():
                if name in now and now[name].shape == value.shape:
                    now[name].copy_(value)

    def _tensors(self, *, parameters: bool = True) -> dict[str, Tensor]:
        model = self._trainer.model
        return {**dict(model.named_parameters() if parameters else ()), **dict(model.named_buffers())}

    def _batches_for_statistics(self) -> Iterator[dict[str, Any]]:
        """Return training batches, the same at every call; the random state outside is not changed."""
        trainer = self._trainer
        if trainer.train_dataset is None:
            return
        size = trainer.args.train_batch_size
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.compute_loss_context_manager():
            torch.manual_seed(trainer.args.seed)
            data: Any = trainer.train_dataset
            sized = hasattr(data, "__len__")
            datasets = sys.modules.get("datasets")  # if nobody imported it, no data can be of its kind
            if datasets is not None and isinstance(data, datasets.Dataset):
                data = trainer._remove_unused_columns(data, description="training")
                collate = trainer.data_collator
            else:
                collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
            shuffles = sized and not isinstance(data, IterableDataset)
            loader = DataLoader(data, batch_size=size, shuffle=shuffles, collate_fn=collate, drop_last=sized)
            number = max(1, BATCH_NORM_SAMPLES // size)
            for batch, _ in zip(loader, range(number), strict=False):
                yield trainer._prepare_inputs(batch)
