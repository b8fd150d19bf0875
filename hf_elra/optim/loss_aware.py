"""What the optimizers of this package have in common: they are told the loss, and several processes decide alike.

How a loss gets there, as ``step(closure)``, ``step(loss=value)`` or ``observe_loss(value)``, is settled here; what is
made of it, in the classes (``elra.py``, ``spectral.py``).
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hf_elra.errors import ConfigurationError
from hf_elra.optim.tensors import mean_over_processes


class LossAwareOptimizer(torch.optim.Optimizer):
    """An optimizer that has to know the loss of every update, and says what it did with it.

    Subclasses implement :meth:`_take_step`, and ``alpha``, ``restarts`` and ``metrics`` for a user to read.
    """

    takes_shards = True
    """Whether parameters may be sharded (DTensor)."""
    process_group: dist.ProcessGroup | None = None
    """Processes whose scalar products are averaged; not part of the state."""
    _observed_loss: Tensor | float | None = None
    _warned_no_loss = False

    @property
    def settled(self) -> bool:
        """Whether the points of training are there to stay; not during a search that is taken back."""
        return True

    @property
    def alpha(self) -> float:
        """The learning rate in force, α_t."""
        raise NotImplementedError

    @property
    def restarts(self) -> int:
        """How many steps were taken back so far, for a too high loss or for anything not finite."""
        raise NotImplementedError

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the last update, for logs."""
        raise NotImplementedError

    def observe_loss(self, loss: Tensor | float) -> None:
        """Tell the loss of the batch that gave the gradients, for the :meth:`step` that follows.

        Args:
            loss (Tensor with one element, or float): on several processes the same value on every one of them.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ConfigurationError(
                    f"loss must be one number but has shape {tuple(loss.shape)}; reduce it first, e.g. loss.mean()."
                )
            self._observed_loss = loss.detach()
        elif isinstance(loss, numbers.Real):
            self._observed_loss = float(loss)
        else:
            raise ConfigurationError(f"loss must be a tensor or a float, not {type(loss).__name__} {loss!r}.")

    def end_cycle(self) -> None:
        """Declare an epoch or control cycle over: its losses' mean and σ judge the losses of the next one."""
        raise NotImplementedError

    @torch.compiler.disable  # in a compiled training step this is left as it is: every size of tensor would be compiled
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Make one update.

        Args:
            closure (callable, optional): computes loss and gradients and returns the loss; called once.
            loss (Tensor or float, optional): the loss, if gradients are there already. Not together with ``closure``.

        Returns:
            What the closure returned, else ``loss``.
        """
        if closure is not None and loss is not None:
            raise ConfigurationError("step() got both closure and loss; give one of them.")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is not None:
            self.observe_loss(loss)
        observed, self._observed_loss = self._observed_loss, None
        factors = [float(group["lr"]) / group["base_lr"] for group in self.param_groups]
        if observed is None and not self._warned_no_loss and max(factors) > 0:
            self._warned_no_loss = True
            warnings.warn(
                f"{type(self).__name__} was not told the loss, so it cannot take back a step that went too far. Call "
                "step(closure), step(loss=loss) or observe_loss(loss) before step(); in a Hugging Face Trainer, import "
                "hf_elra first.",
                stacklevel=3,
            )
        self._take_step(observed, factors)
        return loss

    def _take_step(self, loss: Tensor | float | None, factors: list[float]) -> None:
        """Update the parameters; ``factors`` are what schedulers multiply α by, group by group."""
        raise NotImplementedError

    def _gather(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Return, group by group, the parameters that have a gradient, and these gradients."""
        params, gradients = [], []
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            for p in used:
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients (parameter of shape "
                        f"{tuple(p.shape)}); build the embedding with sparse=False."
                    )
            params.append(used)
            gradients.append([p.grad for p in used])
        return params, gradients

    def _agreed(self, *values: float) -> Sequence[float]:
        """The same numbers, averaged over :attr:`process_group`."""
        if self.process_group is None:
            return values
        device = next((p.device for group in self.param_groups for p in group["params"]), "cpu")
        told = torch.tensor(values, dtype=torch.float64, device=device)
        return cast(list[float], mean_over_processes(told, self.process_group).tolist())


def shares(factors: list[float]) -> list[float]:
    """Every group's part in a step, of the largest."""
    scale = max(factors)
    return [factor / scale if scale > 0 else 0.0 for factor in factors]


def refuse_complex(params: Any) -> None:
    """Raise a ConfigurationError for complex parameters."""
    for p in params:
        if p.is_complex():
            raise ConfigurationError(
                f"params: complex parameters are not supported (one of shape {tuple(p.shape)} is {p.dtype}); optimise "
                "torch.view_as_real(parameter) instead."
            )
