"""What a run survives: kills at random moments, and faults in losses and gradients. Prints a table.

    python scripts/stress.py --output docs/results/reliability/cpu.json
    python scripts/stress.py --quick --output runs/reliability.json

Kills: a BabyLlama is trained to its end, then again while it is killed (SIGKILL) at random moments and resumed each
time; both ends are compared bit by bit. Faults: NaN, infinities, spikes and zeros in losses and gradients, at the first
update, in mid-run and several in a row, for every memory layout; no number that is not finite may reach weights or
state, and training must go on to a lower loss. Exit code 1 if anything did not survive. --help lists all flags.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_elra import ELRA
from hf_elra.recipes.run_folder import METRICS, write_json
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table

TRAIN = Path(__file__).with_name("train_babyllama.py")
SIZES = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "block_size": 32, "vocab_size": 384,
    "per_device_train_batch_size": 4, "elra_control_cycle": "200sp", "logging_steps": 20, "eval_strategy": "no",
}  # fmt: skip


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="fewer kills, in a shorter run")
    parser.add_argument("--kills", type=int, help="default: 20, with --quick 5")
    parser.add_argument("--updates", type=int, help="of the run that is killed; default: 1500, with --quick 400")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(words)
    for name, quick, long in (("kills", 5, 20), ("updates", 400, 1500)):
        if getattr(given, name) is None:
            setattr(given, name, quick if given.quick else long)
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be at least 1")
    if given.updates < 10 * given.kills:
        parser.error(f"--updates {given.updates} is too few to be killed {given.kills} times; pass {10 * given.kills}")
    return given


# ---- kills ----


def run(folder: Path, updates: int) -> subprocess.Popen[bytes]:
    """Start, or go on with, the training in ``folder``."""
    flags = {**SIZES, "output_dir": folder, "max_steps": updates, "save_steps": 1, "save_total_limit": 3}
    words = [sys.executable, str(TRAIN), "--overwrite", "--resume"]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment_ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(words, env=environment_, stdout=log, stderr=log)


def newest(folder: Path) -> int:
    """Number of the newest checkpoint, whole or not; 0 without any."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def kill_often(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train with and without kills; return what happened."""
    random_moment = random.Random(given.seed)
    through, killed = folder / "through", folder / "killed"
    print("training without kills", file=sys.stderr)
    if run(through, given.updates).wait() != 0:
        raise SystemExit((folder / "through.log").read_text(encoding="utf-8"))
    kills = 0
    while not (killed / METRICS).is_file():
        # After a random number of updates, each of which is saved, so that all kills fit in, and at any moment of one.
        last = newest(killed) + random_moment.randint(1, given.updates // (given.kills + 1))
        process = run(killed, given.updates)
        if kills < given.kills:
            while process.poll() is None and newest(killed) < last:
                time.sleep(0.005)
            time.sleep(random_moment.uniform(0, 0.2))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                print(f"killed {kills} of {given.kills}, at update {newest(killed)}", file=sys.stderr)
        process.wait()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit((folder / "killed.log").read_text(encoding="utf-8"))
    cut_short = (folder / "killed.log").read_text(encoding="utf-8").count("is not whole")
    same = (through / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    return {"kills": kills, "checkpoints_cut_short": cut_short, "weights_identical": same, "updates": given.updates}


# ---- faults ----

Fault = Callable[[float, list[torch.Tensor]], float]


def _in_gradient(value: float, everywhere: bool) -> Fault:
    def fault(loss: float, gradients: list[torch.Tensor]) -> float:
        for gradient in gradients if everywhere else gradients[:1]:
            flat = gradient.view(-1)
            flat[: len(flat) if everywhere else 1] = value
        return loss

    return fault


FAULTS: dict[str, Fault] = {
    "loss NaN": lambda loss, _: math.nan,
    "loss infinite": lambda loss, _: math.inf,
    "loss spike of 1e6": lambda loss, _: loss + 1e6,
    "NaN in one element of a gradient": _in_gradient(math.nan, False),
    "infinity in one element of a gradient": _in_gradient(math.inf, False),
    "all gradients NaN": _in_gradient(math.nan, True),
    "all gradients zero": _in_gradient(0.0, True),
    "one element of a gradient 1e30": _in_gradient(1e30, False),
}
MOMENTS = {
    "first": (0,),
    "second": (1,),
    "in mid-run": (25,),
    "three in a row": (25, 26, 27),
    "every tenth": tuple(range(5, 60, 10)),
}
LAYOUTS = ("gradient", "point", "offload")


def train_with(fault: Fault, moments: tuple[int, ...], memory: str) -> dict[str, Any]:
    """Train a small network for 80 updates; return whether it survived, and how often ELRA went back."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = ELRA(model.parameters(), memory=memory)
    params = list(model.parameters())
    finite, losses = True, []
    for number in range(80):
        inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        losses.append(loss.item())
        told = loss.item()
        if number in moments:
            told = fault(told, [p.grad for p in params if p.grad is not None])
        optimizer.step(loss=told)
        if number % 20 == 19:
            optimizer.end_cycle()
        tensors = [*params, *(v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))]
        finite &= all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    learnt = sum(losses[-10:]) < 0.5 * sum(losses[:10])
    return {"finite": finite, "learnt": learnt, "restarts": optimizer.restarts}


def faults() -> list[dict[str, Any]]:
    """Every fault at every moment in every layout."""
    results = []
    for name, fault in FAULTS.items():
        for moment, updates in MOMENTS.items():
            for memory in LAYOUTS:
                result = train_with(fault, updates, memory)
                results.append({"fault": name, "moment": moment, "memory": memory, **result})
    return results


def main(words: list[str]) -> int:
    """Do everything; print the table."""
    given = parse(words)
    path = Path(given.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("error")
    about = {"command": shlex.join(["python", *sys.argv]), **environment("cpu"), "seed": given.seed}
    tried = faults()
    print(f"{len(tried)} faults tried", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        killed = kill_often(given, Path(folder))
    write_json(path, {**about, "faults": tried, "kills": killed})
    rows = []
    for name in FAULTS:
        mine = [result for result in tried if result["fault"] == name]
        survived = sum(result["finite"] and result["learnt"] for result in mine)
        rows.append([name, str(len(mine)), str(survived), str(sum(result["restarts"] for result in mine))])
    whole = int(killed["weights_identical"])
    rows.append([f"SIGKILL, {killed['kills']} times in {killed['updates']} updates", "1", str(whole), ""])
    print(markdown_table(["fault", "runs", "survived", "restarts"], rows))
    print(f"\ncheckpoints cut short by a kill, and passed over: {killed['checkpoints_cut_short']}")
    print(f"weights after all kills identical to those of the run without: {'yes' if whole else 'NO'}")
    return 0 if all(row[1] == row[2] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
