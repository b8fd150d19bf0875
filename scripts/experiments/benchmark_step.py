"""Time and memory of one update: ELRA and elra_spectral beside PyTorch's optimizers and others that choose their rate.

    python scripts/experiments/benchmark_step.py --output docs/results/step/cpu.jsonl

All optimizers update the same parameters with the same gradients in this process, in turns; gradients come from a pool,
so that every update meets new tensors, as after ``zero_grad``. Medians, their ratio to fused AdamW, the bytes of state
and the memory that an update needs beside it at its peak (on a CPU only where Linux tells) are printed, and how near an
update comes to the time in which the numbers that it has to move could be copied. Every measurement is written to
--output, one JSON line each, the first line being command, machine and versions. Optimizers that are not installed are
named and left out. --help lists all flags.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_elra import ELRA, ELRASpectral
from hf_elra.optim import LossAwareOptimizer
from hf_elra.optim.tensors import squares_and_products
from hf_elra.recipes import babyllama
from hf_elra.recipes.image_models import ARCHITECTURES
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table

BASELINE = "AdamW, fused"
POOL = 3  # sets of gradients
SCHEDULE_FREE = "schedule-free AdamW, foreach"  # writes to gradients: its own pool, or ELRA would have to copy them


def shapes_of(model: str) -> list[torch.Size]:
    """Shapes of a model's parameters; of a Llama the first is its embeddings."""
    with torch.device("meta"):
        if model == "resnet18":
            network: Any = ARCHITECTURES["resnet18"](3, 32, 10)
        elif model.startswith("babyllama-"):
            preset = model.removeprefix("babyllama-")
            network = babyllama.build_model(babyllama.parse_arguments(["--preset", preset])[0])
        else:
            size = dict(
                zip(("hidden_size", "num_layers", "num_heads", "intermediate_size"), LLAMAS[model], strict=True)
            )
            words = [word for name, value in size.items() for word in (f"--{name}", str(value))]
            network = babyllama.build_model(babyllama.parse_arguments(["--preset", "15m", *words])[0])
    return [p.shape for p in network.parameters()]


LLAMAS = {"llama-124m": (768, 14, 12, 2048), "llama-1b": (2048, 19, 16, 5504), "llama-2m": (64, 2, 2, 128)}
MODELS = ("babyllama-15m", "resnet18", *LLAMAS, "babyllama-tiny")
EXACT = {"polar_dtype": "float32", "state_dtype": "float32"}


class Together:
    """torch.optim.Muon for hidden matrices and fused AdamW for the rest."""

    def __init__(self, params: list[Tensor], embeddings: list[Tensor]) -> None:
        hidden = [p for p in params if p.dim() == 2 and not any(p is e for e in embeddings)]
        rest = [p for p in params if not any(p is matrix for matrix in hidden)]
        self.parts = [torch.optim.Muon(hidden), torch.optim.AdamW(rest, fused=True)]

    @property
    def state(self) -> dict[Tensor, Any]:
        """As of one optimizer."""
        return {p: state for part in self.parts for p, state in part.state.items()}

    def step(self) -> None:
        """Update all parameters."""
        for part in self.parts:
            part.step()


