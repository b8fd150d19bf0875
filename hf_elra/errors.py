"""Exceptions and warnings for users: wrong input, and checkpoints that cannot be written.

They live here because every room raises them. Scripts and the launcher turn wrong input into one line on stderr and
exit code 2; nothing else is handled here. A missing package counts as wrong input.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import warnings
from collections.abc import Iterable
from typing import Any

_NOT_THE_USERS = ("hf_elra", "torch", "accelerate", "transformers")


class ConfigurationError(ValueError):
    """Raised where a setting cannot be used. The message names the setting, its value and the remedy."""


class CheckpointError(OSError):
    """Raised where a checkpoint could not be written. The message says why, and from where training can go on."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the valid name closest to ``name``, or an empty string when none is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def needed_by_recipes(package: str) -> Any:
    """Import a package of the extra ``recipes`` and return it.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is a package that the wanted one needs
            raise
        raise ConfigurationError(
            f"this needs the package {package}, which is missing; install it with: pip install 'hf_elra[recipes]'"
        ) from error


def warn_user(message: str) -> None:
    """Warn of something that the user's code does; the warning points to the line that called into this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)
