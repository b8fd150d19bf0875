"""Pictures of results: paths over a function, learning rates over updates, losses over the length of runs.

They need matplotlib (``pip install 'hf_elra[plots]'``); without it a function here says so and draws nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

Path = list[tuple[float, float]]


def draw_paths(
    title: str, function: Callable[[Tensor], Tensor], paths: dict[str, tuple[Path, Path]], file: File, limit: int
) -> None:
    """Draw paths over a function's level lines.

    Args:
        title: title of the picture.
        function: a function of a tensor of shape (2, ...).
        paths: by optimizer, the points in the function's own coordinates: walked in these, and in coordinates turned
            by 45°.
        file: the PNG file.
        limit: a path with this many updates did not arrive.
    """
    if (plt := _pyplot()) is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    start = next(iter(paths.values()))[0][0]
    bound = [abs(x) * 1.5 + 1 for x in start]
    across, up = torch.meshgrid(*(torch.linspace(-b, b, 200) for b in bound), indexing="xy")
    heights = function(torch.stack([across, up]).reshape(2, -1)).reshape(across.shape)
    levels = torch.linspace(float(heights.min()), float(heights.max()), 20)
    if float(heights.min()) >= 0:
        levels = torch.logspace(-2, math.log10(float(heights.max())), 20)
    for number, (axis, degrees) in enumerate(zip(axes, (0, 45), strict=True)):
        axis.contour(across, up, heights, levels=levels.tolist(), colors="0.85", linewidths=0.7)
        for name, both in paths.items():
            points, updates = both[number][:2000], len(both[number]) - 1
            label = f"{name} ({'> ' if updates >= limit else ''}{updates:,})"
            axis.plot([a for a, _ in points], [b for _, b in points], ".-", linewidth=1, markersize=3, label=label)
        axis.set(title=f"coordinates turned by {degrees}°", xlabel="$x_1$", ylabel="$x_2$")
        axis.set(xlim=(-bound[0], bound[0]), ylim=(-bound[1], bound[1]))
        axis.legend(fontsize=8, title="updates in brackets", title_fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_learning_rates(title: str, paths: dict[str, list[float]], file: File) -> None:
    """Draw learning rates over updates, on a logarithmic scale, one curve for each first rate."""
    if (plt := _pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, rates) in enumerate(paths.items()):
        axis.plot(rates, ".-", linewidth=1, markersize=3, color=plt.cm.viridis(number / len(paths)), label=name)
    axis.set(yscale="log", xlabel="update", ylabel="learning rate in force", title=title)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_curves(runs: dict[str, dict[str, list[float]]], across: list[str], up: str, label: str, file: File) -> None:
    """Draw ``up`` of every run over each of ``across``, in panels side by side.

    Args:
        runs: values by name, by title of the run.
        across: names of the horizontal values, one panel each.
        up: name of the vertical values.
        label: label of the vertical axis.
        file: the PNG file.
    """
    if (plt := _pyplot()) is None:
        return
    figure, axes = plt.subplots(1, len(across), figsize=(5.5 * len(across), 4.5), sharey=True, layout="constrained")
    for axis, name in zip(axes, across, strict=True):
        for title, values in runs.items():
            axis.plot(values[name], values[up], ".-", label=title)
        axis.set(xlabel=name)
    axes[0].set(ylabel=label)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures: they need matplotlib (pip install 'hf_elra[plots]')", file=sys.stderr)
        return None
    return plt
