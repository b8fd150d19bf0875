"""Runs an unmodified training script with this package's optimizers available.

``hf-elra run script.py ARGS…`` and ``accelerate launch -m hf_elra.run script.py ARGS…`` end here. The launcher takes
the ``--elra_*`` flags out of the arguments and runs the script as ``__main__``. What these flags mean is said in
``arguments.py``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import runpy
import sys
from typing import NoReturn

from transformers.training_args import OptimizerNames

from hf_elra.errors import ConfigurationError, nearest
from hf_elra.trainer.arguments import LAUNCHER_FLAGS, OPTIMIZERS, ElraSettings, OneLineParser
from hf_elra.trainer.leaving import leave, part

USAGE = "usage: hf-elra run [-m] SCRIPT_OR_MODULE [ARGS ...]   (ARGS may hold --elra_* flags the script does not know)"


def run(words: list[str]) -> int:
    """Run ``[script.py, *args]`` or ``["-m", module, *args]``; return the exit code (2 for wrong input)."""
    is_module = words[:1] == ["-m"]
    words = words[is_module:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    target, *arguments = words
    try:
        remaining = take_elra_flags(arguments)
        check_optimizer_name(remaining)
        sys.argv = [target, *remaining]
        if is_module:
            sys.path.insert(0, os.getcwd())
            check_module(target)
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            if not os.path.isfile(target):
                hint = "" if target.endswith(".py") else f" For a module write: hf-elra run -m {target}"
                raise ConfigurationError(f"script {target!r} does not exist.{hint}")
            sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
            runpy.run_path(target, run_name="__main__")
    except ConfigurationError as error:
        print(f"hf-elra: error: {error}", file=sys.stderr)
        return 2
    if LAUNCHER_FLAGS.values and not LAUNCHER_FLAGS.honoured:
        given = ", ".join(f"--{name}" for name in LAUNCHER_FLAGS.values)
        print(
            f"hf-elra: warning: {given} had no effect: no Trainer that ran uses it (most flags need --optim elra).",
            file=sys.stderr,
        )
    return 0


def run_and_leave(words: list[str]) -> NoReturn:
    """:func:`run`, then end the process with its exit code; of several, all together."""
    try:
        code = run(words)
    except SystemExit as end:  # the script's own
        if isinstance(end.code, str):
            raise
        code = int(end.code or 0)
    if code == 0:
        part()
    leave(code)


def check_module(name: str) -> None:
    """Raise a ConfigurationError if there is no module of this name to run."""
    try:
        found = importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        raise ConfigurationError(f"module {name!r} cannot be found here or among the installed packages.")


def take_elra_flags(words: list[str]) -> list[str]:
    """Take every ``--elra_*`` flag (and its value) out of ``words`` into ``LAUNCHER_FLAGS``; return the rest."""
    valid = [f.name for f in dataclasses.fields(ElraSettings)]
    ours: list[str] = []
    rest: list[str] = []
    names: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        flag, _, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("--") or not name.removeprefix("no_").startswith("elra_"):
            rest.append(word)
            continue
        if name.removeprefix("no_") not in valid:
            raise ConfigurationError(f"unknown flag {flag}.{nearest(name, valid)} Valid: --{', --'.join(valid)}.")
        names.append(name.removeprefix("no_"))
        ours.append(f"--{name}")
        if value:
            ours.append(value)
        elif position < len(words) and not words[position].startswith("--"):
            ours.append(words[position])
            position += 1
    if ours:
        parser = OneLineParser(ElraSettings)  # type: ignore[arg-type]
        (settings,) = parser.parse(ours)
        LAUNCHER_FLAGS.values = {name: getattr(settings, name) for name in names}
    return rest


def check_optimizer_name(words: list[str]) -> None:
    """Refuse an ``--optim`` that Transformers does not know and that looks like one of ours, before the script runs."""
    for position, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag != "--optim":
            continue
        value = value or (words[position + 1] if position + 1 < len(words) else "")
        suggestion = nearest(value, OPTIMIZERS)
        if value not in OptimizerNames._value2member_map_ and suggestion:
            raise ConfigurationError(f"--optim {value} is not known.{suggestion}")
