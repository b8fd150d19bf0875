"""Updates made of a changing number of micro-batches, inside the stock training loop.

The loop is left at one step per update: ``get_batch_samples`` takes as many micro-batches as the controller wants and
returns them as *one* group, ``training_step`` runs over it, merged into as few forward passes as are allowed, and what
counts batches (epoch, resume position, tokens, learning-rate schedule, number of updates, speed) is put right. Which
number is wanted is decided in ``control/batch_size.py``; how far the run is, in ``control/progress.py``; how
micro-batches are concatenated, in ``merging.py``; whether a loss is a mean, in ``loss_scale.py``; what a row is, in
``rows.py``; what the flags ask for, in ``batch_control.py``; what the optimizer is told, in ``mixin.py``. Works with
any optimizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from hf_elra.control import ControlCycle, NoiseScale, batch_size
from hf_elra.control.batch_size import BatchDecision, BatchSizeController, linear_factor
from hf_elra.control.progress import TrainingProgress
from hf_elra.errors import ConfigurationError
from hf_elra.optim.snapshot import unchanged
from hf_elra.optim.tensors import accumulates_in
from hf_elra.trainer.arguments import ElraSettings, is_causal_language_model, set_meanwhile
from hf_elra.trainer.batch_control import (
    BatchControl,
    budget_as_max_steps,
    build_batch_control,
    default_control,
    makes_own_batches,
    tokens_of_first_row,
    updates_per_cycle,
)
from hf_elra.trainer.callbacks import DataProgressBar, ElraCallback
from hf_elra.trainer.loss_scale import LossScaleMixin, SumOfFinite
from hf_elra.trainer.merging import LABEL_PADDING, CannotMerge, merge_micro_batches, plan_passes
from hf_elra.trainer.rows import RowsSkipped, plain_batch_sampler, rows_of, splits_batches

logger = logging.getLogger(__name__)


class MicroBatchGroup(list):
    """The micro-batches of one update."""


class DynamicBatchMixin(LossScaleMixin):
    """Gives a Trainer updates of a changing number of micro-batches; does nothing while ``batch_control`` is None."""

    batch_control: BatchControl | None
    batch_controller: BatchSizeController | None = None
    progress: TrainingProgress
    elra_settings: ElraSettings
    average_over: str
    _first_epoch_of_call = True
    _pass_limit: float = math.inf
    _proven_pass = 0
    _merging_refused = False
    _micro_batches_per_pass = 1.0  # in the last update
    _last_accumulation: int | None = None  # micro-batches of the last update
    _flops_per_element: float | None = None
    _accumulation_of_user = 1
    _rows_drawn: int | None = None  # by the last update, over all processes; None where the sampler does not tell
    _rows_are_known = False
    _rows_to_skip = 0
    _share_before = 0.0  # of the run
    noise_scale: NoiseScale | None = None

    def prepare_batch_control(self, settings: ElraSettings, wanted: str, *, keeps_position: bool = False) -> None:
        """Take the control that ``settings`` ask for, else the ``wanted`` one; groups do the accumulation from here on.

        Where a Trainer makes batches of its own, what was not asked for is off. Elsewhere ``keeps_position`` lets
        groups do the accumulation also where nothing is asked for, as they know where in the data a run is.
        """
        self.progress = TrainingProgress()
        default = default_control(type(self), wanted)
        if default != wanted and settings.elra_batch_control is None:
            logger.warning(
                "The batch size stays as it is: %s makes batches of its own. --elra_batch_control %s changes that.",
                type(self).__name__,
                wanted,
            )
        always = keeps_position and not makes_own_batches(type(self))
        self.batch_control = build_batch_control(settings, self.args, self.train_dataset, default, always=always)
        bars = self.callback_handler.callbacks
        asked_for = self.batch_control is not None and self.batch_control.asked_for
        for position, callback in enumerate(bars):
            if type(callback) is ProgressCallback and asked_for:
                bars[position] = DataProgressBar(self)
            elif type(callback) is DataProgressBar and not asked_for:
                bars[position] = ProgressCallback()
        if self.batch_control is None:
            return
        if self.batch_control.mode == "linear" and settings.elra_batch_control is None:
            logger.warning(
                "The batch grows by its first size every %d updates, as there is no momentum to average over the "
                "noise. --elra_max_batch_size limits it, --elra_batch_control off leaves it as it is.",
                batch_size.UPDATES_PER_GROWTH,
            )
        self.batch_controller = self.batch_control.controller
        if self.batch_control.max_pass == "auto" and self.args.device.type == "cpu":
            logger.warning(
                "elra_max_micro_batch=auto: on a CPU, running out of memory may end the process before it can be "
                "caught; a number of samples is safer."
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of the next update: the controller's number or a multiple of the first, at most an epoch's."""
        assert self.batch_control is not None
        assert self.batch_controller is not None
        number, first = self.batch_controller.accumulation, self.batch_controller.initial_accumulation
        if (schedule := self.batch_control.schedule) is not None:
            number = first * schedule.factor(self.progress.fraction())
        elif self.batch_control.mode == "linear":
            number = first * linear_factor(self.progress.samples / (first * self.progress.samples_per_batch))
        if (most := self.batch_controller.max_accumulation) is not None:
            number = min(number, most)
        if (per_epoch := self.progress.batches_per_epoch) is not None:
            number = min(number, per_epoch)
        return number

    def _limit_to_cycle(self, controller: BatchSizeController) -> None:
        """Let no update outgrow a control cycle, whose losses are to say whether updates should grow."""
        if self.batch_control is None or self.batch_control.mode != "elra":
            return
        cycle = ControlCycle.parse(self.elra_settings.control_cycle(self.train_dataset))
        per_batch, batches = self.progress.samples_per_batch, self.progress.batches_per_epoch
        samples = cycle.samples(None if batches is None else batches * per_batch, self.progress.tokens_per_sample)
        if samples is not None:
            most = max(int(samples / per_batch), controller.initial_accumulation)
            given = controller.max_accumulation
            controller.max_accumulation = most if given is None else min(most, given)

    def end_batch_cycle(self, mean: float, std: float) -> BatchDecision | None:
        """A control cycle is over: decide, where the number of micro-batches is controlled at all."""
        if self.batch_control is None or self.batch_controller is None or not self.batch_control.decides_at_cycles:
            return None
        if self.batch_control.mode == "noise":
            assert self.noise_scale is not None
            scale = self.noise_scale.value
            wanted = None if scale is None else scale / self.progress.samples_per_batch
            decision = self.batch_controller.follow(wanted, mean, std)
        else:
            decision = self.batch_controller.end_cycle(mean, std)
        return dataclasses.replace(decision, accumulation=self.accumulation)

    # ---- the loop's hooks ----

    def _run_epoch(self, *args, **kwargs):
        """Stock; only meanwhile does the loop believe that an update is one batch, which is a group."""
        with self._an_update_is_a_batch():
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Stock; what is saved and told within an epoch are the user's arguments."""
        with set_meanwhile(self.args, gradient_accumulation_steps=self._accumulation_of_user):
            super()._maybe_log_save_evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def _an_update_is_a_batch(self) -> Iterator[None]:
        self._accumulation_of_user = self.args.gradient_accumulation_steps
        if self.batch_control is not None and not self.batch_control.asked_for:
            # Then it is the user's number, whatever it was before.
            self.batch_control.controller = BatchSizeController(self._accumulation_of_user)
        values = {} if self.batch_control is None else {"gradient_accumulation_steps": 1}
        with set_meanwhile(self.args, **values):
            yield

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Take the micro-batches of one update and return them as one group."""
        if self.batch_control is None:
            self._rows_drawn = None
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        wanted = self.accumulation
        batches, num_items = super().get_batch_samples(epoch_iterator, wanted, device)
        if len(batches) < wanted and self._skips_last_batch():
            batches = []
        if not batches:
            return [], None
        rows = self.progress.take(len(batches))
        self._rows_drawn = rows if self._rows_are_known else None
        self._last_accumulation = len(batches)
        return [MicroBatchGroup(batches)], num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run over a group of micro-batches; gradients meet those of other processes only at the last pass."""
        if not isinstance(inputs, MicroBatchGroup) or self.batch_control is None:
            return self.scaled_step(model, inputs, num_items_in_batch)
        while True:
            passes = self._merged(model, inputs, num_items_in_batch)
            alone = self.accelerator.num_processes == 1
            may_shrink = alone and self.batch_control.max_pass == "auto" and len(passes) < len(inputs)
            new = may_shrink and _largest(passes) > self._proven_pass
            with unchanged(model, random_state=True) if new else contextlib.nullcontext() as keep:
                try:
                    total = self._run_passes(model, passes, num_items_in_batch)
                    if keep is not None:
                        keep()
                        self._proven_pass = _largest(passes)
                    break
                except RuntimeError as error:
                    if not (may_shrink and should_reduce_batch_size(error)):
                        raise
            model.zero_grad()
            self._shrink_passes(passes)  # only now, as the error holds on to what filled the memory
        self._micro_batches_per_pass = len(inputs) / len(passes)
        if self.batch_control.gradient_decay and self.batch_controller is not None:
            factor = self.batch_controller.gradient_decay(len(inputs))
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if (optimizer := getattr(self, "elra_optimizer", None)) is not None:
                optimizer.gradient_decay = factor  # it measures slopes with the gradients as they are
            elif factor != 1 and gradients:
                torch._foreach_mul_(gradients, factor)
        return total

    def _run_passes(self, model: Any, passes: list[Any], num_items: Any) -> Any:
        measures = self.noise_scale is not None and len(passes) > 1
        # Not known yet is no reason for a mean: the first pass finds out, before its loss goes back.
        divided = self.loss_is_divided(num_items, len(passes))
        weights = [] if divided and not measures else self._weights(passes)
        shares = [len(passes)] * len(passes) if divided else weights
        losses = SumOfFinite()
        square_of_first: Any = None
        for position, (inputs, share) in enumerate(zip(passes, shares, strict=True), start=1):
            last = position == len(passes)
            # A loss that is a mean over its own pass is divided by this number.
            self.current_gradient_accumulation_steps = share
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                losses.add(self.scaled_step(model, inputs, num_items, passes=len(passes)), 1 / share)
            if measures and position == 1:
                square_of_first = _gradient_square(model) * weights[0] ** 2
            if not last:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        if measures:
            self._measure_noise(model, passes, square_of_first, weights[0])
        return losses.value

    def _measure_noise(self, model: Any, passes: list[Any], square_of_first: Any, weight: Any) -> None:
        """Compare the mean gradient of the first pass with that of all passes of all processes."""
        assert self.noise_scale is not None
        samples = torch.tensor(float(sum(rows_of(inputs) or 1 for inputs in passes)), device=self.args.device)
        told = torch.stack([samples, samples / weight, square_of_first]).to(accumulates_in(samples.device))
        if (processes := self.accelerator.num_processes) > 1:
            told = self.accelerator.reduce(told, reduction="mean")
        big, small, small_square = told.tolist()
        self.noise_scale.add(small, small_square, big * processes, float(_gradient_square(model)))

    def _weights(self, passes: list[Any]) -> list[Any]:
        """Targets (or samples) of the whole update over those of each pass, for losses that are means over a pass."""
        shifted = is_causal_language_model(self.model)
        counts = [_targets(inputs, shifted) for inputs in passes]
        if any(count is None for count in counts):
            counts = [torch.tensor(rows_of(inputs) or 1, device=self.args.device) for inputs in passes]
        counts = [count.to(self.args.device).clamp(min=1) for count in counts]
        total = torch.stack(counts).sum().float()
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="mean")
        return [total / count for count in counts]

    # ---- merging micro-batches ----

    def _merged(self, model: Any, group: MicroBatchGroup, num_items: Any) -> list[Any]:
        """Return the group's micro-batches, concatenated into as few passes as are allowed."""
        assert self.batch_control is not None
        limit = self.batch_control.max_pass
        if limit is None or self._merging_refused:
            return list(group)
        automatic = limit == "auto"
        sizes = [_rows_and_width(batch) for batch in group]
        if (processes := self.accelerator.num_processes) > 1:  # the same plan everywhere
            told = torch.tensor([sizes], device=self.args.device)
            sizes = [(int(r), int(w)) for r, w in self.accelerator.gather(told).view(processes, -1, 2).amax(0)]
        while True:
            most = self._pass_limit if automatic else float(limit)
            plan = plan_passes(sizes, most, padded=automatic)
            if self.noise_scale is not None and len(plan) == 1 < len(group):  # two gradients to compare
                plan = [len(group) - len(group) // 2, len(group) // 2]
            passes = self._concatenate(group, plan)
            if passes is None:
                return list(group)
            if not automatic or processes == 1:  # one process alone may run out of memory and begin anew
                return passes
            elements = _elements(sizes, plan)
            largest = max(range(len(plan)), key=elements.__getitem__)
            if elements[largest] <= self._proven_pass or plan[largest] == 1:
                return passes
            if self._fits(model, passes[largest], num_items):
                self._proven_pass = elements[largest]
                return passes
            self._pass_limit = elements[largest] / 2
            logger.warning("A forward pass over %d micro-batches does not fit; halving it.", plan[largest])

    def _concatenate(self, group: MicroBatchGroup, plan: list[int]) -> list[Any] | None:
        """Merge by ``plan``; None, with a note, where this collator's output cannot be merged (on any process)."""
        tokenizer = getattr(self, "processing_class", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is None:
            pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        takes_mask = "attention_mask" in inspect.signature(_innermost(self.model).forward).parameters
        reason, passes, position = None, [], 0
        try:
            for number in plan:
                part = list(group[position : position + number])
                passes.append(merge_micro_batches(part, pad_token_id=pad or 0, add_attention_mask=takes_mask))
                position += number
        except CannotMerge as refusal:
            reason = str(refusal)
        if self.accelerator.num_processes > 1:
            refused = torch.tensor([reason is not None], device=self.args.device)
            if self.accelerator.gather(refused).any() and reason is None:
                reason = "another process cannot merge its own"
        if reason is None:
            return passes
        self._merging_refused = True
        logger.warning("elra_max_micro_batch: micro-batches are accumulated, not merged: %s.", reason)
        return None

    def _fits(self, model: Any, inputs: Any, num_items: Any) -> bool:
        """Whether a pass over ``inputs`` and back fits into the memory of every process, by trial; changes nothing.

        What user code does in ``compute_loss`` beside the loss, it does once more here.
        """
        fits = True
        with unchanged(model, random_state=True), self.accelerator.no_sync(model=model):
            try:
                super().training_step(model, inputs, num_items)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                fits = False
        model.zero_grad()
        if not fits:
            clear_device_cache(garbage_collection=True)
        if self.accelerator.num_processes > 1:
            told = torch.tensor([fits], device=self.args.device)
            fits = bool(self.accelerator.gather(told).all())
        return fits

    def _shrink_passes(self, passes: list[Any]) -> None:
        """After running out of memory in a merged pass: halve the limit."""
        self._pass_limit = _largest(passes) / 2
        self._proven_pass = min(self._proven_pass, int(self._pass_limit))
        logger.warning("Out of memory in a merged forward pass; halving it.")
        clear_device_cache(garbage_collection=True)

    def floating_point_ops(self, inputs):
        """Sum over a group; the stock one, which counts the model's parameters anew each time, is asked only once."""
        if not isinstance(inputs, MicroBatchGroup):
            return super().floating_point_ops(inputs)
        stock = super().floating_point_ops
        name = getattr(self.model, "main_input_name", "input_ids")
        sizes = [inner[name].numel() for inner in inputs if hasattr(inner, "get") and inner.get(name) is not None]
        if getattr(stock, "__func__", None) is not Trainer.floating_point_ops or len(sizes) < len(inputs):
            return sum(stock(batch) for batch in inputs)
        if self._flops_per_element is None:
            self._flops_per_element = stock(inputs[0]) / max(sizes[0], 1)
        return self._flops_per_element * sum(sizes)

    def _track_num_input_tokens(self, inputs):
        for batch in inputs if isinstance(inputs, MicroBatchGroup) else [inputs]:
            super()._track_num_input_tokens(batch)

    # ---- counting ----

    def set_initial_training_values(self, args, dataloader):
        """Stock counts; where samples, tokens or updates limit the run, there may be any number of epochs."""
        if self.batch_control is None:
            return super().set_initial_training_values(args, dataloader)
        control, sized = self.batch_control, has_length(dataloader)
        budget = None if sized else control.max_samples or control.max_tokens
        with budget_as_max_steps(args, budget), self._an_update_is_a_batch():
            values = super().set_initial_training_values(args, dataloader)
        epochs, per_epoch, examples, samples, batch, in_epoch, _ = values
        plain = plain_batch_sampler(dataloader) if sized else None
        per_batch = self._samples_of(self._train_batch_size)
        rows = len(dataloader) * per_batch if sized else None  # with several processes the last batch is filled up
        if plain is not None:
            per_batch = self._samples_of(plain.batch_size)
            rows = len(dataloader) * per_batch
            if plain.drop_last or self.accelerator.num_processes == 1:
                rows = len(plain.sampler)  # type: ignore[arg-type]
        self._rows_are_known = plain is not None
        self.progress = TrainingProgress(
            num_epochs=args.num_train_epochs,
            max_updates=args.max_steps if args.max_steps > 0 else None,
            max_samples=control.max_samples,
            max_tokens=control.max_tokens,
            samples_per_batch=per_batch,
            samples_per_epoch=rows,
            tokens_per_sample=(tokens_of_first_row(self.train_dataset) if self._counts_tokens(control) else None) or 1,
            drops_last=plain is not None and plain.drop_last,
            skips_incomplete=self._skips_last_batch(),
        )
        self._warn_of_limits(control)
        # The number of first-sized updates that would end the run: the unit of learning-rate schedules.
        self._schedule_length = max(1, self.progress.updates_left(control.controller.initial_accumulation))
        if self.progress.limited:
            epochs = sys.maxsize
        if not sized:  # get_batch_samples ends the epoch with the data
            per_epoch = sys.maxsize
        return epochs, per_epoch, examples, samples, batch, in_epoch, self._schedule_length

    def _warn_of_limits(self, control: BatchControl) -> None:
        """Tell where what was asked for cannot be had with these data."""
        first, per_epoch = control.controller.initial_accumulation, self.progress.batches_per_epoch
        wanted = first * (max(factor for _, factor in control.schedule.steps) if control.schedule else 1)
        if per_epoch is not None and wanted > per_epoch:
            logger.warning("Updates of %d micro-batches are cut to the %d that an epoch has.", wanted, per_epoch)
        updates, left = updates_per_cycle(self), self.progress.updates_left(first)
        if control.decides_at_cycles and updates is not None and updates >= left:
            boosted = "; with elra_boost the mean is over all of it" if self.average_over == "cycle" else ""
            logger.warning(
                "elra_control_cycle=%s is no shorter than this run: the batch size will not change%s.",
                self.elra_settings.control_cycle(self.train_dataset),
                boosted,
            )

    def _counts_tokens(self, control: BatchControl) -> bool:
        """Whether the tokens of a sample have to be known beforehand."""
        cycle = ControlCycle.parse(self.elra_settings.control_cycle(self.train_dataset))
        return control.max_tokens is not None or (control.decides_at_cycles and cycle.unit == "tok")

    def _samples_of(self, batch_size: int) -> int:
        """Samples of a micro-batch over all processes that have data of their own, from the loader's batch size."""
        if splits_batches(self.args):
            return batch_size
        total = self.get_total_train_batch_size(self.args) // self.args.gradient_accumulation_steps
        return batch_size * (total // self._train_batch_size)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Stock scheduler over the number of updates of the first size."""
        if self.batch_control is not None and num_training_steps > 0:
            num_training_steps = getattr(self, "_schedule_length", num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _init_training_state(self, *args, **kwargs):
        epochs, skip = super()._init_training_state(*args, **kwargs)
        self._divides = None  # model and loss may be other ones than before
        if self.batch_control is None:
            return epochs, skip
        self._restore_position(self.batch_control)
        self._first_epoch_of_call, self._flops_per_element = True, None
        progress = self.progress
        if self.args.ignore_data_skip:
            progress.taken = 0
        if progress.batches_per_epoch and progress.epoch_is_over(self.accumulation):
            progress.restart(progress.epoch + 1)
        batches, rows = divmod(progress.taken, progress.samples_per_batch)
        if rows and not self._rows_are_known:  # no sampler to leave them out of: better twice than never
            progress.taken, rows = progress.taken - rows, 0
        self._rows_to_skip = rows
        self._show_totals()
        return progress.epoch, batches

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Stock; where a checkpoint lies within a batch of the present size, the sampler goes on after its last row."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        plain = plain_batch_sampler(train_dataloader) if self._rows_are_known else None
        if self.batch_control is not None and plain is not None and self._rows_to_skip:
            plain.sampler = RowsSkipped(plain.sampler, self._rows_to_skip)
        return prepared

    def data_position(self) -> dict[str, Any]:
        """Where in the data the run is, and the controller's state, as JSON values for the checkpoint."""
        assert self.batch_controller is not None
        limit = self._pass_limit if math.isfinite(self._pass_limit) else None
        return {
            **self.progress.state_dict(),
            "samples_per_batch": self.progress.samples_per_batch,
            "controller": self.batch_controller.state_dict(),
            "pass_limit": limit,
            "noise_scale": None if self.noise_scale is None else self.noise_scale.state_dict(),
        }

    def _restore_position(self, control: BatchControl) -> None:
        """Take position and controller from the checkpoint that is resumed; without one start anew."""
        saved = ElraCallback.saved_attributes(self.state)
        position = saved.get("data_position")
        self.batch_controller = dataclasses.replace(control.controller)
        if (most := self.elra_settings.elra_max_batch_size) is not None:  # auto_find_batch_size makes smaller batches
            self.batch_controller.max_accumulation = most // self.progress.samples_per_batch
        self._limit_to_cycle(self.batch_controller)
        self.noise_scale = NoiseScale() if control.measures_noise else None
        self.progress.restart()
        # What fitted is tried again: the run may go on on another device.
        self._pass_limit, self._proven_pass, self._merging_refused = math.inf, 0, False
        if position is not None:
            self.progress.restart(position["epoch"], position["taken"])
            self.progress.count(
                updates=self.state.global_step, samples=saved.get("samples", 0), tokens=saved.get("tokens", 0)
            )
            if control.decides_at_cycles:
                self.batch_controller.load_state_dict(position["controller"])
                # It counts micro-batches, which may be of another size now.
                exact = self.batch_controller.exact * position["samples_per_batch"] / self.progress.samples_per_batch
                exact = max(exact, self.batch_controller.initial_accumulation)
                self.batch_controller.exact = min(exact, self.batch_controller.max_accumulation or exact)
            if position["pass_limit"] is not None:
                self._pass_limit = position["pass_limit"]
            if self.noise_scale is not None and position.get("noise_scale") is not None:
                self.noise_scale = NoiseScale(**position["noise_scale"])

    def true_epoch(self, state: Any) -> float:
        """Epochs of data seen, also before the stock count is corrected."""
        epochs = self.progress.epochs(self.accumulation) if self.batch_control is not None else None
        return (state.epoch or 0.0) if epochs is None else epochs

    def begin_epoch(self) -> None:
        """The loop begins an epoch: the first one of a call goes on where a checkpoint stopped."""
        if not self._first_epoch_of_call:
            self.progress.restart(self.progress.epoch + 1)
        self._first_epoch_of_call = False

    def correct_state(self, samples: int, tokens: int) -> None:
        """After an update: the true epoch, the updates still to come, and a schedule that follows the data."""
        if self.batch_control is None:
            return
        self.progress.count(updates=self.state.global_step, samples=samples, tokens=tokens)
        if tokens == 0:
            self._refuse_tokens(self.batch_control)
        self._show_totals()
        if isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR) and self._created_lr_scheduler:
            position = round(self.progress.fraction(self.accumulation) * self._schedule_length, 9)
            if position != self.lr_scheduler.last_epoch:
                self.lr_scheduler.last_epoch = position - 1  # type: ignore[assignment]  # a schedule takes any number
                self.lr_scheduler.step()

    def begin_intervals(self) -> None:
        """Remember how far the run is, where training begins or goes on."""
        self._share_before = 0.0 if self.batch_control is None else self.progress.fraction(self.accumulation)

    def time_intervals(self) -> None:
        """After an update: let intervals that are shares of the run follow the data.

        The stock ones are a fixed number of updates, which comes round ever more seldom as updates grow.
        """
        if self.batch_control is None:
            return
        before, self._share_before = self._share_before, self.progress.fraction(self.accumulation)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            share = getattr(self.args, name)
            if share is not None and 0 < share < 1:
                passed = math.floor(self._share_before / share + 1e-9) > math.floor(before / share + 1e-9)
                # The Trainer acts where this divides the number of the update.
                setattr(self.state, name, self.state.global_step + (0 if passed else 1))

    def _refuse_tokens(self, control: BatchControl) -> None:
        """Raise a ConfigurationError for what counts tokens, where there are none."""
        name = getattr(self.model, "main_input_name", "input_ids")
        none = f"the model's main input, {name!r}, holds no tokens"
        cycle = self.elra_settings.control_cycle(self.train_dataset)
        if control.max_tokens is not None:
            raise ConfigurationError(f"elra_max_tokens={control.max_tokens}: {none}; use --elra_max_samples.")
        if control.decides_at_cycles and ControlCycle.parse(cycle).unit == "tok":
            raise ConfigurationError(f"elra_control_cycle={cycle!r}: {none}; write it in samples, e.g. 45000sp.")

    def _show_totals(self) -> None:
        epochs = self.progress.epochs(self.accumulation)
        if epochs is None:
            epochs = self.progress.fraction()  # as in the Trainer, data without a length are one epoch
        if epochs is not None and self.state.global_step:
            self.state.epoch = epochs
        self.state.max_steps = self.state.global_step + self.progress.updates_left(self.accumulation)
        self.state.num_train_epochs = self.progress.total_epochs(self.accumulation)

    def _skips_last_batch(self) -> bool:
        return bool(self.args.dataloader_drop_last)


def _targets(inputs: Any, shifted: bool) -> Any:
    """Number of labels that count, or None where there are none to count.

    Where labels are ``shifted`` against the predictions, the first of a row is no target.
    """
    labels = inputs.get("labels") if hasattr(inputs, "get") else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return None
    if shifted and labels.dim() > 1:
        labels = labels[:, 1:]
    return labels.ne(LABEL_PADDING).sum()


def _gradient_square(model: Any) -> Any:
    """Squared norm of a model's gradient, on its device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.to(accumulates_in(norm.device)) ** 2


def _rows_and_width(batch: Any) -> tuple[int, int]:
    """Samples of a micro-batch, and elements of a row of its largest tensor."""
    values = batch.values() if hasattr(batch, "values") else [batch]
    largest = max((v.numel() for v in values if isinstance(v, torch.Tensor)), default=0)
    rows = rows_of(batch) or 1
    return rows, max(1, largest // rows)


def _largest(passes: list[Any]) -> int:
    """Elements of the largest pass."""
    return max(rows * width for rows, width in map(_rows_and_width, passes))


def _elements(sizes: list[tuple[int, int]], plan: list[int]) -> list[int]:
    """Elements of every pass, rows padded to the widest."""
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
