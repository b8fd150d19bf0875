"""Machine and versions, to be written beside every number that was measured."""

from __future__ import annotations

import platform
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
    """Return the versions of Python and of the packages that matter, and of ``more``; missing ones are left out."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "hf_elra": hf_elra.__version__}  # of the code that runs: a checkout's metadata may be older


def environment(device: Any = "cpu", *more: str) -> dict[str, Any]:
    """Return :func:`machine` and :func:`versions` as the entries of a result file."""
    return {"machine": machine(device), "versions": versions(*more)}
