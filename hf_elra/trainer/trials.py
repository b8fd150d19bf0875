"""Passes through the model that are not training, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from hf_elra.optim.snapshot import unchanged


class Trials:
    """Tries passes for a Trainer.

    Args:
        trainer (Trainer): whose model and data they are.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def fits(self, stock_step: Any, model: Any, inputs: Any, num_items: Any) -> bool:
        """Whether a pass over ``inputs`` and back fits into the memory of every process, by trial; changes nothing.

        What user code does in ``compute_loss`` beside the loss, it does once more here.

        Args:
            stock_step (callable): ``training_step`` of the stock Trainer.
            model, inputs, num_items: what it is called with.
        """
        accelerator, fits = self._trainer.accelerator, True
        with unchanged(model, random_state=True), accelerator.no_sync(model=model):
            try:
                stock_step(model, inputs, num_items)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                fits = False
        model.zero_grad()
        if not fits:
            clear_device_cache(garbage_collection=True)
        if accelerator.num_processes > 1:
            told = torch.tensor([fits], device=self._trainer.args.device)
            fits = bool(accelerator.gather(told).all())
        return fits
