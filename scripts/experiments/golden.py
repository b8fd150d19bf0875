"""Golden paths: what the optimizers and the Trainer do, bit by bit, on small problems.

``--write`` records every case of this file under ``tests/golden``; ``--check`` walks them again and prints every
difference, as ``tests/test_golden.py`` does. Cases use public names only. On the same CPU, with the same versions, a
path is the same to the last bit. Anywhere else only its first updates are compared, to the tolerances of ``APART``. A
number that is logged now but was not then is no difference.

To see whether a change keeps the paths on another machine: ``--write`` before it, ``--check`` after it.
"""

# ruff: noqa: E402 - the project's own modules are found by a path that is set here

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import io
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.conftest import (  # noqa: I001 - first, as it sets what the libraries read
    classifier, llama, padded, ragged_rows, token_rows, trainer, vit, vit_rows, weights,
)  # fmt: skip

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_elra import ELRA, ELRASpectral, WeightAverage
from lib.ready import together

FOLDER = ROOT / "tests" / "golden"
APART = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 1e-1}
"""How far numbers may be apart on another machine, by the type that a case computes in."""
FIRST = 3
"""Updates that are compared on another machine."""
POINTS = (1, 2, 3, 5, 8, 11, 12, 14, 19, 23, 27, 31, 36, 45)
"""Updates of a bare loop that are recorded."""
METRICS = (2, 12, 27, 45)
"""Those of them with all metrics."""
NOT_THE_PATH = ("seconds", "samples_seen", "tokens_seen", "share", "at_floor", "cropped", "at_ceiling")
"""What logs say of a run's progress and of limits; the path itself shows the limits."""
SPIKE, NAN_LOSS, NAN_GRADIENT, NOTHING, NEW_LEVEL = 13, 18, 22, 26, 32
"""Updates in which something happens; from the last one on every loss is higher by ``HIGHER`` where there is noise."""
HIGHER = 30.0
CYCLE = 10
WORDS, WIDTH, EXPERTS = 12, 6, 2


# ---- cases in a bare loop ----


@dataclass(frozen=True)
class Loop:
    """A bare loop, of 45 updates if not said otherwise, with trouble in it.

    ``parts``: the embedding is a group of its own, with half the rate and other weight decay. ``rests``: a parameter
    has no gradient in every third update. ``kinds``: the optimizer is told embeddings and experts. ``mean``: power of a
    ``WeightAverage``, ``"cycle"`` for none.
    """

    name: str
    optimizer: type
    given: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    parts: bool = False
    kinds: bool = False
    frozen: bool = False
    rests: bool = False
    noisy: bool = True
    quiet: bool = False
    schedule: bool = False
    gradient_decay: float = 1.0
    reload: bool = False
    mean: int | str | None = None
    updates: int = POINTS[-1]


