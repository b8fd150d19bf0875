"""Part 1: what the package does on this device is what it should do.

The CUDA tests, ELRA's memory layouts beside the float64 twin, updates that do not wait, CUDA graphs, Newton-Schulz in
bfloat16, and Trainer runs of both optimizers. A row says ``ok`` or what was wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_parts.part import Part, lines

TITLE = "Correctness"
SECONDS = 90
ROOT = Path(__file__).parents[2]
LAYOUTS = ("gradient", "point", "offload")
TRAININGS = ("bf16", "gradient checkpointing")
ON_A_GPU = ("fp16", "torch_compile")
"""Accelerate takes fp16 on a GPU alone; compiling takes longer than all the rest."""
OPTIMIZERS = ("elra", "elra_spectral")
BESIDE_A_GRAPH = {"elra": ({"fused": False}, {"capturable": True}), "elra_spectral": ({}, {})}
"""Settings of the run beside a captured one, and of that. For elra_spectral they are the same operations: where
gradients have a low rank, polar factors in bfloat16 make 1e-2 in twenty updates of one rounding more or less."""
MOST_APART = 1e-4
"""After a captured training step was replayed, from one that was not."""


def rows(tiny: bool) -> list[str]:
    """Names of what is checked."""
    return [
        *(f"memory={layout} beside the float64 twin" for layout in LAYOUTS),
        "an update queues its work and returns",
        *(f"{optim}, captured in a CUDA graph" for optim in OPTIMIZERS),
        "Newton-Schulz in bfloat16 beside float32",
        *(f"Trainer, {optim}, {how}" for how in TRAININGS for optim in OPTIMIZERS),
        "tests/test_fused.py and test_on_device.py",
        *(f"Trainer, {optim}, {how}" for how in ON_A_GPU for optim in OPTIMIZERS if not tiny),
    ]


def run(part: Part) -> None:
    """Check everything."""
    for layout in LAYOUTS:
        part.measure(f"memory={layout} beside the float64 twin", lambda layout=layout: _beside_the_twin(part, layout))
    part.measure("an update queues its work and returns", lambda: _waits(part))
    for optim in OPTIMIZERS:
        part.measure(f"{optim}, captured in a CUDA graph", lambda optim=optim: _graph(part, optim))
    part.measure("Newton-Schulz in bfloat16 beside float32", lambda: _polar_factors(part))
    for how in TRAININGS:
        for optim in OPTIMIZERS:
            part.measure(f"Trainer, {optim}, {how}", lambda how=how, optim=optim: _trainer(part, optim, how))
    part.measure("tests/test_fused.py and test_on_device.py", lambda: _tests(part), needs=10)
    for how in () if part.tiny else ON_A_GPU:
        for optim in OPTIMIZERS:
            part.measure(
                f"Trainer, {optim}, {how}", lambda how=how, optim=optim: _trainer(part, optim, how),
                needs=15 if how == "torch_compile" else 2,
            )  # fmt: skip


def table(entries: list[dict[str, Any]], tiny: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    return ["check", "result", "details"], lines(
        rows(tiny), entries, 2, lambda entry: ["ok" if entry["ok"] else "WRONG", entry["details"]]
    )


def _beside_the_twin(part: Part, layout: str) -> dict[str, Any]:
    """50 updates of a noisy quadratic in float64, with a spike, a NaN and a NaN in the gradient."""
    import torch

    from hf_elra import ELRA
    from hf_elra.optim.reference.elra import ReferenceELRA

    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 48), (48,), (5, 3, 3, 3)]
    scales = torch.logspace(-2, 0, sum(torch.Size(s).numel() for s in shapes), dtype=torch.float64)
    x = torch.randn(len(scales), generator=generator, dtype=torch.float64)
    pieces = x.split([torch.Size(s).numel() for s in shapes])
    params = [torch.nn.Parameter(v.view(s).to(part.device)) for v, s in zip(pieces, shapes, strict=True)]
    optimizer = ELRA(params, memory=layout, fused=None)
    reference = ReferenceELRA(x)
    furthest = 0.0
    for number in range(50):
        gradient = scales * reference.x + 0.05 * torch.randn(len(scales), generator=generator, dtype=torch.float64)
        loss = (0.5 * scales * reference.x.square()).sum().item() * (1e3 if number == 20 else 1.0)
        if number == 30:
            loss = float("nan")
        if number == 40:
            gradient[7] = float("nan")
        of_params = gradient.split([p.numel() for p in params])
        for p, g in zip(params, of_params, strict=True):
            p.grad = g.view(p.shape).to(part.device)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64, device=part.device))
        optimizer.zero_grad()
        reference.step(loss, gradient)
        ours = torch.cat([p.detach().flatten().cpu() for p in params])
        furthest = max(furthest, ((ours - reference.x).norm() / reference.x.norm()).item())
    same_restarts = optimizer.restarts == reference.restarts
    kernels = optimizer._kernels is not None and optimizer._kernels.has_worked
    return {
        "ok": furthest < 1e-9 and same_restarts and optimizer.restarts >= 3,
        "distance": furthest,
        "kernels": kernels,
        "details": f"furthest apart {furthest:.0e}, {optimizer.restarts} restarts, "
        + ("in kernels" if kernels else "by tensor operations"),
    }


def _network(part: Part, optim: str, **settings: Any) -> tuple[Any, Any]:
    import torch

    from hf_elra.optim import OPTIMIZERS as CLASSES

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)).to(part.device)
    return model, CLASSES[optim](model.parameters(), **settings)


def _waits(part: Part) -> dict[str, Any]:
    """Updates with every synchronisation an error; on a CPU, how often a number is read from a tensor."""
    import torch

    from gpu_parts.update_cost import host_waits

    cuda, found = part.device == "cuda", {}

    def update(model: Any, optimizer: Any, inputs: Any, how: Callable[[Callable[[], Any]], Any]) -> Any:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return how(lambda: optimizer.step(loss=loss.detach()))

    def strictly(work: Callable[[], Any]) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for optim in OPTIMIZERS:
        model, optimizer = _network(part, optim, **({"on_device": True} if optim == "elra_spectral" else {}))
        inputs = torch.randn(32, 64, device=part.device)
        for number in range(6):
            update(model, optimizer, inputs, strictly if cuda and number >= 3 else lambda work: work())
        found[optim] = update(model, optimizer, inputs, lambda work: host_waits(work, part.device))
    # On a CPU elra has no kernels by themselves, and nobody to wait for.
    return {
        "ok": found["elra_spectral"] == 0 and (found["elra"] == 0 or not cuda),
        "waits": found,
        "details": ", ".join(f"{optim} waits {waits} times an update" for optim, waits in found.items()),
    }


def _graph(part: Part, optim: str) -> dict[str, Any]:
    """A captured training step beside one that is not."""
    import torch

    from lib.cuda_graphs import WARM_UP, captured

    if part.device != "cuda":
        return {"ok": True, "details": "needs a GPU: nothing was captured"}
    (plain, first), (fast, second) = (_network(part, optim, **settings) for settings in BESIDE_A_GRAPH[optim])
    inputs = torch.randn(32, 64, device=part.device)

    def training_step(model: Any, optimizer: Any) -> None:
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())

    graph = captured(lambda: training_step(fast, second), second.zero_grad)
    for _ in range(20):
        graph.replay()
    for _ in range(WARM_UP + 20):
        first.zero_grad()
        training_step(plain, first)
    apart = _apart(plain, fast)
    return {"ok": apart < MOST_APART, "distance": apart, "details": f"after 20 replays {apart:.0e} apart"}


def _apart(model: Any, other: Any) -> float:
    """Distance of two models, relative to the norm of the first."""
    from lib.many_processes import flat_weights

    one = flat_weights(model).double().cpu()
    return float((one - flat_weights(other).double().cpu()).norm() / one.norm())


def _polar_factors(part: Part) -> dict[str, Any]:
    """Polar factors on the device beside float32 ones, of gradients of full rank and nearly of low rank.

    In bfloat16 singular values below a few thousandths of the largest are noise, which Newton-Schulz makes large.
    """
    import torch

    from hf_elra.optim.directions.polar import polar_factor

    generator = torch.Generator().manual_seed(0)
    cosines, largest = {}, 0.0
    for rank in (256, 64, 4):
        low = torch.randn(3, 256, rank, generator=generator) @ torch.randn(3, rank, 1024, generator=generator)
        gradients = low + 1e-2 * torch.randn(3, 256, 1024, generator=generator)
        exact, here = polar_factor(gradients, "float32"), polar_factor(gradients.to(part.device)).cpu()
        cosine = torch.nn.functional.cosine_similarity(exact.flatten(1), here.flatten(1)).min().item()
        cosines[rank] = cosine
        largest = max(largest, torch.linalg.svdvals(here).max().item())
    return {
        "ok": cosines[256] > 0.999 and cosines[4] > 0.9 and largest < 1.3,
        "cosines": cosines,
        "largest_singular_value": largest,
        "details": f"cosines {', '.join(f'{value:.4f} (rank {rank})' for rank, value in cosines.items())}; "
        f"largest singular value {largest:.3f}",
    }


def _trainer(part: Part, optim: str, how: str) -> dict[str, Any]:
    """40 updates of a small Llama on rows that count upwards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

    from hf_elra import ElraTrainer, ElraTrainingArguments

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, tie_word_embeddings=True, **sizes))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 64, (640, 1), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in (starts + torch.arange(32)) % 64]
    updates = 40 if not part.tiny else 14
    more = {
        "bf16": {},
        "fp16": {"bf16": False, "fp16": True},
        "gradient checkpointing": {"gradient_checkpointing": True},
        "torch_compile": {"torch_compile": True},
    }[how]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ElraTrainingArguments(
            folder, optim=optim, per_device_train_batch_size=16, max_steps=updates, logging_steps=1,
            save_strategy="no", report_to="none", use_cpu=part.device == "cpu", disable_tqdm=True,
            dataloader_pin_memory=False, **{"bf16": True, **more},
        )  # fmt: skip
        trainer = ElraTrainer(model, arguments, train_dataset=data)
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    falls = losses[-1] < losses[0] - 0.1
    finite = all(torch.isfinite(p).all().item() for p in model.parameters())
    kernels = getattr(trainer.elra_optimizer, "_kernels", None)
    in_kernels = kernels is not None and kernels.has_worked
    return {
        "ok": bool(finite and falls and (optim != "elra" or part.device != "cuda" or in_kernels)),
        "losses": losses,
        "details": f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {updates} updates"
        + (", in kernels" if in_kernels else ""),
    }


def _tests(part: Part) -> dict[str, Any]:
    """The tests that run their kernels on the GPU where there is one."""
    # Compiling for a GPU that is not there is for machines without one.
    chosen = "several_types or refused_if_asked_for" if part.tiny else "not compile"
    files = ["tests/test_fused.py", "tests/test_on_device.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    if not part.tiny:
        command += ["-n", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(part.left, 5))
    end = next((line for line in reversed(done.stdout.splitlines()) if " in " in line), done.stderr[-300:])
    wrong = re.findall(r"^FAILED (.*)$", done.stdout, flags=re.MULTILINE)
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return {"ok": done.returncode == 0, "failed": wrong, "details": end.strip("= ")}
