"""The output folder of a run: whether it may be used, what can be resumed, and what is written into it.

A folder holds a run if it holds a ``settings.json`` that this package wrote; the run is finished once ``metrics.json``
is there. The Trainer writes checkpoints. A folder that holds anything else is never emptied.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hf_elra.errors import ConfigurationError
from hf_elra.trainer.checkpoints import last_whole_checkpoint

SETTINGS, METRICS, SAMPLE, LOG = "settings.json", "metrics.json", "sample.txt", "log_history.json"

PART = ".part"
"""The ending of a JSON file while it is being written."""

MARK = {"written_by": "hf_elra"}
"""An entry of ``settings.json`` beside the settings, which tells a run of ours from any other folder."""

ALWAYS_WRITTEN = {
    *("optim", "optim_args", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("preset", "dataset", "elra_control_cycle"),
}
"""Names by which a ``settings.json`` from before :data:`MARK` is known."""

LENGTH = ("max_steps", "num_train_epochs", "elra_max_samples", "elra_max_tokens")
"""Settings in which a resumed run may differ from the interrupted one."""


class AlreadyFinished(Exception):
    """Raised where the run that was asked for is finished already; the text says so."""


def check_run_folder(
    folder: str,
    settings: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    defaults: dict[str, Any] | None = None,
) -> str | None:
    """Decide, before any work, what happens to ``folder``; return the checkpoint to resume from, or None.

    Args:
        folder: the output folder; it need not exist.
        settings: what decides the trajectory; a run is resumed only with the same settings.
        resume: go on with an interrupted run.
        overwrite: replace a run that is there. Together with ``resume`` an interrupted run goes on, a finished one is
            left alone, and only a run with other settings is replaced.
        defaults: values of settings that an earlier version did not write down.

    Raises:
        ConfigurationError: the folder cannot be used like this; nothing was touched.
        AlreadyFinished: with both ``resume`` and ``overwrite``, if there is nothing left to do.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ConfigurationError(f"output_dir={folder!r} is a file; choose another folder.")
    if not os.access(next(p for p in (path, *path.absolute().parents) if p.exists()), os.W_OK):
        raise ConfigurationError(f"output_dir={folder!r} cannot be written; choose another folder.")
    if not path.exists() or not any(path.iterdir()):
        if resume and not overwrite:
            raise ConfigurationError(f"output_dir={folder!r} holds nothing to resume; leave --resume out.")
        return None
    written = read_settings(path / SETTINGS)
    if written is None:
        raise ConfigurationError(
            f"output_dir={folder!r} holds files that are not a run of this script; choose another folder."
        )
    finished = (path / METRICS).is_file()
    before = {**(defaults or {}), **written}
    changed = {name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name)}
    checkpoint = last_whole_checkpoint(folder)
    if resume and finished and overwrite and not changed:
        raise AlreadyFinished(
            f"output_dir={folder!r} holds this run, finished. To train again, remove the folder or pass --overwrite "
            "without --resume."
        )
    if resume and not finished and not changed - set(LENGTH) and checkpoint is not None:
        return checkpoint
    # Interrupted before its first checkpoint: nothing in it is worth keeping, if it holds nothing else.
    only_begun = {file.name for file in path.iterdir()} <= {SETTINGS, SETTINGS + PART}
    if overwrite or (only_begun and not resume):
        return None
    state = "a finished run" if finished else "an interrupted run"
    if not resume:
        remedy = "--overwrite to replace it"
        if not finished:
            goes_on = "--resume to go on with it, " if checkpoint is not None else ""
            remedy = f"{goes_on}{remedy}"
    elif finished:
        remedy = "--overwrite instead of --resume to replace it"
    elif changed - set(LENGTH):
        shown = "; ".join(f"{name} {before.get(name)!r} -> {settings.get(name)!r}" for name in sorted(changed))
        remedy = f"the settings it had to resume it, or --overwrite to replace it (changed: {shown})"
    elif only_begun:
        remedy = "no --resume, as it was interrupted before its first checkpoint and begins anew"
    else:
        remedy = "--overwrite instead of --resume to replace it, as it has no whole checkpoint to go on from"
    raise ConfigurationError(f"output_dir={folder!r} holds {state}; pass {remedy}, or choose another folder.")


def start_run(folder: str, settings: dict[str, Any], checkpoint: str | None) -> None:
    """Empty the folder, with a message, unless a run goes on from ``checkpoint``; then write down the settings.

    The folder itself stays, since it may be a link or a mount point.
    """
    path = Path(folder)
    if checkpoint is not None:
        print(f"going on from {checkpoint}")
    else:
        if (path / SETTINGS).is_file():
            print(f"replacing the run in {folder}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file in list(path.iterdir()):
                if file.name == SETTINGS:  # replaced below; if this is cut short, the folder must still count as ours
                    continue
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                else:
                    file.unlink()
        except OSError as error:
            raise ConfigurationError(
                f"output_dir={folder!r} cannot be written: {error.strerror} ({error.filename})."
            ) from error
    write_json(path / SETTINGS, {**MARK, **settings})


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the ``settings.json`` of a run of ours without :data:`MARK`, or None if there is none."""
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError):  # it is a folder, or not text, or not JSON
        return None
    if not isinstance(content, dict):
        return None
    if not (content.items() >= MARK.items() or content.keys() >= ALWAYS_WRITTEN):
        return None
    return {name: value for name, value in content.items() if name not in MARK}


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the whole file or none of it."""
    temporary = path.with_name(path.name + PART)
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
