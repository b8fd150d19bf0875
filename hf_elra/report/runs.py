"""Finds runs on disk and reads what they logged: finished ones, running ones, checkpoints, copies from elsewhere.

A run is a folder that holds :data:`~hf_elra.report.names.LOG_FILE` (any Trainer with the mixin), ``log_history.json``
(a finished recipe) or ``trainer_state.json`` (any Trainer, here or in a checkpoint). What a run's numbers mean is in
``verdicts.py``; how they are shown, in ``page.py`` and ``text.py``.
"""

from __future__ import annotations

import bisect
import json
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_elra.errors import ConfigurationError
from hf_elra.report.names import LOG, LOG_FILE, METRICS, SETTINGS, STATE

AXES = ("updates", "epochs", "samples", "tokens", "hours")
"""What curves can be drawn over."""
DEPTH = 3
"""Folders of runs are looked for so far below what was named."""
LIMITS = {"at_floor": "floor", "cropped": "crop", "at_ceiling": "ceiling"}
"""Logs that count updates whose rate was decided by a limit, and what the limit is called."""
OF_EVALUATION = ("runtime", "samples_per_second", "steps_per_second", "loss")
"""What ``eval_…`` says beside metrics."""
DESCRIBES = (
    *("optim", "learning_rate", "optim_args", "lr_scheduler_type", "weight_decay", "max_grad_norm"),
    *("model", "preset", "dataset", "text", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("elra_batch_control", "batch_control", "elra_boost", "num_train_epochs", "max_steps", "parameters", "processes"),
)
"""Facts by which runs are told apart; runs that differ in none of them but the seed are seeds of one another."""

ARGUMENTS = "training_args.bin"
OF_ARGUMENTS = ("optim", "seed", "learning_rate", "lr_scheduler_type", "per_device_train_batch_size")
"""What is read of a stock run's arguments."""

Point = tuple[float, float]
"""The number of an update, and a value."""


@dataclass
class Run:
    """What one run has logged.

    Attributes:
        folder: where it was found.
        history: the Trainer's log history.
        facts: what was run: optimizer, seed, model, machine, …, as far as files tell.
        most_updates: after which it was to end, as far as known.
    """

    folder: Path
    history: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    most_updates: int | None = None
    _known: dict[str, Any] = field(default_factory=dict, repr=False)  # series and axes, by name

    # ---- one number ----

    @property
    def name(self) -> str:
        """The folder's name; with its parent's for a checkpoint, whose own name says little."""
        folder = self.folder.absolute()
        return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name

    @property
    def optimizer(self) -> str:
        """Its name, or ``"?"``."""
        return str(self.facts.get("optim", "elra" if self.series("alpha") else "?"))

    @property
    def is_ours(self) -> bool:
        """Whether its optimizer is one of this package."""
        return bool(self.series("alpha"))

    @cached_property
    def updates(self) -> int:
        """How many updates the log covers."""
        return int(max((entry.get("step", 0) for entry in self.history), default=0))

    @cached_property
    def finished(self) -> bool:
        """Whether training has ended."""
        ended = METRICS in self.facts.get("files", ()) or any("train_loss" in entry for entry in self.history)
        return ended or (self.most_updates is not None and self.updates >= self.most_updates)

    @property
    def share(self) -> float | None:
        """How much of what was planned is done, less than all where training was stopped; None where nothing tells."""
        if shares := self.series("share"):
            return shares[-1][1]
        if self.finished:
            return 1.0
        return self.updates / self.most_updates if self.most_updates else None

    def last(self, key: str) -> float | None:
        """The last finite value of a log; None without one."""
        values = [value for _, value in self.series(key) if math.isfinite(value)]
        return values[-1] if values else None

    # ---- series ----

    def series(self, key: str) -> list[Point]:
        """All numbers that were logged under ``key``, with their updates."""
        if key not in self._known:
            self._known[key] = [
                (float(entry["step"]), float(entry[key]))
                for entry in self.history
                if isinstance(entry.get(key), (int, float)) and not isinstance(entry[key], bool) and "step" in entry
            ]
        found: list[Point] = self._known[key]
        return found

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the logs that evaluations have beside the loss."""
        names = {key for entry in self.history for key in entry if key.startswith("eval_")}
        return sorted(name for name in names if not name.endswith(OF_EVALUATION) and self.series(name))

    @cached_property
    def beginning(self) -> list[dict[str, Any]]:
        """The first updates, which were logged one by one."""
        return [entry for entry in self.history if entry.get("elra") == "first"]

    @cached_property
    def taken_back(self) -> list[float]:
        """The updates whose step before was taken back.

        Where that was not logged one by one, it is the update of the log that counted it.
        """
        told = [
            float(entry["step"])
            for entry in self.history
            if entry.get("elra") == "restart" or (entry.get("elra") == "first" and entry.get("taken_back"))
        ]
        counted = self.series("restarts")
        if told or not counted:
            return told
        found: list[float] = []
        before = 0.0
        for step, count in counted:
            found += [step] * max(0, round(count - before))
            before = max(before, count)
        return found

    @cached_property
    def limits(self) -> dict[str, list[tuple[float, float, float]]]:
        """By limit, where it was in force: first update, last update, the share of the updates between them.

        Logs one after the other with the same share are one stretch, and so are those of a hundredth of a long run.
        """
        return {name: self._stretches(list(self._shares(key))) for key, name in LIMITS.items() if self.series(key)}

    def _stretches(self, shares: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
        found: list[tuple[float, float, float]] = []
        for first, last, share in shares:
            before = found[-1] if found else (0.0, -1.0, 0.0)
            is_short = len(shares) > 200 and last - before[0] <= self.updates / 100
            if before[1] == first and (before[2] == share or is_short):
                mean = (before[2] * (first - before[0]) + share * (last - first)) / (last - before[0])
                found[-1] = before[0], last, mean
            else:
                found.append((first, last, share))
        return found

    def _shares(self, key: str) -> Iterator[tuple[float, float, float]]:
        before = 0.0
        for entry in self.history:
            if "loss" not in entry or entry["step"] <= before:
                continue
            if entry.get(key):
                yield before, float(entry["step"]), min(1.0, entry[key] / (entry["step"] - before))
            before = float(entry["step"])

    @cached_property
    def batch_changes(self) -> list[dict[str, Any]]:
        """Decisions about the batch that changed it: ``step``, ``batch_size``, ``condition``, ``change``.

        One at the very end of a run changed no update.
        """
        changed = [entry for entry in self.history if entry.get("change") in ("grow", "shrink")]
        return [entry for entry in changed if entry["step"] < self.updates or not self.finished]

    @cached_property
    def batch(self) -> list[Point]:
        """Samples of an update, where they are controlled."""
        told = [(float(entry["step"]), float(entry["batch_size"])) for entry in self.batch_changes]
        # A log says how large the update before it was, a decision how large those after it are.
        logged = [(float(e["step"]), float(e["batch_size"])) for e in self.history if "loss" in e and "batch_size" in e]
        first = [(0.0, logged[0][1])] if logged else []
        return sorted([*first, *logged, *told], key=lambda point: point[0])

    def speed(self, unit: str) -> list[Point]:
        """Samples or tokens per second from log to log, evaluations between them included."""
        found: list[Point] = []
        before: tuple[float, float] | None = None
        for entry in self.history:
            done = _of(entry, unit)
            if done is None or "seconds" not in entry or "loss" not in entry:
                continue
            now = float(entry["seconds"]), done
            if before is not None and now[0] > before[0] and now[1] > before[1]:
                found.append((float(entry["step"]), (now[1] - before[1]) / (now[0] - before[0])))
            before = now
        return found

    # ---- what curves are drawn over ----

    def axis(self, name: str) -> Callable[[float], float] | None:
        """Return what tells the position of an update on an axis; None where the log does not say."""
        if name == "updates":
            return float
        if (key := f"axis {name}") not in self._known:
            self._known[key] = self._axis(name)
        found: Callable[[float], float] | None = self._known[key]
        return found

    def _axis(self, name: str) -> Callable[[float], float] | None:
        known = [(0.0, 0.0)]
        for entry in self.history:
            value = _of(entry, name)
            if value is not None and entry.get("step", 0) > known[-1][0] and value >= known[-1][1]:
                known.append((float(entry["step"]), value))
        if len(known) == 1 or known[-1][1] == 0:
            return None
        steps = [step for step, _ in known]

        def position(step: float) -> float:
            right = min(max(bisect.bisect_left(steps, step), 1), len(known) - 1)
            (x0, y0), (x1, y1) = known[right - 1], known[right]
            return y0 + (y1 - y0) * (step - x0) / (x1 - x0)

        return position


KEYS: dict[str, tuple[str, ...]] = {
    "epochs": ("epoch",), "samples": ("samples_seen",), "tokens": ("tokens_seen", "num_input_tokens_seen"),
    "hours": ("seconds",),
}  # fmt: skip
"""Which logs say where on an axis an entry lies."""


def _of(entry: dict[str, Any], axis: str) -> float | None:
    """Where an entry lies on an axis."""
    for key in KEYS[axis]:
        value = entry.get(key)
        if isinstance(value, (int, float)) and value > 0:
            return value / 3600 if axis == "hours" else float(value)
    return None


def running_mean(points: list[Point]) -> list[Point]:
    """The mean of each point and of those around it, over a twentieth of all; near the ends over fewer.

    Of very many points there are some 600 means.
    """
    reach, stride = max(2, len(points) // 40), max(1, len(points) // 600)
    means: list[Point] = []
    for position in (*range(0, len(points) - 1, stride), *range(len(points) - 1, len(points))):
        near = min(reach, position, len(points) - 1 - position)  # as many before as after: a trend stays in its place
        values = [v for _, v in points[position - near : position + near + 1] if math.isfinite(v)]
        if values:
            means.append((points[position][0], sum(values) / len(values)))
    return means


# ---- several runs ----


@dataclass
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: what tells it from the other groups.
        runs: in the order in which they were named.
    """

    label: str
    runs: list[Run]


def grouped(runs: list[Run]) -> list[Group]:
    """Group runs that are seeds of one another, and label the groups by what they differ in."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        told = {name: run.facts[name] for name in DESCRIBES if name in run.facts}
        # Where files do not say what was run, nothing says either that two runs are seeds of one another.
        key = json.dumps(told, sort_keys=True, default=str) if "seed" in run.facts else str(run.folder)
        groups.setdefault(key, []).append(run)
    firsts = [members[0] for members in groups.values()]
    labels, apart = [run.name for run in firsts], 1
    told_by: list[str] = []
    for name in DESCRIBES:  # by as few facts as tell them apart
        with_it = [_label(run, [*told_by, name]) for run in firsts]
        if len(set(with_it)) > apart:
            labels, apart = with_it, len(set(with_it))
            told_by.append(name)
        if apart == len(labels):
            break
    if len(set(labels)) < len(labels):
        labels = [run.name for run in firsts]
    if len(set(labels)) < len(labels):
        labels = [str(run.folder) for run in firsts]
    return [Group(label, members) for label, members in zip(labels, groups.values(), strict=True)]


def _label(run: Run, told_by: list[str]) -> str:
    told = [(name, run.facts[name]) for name in told_by if name in run.facts]
    values = [(name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in told]
    return ", ".join(text if name in ("optim", "model") else f"{name} {text}" for name, text in values) or run.name


def median_and_band(curves: list[list[Point]], count: int = 120) -> list[tuple[float, float, float, float]]:
    """Return x, lowest, median and highest value of several curves, at ``count`` positions that all of them reach."""
    curves = [[p for p in curve if math.isfinite(p[1])] for curve in curves]
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if high < low:
        return []
    own = sorted({x for curve in curves for x, _ in curve if low <= x <= high})
    if len(own) > count:
        own = [low + (high - low) * i / (count - 1) for i in range(count)]
    band = []
    for x in own:
        values = sorted(_at(curve, x) for curve in curves)
        middle = len(values) // 2
        median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
        band.append((x, values[0], median, values[-1]))
    return band


def _at(curve: list[Point], x: float) -> float:
    """The value of a curve at x, between its points on a line."""
    right = bisect.bisect_left(curve, (x, -math.inf))
    if right == len(curve) or curve[right][0] == x or right == 0:
        return curve[min(right, len(curve) - 1)][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


# ---- files ----


def find_runs(paths: list[str]) -> list[Run]:
    """Read the runs in folders: a run's own, a checkpoint, or one that holds several runs.

    Raises:
        ConfigurationError: a path holds no run, or one that has logged nothing yet.
    """
    runs: dict[Path, Run] = {}
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise ConfigurationError(f"{text!r} does not exist; name the output folder of a run.")
        if not path.is_dir():
            raise ConfigurationError(f"{text!r} is a file; name the folder of the run that it belongs to.")
        folders = list(_folders_of_runs(path, DEPTH))
        if not folders:
            raise ConfigurationError(
                f"{text!r} holds no run: there is no {LOG_FILE} and no {STATE} in it, nor in the folders below. Name "
                "the output folder of a run, or one of its checkpoints."
            )
        found = [run for run in map(read_run, folders) if run.history]
        if not found:
            raise ConfigurationError(
                f"{text!r} holds a run that has logged nothing yet; look again after its first log, or pass a smaller "
                "--logging_steps if it has ended."
            )
        for run in found:
            runs.setdefault(run.folder.resolve(), run)
    return list(runs.values())


def _folders_of_runs(path: Path, depth: int) -> Iterator[Path]:
    if _logs_of(path):
        yield path
    elif depth > 0:
        for below in sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink()):
            yield from _folders_of_runs(below, depth - 1)


def _logs_of(folder: Path) -> list[Path]:
    """The files of a folder that may hold log histories, those of its checkpoints last and the newest of them first."""
    found = [file for name in (LOG_FILE, LOG, STATE) if (file := folder / name).is_file()]
    numbered = [
        (int(match[1]), path / STATE)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE).is_file()
    ]
    return [*found, *(file for _, file in sorted(numbered, reverse=True))]


def read_run(folder: Path) -> Run:
    """Read one run; of several logs in its folder the one that covers most."""
    best: tuple[tuple[int, int], list[dict[str, Any]]] | None = None
    facts: dict[str, Any] = {}
    most_updates: int | None = None
    for file in _logs_of(folder):
        content, most = _entries(file), None
        if isinstance(content, dict):
            content, most = content.get("log_history", []), content.get("max_steps") or None
        entries = [entry for entry in content if isinstance(entry, dict)]
        if entries and entries[0].get("elra") == "run":
            facts = {name: value for name, value in entries[0].items() if name != "elra" and value is not None}
            entries = entries[1:]
        covers = max((int(entry.get("step", 0)) for entry in entries), default=0), len(entries)
        if best is None or covers > best[0]:
            best, most_updates = (covers, entries), most
        if (arguments := file.parent / ARGUMENTS).is_file():
            facts = {**stock_arguments(arguments), **facts}
        if entries and file.parent != folder:  # older checkpoints cover less
            break
    # Of a checkpoint the settings are beside it.
    of_run = folder.absolute().parent if folder.absolute().name.startswith("checkpoint-") else folder
    for name in (SETTINGS, METRICS):
        told = _json(of_run / name) if (of_run / name).is_file() else None
        if isinstance(told, dict) and (name != METRICS or of_run == folder):
            settings = told.pop("settings", None)
            told = {**(settings if isinstance(settings, dict) else {}), **told}
            facts.update({key: value for key, value in told.items() if value is not None})
            facts.setdefault("files", []).append(name)
    return Run(folder, [] if best is None else best[1], facts, most_updates)


def stock_arguments(file: Path) -> dict[str, Any]:
    """Return some of the arguments in a Trainer's ``training_args.bin``: text and numbers, read without running it."""
    found: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        name = None
        for operation, value, _ in pickletools.genops(pickled):
            if operation.name in ("BINUNICODE", "SHORT_BINUNICODE") and value in OF_ARGUMENTS:
                name = value
            elif name is not None and operation.name.startswith(("BININT", "BINFLOAT", "BINUNICODE")):
                found[name], name = value, None
            elif operation.name not in ("BINPUT", "LONG_BINPUT", "GLOBAL"):
                name = None
    except (OSError, StopIteration, ValueError, zipfile.BadZipFile):
        return {}
    return found


def _entries(file: Path) -> Any:
    """The content of a log. Lines that are cut short, as the last one of a run that writes just now, are left out."""
    if file.suffix != ".jsonl":
        return _json(file) or []
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def _json(file: Path) -> Any:
    """The content of a JSON file; None for one that is cut short."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
