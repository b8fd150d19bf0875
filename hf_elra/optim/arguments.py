"""Checks of the arguments that optimizers have in common: what cannot be used is said before anything is lost."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from hf_elra.errors import ConfigurationError, nearest


def settings_of(arguments: dict[str, Any], *left_out: str) -> dict[str, Any]:
    """Settings from the ``locals()`` of a constructor: all arguments but those that are no settings."""
    return {n: v for n, v in arguments.items() if n not in ("self", "params", "__class__", *left_out)}


def need_number(settings: dict[str, Any], name: str, valid: Callable[[Any], bool], meaning: str) -> None:
    """Raise a ConfigurationError if a setting is no finite number or not ``valid``; ``meaning`` says what would be."""
    value = settings[name]
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and valid(value)):
        kind = "" if is_number else f" (it is a {type(value).__name__})"
        raise ConfigurationError(f"{name}={value!r} must be {meaning}{kind}.")


def need_lr_bounds(settings: dict[str, Any], example: str) -> None:
    """Raise a ConfigurationError if ``lr_bounds`` are none, or ``lr`` is outside them."""
    bounds = settings["lr_bounds"]
    if not (
        isinstance(bounds, (tuple, list))
        and len(bounds) == 2
        and all(isinstance(b, (int, float)) and not isinstance(b, bool) and math.isfinite(b) for b in bounds)
        and 0 < bounds[0] < bounds[1]
    ):
        raise ConfigurationError(f"lr_bounds={bounds!r} must be two numbers with 0 < low < high, e.g. {example}.")
    if not bounds[0] <= settings["lr"] <= bounds[1]:
        raise ConfigurationError(
            f"lr={settings['lr']!r} is outside lr_bounds={tuple(bounds)!r}; move one of them (lr is a Trainer's "
            "learning_rate)."
        )


def check_weight_decay(settings: dict[str, Any], *, scaled: bool) -> None:
    """Raise a ConfigurationError if ``weight_decay``, which may be ``scaled`` by α, cannot be used."""
    if scaled:
        need_number(settings, "weight_decay", lambda v: v >= 0, "a number >= 0 (AdamW's 0.1 fits, as α multiplies it)")
        return
    meaning = "a number in [0, 1), e.g. 3e-4 for a factor of 0.9997 per update"
    need_number(settings, "weight_decay", lambda v: 0 <= v < 1, meaning)


def check_common(settings: dict[str, Any], *, scales_weight_decay: bool) -> None:
    """Raise a ConfigurationError for the first of the arguments that all optimizers have which cannot be used."""
    need_number(settings, "lr", lambda v: v > 0, "a number > 0, the first learning rate (try 1e-3)")
    need_lr_bounds(settings, "(1e-8, 1)")
    check_weight_decay(settings, scaled=scales_weight_decay)
    need_number(settings, "restart_sigma", lambda v: v > 0, "a number > 0, in standard deviations (5)")
    if settings["initial_restart_ratio"] is not None:
        meaning = "a number > 1 (1.1), or None to drop the rule"
        need_number(settings, "initial_restart_ratio", lambda v: v > 1, meaning)
    window = settings["restart_window"]
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 2):
        raise ConfigurationError(f"restart_window={window!r} must be a whole number >= 2, or None for whole cycles.")
    need_flag(settings, "soft_restart")
    need_flag(settings, "stochastic_rounding")


def check_relative_crop(settings: dict[str, Any]) -> None:
    """Raise a ConfigurationError if ``max_relative_step`` cannot be used."""
    if settings["max_relative_step"] is not None:
        meaning = "a number > 0, a share of the parameters' norm, or None for no cropping"
        need_number(settings, "max_relative_step", lambda v: v > 0, meaning)


def need_betas(settings: dict[str, Any]) -> None:
    """Raise a ConfigurationError if ``betas`` are not two shares."""
    betas = settings["betas"]
    if not (
        isinstance(betas, (tuple, list))
        and len(betas) == 2
        and all(isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b < 1 for b in betas)
    ):
        raise ConfigurationError(f"betas={betas!r} must be two numbers in [0, 1), e.g. (0.9, 0.999).")


def need_model(asked: str, model: Any) -> None:
    """Raise a ConfigurationError if what a function was ``asked`` of is no model."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{asked} takes a model, not a {type(model).__name__}; pass {asked}(model).")


def need_choice(settings: dict[str, Any], name: str, valid: Iterable[str]) -> None:
    """Raise a ConfigurationError if a setting is none of the ``valid`` words."""
    valid, value = tuple(valid), settings[name]
    if value not in valid:
        raise ConfigurationError(
            f"{name}={value!r} must be one of {', '.join(map(repr, valid))}.{nearest(str(value), valid)}"
        )


def need_flag(settings: dict[str, Any], name: str, *, or_none: bool = False) -> None:
    """Raise a ConfigurationError if a setting is neither True nor False."""
    if not isinstance(settings[name], bool) and not (or_none and settings[name] is None):
        alternative = " (or None, to choose)" if or_none else ""
        raise ConfigurationError(f"{name}={settings[name]!r} must be True or False{alternative}.")
