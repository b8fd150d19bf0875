"""Boosting (ELRA, section 3.7): evaluate and deploy a mean of the points of training, train on from the last one.

The paper's is the mean of a control cycle's points. The other one, for a rate that is never brought down, weights the
points of the whole run by a power of their number, so that it needs no length. ``BoostingMixin`` gives it to a Trainer;
the running mean itself is in ``optim/averaging.py``. With boosting on, ``evaluate``, ``predict`` and ``save_model``
use the mean, with BatchNorm statistics of its own; the training step never sees it. Checkpoints hold both points:
``model.safetensors`` is the one that training goes on from, ``boosted.safetensors`` the mean. When training is over the
mean stays in the model, unless that is the best one of ``load_best_model_at_end``, and the last point is kept beside it
for a training that goes on. Works with any optimizer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_elra.errors import ConfigurationError
from hf_elra.optim.averaging import BATCH_NORM_SAMPLES, WeightAverage, at_the_mean, recompute_batch_norm
from hf_elra.trainer.arguments import ElraSettings
from hf_elra.trainer.batch_control import updates_per_cycle

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

POWER = 8
"""Of a point's number, in the mean of a whole run."""
POINTS_PER_CYCLE = 50
"""Points of a cycle in the mean, by default, where the length of a cycle is known."""


class _TakesBatches(nn.Module):
    """Calls a model with a batch as keyword arguments."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.model(**batch)


@contextlib.contextmanager
def _in_place(points: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let parameters have other values for the length of a ``with`` block."""
    kept = {p: p.detach().clone() for p in points}
    try:
        with torch.no_grad():
            for p, point in points.items():
                p.copy_(point)
        yield
    finally:
        with torch.no_grad():
            for p, value in kept.items():
                p.copy_(value)


def _holds(tensor: Tensor, value: Tensor) -> bool:
    """Whether a tensor is a value, as far as its type can be."""
    return tensor.shape == value.shape and torch.equal(tensor.detach(), value.to(tensor))


