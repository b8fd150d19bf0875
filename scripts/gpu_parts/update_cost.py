"""Part 2: what one update costs, beside other optimizers: time, bytes, memory, waits for the device.

The optimizers and models are those of ``benchmark_step.py``, which interleaves its rounds. Here one optimizer is made
after the other, so that a billion parameters fit; fused AdamW is timed first.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

from gpu_parts.part import Part, lines

TITLE = "Cost of an update"
SECONDS = 120
BASELINE = "AdamW, fused"
IN_A_GRAPH = "elra_spectral, in a CUDA graph"
"""The time of the device alone: a replay has no work for the host."""
ORDER = (
    BASELINE,
    "ELRA",
    "elra_spectral",
    IN_A_GRAPH,
    "elra_spectral, on_device=False",
    "Muon (AdamW, fused, for tables and vectors)",
    "SGD with momentum, fused",
    "ELRA, memory=point",
    "ELRA, memory=offload",
    "elra_spectral, all in float32",
    "elra_spectral, momentum=0",
    "Lion",
    "Prodigy",
    "schedule-free AdamW, foreach",  # it writes to gradients
)
TOKENS_OF_A_STEP = 2**19
POSITIONS = 1024
ROWS_AT_ONCE = 16
BACKWARD = "124 M, forward and backward over 0.5 M tokens in bfloat16"
"""What an update of a real run is beside."""
SIZES = {"llama-2m": "2 M", "babyllama-15m": "15 M", "llama-124m": "124 M", "llama-1b": "1 B"}


def _models(tiny: bool) -> list[str]:
    return ["llama-2m"] if tiny else ["llama-124m", "babyllama-15m", "llama-1b"]


def rows(tiny: bool) -> list[str]:
    """Names of what is measured."""
    of_updates = [f"{SIZES[model]}, {name}" for model in _models(tiny) for name in ORDER[: 3 if tiny else None]]
    return of_updates if tiny else [BACKWARD, *of_updates]


def run(part: Part) -> None:
    """Measure everything."""
    if part.device == "cuda" and not part.tiny:
        part.measure(BACKWARD, lambda: _backward(part))
    for index, model in enumerate(_models(part.tiny)):
        share = part.left / (len(_models(part.tiny)) - index)
        _measure_model(part, model, part.left - share)


def table(entries: list[dict[str, Any]], tiny: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    header = [
        "parameters, optimizer",
        "ms an update",
        f"ratio to {BASELINE}",
        "of copying speed",
        "state, bytes a parameter on the device",
        "peak beside it, MiB",
        "waits for the device",
    ]

    def cells(entry: dict[str, Any]) -> list[str]:
        if "tokens" in entry:
            return [f"{1000 * entry['seconds']:.2f}", "", "", "", f"{entry['peak_bytes'] / 2**20:,.0f}", ""]
        roofline, peak = entry["of_copying_speed"], entry["peak_bytes"]
        return [
            f"{1000 * entry['seconds']:.2f}",
            f"{entry['ratio']:.2f}" if entry["ratio"] else "",
            "" if roofline is None else f"{100 * roofline:.0f} %",
            f"{entry['state_bytes'] / entry['parameters']:.1f}",
            "" if peak is None else f"{peak / 2**20:,.0f}",
            str(entry["waits"]),
        ]

    return header, lines(rows(tiny), entries, 6, cells)


def host_waits(work: Callable[[], Any], device: str) -> int:
    """How often the host waits for the device in ``work``; on a CPU how often a number is read from a tensor."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        work()
    # Not cudaDeviceSynchronize, by which the profiler itself ends.
    names = ("cudaStreamSynchronize", "cudaEventSynchronize") if device == "cuda" else ("aten::_local_scalar_dense",)
    counts = {event.key: event.count for event in profiler.key_averages()}
    return sum(counts.get(name, 0) for name in names)


