"""When a checkpoint is written, and which one of a folder can be resumed: the newest that was written to its end.

A process that is killed while it saves, or a full disk, leaves a checkpoint that is cut short. Files are not loaded
here. They are only checked: all have to be there, and as long as their headers say. The Trainer decides what is in a
checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_elra.errors import CheckpointError

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # the Trainer writes it last
PICKLED = (".pt", ".pth", ".bin")  # torch.save's zip files
OF_TORCH_SAVE = ("PytorchStreamWriter", "iostream")  # words in its errors, which leave out the system's own


class PutOff:
    """Puts off evaluations and checkpoints that are due during a search, whose points are taken back at its end.

    Otherwise early stopping and the choice of the best checkpoint would use points that do not last. What was put off
    is done at the end of the search, or of the run.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a training."""
        self._due: frozenset[str] = frozenset()  # "should_evaluate", "should_save"
        self._made_up_for: tuple[int, frozenset[str]] = (0, frozenset())  # at which update, and what

    def decide(self, trainer: Any) -> None:
        """Set ``trainer.control.should_evaluate`` and ``should_save`` to what is to be done at this update."""
        control, update, optimizer = trainer.control, trainer.state.global_step, trainer.elra_optimizer
        names = ("should_evaluate", "should_save")
        due = frozenset(name for name in names if getattr(control, name))
        if optimizer is not None and not optimizer.search_finished and not control.should_training_stop:
            if due and not self._due and trainer.is_world_process_zero():
                _tell_that_it_is_put_off(due, update, optimizer.search_updates_left)
            self._due |= due
            due = frozenset()
        elif self._due:
            due, self._due = due | self._due, frozenset()
            self._made_up_for = update, due
        elif self._made_up_for[0] == update:  # the epoch ends with the search
            due -= self._made_up_for[1]
        for name in names:
            setattr(control, name, name in due)


def _tell_that_it_is_put_off(due: frozenset[str], update: int, updates: int) -> None:
    words = [word for name, word in (("evaluate", "evaluation"), ("save", "checkpoint")) if f"should_{name}" in due]
    logger.warning(
        "Update %d: the %s that %s due %s put off to the end of the search for a learning rate, which takes its points "
        "back: update %d, if it ends as planned.",
        update,
        " and the ".join(words),
        *(["are"] * 2 if len(words) > 1 else ["is"] * 2),
        update + updates,
    )


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Return the newest whole checkpoint in ``folder``, or None; a warning names those that are passed over."""
    path = Path(folder)
    numbered = []
    for candidate in path.iterdir() if path.is_dir() else ():
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", candidate.name)
        if match is not None and candidate.is_dir():
            numbered.append((int(match[1]), candidate))
    for _, candidate in sorted(numbered, reverse=True):
        damage = damage_of(candidate)
        if damage is None:
            return str(candidate)
        logger.warning("%s is not whole (%s); an older checkpoint is looked for.", candidate, damage)
    return None


def damage_of(checkpoint: str | Path) -> str | None:
    """Return what is wrong with a checkpoint: a file that is missing or cut short; None if it is whole."""
    path = Path(checkpoint)
    try:
        json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE} is missing"
    except ValueError:
        return f"{STATE} is cut short"
    for file in sorted(path.rglob("*")):
        if file.suffix == ".safetensors" and not _whole_safetensors(file):
            return f"{file.relative_to(path)} is cut short"
        # The end of a zip file says where everything in it lies.
        if file.suffix in PICKLED and not zipfile.is_zipfile(file):
            return f"{file.relative_to(path)} is cut short"
        # torch.distributed.checkpoint writes its table of contents last.
        if file.suffix == ".distcp" and not (file.parent / ".metadata").is_file():
            return f"{file.parent.relative_to(path)}/.metadata is missing"
    return None


@contextlib.contextmanager
def explained(folder: str | Path, update: int) -> Iterator[None]:
    """Turn an error that occurs while a checkpoint is written into a :class:`CheckpointError`.

    Args:
        folder: where the checkpoints are.
        update: number of the update whose checkpoint is written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in OF_TORCH_SAVE):
            raise
        before, free = last_whole_checkpoint(folder), shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{PREFIX_CHECKPOINT_DIR}-{update} could not be written into {str(folder)!r}, where {free / 2**20:,.0f} "
            f"MiB are free: {_reason(error)}. "
            + (f"{before} is whole: make room, then resume from it." if before else "No earlier one is there.")
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0].strip().rstrip(".")


def _whole_safetensors(file: Path) -> bool:
    """Return whether a file is as long as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False
