"""What a run has seen and what is left of it: losses, samples, tokens, epochs, control cycles, resume position.

The stock loop assumes that an update is one batch. ``Accounting`` corrects what it counts: epochs, the number of
updates, the resume position, intervals, the position in a learning-rate schedule. ``ElraCallback`` keeps the totals, is
part of every checkpoint, and ends control cycles. ``control/progress.py`` computes how far a run is;
``update_size.py`` decides how many micro-batches an update has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import has_length

from hf_elra.control import BatchSizeController, ControlCycle, CycleLosses
from hf_elra.control.progress import TrainingProgress
from hf_elra.errors import ConfigurationError
from hf_elra.optim.tensors import accumulates_in
from hf_elra.trainer.arguments import set_meanwhile
from hf_elra.trainer.batch_control import BatchControl, budget_as_max_steps, tokens_of_first_row, updates_per_cycle
from hf_elra.trainer.loss_scale import SumOfFinite
from hf_elra.trainer.rows import RowsSkipped, number_of_rows, plain_batch_sampler, rows_of, splits_batches
from hf_elra.trainer.update_size import UpdateSize

logger = logging.getLogger(__name__)

LOSSES_ON_DEVICE = 1000
"""Losses are fetched this many at a time, since the host would wait for the GPU at every loss otherwise."""


def finite_values(losses: list[Any]) -> list[float]:
    """Fetch losses, which may be on a device, all at once; leave out those that are not finite."""
    tensors = bool(losses) and all(isinstance(loss, Tensor) for loss in losses)
    values = torch.stack(losses).tolist() if tensors else map(float, losses)
    return [value for value in values if math.isfinite(value)]


class Counts:
    """Samples and tokens over all processes.

    Those of an update may be on a device. They are fetched when somebody reads the sum, many at once, so that the host
    does not wait in an update that nobody asks about.
    """

    def __init__(self) -> None:
        self.begin(0, 0)

    def begin(self, samples: int, tokens: int) -> None:
        """Begin with these."""
        self._sums = [samples, tokens]
        self._waiting: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, samples: int | Tensor, tokens: int | Tensor) -> None:
        """Add those of an update; a tensor is one number."""
        for place, number in enumerate((samples, tokens)):
            if not isinstance(number, Tensor):
                self._sums[place] += number
                continue
            self._waiting[place].append(number)
            if len(self._waiting[place]) >= LOSSES_ON_DEVICE:
                self._read(place)

    @property
    def samples(self) -> int:
        """Rows of the data."""
        return self._read(0)

    @property
    def tokens(self) -> int:
        """Numbers of the main input of the model."""
        return self._read(1)

    def _read(self, place: int) -> int:
        if waiting := self._waiting[place]:
            self._sums[place] += sum(map(round, torch.stack(waiting).tolist()))
            waiting.clear()
        return self._sums[place]


class Accounting:
    """Counts what the updates of a Trainer are made of, and how far it is.

    Args:
        trainer (Trainer): a Trainer with :class:`~hf_elra.trainer.mixin.ElraTrainerMixin`.
        size (UpdateSize): the size of its updates; if ``size.control`` is None the stock counts are left as they are.

    Attributes:
        progress: how far the run is.
    """

    def __init__(self, trainer: Any, size: UpdateSize) -> None:
        self._trainer = trainer
        self._size = size
        self.progress = TrainingProgress()
        self._loss = SumOfFinite()  # so far, in the running update
        self._samples = self._tokens = 0
        self._rows_drawn: int | None = None  # rows drawn by it over all processes; None if the sampler does not say
        self._rows_are_known = False
        self._rows_to_skip = 0
        self._first_epoch_of_call = True
        self._schedule_length: int | None = None
        self._batches_of_epoch: int | None = None  # whole micro-batches
        self._share_before = 0.0  # totals of the run
        self._users_accumulation = 1

    def prepare(self) -> None:
        """Take the Trainer's arguments, which are new or have changed."""
        self.progress = TrainingProgress()

    @property
    def accumulation(self) -> int:
        """Return the number of micro-batches of the next update."""
        return self._size.accumulation(self.progress)

    # ---- before the loop ----

    def skips_last_batch(self) -> bool:
        """Return whether the last, incomplete batch of an epoch is left out (paper, section 3.5)."""
        trainer = self._trainer
        if not trainer.elra_active or not trainer.elra_settings.elra_skip_last_batch:
            return False
        rows = number_of_rows(trainer.train_dataset)
        return rows is None or rows >= self._samples_of(trainer._train_batch_size)

    def train_loader(self, stock_loader: Any) -> Any:
        """Return what ``stock_loader`` makes, without the last, incomplete batch of an epoch."""
        trainer = self._trainer
        if self.skips_last_batch():
            with set_meanwhile(trainer.args, dataloader_drop_last=True):
                return stock_loader()
        if trainer.elra_active and trainer.elra_settings.elra_skip_last_batch and trainer.train_dataset is not None:
            logger.warning(
                "The training data are less than one batch of %d: the incomplete batch is used all the same.",
                self._samples_of(trainer._train_batch_size),
            )
        return stock_loader()

    def initial_values(self, stock_values: Any, args: Any, loader: Any) -> Any:
        """Return the seven counts of ``stock_values`` for a run whose updates may change in size.

        If samples, tokens or updates limit the run, there may be any number of epochs.
        """
        control, sized = self._size.control, has_length(loader)
        self._batches_of_epoch = self._whole_batches(loader) if sized else None
        if control is None:
            return self._without_incomplete_updates(stock_values(args, loader), args, sized)
        budget = None if sized else control.max_samples or control.max_tokens
        with budget_as_max_steps(args, budget), self.an_update_is_a_batch():
            epochs, per_epoch, examples, samples, batch, in_epoch, _ = stock_values(args, loader)
        trainer = self._trainer
        plain = plain_batch_sampler(loader) if sized else None
        per_batch = self._samples_of(trainer._train_batch_size)
        rows = len(loader) * per_batch if sized else None  # with several processes the last batch is filled up
        if plain is not None:
            per_batch = self._samples_of(plain.batch_size)
            rows = len(loader) * per_batch
            if plain.drop_last or trainer.accelerator.num_processes == 1:
                rows = len(plain.sampler)  # type: ignore[arg-type]
        self._rows_are_known = plain is not None
        tokens = tokens_of_first_row(trainer.train_dataset) if self._needs_tokens_beforehand(control) else None
        self.progress = TrainingProgress(
            num_epochs=args.num_train_epochs,
            max_updates=args.max_steps if args.max_steps > 0 else None,
            max_samples=control.max_samples,
            max_tokens=control.max_tokens,
            samples_per_batch=per_batch,
            samples_per_epoch=rows,
            tokens_per_sample=tokens or 1,
            drops_last=plain is not None and plain.drop_last,
            skips_incomplete=self.skips_last_batch(),
        )
        self._warn_of_limits(control)
        # The number of first-sized updates that would end the run: the unit of learning-rate schedules.
        self._schedule_length = max(1, self.progress.updates_left(control.controller.initial_accumulation))
        if self.progress.limited:
            epochs = sys.maxsize
        if not sized:  # an epoch ends with the data
            per_epoch = sys.maxsize
        return epochs, per_epoch, examples, samples, batch, in_epoch, self._schedule_length

    def _without_incomplete_updates(self, values: Any, args: Any, sized: bool) -> Any:
        """Return the stock counts, without the incomplete group of micro-batches at the end of an epoch."""
        epochs, _, examples, _, batch, micro_batches, max_steps = values
        accumulation = args.gradient_accumulation_steps
        whole = micro_batches // accumulation
        if not self.skips_last_batch() or not sized or whole == 0:
            return values
        if args.max_steps > 0:
            epochs = -(-max_steps // whole)
        else:
            max_steps = -int(-args.num_train_epochs * whole // 1)
        return epochs, whole, examples, max_steps * batch, batch, whole * accumulation, max_steps

    def _whole_batches(self, loader: Any) -> int:
        """Return the whole micro-batches of an epoch; a sampler may draw every row several times, as GRPO's does."""
        rows = number_of_rows(self._trainer.train_dataset)
        batches = len(loader)
        whole, rest = divmod(rows or 0, self._samples_of(self._trainer._train_batch_size))
        return whole if batches == whole + (rest > 0) else batches

    def _needs_tokens_beforehand(self, control: BatchControl) -> bool:
        trainer = self._trainer
        cycle = ControlCycle.parse(trainer.elra_settings.control_cycle(trainer.train_dataset))
        return control.max_tokens is not None or (control.decides_at_cycles and cycle.unit == "tok")

    def _samples_of(self, batch_size: int) -> int:
        """Return the samples of a micro-batch over all processes that have their own data, from the batch size."""
        trainer = self._trainer
        if splits_batches(trainer.args):
            return batch_size
        total = trainer.get_total_train_batch_size(trainer.args) // trainer.args.gradient_accumulation_steps
        return int(batch_size * (total // trainer._train_batch_size))

    def _warn_of_limits(self, control: BatchControl) -> None:
        """Warn if something that was asked for cannot be had with these data."""
        trainer = self._trainer
        first, per_epoch = control.controller.initial_accumulation, self.progress.batches_per_epoch
        wanted = first * (max(factor for _, factor in control.schedule.steps) if control.schedule else 1)
        if per_epoch is not None and wanted > per_epoch:
            logger.warning("Updates of %d micro-batches are cut to the %d that an epoch has.", wanted, per_epoch)
        updates, left = updates_per_cycle(trainer), self.progress.updates_left(first)
        if control.decides_at_cycles and updates is not None and updates >= left:
            boosted = "; with elra_boost the mean is over all of it" if trainer.average_over == "cycle" else ""
            logger.warning(
                "elra_control_cycle=%s is no shorter than this run: the batch size will not change%s.",
                trainer.elra_settings.control_cycle(trainer.train_dataset),
                boosted,
            )

    def begin(self, stock_position: tuple[int, int]) -> tuple[int, int]:
        """Take the position in the data from the Trainer's state, which is new or was read from a checkpoint.

        Returns:
            Epochs to skip, and batches of the next one; ``stock_position`` if updates are stock.
        """
        control, trainer, progress = self._size.control, self._trainer, self.progress
        if control is None:
            return stock_position
        cycle = trainer.elra_settings.control_cycle(trainer.train_dataset)
        self._size.begin(cycle, progress, trainer.elra_settings.elra_max_batch_size)
        progress.restart()
        if (position := self.saved_position()) is not None:
            saved = ElraCallback.saved_attributes(trainer.state)
            progress.restart(position["epoch"], position["taken"])
            progress.count(
                updates=trainer.state.global_step, samples=saved.get("samples", 0), tokens=saved.get("tokens", 0)
            )
            self._size.load_state_dict(position, progress)
        self._first_epoch_of_call = True
        if trainer.args.ignore_data_skip:
            progress.taken = 0
        if progress.batches_per_epoch and progress.epoch_is_over(self.accumulation):
            progress.restart(progress.epoch + 1)
        batches, rows = divmod(progress.taken, progress.samples_per_batch)
        if rows and not self._rows_are_known:  # no sampler can leave them out: better twice than never
            progress.taken, rows = progress.taken - rows, 0
        self._rows_to_skip = rows
        self._show_totals()
        return progress.epoch, batches

    def saved_position(self) -> dict[str, Any] | None:
        """Return the position in the data of the checkpoint that is resumed (see :meth:`position`), or None."""
        position: dict[str, Any] | None = ElraCallback.saved_attributes(self._trainer.state).get("data_position")
        return position

    def position(self) -> dict[str, Any]:
        """Return the position in the data and the size of updates, as JSON values for the checkpoint."""
        return {**self.progress.state_dict(), **self._size.state_dict(self.progress)}

    def skip_rows(self, loader: Any) -> None:
        """Let the sampler go on after the last row of a checkpoint that lies within a batch of the present size."""
        plain = plain_batch_sampler(loader) if self._rows_are_known else None
        if self._size.control is not None and plain is not None and self._rows_to_skip:
            plain.sampler = RowsSkipped(plain.sampler, self._rows_to_skip)

    def schedule_length(self, num_training_steps: int) -> int:
        """Return the number of updates that a learning-rate schedule is made for: updates of the first size."""
        if self._size.control is None or num_training_steps <= 0 or self._schedule_length is None:
            return num_training_steps
        return self._schedule_length

    # ---- what the loop assumes ----

    @contextlib.contextmanager
    def an_update_is_a_batch(self) -> Iterator[None]:
        """Make the loop take an update for one batch; the batch is a group of micro-batches."""
        args, control = self._trainer.args, self._size.control
        self._users_accumulation = args.gradient_accumulation_steps
        if control is not None and not control.asked_for:
            # In this case it is the user's number, whatever it was before.
            control.controller = BatchSizeController(self._users_accumulation)
        with set_meanwhile(args, **({} if control is None else {"gradient_accumulation_steps": 1})):
            yield

    def as_the_user_set_it(self) -> Any:
        """Return a context in which the arguments are the user's, for what is saved and logged within an epoch."""
        return set_meanwhile(self._trainer.args, gradient_accumulation_steps=self._users_accumulation)

    def begin_epoch(self) -> None:
        """Begin an epoch; the first one of a call goes on where a checkpoint stopped."""
        if not self._first_epoch_of_call:
            self.progress.restart(self.progress.epoch + 1)
        self._first_epoch_of_call = False

    def has_ended(self) -> bool:
        """Return whether the run has reached its end."""
        if self._size.control is not None:
            return not self.progress.updates_left(self.accumulation)
        state = self._trainer.state
        return bool(0 < state.max_steps <= state.global_step)

    def share(self) -> float:
        """How much of the run is done, from 0 to 1."""
        if self.has_ended():  # an incomplete batch that is skipped at the end counts as done
            return 1.0
        if self._size.control is not None:
            return float(self.progress.fraction())
        state = self._trainer.state
        return float(state.global_step / max(state.max_steps, 1))

    # ---- an update ----

    def begin_update(self) -> None:
        """Forget the counts of an update that was interrupted."""
        self._loss, self._samples, self._tokens, self._rows_drawn = SumOfFinite(), 0, 0, None

    def take(self, micro_batches: int) -> None:
        """Count micro-batches that were taken from the data for this update."""
        rows = self.progress.take(micro_batches)
        self._rows_drawn = rows if self._rows_are_known else None

    def count(self, micro_batches: list[Any]) -> tuple[int, int]:
        """Return samples, as far as their contents tell, and tokens of micro-batches."""
        name, samples, tokens = getattr(self._trainer.model, "main_input_name", "input_ids"), 0, 0
        for batch in micro_batches:
            main_input = batch.get(name) if hasattr(batch, "get") else None
            if isinstance(main_input, Tensor) and not main_input.is_floating_point():
                tokens += main_input.numel()
            samples += rows_of(batch) or 0
        return samples, tokens

    def add(self, loss: Tensor, samples: int, tokens: int) -> None:
        """Add micro-batches to the update that runs.

        Args:
            loss: their part of the update's mean, which is divided already by the micro-batches or targets of the
                update.
            samples, tokens: those of this process.
        """
        self._loss.add(loss.detach().float())
        self._samples += samples
        self._tokens += tokens

    def end_update(self) -> Any:
        """Tell the optimizer the mean loss of the update, whose gradients are complete, and count the update.

        Returns:
            The mean loss over all processes that have one; it may be on the device.
        """
        trainer = self._trainer
        loss, samples, tokens, drawn = self._loss.value, self._samples, self._tokens, self._rows_drawn
        processes, of_process = trainer.accelerator.num_processes, loss
        if processes > 1:
            finite = loss.isfinite()
            counts = [torch.full_like(loss, number, dtype=accumulates_in(loss.device)) for number in (samples, tokens)]
            numbers = torch.stack([torch.where(finite, loss, 0.0).to(counts[0]), finite.to(counts[0]), *counts])
            total = trainer.accelerator.reduce(numbers, reduction="sum")
            loss, samples, tokens = total[0] / total[1], total[2], total[3]  # 0/0 where no process has a loss
            of_others = loss.to(of_process.dtype)
            of_process = torch.where(finite, of_process, of_others)  # one without a loss uses that of the others
        if (optimizer := trainer.elra_optimizer) is not None:
            optimizer.observe_loss(of_process)  # the optimizer takes the mean over processes itself
            if processes > 1:
                optimizer.process_group = torch.distributed.group.WORLD
            self._tell_sizes(optimizer)
        trainer.elra_callback.count(samples if drawn is None else drawn, tokens, loss)
        self._loss, self._samples, self._tokens = SumOfFinite(), 0, 0
        return loss

    def _tell_sizes(self, optimizer: Any) -> None:
        """Tell an optimizer how many samples an update has, and how many updates an epoch and the whole run."""
        trainer = self._trainer
        number = trainer.args.gradient_accumulation_steps if self._size.control is None else self.accumulation
        optimizer.samples_per_update = self._samples_of(trainer._train_batch_size) * max(1, round(number))
        batches = self._batches_of_epoch
        optimizer.updates_per_epoch = None if batches is None else max(1, batches // max(1, round(number)))
        optimizer.total_updates = trainer.state.max_steps if trainer.state.max_steps > 0 else None

    # ---- after it ----

    def correct_state(self, seen: Counts) -> None:
        """Correct, after an update, the epoch, the number of updates to come, and the position in a schedule."""
        trainer, control = self._trainer, self._size.control
        if control is None:
            return
        tokens = seen.tokens if control.asked_for else 0  # else nothing depends on them, and nobody has to wait
        self.progress.count(updates=trainer.state.global_step, samples=seen.samples, tokens=tokens)
        if tokens == 0 and control.asked_for:
            self._refuse_tokens(control)
        self._show_totals()
        schedule = trainer.lr_scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) and trainer._created_lr_scheduler:
            assert self._schedule_length is not None
            position = round(self.progress.fraction(self.accumulation) * self._schedule_length, 9)
            if position != schedule.last_epoch:
                schedule.last_epoch = position - 1  # type: ignore[assignment]  # a schedule takes any number
                schedule.step()

    def begin_intervals(self) -> None:
        """Remember how far the run is when training begins or goes on."""
        self._share_before = 0.0 if self._size.control is None else self.progress.fraction(self.accumulation)

    def time_intervals(self) -> None:
        """Let intervals that are shares of the run follow the data; called after every update.

        Stock intervals are a fixed number of updates, which takes ever longer as updates grow.
        """
        if self._size.control is None:
            return
        args, state = self._trainer.args, self._trainer.state
        before, self._share_before = self._share_before, self.progress.fraction(self.accumulation)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            share = getattr(args, name)
            if share is not None and 0 < share < 1:
                passed = math.floor(self._share_before / share + 1e-9) > math.floor(before / share + 1e-9)
                # The Trainer acts where this divides the number of the update.
                setattr(state, name, state.global_step + (0 if passed else 1))

    def true_epoch(self) -> float:
        """Return the epochs of data seen, also before the stock count is corrected."""
        epochs = None if self._size.control is None else self.progress.epochs(self.accumulation)
        return (self._trainer.state.epoch or 0.0) if epochs is None else epochs

    def _refuse_tokens(self, control: BatchControl) -> None:
        """Raise a ConfigurationError if something counts tokens and the data have none."""
        trainer = self._trainer
        none = f"the model's main input, {getattr(trainer.model, 'main_input_name', 'input_ids')!r}, holds no tokens"
        cycle = trainer.elra_settings.control_cycle(trainer.train_dataset)
        if control.max_tokens is not None:
            raise ConfigurationError(f"elra_max_tokens={control.max_tokens}: {none}; use --elra_max_samples.")
        if control.decides_at_cycles and ControlCycle.parse(cycle).unit == "tok":
            raise ConfigurationError(f"elra_control_cycle={cycle!r}: {none}; write it in samples, e.g. 45000sp.")

    def _show_totals(self) -> None:
        state, epochs = self._trainer.state, self.progress.epochs(self.accumulation)
        if epochs is None:
            epochs = self.progress.fraction()  # as in the Trainer, data without a length are one epoch
        if epochs is not None and state.global_step:
            state.epoch = epochs
        state.max_steps = state.global_step + self.progress.updates_left(self.accumulation)
        state.num_train_epochs = self.progress.total_epochs(self.accumulation)


class ElraCallback(TrainerCallback, ExportableState):
    """Counts samples and tokens over all processes, and ends control cycles.

    Its counts, those of passes, the running cycle's losses, the position in the data and the batch-size controller are
    in every checkpoint (``trainer_state.json``, under ``stateful_callbacks``) and continue on resume. It is the
    first of all callbacks, so that the others see the corrected state (:func:`put_first`).

    Args:
        control_cycle (str): length of a cycle, e.g. ``"1ep"``.
    """

    trainer: Any = None

    def __init__(self, control_cycle: str = "1ep") -> None:
        self.control_cycle = control_cycle
        self.seen = Counts()
        self.samples_before = self.updates_before = 0  # where a run was resumed
        self.cycle_losses = CycleLosses()
        self._waiting: list[Any] = []  # losses that are still on the device
        self.full_batch = 0  # samples in a whole micro-batch as seen so far, for data of unknown length
        self._cycle = ControlCycle.parse(control_cycle, "elra_control_cycle")

    @property
    def samples(self) -> int:
        """The samples so far; a Trainer that resumes sets them."""
        return self.seen.samples

    @samples.setter
    def samples(self, number: int) -> None:
        self.seen.begin(number, self.tokens)

    @property
    def tokens(self) -> int:
        """The tokens so far; a Trainer that resumes sets them."""
        return self.seen.tokens

    @tokens.setter
    def tokens(self, number: int) -> None:
        self.seen.begin(self.samples, number)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        self._take_in()
        attributes = {
            "samples": self.samples,
            "tokens": self.tokens,
            "cycle_losses": self.cycle_losses.state_dict(),
            "full_batch": self.full_batch,
        }
        if self.trainer is not None:
            attributes.update(dataclasses.asdict(self.trainer.elra.trials.counts))
        if self.trainer is not None and self.trainer.batch_control is not None:
            elra = self.trainer.elra
            attributes["data_position"] = {**elra.accounting.position(), **elra.micro_batches.state_dict()}
        return {"args": {"control_cycle": self.control_cycle}, "attributes": attributes}

    @classmethod
    def saved_attributes(cls, state: Any) -> dict[str, Any]:
        """Return the attributes in the checkpoint that is being resumed; empty for a fresh start."""
        saved = state.stateful_callbacks.get(cls.__name__) if state.global_step else None
        saved = saved[0] if isinstance(saved, list) else saved
        return saved["attributes"] if saved else {}

    def count(self, samples: int | Tensor, tokens: int | Tensor, loss: Any) -> None:
        """Add one update: samples and tokens over all processes, and its mean loss, which may all be on a device."""
        self.seen.add(samples, tokens)
        control = self.trainer.batch_control
        if control is None or not control.decides_at_cycles:  # nobody needs the losses of the cycle
            return
        self._waiting.append(loss)
        if len(self._waiting) >= LOSSES_ON_DEVICE:
            self._take_in()

    def _take_in(self) -> None:
        """Fetch all waiting losses at once, and add the finite ones to those of the cycle."""
        losses, self._waiting = self._waiting, []
        for value in finite_values(losses):
            self.cycle_losses.add(value)

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        saved = self.saved_attributes(state)
        self.seen.begin(saved.get("samples", 0), saved.get("tokens", 0))
        self.samples_before, self.updates_before = self.samples, state.global_step
        losses, self._waiting = saved.get("cycle_losses"), []
        self.cycle_losses = CycleLosses() if losses is None else CycleLosses.from_state(losses)
        self.full_batch = saved.get("full_batch", 0)
        self.trainer.elra.trials.counts.begin(saved)
        state.stateful_callbacks[type(self).__name__] = self.state()
        self.trainer.elra.logs.begin()
        self.trainer.elra.accounting.begin_intervals()
        self._cycle.completed = 0
        self._advance(state)  # cycles that ended before a resume do not end again

    def on_epoch_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.trainer.elra.accounting.begin_epoch()

    def on_optimizer_step(self, args, state, control, **kwargs):  # noqa: D102
        self.trainer.elra.line_losses.withdraw()

    def on_log(self, args, state, control, **kwargs):  # noqa: D102
        if state.log_history:
            self.trainer.elra.logs.complete_entry()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        elra = self.trainer.elra
        # The true epoch comes first, as it is in the logs of the cycle; the decision then changes what is to come.
        elra.accounting.correct_state(self.seen)
        elra.logs.take_update()
        elra.logs.tell_new_batch()
        cycle_is_over = self._advance(state)
        elra.averaging.sample(state.global_step, cycle_is_over)
        if cycle_is_over:
            self._end_cycle()
            elra.accounting.correct_state(self.seen)
        elra.accounting.time_intervals()

    def _end_cycle(self) -> None:
        self._take_in()
        elra, optimizer = self.trainer.elra, self.trainer.elra_optimizer
        if optimizer is not None:
            optimizer.end_cycle()
        losses = self.cycle_losses.end_cycle()
        if losses.count:
            decision = elra.size.end_cycle(losses.mean, losses.std, elra.accounting.progress)
            if decision is not None:
                elra.logs.tell_decision(decision, losses.mean, losses.std)

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        state.stateful_callbacks[type(self).__name__] = self.state()  # for Trainer.save_state
        self.trainer.elra.averaging.end()

    def _advance(self, state: Any) -> bool:
        unit = self._cycle.unit
        return self._cycle.advance(
            samples=self.samples if unit == "sp" else 0,  # not read in vain, see Counts
            tokens=self.tokens if unit == "tok" else 0,
            epochs=self.trainer.elra.accounting.true_epoch(),
            updates=state.global_step,
        )


def put_first(trainer: Any, callback: ElraCallback | None = None) -> None:
    """Make the :class:`ElraCallback` of a Trainer the first of its callbacks, and tell it its Trainer.

    Args:
        trainer: a Trainer, whose callbacks may be those of a checkpoint by now.
        callback: the new one; None to keep the present one.
    """
    callbacks = trainer.callback_handler.callbacks
    found = trainer.callback_handler.pop_callback(ElraCallback)
    callback = callback or found
    assert callback is not None
    callbacks.insert(0, callback)
    callback.trainer = trainer