def loops() -> Iterator[Loop]:
    """Every case in a bare loop."""
    exact = {"noise_correction": 0.0, "restart_window": 50}
    elra = [
        Loop("plain", ELRA),
        Loop("point", ELRA, {"memory": "point", "weight_decay": 3e-4}),
        Loop("offload", ELRA, {"memory": "offload"}),
        Loop("one tensor at a time", ELRA, {"foreach": False, "capturable": True}),
        Loop("bb1 without noise", ELRA, exact, noisy=False),
        Loop("bb2 without noise", ELRA, {**exact, "step_rule": "bb2"}, noisy=False),
        Loop("paper's formula", ELRA, {"restart_formula": "paper"}),
        Loop("paper's formula without noise", ELRA, {"restart_formula": "paper", **exact}, noisy=False),
        Loop("window", ELRA, {"restart_window": 5, "restart_sigma": 2.0, "initial_restart_ratio": None}),
        Loop("no soft restart", ELRA, {"soft_restart": False}),
        Loop("crop and floor", ELRA, {"min_step_norm": 0.05, "max_step_norm": 0.1}),
        Loop("no relative crop", ELRA, {"max_relative_step": None, "max_first_step": None, "lr": 0.1}),
        Loop("bounds", ELRA, {"max_growth": 2.0, "lr_bounds": (1e-4, 0.05)}),
        Loop("schedule", ELRA, {"weight_decay": 1e-3}, schedule=True),
        Loop("gradient decay", ELRA, {"min_step_norm": 0.05}, gradient_decay=0.4),
        Loop("two groups", ELRA, {"weight_decay": 1e-3}, parts=True),
        Loop("frozen and resting", ELRA, frozen=True, rests=True),
        Loop("round trip", ELRA, {"memory": "point"}, reload=True),
        Loop("mean of a cycle", ELRA, mean="cycle"),
        Loop("mean of the run", ELRA, mean=8),
    ]
    spectral = [
        Loop("plain", ELRASpectral),
        Loop("kinds", ELRASpectral, kinds=True),
        Loop("no momentum", ELRASpectral, {"momentum": 0.0}, kinds=True),
        Loop("no warm-up", ELRASpectral, {"warmup": 0, "lr": 1e-2}, kinds=True),
        Loop("long warm-up", ELRASpectral, {"warmup": 20, "lr": 1e-7}, kinds=True, quiet=True),
        Loop("crop", ELRASpectral, {"max_relative_step": 0.02, "warmup": 5}, quiet=True),
        Loop("bounds", ELRASpectral, {"lr_bounds": (1e-4, 2e-3), "warmup": 0}),
        Loop("no soft restart", ELRASpectral, {"soft_restart": False, "initial_restart_ratio": None}),
        Loop("weight decay", ELRASpectral, {"weight_decay": 0.1, "warmup": 4}),
        Loop("schedule", ELRASpectral, {"warmup": 4}, schedule=True, kinds=True),
        Loop("gradient decay", ELRASpectral, {"warmup": 4}, gradient_decay=0.4),
        Loop("two groups", ELRASpectral, {"weight_decay": 0.1}, parts=True, kinds=True),
        Loop("frozen and resting", ELRASpectral, {"warmup": 4}, frozen=True, rests=True, kinds=True),
        Loop("round trip", ELRASpectral, reload=True, kinds=True),
        Loop("round trip in the warm-up", ELRASpectral, {"warmup": 12}, reload=True),
        Loop("mean of the run", ELRASpectral, kinds=True, quiet=True, mean=8),
    ]
    for case in elra + spectral:
        prefix = "elra" if case.optimizer is ELRA else "elra_spectral"
        for dtype in ("float64", "float32"):
            yield replace(case, name=f"{prefix}, {case.name}, {dtype}", dtype=dtype)
    rounding = {"stochastic_rounding": True}
    yield Loop("elra, bfloat16", ELRA, dtype="bfloat16")
    yield Loop("elra, stochastic rounding", ELRA, rounding, dtype="bfloat16")
    yield Loop("elra_spectral, bfloat16", ELRASpectral, dtype="bfloat16", kinds=True)
    yield Loop("elra_spectral, stochastic rounding", ELRASpectral, {**rounding, "weight_decay": 0.1}, dtype="bfloat16")
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():  # in Triton's interpreter
        yield Loop("elra, kernels", ELRA, {"fused": True}, dtype="float32", parts=True, updates=19)
        yield Loop("elra, kernels, stochastic rounding", ELRA, {"fused": True, **rounding}, "bfloat16", updates=2)


