"""A training step in a CUDA graph, as the tests and ``gpu_check.py`` capture it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3
"""Steps before the capture: the first update of an optimizer makes its state and looks at the weights."""


def captured(step: Callable[[], Any], clear: Callable[[], Any] = lambda: None) -> torch.cuda.CUDAGraph:
    """Make three steps on a stream of their own, and return a graph of one more, which has not run yet.

    Args:
        step: forward, backward and update; or an update alone, with gradients whose memory stays.
        clear: what is done before every step and is not part of it, as ``optimizer.zero_grad``.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            clear()
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    clear()
    with torch.cuda.graph(graph):
        step()
    return graph
