"""Machine and versions, to be written beside every number that was measured."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hf_elra

PACKAGES = ("torch", "transformers", "accelerate")


def machine(device: Any = "cpu") -> str:
    """Name the processor, its threads and the device, e.g. ``"Intel Xeon, 2 threads, device cpu"``."""
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = f"{models[0]} ({processor})" if models else processor
    except OSError:
        pass
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{processor}, {torch.get_num_threads()} threads, device {name}"


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, and of ``more``; missing ones are left out.

    If this package runs from a git checkout, its commit too, with a ``+`` where files of the package differ from it.
    """
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["hf_elra"] = hf_elra.__version__  # of the code that runs: a checkout's metadata may be older
    return {**found, **({"commit": commit} if (commit := _commit(Path(hf_elra.__file__).parent)) else {})}


@functools.cache
def _commit(package: Path) -> str | None:
    """The commit of the checkout that a package lies in; None without one, or without git."""
    if not (package.parent / ".git").exists():
        return None
    try:
        said = [
            subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", "."])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0].strip() + ("+" if said[1] else "")


def environment(device: Any = "cpu", *more: str) -> dict[str, Any]:
    """Return :func:`machine` and :func:`versions` as the entries of a result file."""
    return {"machine": machine(device), "versions": versions(*more)}