class Network(nn.Module):
    """Predicts the next of twelve words; with an embedding, experts, a vector and something that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.hidden = nn.Linear(WIDTH, 8)
        self.experts = nn.Parameter(torch.randn(EXPERTS, 8, 8) / 3)
        self.gain = nn.Parameter(torch.ones(8))
        self.output = nn.Linear(8, WORDS, bias=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, words: Tensor) -> Tensor:
        """Scores of the next word, of one expert a batch."""
        inner = torch.tanh(self.hidden(self.embedding(words))) * self.gain
        return self.output(inner + torch.tanh(inner @ self.experts[words[0] % EXPERTS]))


def batch_of(case: Loop, number: int, rank: int) -> tuple[Tensor, Tensor]:
    """Words and the next ones, some of which are wrong where there is noise."""
    words = torch.arange(WORDS)
    if not case.noisy:
        return words, (words + 1) % WORDS
    generator = torch.Generator().manual_seed(1000 * rank + number)
    words = torch.randint(0, WORDS, (16,), generator=generator)
    wrong = torch.rand(16, generator=generator) < 0.1
    return words, torch.where(wrong, torch.randint(0, WORDS, (16,), generator=generator), (words + 1) % WORDS)


def optimizer_of(case: Loop, model: Network) -> Any:
    """A new optimizer of the case."""
    given = dict(case.given)
    if case.kinds:
        given |= {"embeddings": [model.embedding.weight, model.output.weight], "experts": [model.experts]}
        given["outputs"] = [model.output.weight]
    params: list[Any] = list(model.parameters())
    if case.parts:
        lr, decay = given.get("lr", 1e-3), given["weight_decay"] / 2 if "weight_decay" in given else 0.0
        params = [{"params": params[1:]}, {"params": params[:1], "lr": lr / 2, "weight_decay": decay}]
    return case.optimizer(params, **given)


def walk(case: Loop, rank: int = 0, processes: int = 1) -> list[dict[str, Any]]:
    """Walk a bare loop; what happens to one process happens to the last one."""
    torch.manual_seed(0)
    model = Network().to(getattr(torch, case.dtype))
    if case.frozen:
        model.hidden.weight.requires_grad_(False)
    optimizer = optimizer_of(case, model)
    mean = None if case.mean is None else WeightAverage(model, power=None if case.mean == "cycle" else int(case.mean))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n / 20)) if case.schedule else None
    points = []
    for number in range(1, case.updates + 1):
        happens = 0 if case.quiet or rank < processes - 1 else number
        words, following = batch_of(case, number, rank)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(words).double(), following)
        loss = loss * (20.0 if happens == SPIKE else 0.0 if happens == NOTHING else 1.0)
        loss = loss + (HIGHER if number >= NEW_LEVEL and case.noisy and not case.quiet else 0.0)
        loss.backward()
        if processes > 1:
            optimizer.process_group = dist.group.WORLD
            for p in model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= processes
        if happens == NAN_GRADIENT:
            model.output.weight.grad[1, 2] = math.nan
        if case.rests and number % 3 == 0:
            model.gain.grad = None
        optimizer.gradient_decay = case.gradient_decay if number > 5 else 1.0
        optimizer.step(loss=loss.detach() * (math.nan if happens in (NAN_LOSS, NOTHING) else 1.0))
        if schedule is not None:
            schedule.step()
        if mean is not None and number % 2:
            mean.add()
        if number % CYCLE == 0:
            optimizer.end_cycle()
            if mean is not None:
                mean.end_cycle()
        if number in POINTS:
            point = {"update": number, **summary(weights(model)), "alpha": optimizer.alpha}
            point |= {"restarts": optimizer.restarts}
            if number in METRICS:
                point["metrics"] = dict(optimizer.metrics)
            if mean is not None:
                point["mean"] = summary(torch.cat([m.reshape(-1) for m in mean.mean.values()]))
            points.append(point)
        if case.reload and number == 15:
            saved = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
            saved.seek(0)
            loaded = torch.load(saved, weights_only=True)
            model = Network().to(getattr(torch, case.dtype))
            model.load_state_dict(loaded["model"])
            optimizer = optimizer_of(case, model)
            optimizer.load_state_dict(loaded["optimizer"])
    return points


def summary(vector: Tensor) -> dict[str, Any]:
    """A hash of all numbers, and three of them."""
    some = vector[[0, len(vector) // 2, len(vector) - 5]].double().tolist()
    return {"hash": hashlib.sha256(vector.view(torch.uint8).numpy().tobytes()).hexdigest()[:16], "values": some}


# ---- cases in a Trainer ----


@dataclass(frozen=True)
class Training:
    """A training of a tiny model by an ElraTrainer; ``resume``: a checkpoint after so many updates is gone on from."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], Any] = llama
    rows: Callable[[], Any] = token_rows
    evaluates: bool = False
    spike: int | None = None
    resume: int | None = None
    dtype: str = "float32"


