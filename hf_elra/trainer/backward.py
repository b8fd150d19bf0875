"""Leaves out the pass back of an update whose loss alone says that the last step is taken back.

The optimizer is asked between the two passes (``LossAwareOptimizer.takes_back``). Only where that costs nothing: with
one process, one pass an update, and an optimizer that decides on the host; with a loss scaler there has to be a
gradient to look at. ``grad_norm`` is logged as 0 then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Backward:
    """Asks between a pass and the pass back.

    Args:
        trainer (Trainer): whose ``accelerator.backward`` is called in its training step.

    Attributes:
        was_left_out: whether the last pass back was.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.was_left_out = False

    @contextlib.contextmanager
    def only_if_the_step_stands(self, passes: int) -> Iterator[None]:
        """Let a training step make no pass back where the step before it is taken back anyway.

        Args:
            passes: of the update.
        """
        self.was_left_out = False
        accelerator, optimizer = self._trainer.accelerator, self._trainer.elra_optimizer
        alone = passes == 1 and accelerator.num_processes == 1 and accelerator.scaler is None
        if not alone or optimizer is None or not optimizer.asks_before_backward:
            yield
            return
        users, stock = vars(accelerator).get("backward"), accelerator.backward

        def backward(loss: Any, **kwargs: Any) -> None:
            self.was_left_out = bool(optimizer.takes_back(loss.item()))
            if not self.was_left_out:
                stock(loss, **kwargs)

        accelerator.backward = backward
        try:
            yield
        finally:
            del accelerator.backward
            if users is not None:
                accelerator.backward = users