def optimizers(model: str) -> dict[str, tuple[int | None, Callable[[list[Tensor]], Any]]]:
    """Every optimizer by name: the numbers per parameter that one update has to read or write, and a constructor.

    Those that multiply matrices have no such number.
    """

    def embeddings(params: list[Tensor]) -> list[Tensor]:
        return params[:1] if "llama" in model else []

    found: dict[str, tuple[int | None, Callable[[list[Tensor]], Any]]] = {
        "ELRA": (5, lambda params: ELRA(params)),
        "ELRA, memory=point": (8, lambda params: ELRA(params, memory="point")),
        "ELRA, memory=offload": (7, lambda params: ELRA(params, memory="offload")),
        "elra_spectral": (None, lambda params: ELRASpectral(params, embeddings=embeddings(params), warmup=0)),
        "elra_spectral, all in float32": (
            None,
            lambda params: ELRASpectral(params, embeddings=embeddings(params), warmup=0, **EXACT),
        ),
        "elra_spectral, on_device=True": (
            None,
            lambda params: ELRASpectral(params, embeddings=embeddings(params), warmup=0, on_device=True),
        ),
        "elra_spectral, on_device=False": (
            None,
            lambda params: ELRASpectral(params, embeddings=embeddings(params), warmup=0, on_device=False),
        ),
        "elra_spectral, momentum=0": (
            None,
            lambda params: ELRASpectral(params, embeddings=embeddings(params), warmup=0, momentum=0.0),
        ),
        BASELINE: (7, lambda params: torch.optim.AdamW(params, fused=True)),
        "AdamW, foreach": (7, lambda params: torch.optim.AdamW(params, foreach=True)),
        "SGD with momentum, fused": (5, lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9, fused=True)),
        "SGD with momentum, foreach": (5, lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9, foreach=True)),
    }
    if hasattr(torch.optim, "Muon"):
        found["Muon (AdamW, fused, for tables and vectors)"] = (
            None,
            lambda params: Together(params, embeddings(params)),
        )
    else:
        print("left out: Muon (torch 2.9 or later)", file=sys.stderr)
    try:
        from lion_pytorch import Lion

        found["Lion"] = (5, lambda params: Lion(params, lr=1e-5))
    except ImportError:
        print("left out: Lion (pip install lion-pytorch)", file=sys.stderr)
    try:
        from prodigyopt import Prodigy

        found["Prodigy"] = (10, lambda params: Prodigy(params))
    except ImportError:
        print("left out: Prodigy (pip install prodigyopt)", file=sys.stderr)
    try:
        from schedulefree import AdamWScheduleFree

        def schedule_free(params: list[Tensor]) -> Any:
            optimizer = AdamWScheduleFree(params, foreach=True)
            optimizer.train()
            return optimizer

        found[SCHEDULE_FREE] = (7, schedule_free)
    except ImportError:
        print("left out: schedule-free AdamW (pip install schedulefree)", file=sys.stderr)
    return found


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file for the measurements, one JSON line each")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: the first two; on a GPU also the third")
    parser.add_argument("--optimizers", nargs="+", help="names as in the table; fused AdamW always; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="how often every optimizer is measured")
    parser.add_argument("--updates", type=int, default=5, help="updates a measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(words)
    for name in ("rounds", "updates"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be at least 1")
    given.models = given.models or MODELS[: 3 if given.device.startswith("cuda") else 2]
    return given


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of ``work``, on a GPU until it has finished."""
    start = now(device)
    work()
    return now(device) - start


def now(device: str) -> float:
    """Seconds on a clock that starts anywhere, once a GPU has finished; with one thread on a CPU those that this
    process has had, so that what else the machine does counts less."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def peak_of(work: Callable[[], Any], device: str) -> int | None:
    """Bytes that ``work`` needs at its peak beside what was there before; None where nobody tells."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what is needed
    reset.write_text("5")

    def kibibytes(name: str) -> int:
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
        return int(line.split()[1])

    before = kibibytes("VmRSS")
    work()
    return 1024 * (kibibytes("VmHWM") - before)


def update(optimizer: Any, params: list[Tensor], pool: list[list[Tensor]], updates: int, loss: Tensor) -> None:
    """Make some updates, each with other gradients."""
    for number in range(updates):
        for p, gradient in zip(params, pool[number % POOL], strict=True):
            p.grad = gradient
        if isinstance(optimizer, LossAwareOptimizer):
            optimizer.observe_loss(loss)
        optimizer.step()


def tensors_in(state: Any) -> Iterable[Tensor]:
    """All tensors in an optimizer's state."""
    for values in state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor))


def copy_bandwidth(number: int, given: argparse.Namespace) -> float:
    """Bytes a second that copying ``number`` float32 numbers moves: each is read once and written once."""
    source = torch.ones(number, device=given.device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), given.device) for _ in range(given.rounds + 2)]
    return 2 * 4 * number / statistics.median(seconds[2:])