SPECTRAL = {"optim": "elra_spectral", "max_steps": 20, "optim_args": "warmup=6"}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 4}
GROWS = {
    "elra_control_cycle": "2ba",
    "elra_batch_growth": 2.0,
    "elra_max_batch_size": 24,
    "per_device_train_batch_size": 4,
    "max_steps": 18,
}
MERGES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "elra_max_micro_batch": "8"}
RAGGED: dict[str, Any] = {"rows": ragged_rows}
NOISE: dict[str, Any] = {"rows": lambda: noise_rows()}
TRAININGS = [
    Training("elra", {**EVALUATES, "optim_args": "max_step_norm=1"}, evaluates=True, spike=7),
    Training("elra, dropout", model=lambda: llama(attention_dropout=0.2)),
    Training("elra, classifier", model=lambda: classifier(num_labels=2), rows=lambda: sentence_rows()),
    Training("elra, images", {"gradient_accumulation_steps": 2, "elra_batch_control": "off"}, vit, vit_rows),
    Training("elra, float64", GROWS, model=lambda: llama().double(), dtype="float64", **NOISE),
    Training("elra, schedule of the rate", {"lr_scheduler_type": "cosine", "weight_decay": 1e-3}),
    Training("elra, accumulation", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    Training("elra, epochs", {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 6}),
    Training("elra, batch elra", GROWS, **NOISE),
    Training("elra, gradient decay", {**GROWS, "elra_gradient_decay": True}, **NOISE),
    Training(
        "elra, batch noise",
        {**GROWS, "elra_batch_control": "noise", "gradient_accumulation_steps": 2},
        **NOISE,
    ),
    Training("elra, batch schedule", {"elra_batch_control": "schedule", "elra_batch_schedule": "0:1,0.3:2,0.6:3"}),
    Training("elra, samples", {"elra_max_samples": 100, "elra_log_noise_scale": True, **MERGES}),
    Training("elra, merging", MERGES),
    Training("elra, merging rows of many lengths", MERGES, **RAGGED),
    Training("elra, boosting a cycle", {**EVALUATES, "elra_boost": True, "elra_control_cycle": "4ba"}, evaluates=True),
    Training("elra, boosting the run", {**EVALUATES, "elra_boost_mean": "run"}, evaluates=True),
    Training("elra, resumed", {**GROWS, "elra_boost": True}, resume=9, **NOISE),
    Training("elra_spectral", {"optim": "elra_spectral", "max_steps": 24}, spike=17),
    Training("elra_spectral, evaluation in the warm-up", {**SPECTRAL, **EVALUATES}, evaluates=True),
    Training("elra_spectral, no mean", {**SPECTRAL, "elra_boost_mean": "off", "lr_scheduler_type": "cosine"}),
    Training("elra_spectral, no momentum", {**SPECTRAL, "optim_args": "momentum=0,warmup=5"}),
    Training("elra_spectral, batch linear", {**SPECTRAL, "elra_batch_control": "linear"}),
    Training("elra_spectral, merging", {**SPECTRAL, **MERGES}, **RAGGED),
    Training("elra_spectral, resumed", {**SPECTRAL, "weight_decay": 0.1}, resume=13),
    Training("elra_spectral, saved in the warm-up", {**SPECTRAL, "save_steps": 6}, resume=12),
    Training("adamw, batch elra and boosting", {"optim": "adamw_torch", "elra_batch_control": "elra", **GROWS,
                                                "elra_boost": True, "max_grad_norm": 1.0}, **NOISE),
    Training("sgd, gradient decay", {"optim": "sgd", "learning_rate": 0.1, "elra_batch_control": "elra", **GROWS,
                                     "elra_gradient_decay": True}, **NOISE),
]  # fmt: skip


def sentence_rows() -> list[dict[str, Any]]:
    """Rows of tokens, whose class is whether the first token is above the middle."""
    return [{"input_ids": row["input_ids"], "labels": int(row["input_ids"][0] > 31)} for row in token_rows()]


def noise_rows() -> list[dict[str, Tensor]]:
    """Rows of which nothing can be learned, so that batches grow."""
    tokens = torch.randint(0, 64, (128, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def padded_with_targets(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As ``padded`` does, without a label of the first token."""
    batch = padded(rows)
    batch["labels"][:, 0] = -100
    return batch


class Spike(TrainerCallback):
    """From one update on a loss ten times as high, for that update."""

    def __init__(self, model: nn.Module, update: int) -> None:
        self.update, self.scale = update, 1.0
        model.register_forward_hook(self.after)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note whether this update is the one."""
        self.scale = 10.0 if state.global_step + 1 == self.update else 1.0

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Of the model's forward pass."""
        if module.training and self.scale != 1:
            output["loss"] = output["loss"] * self.scale


def train(case: Training) -> list[dict[str, Any]]:
    """Train, and go on from a checkpoint where the case says so."""
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"max_steps": 12, **case.given}
        if case.resume:
            given = {"save_strategy": "steps", "save_steps": case.resume, **given}
        checkpoints = [None, f"{folder}/checkpoint-{case.resume}"] if case.resume else [None]
        return [record for checkpoint in checkpoints for record in train_once(case, folder, given, checkpoint)]


def train_once(case: Training, folder: str, given: dict[str, Any], checkpoint: str | None) -> list[dict[str, Any]]:
    """Train once; the logs without times, and the weights.

    Two things that versions of Transformers do not agree on are settled here: matrices begin with values of our own,
    and the first token, which is no target, has no label, so that it is not counted.
    """
    model = case.model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 50)
    rows = case.rows()
    for row in rows:
        if case.rows is not ragged_rows and isinstance(row["labels"], Tensor):
            row["labels"] = torch.cat([torch.tensor([-100]), row["labels"][1:]])
    own: dict[str, Any] = {"eval_dataset": rows[:16]} if case.evaluates else {}
    if case.rows is ragged_rows:
        own["data_collator"] = padded_with_targets
    if case.spike:
        own["callbacks"] = [Spike(model, case.spike)]
    run = trainer(folder, model=model, rows=rows, **given, **own)
    run.train(resume_from_checkpoint=checkpoint)
    if dist.is_initialized():
        run.accelerator.wait_for_everyone()
    logs = [
        {key: value for key, value in entry.items() if not key.endswith(("_runtime", "_per_second", *NOT_THE_PATH))}
        for entry in run.state.log_history
        if "elra" not in entry  # of a single update
    ]
    return [*copy.deepcopy(logs), {"step": None, **summary(weights(run.model))}]


# ---- two processes ----

TOGETHER: list[Loop | Training] = [
    Training("elra, in a Trainer", {**GROWS, "per_device_train_batch_size": 2}, spike=7, **NOISE),
    Training("elra_spectral, in a Trainer", {**SPECTRAL, "per_device_train_batch_size": 4}),
    Loop("elra, in a bare loop", ELRA),
    Loop("elra_spectral, in a bare loop", ELRASpectral, kinds=True),
]


def walk_together() -> dict[str, list[dict[str, Any]]]:
    """Be one of two processes that walk the cases of ``TOGETHER``; what it recorded."""
    torch.set_num_threads(1)
    records = {}
    for case in TOGETHER:
        if isinstance(case, Training):
            records[case.name] = train(case)
            continue
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        records[case.name] = walk(case, dist.get_rank(), dist.get_world_size())
    return records


# ---- recording and comparing ----

LOOPS = {case.name: case for case in loops()}
BY_NAME = {"loops": LOOPS, "trainings": {case.name: case for case in TRAININGS},
           "processes": {case.name: case for case in TOGETHER}}  # fmt: skip
"""File → name → case."""


def walked(file: str, name: str) -> list[dict[str, Any]]:
    """Walk one case on this process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), np.errstate(all="ignore"):  # numpy: of Triton
            warnings.simplefilter("ignore")
            case = BY_NAME[file][name]
            found = walk(case) if isinstance(case, Loop) else train(case)
    finally:
        torch.set_num_threads(threads)
    return json.loads(json.dumps(found))


def machine() -> dict[str, str]:
    """What bits depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""),
    }


