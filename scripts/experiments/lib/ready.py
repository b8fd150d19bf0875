"""Processes that begin at once: forked from one that has loaded PyTorch and Transformers, which takes seconds.

:func:`together` runs a function on several processes of one group, :func:`command` a script or a module as ``python``
or ``torchrun`` would. What depends on how a process starts (signals, launchers, the order of imports) needs a process
of its own instead. What the processes do lives in :mod:`lib.many_processes` and in the tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

LOADED = (
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "transformers.trainer",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""What processes begin with; nothing of this package, as scripts have to import it themselves."""
SECONDS = 600


def together(function: Callable[..., Any], processes: int, **given: Any) -> Any:
    """Run a function on so many processes of one group (gloo, on CPUs); return what it returned on the first.

    Args:
        function: of a module that can be imported; its result must have a form in JSON.
        processes: how many.
        given: its keywords.

    Raises:
        RuntimeError: one of them failed; the text is what they printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        done = _run(_answer, (function, given, str(output)), processes, {"OMP_NUM_THREADS": "1"}, None)
        if done.returncode != 0:
            raise RuntimeError(f"{function.__name__} on {processes} processes failed:\n{done.stderr}")
        return json.loads(output.read_text(encoding="utf-8"))


def command(
    words: Sequence[str],
    *,
    processes: int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS``, where the first words are a script or ``-m`` and a module; do not wait for imports.

    Args:
        words: what follows ``python``.
        processes: as ``torchrun --nproc_per_node`` would start them; None: one, which is part of no group.
        environment: variables in addition to those of this process.
        folder: the working directory; None: that of this process.
    """
    return _run(_call, (list(words),), processes, environment or {}, folder)


def _run(
    target: Callable[..., None],
    given: tuple[Any, ...],
    processes: int | None,
    environment: Mapping[str, str],
    folder: str | Path | None,
) -> subprocess.CompletedProcess[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    count = processes or 1
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as place:
        printed = [str(Path(place, name)) for name in ("output", "error")]
        for name in printed:
            Path(name).touch()
        started = []
        for rank in range(count):
            one = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), **group}
            whole = {**os.environ, **environment, **(one if processes else {})}
            process = context.Process(target=_begin, args=(target, given, whole, str(folder or Path.cwd()), printed))
            process.start()
            started.append(process)
        code = _first_failure(started)
        texts = [
            Path(name).read_text(encoding="utf-8", errors="replace") if os.path.exists(name) else "" for name in printed
        ]
    return subprocess.CompletedProcess([target.__name__, *map(str, given)], code, *texts)


def _first_failure(started: list[Any]) -> int:
    """Wait for all; once one has failed, or time is over, end the others. The exit code of the first that failed."""
    until, code = time.monotonic() + SECONDS, 0
    running = {process.sentinel: process for process in started}
    while running and code == 0:
        ended = wait(list(running), timeout=max(0.0, until - time.monotonic()))
        if not ended:
            code = 124
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            code = code or process.exitcode
    for process in running.values():
        process.terminate()
        process.join()
    return code


def _begin(
    target: Callable[..., None], given: tuple[Any, ...], environment: dict[str, str], folder: str, printed: list[str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in enumerate(printed, start=1):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    import torch

    if environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    target(*given)


def _answer(function: Callable[..., Any], given: dict[str, Any], output: str) -> None:
    from hf_elra.trainer.leaving import leave, part

    result = function(**given)
    if int(os.environ["RANK"]) == 0:
        Path(output).write_text(json.dumps(result), encoding="utf-8")
    part()
    leave(0)


def _call(words: list[str]) -> None:
    module = words[0] == "-m"
    begins = os.getcwd() if module else os.path.dirname(os.path.abspath(words[0]))
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]  # not what the tests can import
    sys.path[:] = [begins, *given, *own]
    sys.argv = list(words[module:])
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
