"""What a run survives: faults, several processes, kills at random moments. Prints tables.

    python scripts/experiments/stress.py --output docs/results/reliability.json
    python scripts/experiments/stress.py --quick --output runs/reliability.json

Faults: NaN, infinities, spikes and zeros in losses, gradients and data, at the first update, in mid-run and several in
a row, for elra with every memory layout and in bfloat16, and for elra_spectral; no number that is not finite may reach
weights or state, and training must go on to a lower loss. How far α is off 20 updates later is printed.
Processes: DDP, FSDP2, HSDP and tensor parallelism beside one process. Kills: a BabyLlama is
trained to its end, then again while it is killed (SIGKILL) at random moments and resumed each time; both ends are
compared bit by bit. Exit code 1 if anything did not survive. --help lists all flags.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from hf_elra import ELRA, ELRASpectral
from hf_elra.recipes.run_folder import read_json, write_json
from hf_elra.report.environment import environment
from hf_elra.report.names import METRICS
from hf_elra.report.table import markdown_table
from lib import many_processes
from lib.many_processes import apart
from lib.ready import together

TRAIN = Path(__file__).parents[1] / "train_babyllama.py"
SIZES = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "block_size": 32, "vocab_size": 384,
    "per_device_train_batch_size": 4, "elra_control_cycle": "200sp", "logging_steps": 20, "eval_strategy": "no",
}  # fmt: skip
PARTS = ("faults", "processes", "kills")


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file for the results, written after every part")
    parser.add_argument("--quick", action="store_true", help="fewer kills, in a shorter run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--every", type=int, default=1, help="of the runs with faults make one in so many; default: 1")
    parser.add_argument("--kills", type=int, help="default: 20, with --quick 5")
    parser.add_argument("--updates", type=int, help="of the run that is killed; default: 1500, with --quick 400")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(words)
    for name, quick, long in (("kills", 5, 20), ("updates", 400, 1500)):
        if getattr(given, name) is None:
            setattr(given, name, quick if given.quick else long)
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be at least 1")
    if given.every < 1:
        parser.error(f"--every {given.every} must be at least 1")
    if given.updates < 10 * given.kills:
        parser.error(f"--updates {given.updates} is too few to be killed {given.kills} times; pass {10 * given.kills}")
    return given


# ---- kills ----


def run(folder: Path, updates: int) -> subprocess.Popen[bytes]:
    """Start, or go on with, the training in ``folder``."""
    flags = {**SIZES, "output_dir": folder, "max_steps": updates, "save_steps": 1, "save_total_limit": 3}
    words = [sys.executable, str(TRAIN), "--overwrite", "--resume", "--optim", "elra"]
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
    "none": lambda loss, _: loss,
    "loss NaN": lambda loss, _: math.nan,
    "loss infinite": lambda loss, _: math.inf,
    "loss spike of 1e6": lambda loss, _: loss + 1e6,
    "loss ten times as high": lambda loss, _: loss * 10,
    "a batch without targets (loss NaN, gradients zero)": lambda loss, gradients: _in_gradient(0.0, True)(
        math.nan, gradients
    ),
    "NaN in one element of a gradient": _in_gradient(math.nan, False),
    "infinity in one element of a gradient": _in_gradient(math.inf, False),
    "all gradients NaN": _in_gradient(math.nan, True),
    "all gradients zero": _in_gradient(0.0, True),
    "one element of a gradient 1e30": _in_gradient(1e30, False),
    "a batch of zeros": lambda loss, _: loss,  # see train_with
}
MOMENTS = {
    "first": (0,),
    "second": (1,),
    "in mid-run": (25,),
    "three in a row": (25, 26, 27),
    "every tenth": tuple(range(5, 60, 10)),
}
LAYOUTS = ("gradient", "point", "offload")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPECTRAL = {"elra_spectral": 0.9, "elra_spectral, no momentum": 0.0}
LATER = 20  # updates after the last fault


def train_with(name: str, moments: tuple[int, ...], kind: str, dtype: str) -> dict[str, Any]:
    """Train a small network for 120 updates; return whether it survived, how often a step was taken back, and α at all
    updates."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(DTYPES[dtype])
    params = list(model.parameters())
    optimizer: ELRA | ELRASpectral
    if kind in SPECTRAL:
        optimizer = ELRASpectral(params, momentum=SPECTRAL[kind])
    else:
        optimizer = ELRA(params, memory=kind, stochastic_rounding=dtype == "bfloat16")
    finite, losses, alphas = True, [], []
    for number in range(120):
        inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(number))
        if number in moments and name == "a batch of zeros":
            inputs.zero_()
        optimizer.zero_grad()
        loss = (model(inputs.to(DTYPES[dtype])).float() - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        told = loss.item()
        if number not in moments or name != "a batch of zeros":
            losses.append(told)
        if number in moments:
            told = FAULTS[name](told, [p.grad for p in params if p.grad is not None])
        optimizer.step(loss=told)
        alphas.append(optimizer.alpha)
        if number % 20 == 19:
            optimizer.end_cycle()
        tensors = [*params, *(v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))]
        finite &= all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    learnt = sum(losses[-10:]) < 0.5 * sum(losses[:10])
    counts = {name: optimizer.metrics[name] for name in ("restarts", "skipped", "accepted_levels")}
    return {"finite": finite, "learnt": learnt, **counts, "alphas": alphas}