def _backward(part: Part) -> dict[str, Any]:
    """Seconds of forward and backward over the tokens of one update of a real run, accumulated."""
    import torch

    from benchmark_step import LLAMAS, timed
    from hf_elra.recipes import babyllama

    sizes = zip(("hidden_size", "num_layers", "num_heads", "intermediate_size"), LLAMAS["llama-124m"], strict=True)
    words = [word for name, value in sizes for word in (f"--{name}", str(value))]
    words += ["--preset", "15m", "--block_size", str(POSITIONS)]
    torch.manual_seed(0)
    model = babyllama.build_model(babyllama.parse_arguments(words)[0]).to(part.device)
    tokens = torch.randint(0, model.config.vocab_size, (ROWS_AT_ONCE, POSITIONS), device=part.device)

    def work(passes: int) -> None:
        for _ in range(passes):
            with torch.autocast(part.device, torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()

    work(3)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: work(TOKENS_OF_A_STEP // tokens.numel()), part.device)
    return {"seconds": seconds, "tokens": TOKENS_OF_A_STEP, "peak_bytes": torch.cuda.max_memory_allocated()}


def _measure_model(part: Part, model: str, until: float) -> None:
    """The rows of one model, while more than ``until`` seconds are left."""
    import torch

    from benchmark_step import POOL, copy_bandwidth, optimizers, shapes_of

    names = [name for name in ORDER[: 3 if part.tiny else None] if not part.is_done(f"{SIZES[model]}, {name}")]
    if not names:
        return
    torch.manual_seed(0)
    shapes = shapes_of(model)
    number = sum(shape.numel() for shape in shapes)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, device=part.device)) for shape in shapes]
    pool = [[1e-3 * torch.randn(shape, device=part.device) for shape in shapes] for _ in range(POOL)]
    loss = torch.tensor(1.0, device=part.device)
    given = type("Given", (), {"device": part.device, "rounds": 2 if part.tiny else 10})
    bandwidth = copy_bandwidth(number, given)
    part.write(model=model, parameters=number, copy_bytes_per_second=bandwidth)
    known = optimizers(model)
    if part.device == "cuda":
        known[IN_A_GRAPH] = known["elra_spectral"]

    def measure(name: str) -> dict[str, Any]:
        numbers, build = known[name]
        try:
            found = _measure(build(params), params, pool, loss, part, in_a_graph=name == IN_A_GRAPH)
        finally:
            for p in params:
                p.grad = None
            gc.collect()
            if part.device == "cuda":
                torch.cuda.empty_cache()
        seconds = found["seconds"]
        if name == BASELINE:
            baselines[model] = seconds
        return {
            "model": model, "optimizer": name, "parameters": number, **found,
            "ratio": seconds / baselines[model] if model in baselines else None, "copy_bytes_per_second": bandwidth,
            "of_copying_speed": numbers * 4 * number / bandwidth / seconds if numbers else None,
        }  # fmt: skip

    baselines = {entry["model"]: entry["seconds"] for entry in part.entries if entry.get("optimizer") == BASELINE}
    for name in names:
        if part.left <= until:
            print(f"{part.name}: {model}: its time is over", flush=True)
            break
        if name in known:
            part.measure(f"{SIZES[model]}, {name}", lambda name=name: measure(name))
        else:
            part.write(row=f"{SIZES[model]}, {name}", error="its package is not installed")


def _measure(
    optimizer: Any, params: list[Any], pool: list[list[Any]], loss: Any, part: Part, *, in_a_graph: bool = False
) -> dict[str, Any]:
    """Time, memory and waits of one optimizer's updates; its state is made, and kernels compiled, before."""
    import torch

    from benchmark_step import POOL, tensors_in, timed, update

    made = 0

    def make(updates: int) -> None:
        """Updates go on where the last ones ended: never twice in a row with the same gradients."""
        nonlocal made
        first = made % POOL
        update(optimizer, params, pool[first:] + pool[:first], updates, loss)
        made += updates

    make(POOL)
    if in_a_graph:
        from lib.cuda_graphs import captured

        graph = captured(lambda: make(1))

        def make(updates: int) -> None:  # the same gradients in every replay
            for _ in range(updates):
                graph.replay()

    peak = None
    if part.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make(1)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    updates, least, most = (1, 2, 2) if part.tiny else (5, 2, 12)
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and updates * sum(seconds) < 2.0):
        seconds.append(timed(lambda: make(updates), part.device) / updates)
    waits = host_waits(lambda: make(1), part.device)
    state = [tensor for tensor in tensors_in(optimizer.state) if tensor.device == params[0].device]
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state),
        "peak_bytes": peak,
        "waits": waits,
    }