def measure_parts(given: argparse.Namespace, write: Callable[..., None]) -> list[list[str]]:
    """What an update is made of, on one tensor of 15 M numbers."""
    torch.manual_seed(0)
    x, y, p = (torch.randn(15_000_000, device=given.device) for _ in range(3))
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = x
    adamw = torch.optim.AdamW([parameter], fused=True)
    parts: dict[str, Callable[[], Any]] = {
        "⟨g, g⟩ and ⟨g, g_prev⟩, one after the other": lambda: (torch.dot(x, x), torch.dot(x, y)),
        "both, as ELRA takes them": lambda: squares_and_products([x], [y]),
        "⟨g, g_prev⟩ alone, which reads all that both need": lambda: torch.dot(x, y),
        "p.add_(g)": lambda: p.add_(x, alpha=-1e-9),
        "copy of g": lambda: p.copy_(x),
        BASELINE: adamw.step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(given.rounds + 1):
        for name, work in parts.items():
            each = timed(work, given.device)
            if turn:  # the first round warms up
                seconds[name].append(each)
                write(part=name, numbers=x.numel(), seconds=each)
    baseline = statistics.median(seconds[BASELINE])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [[name, f"{1000 * value:.2f}", f"{value / baseline:.2f}"] for name, value in medians.items()]


def measure(model: str, given: argparse.Namespace, write: Callable[..., None]) -> list[list[str]]:
    """The rows of one model."""
    torch.manual_seed(0)
    shapes = shapes_of(model)
    number = sum(shape.numel() for shape in shapes)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, device=given.device)) for shape in shapes]
    pool = [[1e-3 * torch.randn(shape, device=given.device) for shape in shapes] for _ in range(POOL)]
    own = [[gradient.clone() for gradient in gradients] for gradients in pool]
    loss = torch.tensor(1.0, device=given.device)
    bandwidth = copy_bandwidth(number, given)
    write(model=model, parameters=number, copy_bytes_per_second=bandwidth)
    known = optimizers(model)
    if given.optimizers:
        known = {name: known[name] for name in (*given.optimizers, BASELINE)}
    built = {name: build(params) for name, (_, build) in known.items()}
    peaks: dict[str, int | None] = {}
    for name, optimizer in built.items():  # warm up: state is made, kernels are compiled
        gradients = own if name == SCHEDULE_FREE else pool
        update(optimizer, params, gradients, POOL, loss)
        peaks[name] = peak_of(functools.partial(update, optimizer, params, gradients, 1, loss), given.device)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(given.rounds):
        print(f"{model}: round {turn + 1} of {given.rounds}", file=sys.stderr)
        for name in list(built) if turn % 2 else list(built)[::-1]:
            optimizer, gradients = built[name], own if name == SCHEDULE_FREE else pool
            work = functools.partial(update, optimizer, params, gradients, given.updates, loss)
            each = timed(work, given.device) / given.updates
            seconds[name].append(each)
            write(model=model, optimizer=name, seconds_per_update=each)
    rows = []
    baseline = statistics.median(seconds[BASELINE])
    for name, optimizer in built.items():
        median = statistics.median(seconds[name])
        state = sum(
            tensor.numel() * tensor.element_size()
            for tensor in tensors_in(optimizer.state)
            if tensor.device == params[0].device
        )
        to_move = known[name][0]
        peak = peaks[name]
        write(model=model, optimizer=name, state_bytes=state, peak_bytes=peak)
        rows.append(
            [
                model,
                name,
                f"{1000 * median:.2f}",
                f"{median / baseline:.2f}",
                f"{state / number:.1f}",
                "not measured" if peak is None else f"{peak / 2**20:.0f}",
                f"{to_move or ''}",
                f"{100 * to_move * 4 * number / bandwidth / median:.0f} %" if to_move else "",
            ]
        )
    return rows


def main(words: list[str]) -> int:
    """Measure, write, print."""
    given = parse(words)
    path = Path(given.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:

        def write(**entry: Any) -> None:
            print(json.dumps(entry), file=file, flush=True)

        packages = ("lion-pytorch", "prodigyopt", "schedulefree")
        write(command=shlex.join(["python", *sys.argv]), **environment(given.device, *packages), seed=0)
        rows = [row for model in given.models for row in measure(model, given, write)]
        parts = measure_parts(given, write)
    header = [
        "parameters of",
        "optimizer",
        "ms an update",
        f"ratio to {BASELINE}",
        "bytes of state a parameter on the device",
        "peak, MiB",
        "numbers to move",
        "of copying speed",
    ]
    print(markdown_table(header, rows))
    print()
    print(markdown_table(["parts, one tensor of 15 M numbers", "ms", f"ratio to {BASELINE}"], parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