def recorded(file: str) -> dict[str, Any]:
    """The content of a file."""
    return json.loads((FOLDER / f"{file}.json").read_text(encoding="utf-8"))


def is_exact(file: str) -> bool:
    """Whether this machine is as that of the recording; Transformers does not count in bare loops."""
    there, here = recorded(file)["recorded_with"], machine()
    return all(there[key] == here[key] for key in here if key != "transformers" or file != "loops")


def write(file: str, cases: dict[str, list[dict[str, Any]]]) -> None:
    """Write a file, one line a point."""
    texts = []
    for name, records in cases.items():
        lines = ",\n".join(f"   {json.dumps(record)}" for record in records)
        texts.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    whole = ",\n".join(texts)
    FOLDER.mkdir(exist_ok=True)
    text = f'{{\n "recorded_with": {json.dumps(machine())},\n "cases": {{\n{whole}\n }}\n}}\n'
    (FOLDER / f"{file}.json").write_text(text, encoding="utf-8")


def differences(file: str, name: str, found: list[dict[str, Any]]) -> list[str]:
    """What is not as it was recorded, in words."""
    was, exact, apart = recorded(file)["cases"][name], is_exact(file), APART[BY_NAME[file][name].dtype]
    if exact and len(was) != len(found):
        return [f"{len(found)} records, not {len(was)}"]
    differing = []
    for before, now in zip(was, found, strict=False):
        moment = before.get("update", before.get("step"))
        if exact:
            differing += [f"{moment}: {text}" for text in _unlike(before, now, None)]
        elif moment is not None and moment <= FIRST:
            differing += [f"{moment}: {text}" for text in _unlike(before, now, apart)]
    return differing


