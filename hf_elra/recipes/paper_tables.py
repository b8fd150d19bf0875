"""The paper's tables on small networks: which runs they consist of, and the files their results are kept in.

A run is one configuration and one seed; its JSON lines file begins with command, machine and versions and has one line
an epoch. A finished run is not repeated. Printing and arguments are in ``scripts/reproduce.py``.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_elra.control.batch_size import BatchSizeController
from hf_elra.errors import ConfigurationError
from hf_elra.optim import ELRA
from hf_elra.recipes import light_loop
from hf_elra.recipes.image_data import ImageSplits
from hf_elra.recipes.image_models import ARCHITECTURES


@dataclass(frozen=True)
class Configuration:
    """One column of a table.

    Attributes:
        name: of its files.
        title: its heading.
        optimizer: ``elra``, ``adam`` or ``lion``.
        lr: first or constant learning rate.
        weight_decay: ELRA's, a share per update.
        gradient_decay: the paper's FT.
        micro_batch, initial_accumulation: the first batch is their product; it grows for ELRA alone.
        epochs: in the paper.
        paper: the paper's mean and standard deviation, where it has them.
    """

    name: str
    title: str
    optimizer: str = "elra"
    lr: float = 1e-3
    weight_decay: float = 0.0
    gradient_decay: bool = False
    micro_batch: int = 32
    initial_accumulation: int = 2
    epochs: int = 100
    paper: str = ""


def image_table(papers: dict[str, str]) -> tuple[Configuration, ...]:
    """The columns of Tables 3 and 4."""
    return (
        Configuration("elra", "ELRA", paper=papers["elra"]),
        Configuration("elra-ft", "ELRA+FT", gradient_decay=True, paper=papers["elra-ft"]),
        Configuration("adam", "Adam", "adam", 1e-3, micro_batch=256, initial_accumulation=1, paper=papers["adam"]),
        Configuration("lion", "Lion", "lion", 1e-4, micro_batch=256, initial_accumulation=1, paper=papers["lion"]),
        Configuration("elra-wd", "ELRA+WD", weight_decay=3e-4, epochs=200, paper=papers["elra-wd"]),
        Configuration(
            "elra-wd-ft", "ELRA+WD+FT", weight_decay=3e-4, gradient_decay=True, epochs=200, paper=papers["elra-wd-ft"]
        ),
    )


TABLES: dict[str, tuple[str, str, tuple[Configuration, ...]]] = {
    "mnist": (
        "mnist-mlp",
        "none",
        image_table(
            {
                "elra": "94.25 ± 0.21",
                "elra-ft": "94.41 ± 0.10",
                "adam": "93.90 ± 0.56",
                "lion": "93.82 ± 0.49",
                "elra-wd": "94.70 ± 0.25",
                "elra-wd-ft": "94.67 ± 0.19",
            }
        ),
    ),
    "fashion-mnist": (
        "fashion-cnn",
        "flip",
        image_table(
            {
                "elra": "92.58 ± 0.13",
                "elra-ft": "92.71 ± 0.11",
                "adam": "92.37 ± 0.14",
                "lion": "92.48 ± 0.13",
                "elra-wd": "92.77 ± 0.08",
                "elra-wd-ft": "93.31 ± 0.10",
            }
        ),
    ),
    "alpha0": (
        "mnist-mlp",
        "none",
        tuple(Configuration(f"elra-{10.0**k:.0e}", f"α_0 = {10.0**k:.0e}", lr=10.0**k) for k in range(-8, 1)),
    ),
}
"""Network, augmentation and columns of every table."""


def build_optimizer(configuration: Configuration, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of one column."""
    if configuration.optimizer == "elra":
        return ELRA(parameters, lr=configuration.lr, weight_decay=configuration.weight_decay)
    if configuration.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=configuration.lr)
    try:
        from lion_pytorch import Lion
    except ImportError:
        raise ConfigurationError("the column lion needs lion-pytorch: pip install 'hf_elra[peers]'.") from None
    optimizer: torch.optim.Optimizer = Lion(parameters, lr=configuration.lr)
    return optimizer


