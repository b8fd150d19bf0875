"""A file in the run's folder that holds the Trainer's log history as it goes, so that a running run can be looked at.

The Trainer itself writes its history with checkpoints alone. What is in an entry is decided in ``logs.py`` and by the
Trainer; who reads the file is ``report/``.
"""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

from hf_elra.optim import OPTIMIZERS
from hf_elra.report.environment import environment
from hf_elra.report.names import LOG_FILE
from hf_elra.trainer.arguments import optimizer_name

logger = logging.getLogger(__name__)

NAMES = {optimizer_class: name for name, optimizer_class in OPTIMIZERS.items()}


class LogFile:
    """Writes the log history of a Trainer, line by line.

    Args:
        trainer (Trainer): with :class:`~hf_elra.trainer.mixin.ElraTrainerMixin`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._path: Path | None = None  # None where nothing is written
        self._written = 0

    def begin(self) -> None:
        """Training begins or goes on: a new file, with the entries of the checkpoint that is resumed."""
        trainer = self._trainer
        self._path, self._written = None, 0
        if trainer.is_world_process_zero():
            self._path = Path(str(trainer.args.output_dir), LOG_FILE)
            self._write("w", [self._first_line()])
            self.follow()

    def follow(self) -> None:
        """Write the entries that are new since the last call."""
        history = self._trainer.state.log_history
        if self._path is not None and len(history) > self._written:
            self._write("a", history[self._written :])
            self._written = len(history)

    def _first_line(self) -> dict[str, Any]:
        trainer = self._trainer
        args, model, optimizer = trainer.args, trainer.model, trainer.elra_optimizer
        control, kind = trainer.batch_control, type(optimizer)
        return {
            "elra": "run",
            "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "optim": optimizer_name(args) if optimizer is None else NAMES.get(kind, kind.__name__),
            "optim_args": args.optim_args,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "seed": args.seed,
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "pretrained": bool(getattr(getattr(model, "config", None), "name_or_path", "")),
            "processes": args.world_size,
            "averaged": trainer.average_over,
            "batch_control": "off" if control is None or not control.asked_for else control.mode,
            **environment(args.device),
        }

    def _write(self, mode: str, entries: list[dict[str, Any]]) -> None:
        """Write whole lines; a folder that cannot be written is told once and ends no training."""
        assert self._path is not None
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.write("".join(json.dumps(entry, default=_plain) + "\n" for entry in entries))
        except OSError as error:
            logger.warning("%s cannot be written, and the log is not kept there: %s.", self._path, error.strerror)
            self._path = None


def _plain(value: Any) -> Any:
    """A number of another library, or else text."""
    return value.item() if hasattr(value, "item") else str(value)