def faults(every: int) -> list[dict[str, Any]]:
    """Every fault at every moment in every layout, or one in ``every`` of these runs."""
    kinds = [*((layout, dtype) for layout in LAYOUTS for dtype in DTYPES), *((kind, "float32") for kind in SPECTRAL)]
    usual = functools.cache(lambda kind, dtype: train_with("none", (), kind, dtype)["alphas"])
    results = []
    for (kind, dtype), name, (moment, updates) in islice(product(kinds, FAULTS, MOMENTS.items()), 0, None, every):
        result = train_with(name, updates, kind, dtype)
        later = updates[-1] + LATER
        recovery = result.pop("alphas")[later] / usual(kind, dtype)[later]
        about = {"fault": name, "moment": moment, "optimizer": kind, "dtype": dtype, "alpha_later": recovery}
        results.append({**about, **result})
    print(f"{len(results)} runs with faults", file=sys.stderr)
    return results


def returns(memory: str, dtype: str) -> dict[str, Any]:
    """Take 200 steps of a vector and one of them back at a time; how many of its elements are where they were?

    α is at its lower bound, so that nothing is left of the step that is tried again.
    """
    generator = torch.Generator().manual_seed(0)
    elements = exact = 0
    for _ in range(200):
        x = torch.randn(500, generator=generator).to(DTYPES[dtype]).requires_grad_()
        optimizer = ELRA(
            [x], lr=1e-30, lr_bounds=(1e-30, 1e-2), min_step_norm=1e-1, max_first_step=None, memory=memory,
            stochastic_rounding=dtype == "bfloat16",
        )  # fmt: skip
        before = x.detach().clone()
        x.grad = torch.randn(500, generator=generator).to(DTYPES[dtype])
        optimizer.step(loss=1.0)
        x.grad = torch.ones_like(x)
        optimizer.param_groups[0]["scalars"]["alpha"] = 1e-30
        optimizer.step(loss=math.nan)
        elements += x.numel()
        exact += int((x == before).sum())
    return {"memory": memory, "dtype": dtype, "elements": elements, "exact": exact}


# ---- processes ----

MESHES = (
    ("FSDP2, 2 processes", 2, ([2], "data", "gradient")),
    ('FSDP2, 2 processes, memory="point"', 2, ([2], "data", "point")),
    ("tensor parallel, 2 processes", 2, ([2], "tensor", "gradient")),
    ("HSDP, 2 x 2 processes", 4, ([2, 2], "data", "gradient")),
)


