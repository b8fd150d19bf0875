"""Passes through the model that do not train and leave nothing behind; and the count of all passes.

``Trials`` finds out whether a pass fits into memory. ``LineLosses`` gives an optimizer the mean loss at points along a
line. Two other things are not tried here: ``loss_scale.py`` sees from a training pass whether a loss is divided by its
number of targets, and ``optim/averaging.py`` takes the statistics of BatchNorm at a mean of points.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from hf_elra.errors import ConfigurationError
from hf_elra.optim.snapshot import nothing_changes, random_numbers_of
from hf_elra.trainer.rows import rows_of
from hf_elra.trainer.upstream import data_are_at_their_end

if TYPE_CHECKING:
    from hf_elra.trainer.accounting import Accounting
    from hf_elra.trainer.micro_batches import MicroBatches


@dataclass
class PassCounts:
    """Passes of a run on each process: of training, trials and line losses; evaluation is not counted."""

    forwards: int = 0
    backwards: int = 0

    def begin(self, saved: dict[str, Any]) -> None:
        """Begin a training, or resume it with the counts of a checkpoint."""
        self.forwards, self.backwards = saved.get("forwards", 0), saved.get("backwards", 0)

    def add(self, *, backward: bool) -> None:
        """Count a forward pass and a backward pass."""
        self.forwards += 1
        self.backwards += backward


class LookAhead:
    """An iterator over training data whose next items can be looked at before they are taken.

    Args:
        data (iterator): an iterator over micro-batches.
        is_last (callable): returns whether the latest item of ``data`` is its last one.
    """

    def __init__(self, data: Iterator[Any], is_last: Callable[[], bool]) -> None:
        self.data = data
        self._is_last = is_last
        self._waiting: deque[Any] = deque()
        self._last_is_out = False

    def __iter__(self) -> LookAhead:
        return self

    def __next__(self) -> Any:
        return self._waiting.popleft() if self._waiting else self._draw()

    def _draw(self) -> Any:
        item = next(self.data)
        self._last_is_out = self._is_last()
        return item

    def peek(self, number: int) -> list[Any]:
        """Return the next items, at most ``number``, without taking them."""
        while len(self._waiting) < number:
            try:
                self._waiting.append(self._draw())
            except StopIteration:
                break
        return list(islice(self._waiting, number))

    @property
    def is_at_its_end(self) -> bool:
        """Whether the latest item that was taken is the last one."""
        return self._last_is_out and not self._waiting


def is_at_its_end(data: Any, trainer: Any) -> bool:
    """Return whether the latest micro-batch that a Trainer took from ``data`` is the last one of its epoch."""
    return data.is_at_its_end if isinstance(data, LookAhead) else data_are_at_their_end(trainer)


class Trials:
    """Tries passes for a Trainer.

    Args:
        trainer (Trainer): the Trainer whose model and data are used.

    Attributes:
        counts: all passes of the run.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.counts = PassCounts()

    def fits(self, stock_step: Any, model: Any, inputs: Any, num_items: Any) -> bool:
        """Try whether a pass forward and back over ``inputs`` fits into the memory of every process; change nothing.

        Side effects of user code in ``compute_loss`` happen once more here.

        Args:
            stock_step (callable): ``training_step`` of the stock Trainer.
            model, inputs, num_items: its arguments.
        """
        accelerator, fits = self._trainer.accelerator, True
        with nothing_changes(model), accelerator.no_sync(model=model):
            try:
                stock_step(model, inputs, num_items)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                fits = False
        self.counts.add(backward=True)
        if not fits:
            clear_device_cache(garbage_collection=True)
        if accelerator.num_processes > 1:
            told = torch.tensor([fits], device=self._trainer.args.device)
            fits = bool(accelerator.gather(told).all())
        return fits


