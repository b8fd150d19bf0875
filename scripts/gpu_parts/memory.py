"""Part 5: merged micro-batches until memory runs out, and several processes on one device.

``--elra_max_micro_batch auto`` doubles its passes until one does not fit, halves, and goes on. A share of the device's
memory is all that it may have here, so that this comes soon.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_parts.part import Part, lines

TITLE = "Memory and several processes"
SECONDS = 60
MERGED = "elra_max_micro_batch=auto until memory runs out"
PROCESSES = {"NCCL, one process": ("nccl", 1), "gloo, two processes on one device": ("gloo", 2)}
ROUNDED = 4e-3
SHARDED = "FSDP2 with NCCL, one process"
ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "scripts", ROOT / "scripts" / "experiments", ROOT)


def rows(tiny: bool) -> list[str]:
    """Names of what is tried."""
    return [MERGED, *PROCESSES, SHARDED]


def run(part: Part) -> None:
    """Try everything."""
    part.measure(MERGED, lambda: _merge(part))
    for name, (backend, number) in PROCESSES.items():
        part.measure(name, lambda backend=backend, number=number: _processes(part, backend, number), needs=5)
    part.measure(SHARDED, lambda: _sharded(part), needs=5)


def table(entries: list[dict[str, Any]], tiny: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    return ["what", "result", "details"], lines(
        rows(tiny), entries, 2, lambda entry: ["ok" if entry["ok"] else "WRONG", entry["details"]]
    )


def _merge(part: Part) -> dict[str, Any]:
    """Updates of 256 rows, in micro-batches of 2, with 2 GiB; their gradients are those of accumulation."""
    import logging

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

    from hf_elra import ElraTrainer, ElraTrainingArguments

    cuda, notes = part.device == "cuda", []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    size, rows_of_update = (64, 8) if part.tiny else (512, 512)
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, tie_word_embeddings=True,
        )
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 8192, (4 * rows_of_update, 256))]
    handler = Notes()
    logger = logging.getLogger("hf_elra")
    logger.addHandler(handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ElraTrainingArguments(
                folder, optim="elra", per_device_train_batch_size=2, gradient_accumulation_steps=rows_of_update // 2,
                elra_max_micro_batch="auto", max_steps=4, bf16=True, save_strategy="no", report_to="none",
                disable_tqdm=True, use_cpu=not cuda, dataloader_pin_memory=False, logging_steps=1,
            )  # fmt: skip
            trainer = ElraTrainer(model, arguments, train_dataset=data)
            trainer.pop_callback(PrinterCallback)
            trainer.train()
    finally:
        logger.removeHandler(handler)
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    halved = sum("halving" in note for note in notes)
    merged = trainer.elra.micro_batches.per_pass
    return {
        "ok": trainer.state.global_step == 4 and merged > 1 and (halved > 0 or not cuda),
        "halved": halved,
        "micro_batches_per_pass": merged,
        "details": f"{halved} times out of memory, then {merged:.0f} micro-batches a pass, 4 updates",
    }


def _processes(part: Part, backend: str, number: int) -> dict[str, Any]:
    """A training script on so many processes; their weights are those of one process."""
    backend = backend if part.device == "cuda" else "gloo"
    (alone, _), (norms, differing) = _trained_on(part, backend, 1), _trained_on(part, backend, number)
    apart = [abs(norm / one - 1) for norm, one in zip(norms, alone, strict=True)]
    # Sums over two processes are rounded otherwise. The directions of elra_spectral come in bfloat16 on a GPU, of which
    # one rounding is 0.4 %.
    allowed = 1e-4, 1e-4 if part.device == "cpu" else ROUNDED
    return {
        "ok": differing == 0 and all(one < limit for one, limit in zip(apart, allowed, strict=True)),
        "details": f"{differing} of 40 updates after which processes differ"
        + (f"; norms of the weights {apart[0]:.0e} and {apart[1]:.0e} from those of one process" if number > 1 else ""),
    }


def _sharded(part: Part) -> dict[str, Any]:
    """30 updates of ``elra_spectral`` on sharded parameters, with a spike and a NaN, beside whole ones."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from hf_elra import ELRASpectral
    from lib.many_processes import flat_weights

    def network() -> Any:
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8)
        return torch.nn.Sequential(*layers).to(part.device)

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if part.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            plain = network()
            split = fully_shard(network(), mesh=init_device_mesh(part.device, (1,)))
            one, other = (ELRASpectral(model.parameters(), lr=1e-2) for model in (plain, split))
            for number in range(30):
                inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(number)).to(part.device)
                for model, optimizer in ((plain, one), (split, other)):
                    optimizer.zero_grad()
                    loss = (model(inputs) - inputs[:, :8]).square().mean()
                    loss.backward()
                    told = loss.detach() * {12: 50.0, 20: float("nan")}.get(number, 1.0)
                    optimizer.step(loss=told)
            apart = (flat_weights(plain) - flat_weights(split)).norm() / flat_weights(plain).norm()
        finally:
            dist.destroy_process_group()
    allowed = 1e-5 if part.device == "cpu" else ROUNDED
    return {
        "ok": apart.item() < allowed and one.restarts == other.restarts > 0,
        "distance": apart.item(),
        "details": f"weights {apart.item():.0e} apart, {other.restarts} restarts, α {other.alpha:.2e}",
    }


_KNOWN: dict[tuple[str, int], tuple[list[float], int]] = {}  # by backend and number of processes


def _trained_on(part: Part, backend: str, processes: int) -> tuple[list[float], int]:
    """Norms of the weights that so many processes trained, and after how many updates these differed.

    Trained once, however many rows ask: on a CPU one process is the same with every backend.
    """
    if (backend, processes) in _KNOWN:
        return _KNOWN[backend, processes]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
        *("-m", "gpu_parts.one_of_many", backend, part.device, str(16 // processes)),
    ]
    path = os.pathsep.join([*map(str, SOURCES), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=max(part.left, 5)
    )
    found = re.findall(r"^weights (\S+) (\S+) differing (\d+)$", done.stdout, flags=re.MULTILINE)
    if done.returncode != 0 or not found:
        raise RuntimeError(f"{processes} processes failed: {done.stderr[-1500:]}")
    _KNOWN[backend, processes] = [float(norm) for norm in found[0][:2]], int(found[0][2])
    return _KNOWN[backend, processes]