def processes() -> list[dict[str, Any]]:
    """DDP in a Trainer and shards on meshes, beside one process."""
    results: list[dict[str, Any]] = []
    one: dict[str, Any] = {}
    for number in (1, 2, 4):
        found = together(many_processes.data_parallel, number, batch=8 // number)
        one = one or found
        distance = apart(one["weights"], found["weights"])
        same = all(found[name] == one[name] for name in ("updates", "restarts", "non_finite", "batches"))
        survived = same and found["differing"] == 0 and distance < 1e-5
        if number > 1:
            survived = survived and found["reductions"] == found["updates"]
        name = f"DDP, {number} x batch {8 // number}"
        told = {key: value for key, value in found.items() if key != "weights"}
        results.append({"name": name, **told, "apart": distance, "survived": survived})
        print(f"{name}: {'as one process' if survived else 'NOT as one process'}", file=sys.stderr)
    for name, number, case in MESHES:
        (found,) = together(many_processes.sharded, number, cases=[case])
        before, after = found["restarts"]
        survived = before == after and found["apart"] < 1e-5
        results.append({"name": name, "updates": 20, **found, "restarts": after, "survived": survived})
        print(f"{name}: {'as one process' if survived else 'NOT as one process'}", file=sys.stderr)
    return results


# ---- all of it ----


def main(words: list[str]) -> int:
    """Do everything; print the tables."""
    given = parse(words)
    path = Path(given.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("error")
    results = {"command": shlex.join(["python", *sys.argv]), **environment("cpu"), "seed": given.seed}
    if "faults" in given.parts:
        results["faults"] = faults(given.every)
        results["returns"] = [returns(memory, dtype) for memory in LAYOUTS for dtype in DTYPES]
        write_json(path, results)
    if "processes" in given.parts:
        results["processes"] = processes()
        write_json(path, results)
    if "kills" in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            results["kills"] = kill_often(given, Path(folder))
        write_json(path, results)
    text, survived = tables(read_json(path))
    print(text)
    return 0 if survived else 1


def recovery(runs: list[dict[str, Any]]) -> str:
    """How large α is after a fault, beside α of the run without it."""
    ratios = [run["alpha_later"] for run in runs]
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return f"{statistics.median(ratios):.2f}, {tenths[0]:.2f} to {tenths[-1]:.2f}"


def tables(results: dict[str, Any]) -> tuple[str, bool]:
    """The results as text, and whether everything survived."""
    parts, survived = [], True
    if "faults" in results:
        rows = []
        for optimizer, is_mine in (("elra", lambda r: r["optimizer"] in LAYOUTS),
                                   ("elra_spectral", lambda r: r["optimizer"] in SPECTRAL)):  # fmt: skip
            for name in FAULTS:
                mine = [result for result in results["faults"] if result["fault"] == name and is_mine(result)]
                if not mine:
                    continue
                good = sum(result["finite"] and result["learnt"] for result in mine)
                survived = survived and good == len(mine)
                counts = [str(sum(result[count] for result in mine)) for count in ("restarts", "skipped")]
                rows.append([optimizer, name, str(len(mine)), str(good), *counts, recovery(mine)])
        heads = ["optimizer", "fault", "runs", "survived", "restarts", "skipped"]
        parts.append(markdown_table([*heads, "α 20 updates later, of that without: median, middle 80 %"], rows))
        rows = [[f'"{r["memory"]}"', r["dtype"], f"{r['exact']:,} of {r['elements']:,}"] for r in results["returns"]]
        survived = survived and all(r["exact"] == r["elements"] for r in results["returns"] if r["memory"] == "point")
        parts.append(markdown_table(["memory", "parameters", "elements back at the very same value"], rows))
    if "processes" in results:
        rows = []
        for r in results["processes"]:
            survived = survived and r["survived"]
            rows.append(
                [
                    r["name"], str(r["updates"]), str(r["restarts"]), str(r.get("reductions") or ""),
                    str(r.get("differing", "")), f"{r['apart']:.1e}", "yes" if r["survived"] else "NO",
                ]
            )  # fmt: skip
        heads = ["processes", "updates", "restarts", "reductions of gradients", "updates after which ranks differ"]
        parts.append(markdown_table([*heads, "from one process", "as one process"], rows))
    if "kills" in results:
        killed = results["kills"]
        survived = survived and killed["weights_identical"]
        parts.append(
            f"{killed['updates']} updates, killed {killed['kills']} times (SIGKILL) and resumed: weights identical to "
            f"those of the run without: {'yes' if killed['weights_identical'] else 'NO'}; checkpoints that a kill cut "
            f"short, and that were passed over: {killed['checkpoints_cut_short']}"
        )
    return "\n\n".join(parts), survived


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
