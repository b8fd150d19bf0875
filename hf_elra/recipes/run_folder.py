"""The output folder of a run: may it be used, is there something to resume, and what is written into it.

A folder holds a run if it holds ``settings.json``; the run is finished once ``metrics.json`` is there. Checkpoints are
the Trainer's.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from hf_elra.errors import ConfigurationError

SETTINGS, METRICS, SAMPLE, LOG = "settings.json", "metrics.json", "sample.txt", "log_history.json"


def check_run_folder(folder: str, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> str | None:
    """Decide, before any work, what happens to ``folder``; return the checkpoint to resume from, or None.

    Args:
        folder: the output folder; it need not exist.
        settings: what decides the trajectory; a run is resumed only with the same.
        resume: go on with an interrupted run.
        overwrite: replace a run that is there. With ``resume`` too, an interrupted run goes on, a finished one is
            replaced.

    Raises:
        ConfigurationError: the folder cannot be used that way; nothing was touched.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ConfigurationError(f"output_dir={folder!r} is a file; choose another folder.")
    if not path.exists() or not any(path.iterdir()):
        if resume and not overwrite:
            raise ConfigurationError(f"output_dir={folder!r} holds nothing to resume; leave --resume out.")
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise ConfigurationError(f"output_dir={folder!r} cannot be written; choose another folder.")
        return None
    if not (path / SETTINGS).is_file():
        raise ConfigurationError(
            f"output_dir={folder!r} holds files that are no run of this script; choose another folder."
        )
    finished = (path / METRICS).is_file()
    if resume and not finished:
        before = json.loads((path / SETTINGS).read_text())
        changed = [
            f"{name} {before.get(name)!r} -> {settings.get(name)!r}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if changed and not overwrite:
            raise ConfigurationError(
                f"output_dir={folder!r} holds an interrupted run with other settings ({'; '.join(changed)}); give the "
                "same to resume it, or --overwrite to replace it."
            )
        checkpoint = get_last_checkpoint(folder)
        if not changed and checkpoint is not None:
            return checkpoint
        if not overwrite:
            raise ConfigurationError(
                f"output_dir={folder!r} holds a run that was interrupted before its first checkpoint; "
                "start it again with --overwrite."
            )
        return None
    if not overwrite:
        state = "a finished run" if finished else "an interrupted run"
        remedy = "--overwrite to replace it" if finished else "--resume to go on with it, --overwrite to replace it"
        raise ConfigurationError(f"output_dir={folder!r} holds {state}; pass {remedy}, or choose another folder.")
    return None


def start_run(folder: str, settings: dict[str, Any], checkpoint: str | None) -> None:
    """Empty the folder unless a run goes on from ``checkpoint``, and write down the settings."""
    path = Path(folder)
    if checkpoint is None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    write_json(path / SETTINGS, settings)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the whole file or none of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
