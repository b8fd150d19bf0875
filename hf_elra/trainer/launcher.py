"""Runs an unmodified training script with this package's optimizers available.

``hf-elra run script.py ARGS…`` and ``accelerate launch -m hf_elra.run script.py ARGS…`` end here. The launcher takes
the ``--elra_*`` flags out of the arguments and runs the script as ``__main__``. Python processes that the script
starts, as ``trl sft`` does, get both through the environment (``children/sitecustomize.py``). ``arguments.py`` says
what the flags mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pkgutil
import runpy
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from hf_elra.errors import ConfigurationError, nearest
from hf_elra.trainer.arguments import LAUNCHER_FLAGS, OPTIMIZERS, ElraSettings, OneLineParser
from hf_elra.trainer.leaving import leave, part
from hf_elra.trainer.upstream import optimizer_names

USAGE = "usage: hf-elra run [-m] SCRIPT_OR_MODULE [ARGS ...]   (ARGS may hold --elra_* flags the script does not know)"
FLAGS, HONOURED = "HF_ELRA_FLAGS", "HF_ELRA_HONOURED"
"""Environment variables for child processes: the flags as JSON, and a file that a child makes once it has read them."""


def run(words: list[str]) -> int:
    """Run ``[script.py, *args]``, ``["-m", module, *args]`` or ``[command, *args]`` for a command written in Python.

    Returns:
        The exit code (2 for wrong input).
    """
    is_module = words[:1] == ["-m"]
    words = words[is_module:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    target, *arguments = words
    try:
        remaining, ours = take_elra_flags(arguments)
        check_optimizer_name(remaining)
        if is_module:
            sys.path.insert(0, os.getcwd())
            check_module(target)
        else:
            target = check_script(target)
            sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
        sys.argv = [target, *remaining]
        with told_to_children(ours) as honoured_by_a_child:
            try:
                if is_module:
                    runpy.run_module(target, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(target, run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise
            honoured = LAUNCHER_FLAGS.honoured or honoured_by_a_child.exists()
    except ConfigurationError as error:
        print(f"hf-elra: error: {error}", file=sys.stderr)
        return 2
    if LAUNCHER_FLAGS.values and not honoured:
        given = ", ".join(f"--{name}" for name in LAUNCHER_FLAGS.values)
        print(
            f"hf-elra: warning: {given} had no effect: no Trainer that ran uses it (most flags need --optim elra).",
            file=sys.stderr,
        )
    return 0


@contextlib.contextmanager
def told_to_children(flags: list[str]) -> Iterator[Path]:
    """Pass our optimizers and these ``--elra_*`` flags to Python processes that are started in a ``with`` block.

    Yields the path of a file that is made when a Trainer in one of them has read the flags.
    """
    kept = {name: os.environ.get(name) for name in (FLAGS, HONOURED, "PYTHONPATH")}
    folder = str(Path(__file__).parent / "children")
    path = [folder, *filter(None, (kept["PYTHONPATH"] or "").split(os.pathsep))]
    with tempfile.TemporaryDirectory(prefix="hf-elra-") as place:
        honoured = Path(place, "honoured")
        os.environ.update({FLAGS: json.dumps(flags), HONOURED: str(honoured), "PYTHONPATH": os.pathsep.join(path)})
        try:
            yield honoured
        finally:
            for name, value in kept.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def take_flags_of_parent() -> None:
    """Take the flags that the launcher was given, in a process that its script has started."""
    take_elra_flags(json.loads(os.environ[FLAGS]))
    LAUNCHER_FLAGS.tell = Path(os.environ[HONOURED])


def run_and_leave(words: list[str]) -> NoReturn:
    """:func:`run`, then end the process with its exit code; of several, all together."""
    try:
        code = run(words)
    except SystemExit as end:  # the exit code of the script
        if isinstance(end.code, str):
            raise
        code = int(end.code or 0)
    if code == 0:
        part()
    leave(code)


def check_module(name: str) -> None:
    """Raise a ConfigurationError if there is no module of this name, and no package with a ``__main__``."""
    try:
        found = importlib.util.find_spec(name)
        folders = None if found is None else found.submodule_search_locations
        if folders is not None and importlib.util.find_spec(f"{name}.__main__") is None:
            modules = [f"{name}.{module.name}" for module in pkgutil.iter_modules(folders) if not module.ispkg]
            raise ConfigurationError(
                f"module {name!r} is a package without a __main__, which cannot be run; name one of its modules"
                + (f": {', '.join(modules)}." if modules else ".")
            )
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        found = None
    if found is None:
        raise ConfigurationError(f"module {name!r} cannot be found here or among the installed packages.")


def check_script(target: str) -> str:
    """Return the path of a script or of a command written in Python; raise a ConfigurationError if it cannot be run."""
    if not os.path.exists(target):
        command = shutil.which(target)
        if command is not None and _is_python(Path(command)):
            return command
        if target.endswith(".py") or os.sep in target:
            raise ConfigurationError(f"script {target!r} does not exist.")
        if "." in target:
            instead = f"for a module write: hf-elra run -m {target}"
        else:
            instead = f"nor does a command of that name; if a package brings it (pip install {target}?), install that"
        raise ConfigurationError(f"script {target!r} does not exist, {instead}.")
    path = Path(target)
    if path.suffix.lower() in (".json", ".yaml", ".yml", ".toml"):
        raise ConfigurationError(
            f"script {target!r} holds settings, not a script; name the script first: hf-elra run SCRIPT {target}"
        )
    if not _can_run(path):
        raise ConfigurationError(f"script {target!r} is not written in Python, and nothing else can be run.")
    return target


def _can_run(path: Path) -> bool:
    """Return whether Python can run a file or folder; errors within a ``.py`` file are left to Python."""
    if path.is_dir():
        return (path / "__main__.py").exists()
    if path.suffix in (".py", ".pyc") or zipfile.is_zipfile(path):
        return True
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _is_python(command: Path) -> bool:
    """Return whether a command is a script for Python, as pip and others write them."""
    with command.open("rb") as file:
        head = file.read(512)
    return head.startswith(b"#!") and b"python" in head


def take_elra_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """Take the ``--elra_*`` flags (and their values) out of ``words`` into ``LAUNCHER_FLAGS``; return both."""
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
    return rest, ours


def check_optimizer_name(words: list[str]) -> None:
    """Refuse an ``--optim`` that Transformers does not know and that looks like one of ours, before the script runs."""
    for position, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag != "--optim":
            continue
        value = value or (words[position + 1] if position + 1 < len(words) else "")
        suggestion = nearest(value, OPTIMIZERS)
        if value not in optimizer_names() and suggestion:
            raise ConfigurationError(f"--optim {value} is not known.{suggestion}")
