"""One run of a training script: its folder, training that a signal may stop, results, and the exit code.

``run_folder.py`` decides what may happen to the output folder; ``train_….py`` decides what is trained.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from hf_elra.errors import CheckpointError, ConfigurationError
from hf_elra.recipes.command_line import command_line, default_settings, recorded_settings
from hf_elra.recipes.run_folder import AlreadyFinished, check_run_folder, start_run, write_json
from hf_elra.report.environment import environment
from hf_elra.report.names import LOG, METRICS
from hf_elra.report.table import training_table
from hf_elra.trainer import ElraTrainingArguments
from hf_elra.trainer.arguments import optimizer_arguments, uses_elra
from hf_elra.trainer.callbacks import ProgressLine, StopOnSignal
from hf_elra.trainer.leaving import leave, part

TABLE = "training.md"


class Interrupted(Exception):
    """Raised where a signal stopped the training, which is saved; on the first process the text says how to go on.

    Attributes:
        exit_code: 128 + the number of the signal, as in a shell.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Diverged(Exception):
    """Raised where training ended at a loss that is not a number; its results are written."""


class TrainingRun:
    """A run in ``training.output_dir``, new or resumed. It is made before any work, so that a bad folder costs nothing.

    Args:
        recipe: settings of the script, a dataclass with ``resume`` and ``overwrite``.
        training: settings of the Trainer.
        ignored: settings of ``recipe`` in which a resumed run may differ.
        unit: unit of progress, ``"tokens"``, ``"images"`` or ``"samples"``.
        defaults: values of flags that are not given, where they differ from the defaults of the fields.

    Attributes:
        callbacks: for the Trainer.
        checkpoint: the one that the run goes on from, or None.

    Raises:
        ConfigurationError: the folder cannot be used.
        AlreadyFinished: there is nothing left to do.
    """

    def __init__(
        self,
        recipe: Any,
        training: ElraTrainingArguments,
        ignored: set[str],
        unit: str,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        check_trainable(training)
        self.recipe, self.folder = recipe, str(training.output_dir)
        self.settings = recorded_settings(recipe, training, ignored)
        self.checkpoint = check_run_folder(
            self.folder,
            self.settings,
            resume=recipe.resume,
            overwrite=recipe.overwrite,
            defaults=default_settings(self.settings, recipe, training, defaults or {}),
        )
        self._stop, self._progress = StopOnSignal(), ProgressLine(unit)
        self.callbacks = [self._stop, self._progress]

    def train(self, trainer: Any, headline: str) -> list[dict[str, Any]]:
        """Train to the end, evaluate and save the model; return all evaluations, the last one of the saved model.

        Args:
            trainer: a Trainer that was given :attr:`callbacks`.
            headline: a line that is printed first.

        Raises:
            Interrupted: if SIGINT or SIGTERM stopped it.
        """
        disable_progress_bar()  # progress bars of saving would cut through the lines of progress
        trainer.remove_callback(PrinterCallback)
        self._progress.trainer = self._stop.trainer = trainer
        if trainer.is_world_process_zero():
            start_run(self.folder, self.settings, self.checkpoint)
            print(headline)
        trainer.accelerator.wait_for_everyone()
        try:
            self._train_metrics = trainer.train(resume_from_checkpoint=self.checkpoint).metrics
        finally:
            self._stop.restore()
        if self._stop.received is not None:
            again = command_line() + ("" if self.recipe.resume else " --resume")
            text = f"interrupted at update {trainer.state.global_step:,}; saved. Go on with:\n  {again}"
            raise Interrupted(text if trainer.is_world_process_zero() else "", 128 + self._stop.received)
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        last = evaluations[-1]["step"] if evaluations else None
        if last != trainer.state.global_step or trainer.args.load_best_model_at_end:  # the best may be an earlier one
            evaluations.append(trainer.evaluate())
        trainer.save_model(self.folder)
        return evaluations

    def write_results(self, trainer: Any, results: dict[str, Any]) -> dict[str, Any]:
        """Write log, table and ``metrics.json`` and print the table; return the metrics: ``results`` and the run's."""
        seconds = self._train_metrics["train_runtime"]
        metrics = {
            **results,
            f"{self._progress.unit}_seen": self._progress.total,
            "updates": trainer.state.global_step,
            "parameters": trainer.model.num_parameters(),
            "resumed_from": self.checkpoint,
            "train_seconds": seconds,
            f"{self._progress.unit}_per_second": self._progress.done / seconds,
            "command": command_line(),
            **environment(trainer.args.device),
            "settings": self.settings,
        }
        table = training_table(trainer.state.log_history)
        write_json(Path(self.folder, LOG), trainer.state.log_history)
        Path(self.folder, TABLE).write_text(table + "\n", encoding="utf-8")
        write_json(Path(self.folder, METRICS), metrics)
        print(f"\n{table}\n")
        return metrics

    def check_finite(self, loss: float) -> None:
        """Raise :class:`Diverged` if the final loss is not finite, so that scripts waiting for the run learn of it."""
        if not math.isfinite(loss):
            raise Diverged(
                f"the run diverged: its validation loss is {loss}. Lower --learning_rate, or choose --optim elra or "
                "elra_spectral, which take back steps that went too far."
            )

    def speed(self, metrics: dict[str, Any]) -> str:
        """Return seconds and speed as text."""
        unit, since = self._progress.unit, " since the last resume" if self.checkpoint else ""
        return f"{metrics['train_seconds']:.0f} s, {metrics[f'{unit}_per_second']:,.0f} {unit}/s{since}"


def check_trainable(training: ElraTrainingArguments) -> None:
    """Refuse settings that the Trainer would fail on later, or ignore."""
    if uses_elra(training):
        optimizer_arguments(training, None)
    for name, least in (
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("dataloader_num_workers", 0),
        ("seed", 0),
        ("logging_steps", 0),
    ):
        if getattr(training, name) < least:
            raise ConfigurationError(f"{name}={getattr(training, name)} must be at least {least}.")
    if training.num_train_epochs <= 0:
        raise ConfigurationError(f"num_train_epochs={training.num_train_epochs} must be above 0.")
    if training.max_steps == 0 or training.max_steps < -1:
        raise ConfigurationError(f"max_steps={training.max_steps} must be at least 1; leave it out for no limit.")
    if training.resume_from_checkpoint:
        raise ConfigurationError(
            f"resume_from_checkpoint={training.resume_from_checkpoint!r} is not used here: pass --resume to go on from "
            "the last checkpoint in --output_dir."
        )
    if training.do_predict:
        raise ConfigurationError("do_predict: these scripts train and evaluate; leave it out.")


def run_script(main: Callable[[list[str]], None], words: list[str]) -> NoReturn:
    """Run a script's ``main`` on the words of its command line and leave with its exit code."""
    code = 0
    try:
        main(words)
        part()
    except AlreadyFinished as notice:
        print(notice)
    except Interrupted as notice:
        if str(notice):
            print(notice)
        part()
        code = notice.exit_code
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        part()
        code = 1
    except CheckpointError as error:
        print(f"error: {error} Pass --resume for that.", file=sys.stderr)
        code = 1
    leave(code)