def run(
    table: str,
    configuration: Configuration,
    data: ImageSplits,
    *,
    seed: int,
    epochs: int,
    path: Path,
    header: dict[str, Any],
    show: Callable[[str], None] = print,
) -> None:
    """Train one configuration with one seed and write its epochs to ``path``; a finished run is left alone."""
    if is_finished(path, epochs):
        return
    architecture = TABLES[table][0]
    torch.manual_seed(seed)
    channels, size = data.train.images.shape[1], data.train.images.shape[-1]
    model = ARCHITECTURES[architecture](channels, size, len(data.classes)).to(data.train.images.device)
    ours = configuration.optimizer == "elra"
    controller = BatchSizeController(configuration.initial_accumulation) if ours else None
    data.train.seed = seed
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        about = {**header, "seed": seed, "epochs": epochs, "configuration": dataclasses.asdict(configuration)}
        print(json.dumps(about), file=file, flush=True)
        results = light_loop.train(
            model,
            data.train,
            data.test,
            build_optimizer(configuration, model.parameters()),
            epochs=epochs,
            micro_batch=configuration.micro_batch,
            controller=controller,
            gradient_decay=configuration.gradient_decay,
            boost_every=10,
            seed=seed,
        )
        for result in results:
            print(json.dumps(dataclasses.asdict(result)), file=file, flush=True)
    best = max(reported_accuracy(about, result) for result in read(path)[1])
    show(f"{table} {configuration.name} seed {seed}: best test accuracy {100 * best:.2f} %")


def reported_accuracy(header: dict[str, Any], epoch: dict[str, Any]) -> float:
    """The accuracy that the paper reports: with boosting for ELRA, without it for the others."""
    boosted = header["configuration"]["optimizer"] == "elra" and epoch["boosted_accuracy"] is not None
    return float(epoch["boosted_accuracy"] if boosted else epoch["test_accuracy"])


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and epochs of a run's file."""
    header, *epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return header, epochs


def is_finished(path: Path, epochs: int) -> bool:
    """Whether the file holds a run of so many epochs to its end."""
    if not path.is_file():
        return False
    try:
        header, done = read(path)
    except ValueError:
        return False
    return header["epochs"] == epochs and len(done) == epochs


@dataclass(frozen=True)
class Summary:
    """Means and standard deviations over seeds, in per cent.

    Attributes:
        seeds, epochs: what they are over.
        best: best test accuracy of a run's epochs, as in the paper (:func:`reported_accuracy`); it picks the epoch by
            the test images.
        last: the same after the last epoch.
        other: after the last epoch, boosted where ``last`` is not and the other way round.
        batch: batch size at the end.
    """

    seeds: int
    epochs: int
    best: tuple[float, float]
    last: tuple[float, float]
    other: tuple[float, float]
    batch: float


def summarise(paths: list[Path]) -> Summary | None:
    """Summarise the finished runs among ``paths``; None without any."""
    runs = [read(path) for path in paths if path.is_file()]
    runs = [(header, epochs) for header, epochs in runs if len(epochs) == header["epochs"]]
    if not runs:
        return None

    def spread(values: list[float]) -> tuple[float, float]:
        return 100 * statistics.mean(values), 100 * (statistics.stdev(values) if len(values) > 1 else 0.0)

    return Summary(
        len(runs),
        min(header["epochs"] for header, _ in runs),
        spread([max(reported_accuracy(header, e) for e in epochs) for header, epochs in runs]),
        spread([reported_accuracy(header, epochs[-1]) for header, epochs in runs]),
        spread([_other_accuracy(header, epochs[-1]) for header, epochs in runs]),
        statistics.mean(epochs[-1]["batch"] for _, epochs in runs),
    )


def _other_accuracy(header: dict[str, Any], epoch: dict[str, Any]) -> float:
    both = [float(epoch[name]) for name in ("test_accuracy", "boosted_accuracy") if epoch[name] is not None]
    return sum(both) - reported_accuracy(header, epoch) if len(both) == 2 else both[0]
