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

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_elra.errors import CheckpointError

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # the Trainer writes it last
PICKLED = (".pt", ".pth", ".bin")  # torch.save's zip files
OF_TORCH_SAVE = ("PytorchStreamWriter", "iostream")  # words in its errors, which leave out the system's own


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
