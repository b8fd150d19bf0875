"""Is a loss divided by ``num_items_in_batch``, or is it the mean over its own pass? The first pass tells.

Many models accept the argument and ignore it, for example BERT's classifiers. So do many functions given as
``compute_loss_func``, and ``compute_loss`` of many subclasses. Transformers then takes the sum of the mean losses of
all passes, times the number of processes, for the mean. Therefore the first pass of a run gets a number that knows
whether the loss was made with it. A loss that was not is divided by the number of passes, or by their share of the
targets (``micro_batches.py``), before its backward pass. User code is called once for every pass.

Two things are assumed: a loss that was made with the number is divided by it, and all losses of a run are of one kind.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from hf_elra.trainer.arguments import set_meanwhile
from hf_elra.trainer.upstream import says_loss_is_scaled, stock_step_reads_what_a_trainer_says


class NotedNumber(Tensor):
    """A number that knows whether a loss depends on it: by the graph of the loss, or because its value was read."""

    # Results of computations with it are ordinary tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    leaf: Tensor
    was_read: bool

    @classmethod
    def of(cls, number: Tensor | float, device: torch.device) -> NotedNumber:
        """Return the number as a float, for a loss that will be computed."""
        leaf = torch.as_tensor(number, device=device).detach()
        leaf = (leaf if leaf.is_floating_point() else leaf.float()).clone().requires_grad_()
        noted: NotedNumber = leaf.clone().as_subclass(cls)  # it is not a leaf, since user code may change it in place
        noted.leaf, noted.was_read = leaf, False
        return noted

    def was_used_in(self, loss: Tensor) -> bool:
        """Return whether a loss was, or may have been, computed with the number."""
        waiting: list[Any] = [loss.grad_fn]
        met: set[Any] = {None}
        while waiting and not self.was_read:
            node = waiting.pop()
            if node in met:
                continue
            met.add(node)
            if getattr(node, "variable", None) is self.leaf:
                return True
            waiting += [before for before, _ in node.next_functions]
        return self.was_read


def _noting(name: str) -> Any:
    plain = getattr(Tensor, name)

    @functools.wraps(plain)
    def read(self: NotedNumber, *args: Any, **kwargs: Any) -> Any:
        self.was_read = True
        return plain(self.leaf.detach(), *args, **kwargs)

    return read


for _name in ("item", "tolist", "numpy", "detach", "long", "int", "__int__", "__float__", "__index__", "__array__"):
    setattr(NotedNumber, _name, _noting(_name))


class SumOfFinite:
    """Adds up the parts of a mean loss. Parts that are not finite are left out, and the others count for more.

    A part without targets has a loss of 0/0 and a gradient of zero, which changes only the length of the update. If a
    loss is not finite for a reason that matters, the gradient is not finite either, and the optimizer sees that.
    """

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._whole: Any = 0.0
        self._finite: Any = 0.0

    def add(self, loss: Tensor, weight: Any = 1.0) -> None:
        """Add a part that is scaled already; ``weight`` is its share, in any unit. Does not wait for a GPU."""
        finite = loss.isfinite()
        if not isinstance(weight, Tensor):  # it is filled on the device, as a copy from the host would wait
            weight = torch.full_like(loss, weight, dtype=torch.float32)
        self._sum = self._sum + torch.where(finite, loss, 0.0)
        self._whole = self._whole + weight
        self._finite = self._finite + torch.where(finite, weight, 0.0)

    @property
    def value(self) -> Any:
        """Return the mean loss: NaN if no part is finite, 0 without parts."""
        return self._sum * (self._whole / self._finite) if isinstance(self._finite, Tensor) else self._sum


class LossScale:
    """Makes the loss of every pass its part of the update's mean, whoever computes it.

    Args:
        trainer (Trainer): the Trainer whose losses they are.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._divides: bool | None = None  # whether by num_items_in_batch; None until a loss was seen

    def forget(self) -> None:
        """Begin a training, with a model and a loss that may have changed."""
        self._divides = None

    def is_divided(self, num_items: Any, passes: int) -> bool | None:
        """Return whether losses of passes are divided already; None if that is not known yet.

        Two kinds of subclass are not looked at: one that says so itself (``loss_is_scaled_for_ga``), and one whose
        ``_prepare_inputs`` does more than move tensors (TRL's GRPO).
        """
        trainer = self._trainer
        if (says := says_loss_is_scaled(trainer)) is not None:
            return says
        if num_items is None:
            return False
        alone = passes == 1 and trainer.accelerator.num_processes == 1  # both are the same then
        own_inputs = type(trainer)._prepare_inputs is not Trainer._prepare_inputs
        return True if alone or own_inputs else self._divides

    def step(self, stock_step: Any, model: Any, inputs: Any, num_items: Any, passes: int) -> Tensor:
        """Run the stock training step of one pass, with its loss scaled.

        Args:
            stock_step (callable): ``training_step`` of the stock Trainer.
            model, inputs, num_items: its arguments.
            passes (int): number of passes of the update. A mean over the pass is divided by
                ``current_gradient_accumulation_steps``.
        """
        trainer = self._trainer
        divided = self.is_divided(num_items, passes)
        if divided is False and says_loss_is_scaled(trainer) is None:
            num_items = None
        if divided or (divided is False and self._stock_divides(num_items)):
            return cast(Tensor, stock_step(model, inputs, num_items))
        users = vars(trainer).get("compute_loss")
        trainer.compute_loss = functools.partial(self._scaled_loss, trainer.compute_loss, divided is None)
        try:
            return cast(Tensor, stock_step(model, inputs, num_items))
        finally:
            del trainer.compute_loss
            if users is not None:
                trainer.compute_loss = users

    def _stock_divides(self, num_items: Any) -> bool:
        """Return whether the stock training step divides by ``current_gradient_accumulation_steps``."""
        trainer = self._trainer
        says = says_loss_is_scaled(trainer) if stock_step_reads_what_a_trainer_says(Trainer) else None
        if says is not None:
            return not says
        return trainer.compute_loss_func is None and (num_items is None or not trainer.model_accepts_loss_kwargs)

    def _scaled_loss(self, compute_loss: Any, asks: bool, *args: Any, **kwargs: Any) -> Any:
        """Compute a loss, and divide a mean that the stock training step does not divide."""
        trainer, num_items = self._trainer, kwargs.get("num_items_in_batch")
        if not asks:
            return compute_loss(*args, **kwargs) / trainer.current_gradient_accumulation_steps
        assert num_items is not None
        number = NotedNumber.of(num_items, trainer.args.device)
        averages = trainer.args.average_tokens_across_devices
        with set_meanwhile(trainer.args, average_tokens_across_devices=False):
            # A mean would also be multiplied by the number of processes.
            loss = compute_loss(*args, **{**kwargs, "num_items_in_batch": number})
        if loss.grad_fn is not None:
            self._divides = number.was_used_in(loss)
        if self._divides is False:
            return loss if self._stock_divides(num_items) else loss / trainer.current_gradient_accumulation_steps
        if averages and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
            processes = trainer.accelerator.num_processes // trainer.get_tp_size()
            loss = loss * (processes if trainer.args.n_gpu <= 1 else trainer.args.n_gpu)
        return loss
