"""Updates made of a changing number of micro-batches, inside the stock training loop.

The loop keeps one step per update: ``take`` takes as many micro-batches as are wanted from the data and returns them as
*one* group, and ``step`` runs over the group, merged into as few forward passes as are allowed. ``update_size.py``
decides how many are wanted, ``accounting.py`` corrects what counts batches, ``merging.py`` concatenates micro-batches,
and ``loss_scale.py`` knows whether a loss is a mean. Works with any optimizer.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers import Trainer

from hf_elra.optim.snapshot import nothing_changes
from hf_elra.optim.tensors import accumulates_in
from hf_elra.trainer.accounting import Accounting
from hf_elra.trainer.arguments import is_causal_language_model
from hf_elra.trainer.loss_scale import LossScale, SumOfFinite
from hf_elra.trainer.merging import LABEL_PADDING, CannotMerge, merge_micro_batches, plan_passes
from hf_elra.trainer.rows import number_of_rows, rows_of
from hf_elra.trainer.trials import Trials, is_at_its_end
from hf_elra.trainer.update_size import UpdateSize

logger = logging.getLogger(__name__)


class MicroBatchGroup(list):
    """The micro-batches of one update."""


class MicroBatches:
    """Takes micro-batches from the data for a Trainer, and runs over them.

    Args:
        trainer (Trainer): a Trainer with :class:`~hf_elra.trainer.mixin.ElraTrainerMixin`.
        size: how many an update has; if ``size.control`` is None they are those of the stock Trainer.
        accounting: counts what was taken.
        loss_scale: turns the loss of every pass into its part of the update's mean.
        trials: finds out whether a pass fits into memory.

    Attributes:
        in_last_update: micro-batches of the last update; None before it.
        per_pass: micro-batches that one forward pass of it had.
        passes: the inputs of every pass of the running update; only if ``keeps_passes``.
    """

    def __init__(
        self, trainer: Any, size: UpdateSize, accounting: Accounting, loss_scale: LossScale, trials: Trials
    ) -> None:
        self._trainer = trainer
        self._size = size
        self._accounting = accounting
        self._loss_scale = loss_scale
        self._trials = trials
        self.in_last_update: int | None = None
        self.per_pass = 1.0
        self._pass_limit: float = math.inf  # elements
        self._proven_pass = 0
        self._merging_refused = False
        self._flops_per_element: float | None = None
        self.keeps_passes = False
        self.passes: list[Any] = []

    def begin(self) -> None:
        """Begin a training, or resume it from a checkpoint."""
        # What fitted is tried again, since the run may have moved to another device.
        self._pass_limit, self._proven_pass, self._merging_refused = math.inf, 0, False
        self._flops_per_element = None
        position = self._accounting.saved_position()
        if self._size.control is not None and position is not None and position["pass_limit"] is not None:
            self._pass_limit = position["pass_limit"]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        return {"pass_limit": self._pass_limit if math.isfinite(self._pass_limit) else None}

    # ---- taking ----

    def take(self, stock_take: Any, epoch_iterator: Any, number: int, device: Any) -> tuple[list[Any], Any]:
        """Take the micro-batches of one update, as one group, and count their targets.

        It is empty if a run is resumed that had reached its end, as the stock Trainer makes one more update then.

        Args:
            stock_take (callable): ``get_batch_samples`` of the stock Trainer.
            epoch_iterator, number, device: its arguments.
        """
        self._accounting.begin_update()
        self.passes = []
        batches: list[Any] = []
        num_items: Any = None
        if not self._accounting.has_ended():
            batches, num_items = self._take(stock_take, epoch_iterator, number, device)
        if not batches:  # otherwise the loop would ask again for every update that it expects
            self._trainer.control.should_epoch_stop = True
        return batches, num_items

    def _take(self, stock_take: Any, epoch_iterator: Any, number: int, device: Any) -> tuple[list[Any], Any]:
        grouped, skips = self._size.control is not None, self._accounting.skips_last_batch()
        if grouped:
            wanted = self._accounting.accumulation
            batches, num_items = stock_take(epoch_iterator, wanted, device)
            if len(batches) < wanted and skips:
                batches = []
        else:
            batches, num_items = stock_take(epoch_iterator, number, device)
        if not batches:
            return [], None
        if grouped:
            self._accounting.take(len(batches))
            self.in_last_update = len(batches)
        if skips and self._is_incomplete(batches, epoch_iterator, one_group=grouped or len(batches) == number):
            return [], None
        return [MicroBatchGroup(batches)] if grouped else batches, num_items

    def _is_incomplete(self, batches: list[Any], data: Any, *, one_group: bool) -> bool:
        """Return whether an iterable data set, whose length is not known, has ended within this update."""
        if number_of_rows(self._trainer.train_dataset) is not None:
            return False
        sizes = [rows_of(batch) or 0 for batch in batches]
        seen = self._trainer.elra_callback
        seen.full_batch = max(*sizes, seen.full_batch)
        return is_at_its_end(data, self._trainer) and (not one_group or sizes[-1] < seen.full_batch)

    def floating_point_ops(self, stock_count: Any, inputs: Any) -> Any:
        """Return the sum over a group; the stock function counts parameters at every call, so it is called once."""
        if not isinstance(inputs, MicroBatchGroup):
            return stock_count(inputs)
        name = getattr(self._trainer.model, "main_input_name", "input_ids")
        sizes = [inner[name].numel() for inner in inputs if hasattr(inner, "get") and inner.get(name) is not None]
        if getattr(stock_count, "__func__", None) is not Trainer.floating_point_ops or len(sizes) < len(inputs):
            return sum(stock_count(batch) for batch in inputs)
        if self._flops_per_element is None:
            self._flops_per_element = stock_count(inputs[0]) / max(sizes[0], 1)
        return self._flops_per_element * sum(sizes)

    # ---- running ----

    def step(self, stock_step: Any, model: Any, inputs: Any, num_items: Any) -> Tensor:
        """Run over a group of micro-batches; gradients are reduced over processes only in the last pass.

        Args:
            stock_step (callable): ``training_step`` of the stock Trainer, for one pass.
            model, inputs, num_items: arguments of the Trainer's own.
        """
        control = self._size.control
        if control is None or not isinstance(inputs, MicroBatchGroup):
            self._keep([inputs])
            return self._run_pass(stock_step, model, inputs, num_items, None)
        while True:
            passes = self._merged(stock_step, model, inputs, num_items)
            alone = self._trainer.accelerator.num_processes == 1
            may_shrink = alone and control.max_pass == "auto" and len(passes) < len(inputs)
            new = may_shrink and _largest(passes) > self._proven_pass
            with nothing_changes(model) if new else contextlib.nullcontext() as keep:
                try:
                    total = self._run_passes(stock_step, model, passes, num_items)
                    if keep is not None:
                        keep()
                        self._proven_pass = _largest(passes)
                    break
                except RuntimeError as error:
                    if not (may_shrink and should_reduce_batch_size(error)):
                        raise
            model.zero_grad()
            self._shrink_passes(passes)  # not before, as the error holds on to what filled the memory
        self._keep(passes)
        self.per_pass = len(inputs) / len(passes)
        if control.gradient_decay and self._size.controller is not None:
            self._decay(model, self._size.controller.gradient_decay(len(inputs)))
        return total

    def _keep(self, passes: list[Any]) -> None:
        if self.keeps_passes:
            self.passes += passes

    def _run_pass(
        self, stock_step: Any, model: Any, inputs: Any, num_items: Any, passes: int | None, *, backward: bool = True
    ) -> Tensor:
        """Run one of several passes; without a group their number is what the Trainer divides a mean by."""
        trainer = self._trainer
        if self._size.control is None and not trainer.elra_active:
            loss: Tensor = stock_step(model, inputs, num_items)
        else:
            passes = passes or trainer.current_gradient_accumulation_steps
            loss = self._loss_scale.step(stock_step, model, inputs, num_items, passes)
        self._trials.counts.add(backward=backward)
        return loss

    def forward(self, stock_step: Any, model: Any, passes: list[Any], num_items: Any) -> Tensor:
        """Return the mean loss over passes, with a ``stock_step`` that makes no backward pass."""
        divided, total = self._loss_scale.is_divided(num_items, len(passes)), torch.zeros((), device=self._device)
        # If the kind of loss is not known yet, the graph of a loss tells.
        with torch.set_grad_enabled(divided is None):
            for inputs, share in zip(passes, self._shares(passes, divided), strict=True):
                self._trainer.current_gradient_accumulation_steps = share
                total += self._run_pass(stock_step, model, inputs, num_items, len(passes), backward=False).detach()
        return total

    @property
    def _device(self) -> Any:
        return self._trainer.args.device

    @property
    def next_number(self) -> int:
        """Return the number of micro-batches of the next update."""
        if self._size.control is None:
            return int(self._trainer.args.gradient_accumulation_steps)
        return self._accounting.accumulation

    def _shares(self, passes: list[Any], divided: bool | None) -> list[Any]:
        """Return, for each pass, what a loss that is a mean over it is divided by."""
        # If the kind is not known yet, the first pass finds out, before its backward pass.
        return [len(passes)] * len(passes) if divided else self._weights(passes)

    def _decay(self, model: Any, factor: float) -> None:
        """Make the step of the update shorter by a factor (ELRA, section 3.4)."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if (optimizer := self._trainer.elra_optimizer) is not None:
            optimizer.gradient_decay = factor  # it measures slopes with unscaled gradients
        elif factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)

    def _run_passes(self, stock_step: Any, model: Any, passes: list[Any], num_items: Any) -> Any:
        trainer = self._trainer
        measures = self._size.noise_scale is not None and len(passes) > 1
        divided = self._loss_scale.is_divided(num_items, len(passes))
        shares = self._shares(passes, divided)
        weights = shares if not divided else self._weights(passes) if measures else []
        losses = SumOfFinite()
        square_of_first: Any = None
        for position, (inputs, share) in enumerate(zip(passes, shares, strict=True), start=1):
            last = position == len(passes)
            # A loss that is a mean over its own pass is divided by this number.
            trainer.current_gradient_accumulation_steps = share
            with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model=model):
                losses.add(self._run_pass(stock_step, model, inputs, num_items, len(passes)), 1 / share)
            if measures and position == 1:
                square_of_first = _gradient_square(model) * weights[0] ** 2
            if not last:
                trainer.control = trainer.callback_handler.on_substep_end(trainer.args, trainer.state, trainer.control)
        if measures:
            self._measure_noise(model, passes, square_of_first, weights[0])
        return losses.value

    def _measure_noise(self, model: Any, passes: list[Any], square_of_first: Any, weight: Any) -> None:
        """Compare the mean gradient of the first pass with that of all passes of all processes."""
        assert self._size.noise_scale is not None
        accelerator, device = self._trainer.accelerator, self._device
        samples = torch.tensor(float(sum(rows_of(inputs) or 1 for inputs in passes)), device=device)
        told = torch.stack([samples, samples / weight, square_of_first]).to(accumulates_in(samples.device))
        if (processes := accelerator.num_processes) > 1:
            told = accelerator.reduce(told, reduction="mean")
        big, small, small_square = told.tolist()
        self._size.noise_scale.add(small, small_square, big * processes, float(_gradient_square(model)))

    def _weights(self, passes: list[Any]) -> list[Any]:
        """Return targets (or samples) of the update over those of each pass, for losses that are means over a pass."""
        accelerator, device = self._trainer.accelerator, self._device
        shifted = is_causal_language_model(self._trainer.model)
        counts = [_targets(inputs, shifted) for inputs in passes]
        if any(count is None for count in counts):
            counts = [torch.tensor(rows_of(inputs) or 1, device=device) for inputs in passes]
        counts = [count.to(device).clamp(min=1) for count in counts]
        total = torch.stack(counts).sum().float()
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, reduction="mean")
        return [total / count for count in counts]

    # ---- merging ----

    def _merged(self, stock_step: Any, model: Any, group: MicroBatchGroup, num_items: Any) -> list[Any]:
        """Return the group's micro-batches, concatenated into as few passes as are allowed."""
        assert self._size.control is not None
        accelerator, limit = self._trainer.accelerator, self._size.control.max_pass
        if limit is None or self._merging_refused:
            return list(group)
        automatic = limit == "auto"
        sizes = [_rows_and_width(batch) for batch in group]
        if (processes := accelerator.num_processes) > 1:  # the same plan everywhere
            told = torch.tensor([sizes], device=self._device)
            sizes = [(int(r), int(w)) for r, w in accelerator.gather(told).view(processes, -1, 2).amax(0)]
        while True:
            most = self._pass_limit if automatic else float(limit)
            plan = plan_passes(sizes, most, padded=automatic)
            if self._size.noise_scale is not None and len(plan) == 1 < len(group):  # two gradients to compare
                plan = [len(group) - len(group) // 2, len(group) // 2]
            passes = self._concatenate(group, plan)
            if passes is None:
                return list(group)
            if not automatic or processes == 1:  # a single process may run out of memory and begin anew
                return passes
            elements = _elements(sizes, plan)
            largest = max(range(len(plan)), key=elements.__getitem__)
            if elements[largest] <= self._proven_pass or plan[largest] == 1:
                return passes
            if self._trials.fits(stock_step, model, passes[largest], num_items):
                self._proven_pass = elements[largest]
                return passes
            self._pass_limit = elements[largest] / 2
            logger.warning("A forward pass over %d micro-batches does not fit; halving it.", plan[largest])

    def _concatenate(self, group: MicroBatchGroup, plan: list[int]) -> list[Any] | None:
        """Merge by ``plan``; return None, with a warning, if the output of this collator cannot be merged somewhere."""
        trainer = self._trainer
        pad = getattr(getattr(trainer, "processing_class", None), "pad_token_id", None)
        if pad is None:
            pad = getattr(getattr(trainer.model, "config", None), "pad_token_id", None)
        takes_mask = "attention_mask" in inspect.signature(_innermost(trainer.model).forward).parameters
        reason, passes, position = None, [], 0
        try:
            for number in plan:
                part = list(group[position : position + number])
                passes.append(merge_micro_batches(part, pad_token_id=pad or 0, add_attention_mask=takes_mask))
                position += number
        except CannotMerge as refusal:
            reason = str(refusal)
        if trainer.accelerator.num_processes > 1:
            refused = torch.tensor([reason is not None], device=trainer.args.device)
            if trainer.accelerator.gather(refused).any() and reason is None:
                reason = "another process cannot merge its own"
        if reason is None:
            return passes
        self._merging_refused = True
        logger.warning("elra_max_micro_batch: micro-batches are accumulated, not merged: %s.", reason)
        return None

    def _shrink_passes(self, passes: list[Any]) -> None:
        """Halve the limit after a merged pass ran out of memory."""
        self._pass_limit = _largest(passes) / 2
        self._proven_pass = min(self._proven_pass, int(self._pass_limit))
        logger.warning("Out of memory in a merged forward pass; halving it.")
        clear_device_cache(garbage_collection=True)


def micro_batches_of(inputs: Any) -> list[Any]:
    """Return the micro-batches in what the loop takes for a batch, which is one or a group."""
    return inputs if isinstance(inputs, MicroBatchGroup) else [inputs]


def _targets(inputs: Any, shifted: bool) -> Any:
    """Return the number of labels that count, or None if there are no labels.

    If labels are ``shifted`` against the predictions, the first of a row is no target.
    """
    labels = inputs.get("labels") if hasattr(inputs, "get") else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return None
    if shifted and labels.dim() > 1:
        labels = labels[:, 1:]
    return labels.ne(LABEL_PADDING).sum()


def _gradient_square(model: Any) -> Any:
    """Return the squared norm of the gradient of a model, on its device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.to(accumulates_in(norm.device)) ** 2


def _rows_and_width(batch: Any) -> tuple[int, int]:
    """Return the samples of a micro-batch, and the elements of a row of its largest tensor."""
    values = batch.values() if hasattr(batch, "values") else [batch]
    largest = max((v.numel() for v in values if isinstance(v, torch.Tensor)), default=0)
    rows = rows_of(batch) or 1
    return rows, max(1, largest // rows)


def _largest(passes: list[Any]) -> int:
    """Return the elements of the largest pass."""
    return max(rows * width for rows, width in map(_rows_and_width, passes))


def _elements(sizes: list[tuple[int, int]], plan: list[int]) -> list[int]:
    """Return the elements of every pass, with rows padded to the widest."""
    elements, position = [], 0
    for number in plan:
        part = sizes[position : position + number]
        elements.append(sum(rows for rows, _ in part) * max(width for _, width in part))
        position += number
    return elements


def _innermost(model: Any) -> Any:
    while (inner := getattr(model, "module", None)) is not None:
        model = inner
    return model