class BoostingMixin(_Base):
    """Gives a Trainer the mean of its points; does nothing while ``weight_average`` is None."""

    elra_settings: ElraSettings
    average_over: str
    weight_average: WeightAverage | None = None
    _at_the_mean = False  # the model holds the mean, or what was chosen in its place at the end of training
    _last_point: dict[str, Tensor] | None = None  # beside a model that was left at the mean
    _updates_per_cycle: float | None = None  # at the first batch

    def check_boosting(self) -> None:
        """Refuse what cannot be boosted, before training begins."""
        mean = self.average_over
        if mean != "off" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigurationError(
                f"elra_boost_mean={mean}, the mean of points, cannot be used with FSDP or DeepSpeed, which shard the "
                "points; pass --elra_boost_mean off."
            )

    def sample_point(self, update: int, cycle_is_over: bool) -> None:
        """Take every k-th point into the mean, and the last one of every cycle, so that none goes without."""
        optimizer = getattr(self, "elra_optimizer", None)
        if self.weight_average is None or (optimizer is not None and not optimizer.search_finished):
            return
        if (cycle_is_over and self.weight_average.power is None) or update % self.boost_every == 0:
            self.weight_average.add()
        if cycle_is_over:
            self.weight_average.end_cycle()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.weight_average = None  # that of an earlier training, or trial, is of other points
        if (mean := self.average_over) != "off":
            self.weight_average = WeightAverage(cast(nn.Module, self.model), POWER if mean == "run" else None)
            self._updates_per_cycle = updates_per_cycle(self)
            if resume_from_checkpoint is not None:
                self.weight_average.load(resume_from_checkpoint)
        return prepared

    @property
    def boost_every(self) -> int:
        """Every how many updates a point is taken: as asked for, or for so many points a cycle at the present batch."""
        if self.elra_settings.elra_boost_every is not None:
            return self.elra_settings.elra_boost_every
        if self.weight_average is not None and self.weight_average.power is not None:
            return 1
        if self._updates_per_cycle is None:
            return 10
        updates: Any = self._updates_per_cycle
        trainer: Any = self
        if trainer.batch_control is not None and not self.elra_settings.control_cycle(self.train_dataset).endswith(
            "ba"
        ):
            updates *= trainer.batch_control.controller.initial_accumulation / trainer.accumulation
        return max(1, round(updates / POINTS_PER_CYCLE))

    # ---- evaluation and deployment use the mean ----

    @contextlib.contextmanager
    def boosted(self) -> Iterator[None]:
        """Use the mean, if there is one, for the length of a ``with`` block.

        During a search, which ends where it began, that is where it began.
        """
        if start := self._start_of_search():
            with _in_place(start):
                yield
            return
        if self.weight_average is None or self.weight_average.count == 0 or self._at_the_mean:
            yield
            return
        self._at_the_mean = True
        try:
            with at_the_mean(self.weight_average, _TakesBatches(self.model), self._batches_for_statistics()):
                yield
        finally:
            self._at_the_mean = False

    # ---- the end of training, and going on ----

    def end_at_the_mean(self) -> None:
        """Leave the mean in the model, which training is over with."""
        if self.weight_average is None or self.weight_average.count == 0 or self._at_the_mean:
            return
        moved = self.weight_average.mean.keys() | self._tensors(parameters=False).keys()
        self._last_point = {n: t.detach().clone() for n, t in self._tensors().items() if n in moved}
        self._put_mean()

    def _put_mean(self) -> None:
        assert self.weight_average is not None
        self.weight_average.put()
        recompute_batch_norm(_TakesBatches(self.model), self._batches_for_statistics())
        self._at_the_mean = True

    def go_on(self, resume_from_checkpoint: str | None) -> None:
        """Training begins: if it goes on where this Trainer ended at the mean, put the last point into the model again.

        The optimizer's memory is of that point. A model that somebody changed since, or that is made anew, or read from
        a checkpoint, is taken as it is.
        """
        last, self._last_point, self._at_the_mean = self._last_point, None, False
        if (
            last is None
            or self.weight_average is None
            or self.model_init is not None
            or resume_from_checkpoint is not None
        ):
            return
        now = self._tensors()
        if any(n not in now or not _holds(now[n], mean) for n, mean in self.weight_average.mean.items()):
            return
        with torch.no_grad():
            for name, value in last.items():
                if name in now and now[name].shape == value.shape:
                    now[name].copy_(value)

    def _tensors(self, *, parameters: bool = True) -> dict[str, Tensor]:
        model = cast(nn.Module, self.model)
        return {**dict(model.named_parameters() if parameters else ()), **dict(model.named_buffers())}

    def _start_of_search(self) -> dict[nn.Parameter, Tensor]:
        """Where parameters were when the search began that runs now; nothing where none does, or where it is let be."""
        optimizer = getattr(self, "elra_optimizer", None)
        if optimizer is None or optimizer.search_finished or not self.is_in_train or self.control.should_training_stop:
            return {}
        return {p: state["start"] for p, state in optimizer.state.items() if "start" in state}

    def _batches_for_statistics(self) -> Iterator[dict[str, Any]]:
        """Training batches, the same at every call; the random state outside is left alone."""
        if self.train_dataset is None:
            return
        size = self.args.train_batch_size
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            torch.manual_seed(self.args.seed)
            sized = hasattr(self.train_dataset, "__len__")
            data: Any = self.train_dataset
            datasets = sys.modules.get("datasets")  # where nobody imported it, no data are of its kind
            if datasets is not None and isinstance(data, datasets.Dataset):
                data, collate = self._remove_unused_columns(data, description="training"), self.data_collator
            else:
                collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
            shuffles = sized and not isinstance(data, IterableDataset)
            loader = DataLoader(data, batch_size=size, shuffle=shuffles, collate_fn=collate, drop_last=sized)
            number = max(1, BATCH_NORM_SAMPLES // size)
            for batch, _ in zip(loader, range(number), strict=False):
                yield self._prepare_inputs(batch)

    def evaluate(self, *args, **kwargs):
        """Stock evaluation, of the mean where boosting is on."""
        with self.boosted():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """Stock prediction, by the mean where boosting is on."""
        with self.boosted():
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the mean where boosting is on; a checkpoint gets both points."""
        if not _internal_call:
            with self.boosted():
                super().save_model(output_dir, _internal_call)
            return
        super().save_model(output_dir, _internal_call)
        if self.weight_average is not None and self.args.should_save and not self._at_the_mean:
            self.weight_average.save(str(output_dir or self.args.output_dir))

    def push_to_hub(self, *args, **kwargs):
        """Stock upload, of the mean where boosting is on."""
        with self.boosted():
            return super().push_to_hub(*args, **kwargs)

    def _load_best_model(self):
        """Stock; with boosting the best point is the mean in that checkpoint, if it has one: that was evaluated."""
        super()._load_best_model()
        if self.weight_average is not None and self.weight_average.load(str(self.state.best_model_checkpoint)):
            self._put_mean()