def _unlike(before: Any, now: Any, apart: float | None) -> Iterator[str]:
    """What of ``before`` is not so now; numbers may be ``apart``, None for not at all."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before:
            yield from (f"{key}: {text}" for text in _unlike(before[key], now.get(key, "nothing"), apart))
    elif isinstance(before, list) and isinstance(now, list) and apart is not None:
        for one, other in zip(before, now, strict=True):
            yield from _unlike(one, other, apart)
    elif repr(before) != repr(now):  # repr: NaN is NaN
        is_hash = isinstance(before, str) and isinstance(now, str)
        are_numbers = isinstance(before, int | float) and isinstance(now, int | float)
        if apart is None or not (is_hash or are_numbers):
            yield f"{now}, not {before}"
        elif are_numbers and not math.isclose(before, now, rel_tol=apart, abs_tol=apart / 10):
            yield f"{now}, not near {before}"


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="record every case under tests/golden")
    what.add_argument("--check", action="store_true", help="compare every case with what was recorded")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="the others stay as they were recorded")
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for file, cases in BY_NAME.items():
        found = together(walk_together, 2) if file == "processes" else {name: walked(file, name) for name in cases}
        if given.only is not None:
            found = {name: records for name, records in found.items() if name in given.only}
        if given.write and found:
            write(file, {**(recorded(file)["cases"] if given.only else {}), **found})
        if given.write:
            continue
        print(f"{file}: {len(found)} cases, {'to the last bit' if is_exact(file) else f'first {FIRST} updates'}")
        for name, records in found.items():
            differing = differences(file, name, records)
            failed += bool(differing)
            print("".join(f"{name}: {text}\n" for text in differing[:5]), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
