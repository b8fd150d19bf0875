"""Metrics as local ``evaluate`` modules, so that the hub is never asked.

``load("accuracy")`` returns an ``evaluate`` module with the usual ``compute`` and ``add_batch``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from hf_elra.errors import ConfigurationError, nearest, needed_by_recipes

NAMES = ("accuracy", "perplexity")


def load(name: str) -> Any:
    """Load one of :data:`NAMES`.

    Raises:
        ConfigurationError: there is no metric of this name here, or the package ``evaluate`` is not installed.
    """
    if name not in NAMES:
        raise ConfigurationError(f"metric {name!r} is unknown.{nearest(name, NAMES)} Choose from {', '.join(NAMES)}.")
    return needed_by_recipes("evaluate").load(str(files("hf_elra.metrics").joinpath(name).joinpath(f"{name}.py")))