class LineLosses:
    """Gives an optimizer the mean loss at points along a line, before its step.

    An optimizer whose class has ``needs_line_loss = True`` finds :meth:`line_loss` as its attribute ``line_loss``
    whenever ``step`` is called.

    Args:
        trainer (Trainer): a Trainer with :class:`~hf_elra.trainer.mixin.ElraTrainerMixin`.
        accounting, micro_batches, trials: its collaborators.
    """

    def __init__(self, trainer: Any, accounting: Accounting, micro_batches: MicroBatches, trials: Trials) -> None:
        self._trainer = trainer
        self._accounting = accounting
        self._micro_batches = micro_batches
        self._trials = trials
        self._stock_step: Any = None
        self._model: Any = None
        self._num_items: Any = None
        self._put_random_numbers_back: Callable[[], None] | None = None
        self._data: LookAhead | None = None

    @property
    def are_needed(self) -> bool:
        """Whether the optimizer asks for losses along the line."""
        return bool(getattr(self._trainer.elra_optimizer, "needs_line_loss", False))

    def watch(self, data: Any) -> Any:
        """Return the iterator over training data; if the optimizer needs it, as one that can look ahead."""
        if not self.are_needed:
            return data
        if self._data is None or self._data.data is not data:
            self._data = LookAhead(data, lambda: data_are_at_their_end(self._trainer))
        return self._data

    def before_pass(self, stock_step: Any, model: Any, num_items: Any) -> None:
        """Remember how the next micro-batches are run.

        Args:
            stock_step (callable): ``training_step`` of the stock Trainer.
            model, num_items: its arguments.
        """
        self._micro_batches.keeps_passes = self.are_needed
        if not self.are_needed:
            return
        if not self._micro_batches.passes:  # these are the first ones of an update
            self._put_random_numbers_back = random_numbers_of(model)
        self._stock_step, self._model, self._num_items = stock_step, model, num_items

    def offer(self) -> None:
        """Give the optimizer the function, once the gradients of an update are complete."""
        if self.are_needed:
            self._trainer.elra_optimizer.line_loss = self.line_loss

    def withdraw(self) -> None:
        """Take the function back after the step of the optimizer."""
        if self._put_random_numbers_back is not None:
            self._trainer.elra_optimizer.line_loss = None
        self._stock_step = self._model = self._num_items = self._put_random_numbers_back = None

    def line_loss(
        self, s: float, direction: list[list[Tensor]] | None = None, batches: Literal["same"] | int = "same"
    ) -> float:
        """Return the mean loss at x - s·u, over all processes; forward only, and nothing is left behind.

        Dropout masks are the same at every s. They are those of the passes of the update, so that at s = 0 the loss of
        its micro-batches is the observed one. Side effects of user code in ``compute_loss`` happen once more here. A
        loss that needs gradients cannot be computed.

        Args:
            s (float): length, in units of the direction.
            direction (list of list of Tensor): u, as one list for each of the optimizer's ``param_groups``, with one
                tensor for each parameter that has a gradient. Default: the gradients.
            batches (str or int): ``"same"`` for the micro-batches of this update. A number k for those of the next k
                updates at their present size; each update counts the same. They are drawn from the data now, kept, and
                trained on in their turn. At the end of an epoch there may be fewer; if none are left, the
                micro-batches of this update are used.

        Raises:
            ConfigurationError: ``batches`` is neither of these.
        """
        if batches != "same" and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
            raise ConfigurationError(f"batches={batches!r} must be 'same', or a number of updates of at least 1.")
        updates = [] if batches == "same" else self._next_updates(batches)
        updates = updates or [(self._micro_batches.passes, self._num_items)]
        with self._moved(s, direction), self._forward_only():
            losses = []
            for passes, num_items in updates:
                assert self._put_random_numbers_back is not None
                self._put_random_numbers_back()
                losses.append(self._micro_batches.forward(self._stock_step, self._model, passes, num_items))
        loss = torch.stack([loss.detach().float() for loss in losses]).mean()
        if self._trainer.accelerator.num_processes > 1:
            loss = self._trainer.accelerator.reduce(loss, reduction="mean")
        return float(loss)

    def _next_updates(self, number: int) -> list[tuple[list[Any], Any]]:
        """Return the micro-batches of the next updates, as far as the epoch has them, each with its number of items."""
        if self._data is None:  # this Trainer takes its batches in another way
            return []
        size, trainer = self._micro_batches.next_number, self._trainer
        waiting = self._data.peek(number * size)
        updates = [waiting[first : first + size] for first in range(0, len(waiting), size)]
        if updates and self._accounting.skips_last_batch():
            last, whole = updates[-1], trainer.elra_callback.full_batch
            if len(last) < size or (rows_of(last[-1]) or 0) < whole:  # training skips it too
                updates.pop()
        return [(update, trainer._get_num_items_in_batch(update, trainer.args.device)) for update in updates]

    @contextlib.contextmanager
    def _moved(self, s: float, direction: list[list[Tensor]] | None) -> Iterator[None]:
        """Move parameters to x - s·u for the length of a ``with`` block."""
        groups = [[p for p in g["params"] if p.grad is not None] for g in self._trainer.elra_optimizer.param_groups]
        parts = direction or [[p.grad for p in group] for group in groups]
        moves = [pair for group, part in zip(groups, parts, strict=True) for pair in zip(group, part, strict=True)]
        kept = [p.detach().clone() for p, _ in moves] if s else []
        try:
            with torch.no_grad():
                for p, u in moves if s else ():
                    p.sub_(u, alpha=s)
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(moves, kept, strict=False):
                    p.copy_(value)

    @contextlib.contextmanager
    def _forward_only(self) -> Iterator[None]:
        """Make the stock training step skip its backward pass and leave nothing behind."""
        trainer, accelerator = self._trainer, self._trainer.accelerator
        share, users = trainer.current_gradient_accumulation_steps, vars(accelerator).get("backward")
        accelerator.backward = lambda loss, **kwargs: None
        try:
            with nothing_changes(self._model), accelerator.no_sync(model=self._model):
                yield
        finally:
            trainer.current_gradient_accumulation_steps = share
            del accelerator.backward
            if users is not None:
                accelerator.backward = users
