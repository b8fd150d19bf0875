"""The paper's tables on image classifiers: which runs they consist of, and the files their results are kept in.

A run is one configuration and one seed; its JSON lines file begins with command, machine and versions and has one line
an epoch. A finished run is not repeated. Printing and arguments are in ``scripts/experiments/reproduce.py``.
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

from hf_elra.control.batch_size import CONDITIONS, BatchSizeController
from hf_elra.errors import ConfigurationError
from hf_elra.optim import ELRA
from hf_elra.recipes.image_data import ImageSplits
from hf_elra.recipes.image_models import ARCHITECTURES
from lib import light_loop


@dataclass(frozen=True)
class Configuration:
    """One column of a table.

    Attributes:
        name: of its files.
        title: its heading.
        optimizer: ``elra``, ``adam``, ``lion`` or ``sgd``.
        lr: first or constant learning rate.
        weight_decay: ELRA's, a share per update.
        gradient_decay: the paper's FT.
        conditions: on which ELRA's batch grows.
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
    conditions: tuple[str, ...] = CONDITIONS
    micro_batch: int = 32
    initial_accumulation: int = 2
    epochs: int = 100
    paper: str = ""


def image_columns(papers: dict[str, str]) -> tuple[Configuration, ...]:
    """The columns of Tables 3 and 4; ``papers`` holds the paper's numbers by name."""
    constant: Any = {"micro_batch": 256, "initial_accumulation": 1}
    columns = (
        Configuration("elra", "ELRA"),
        Configuration("elra-ft", "ELRA+FT", gradient_decay=True),
        Configuration("adam", "Adam", "adam", 1e-3, **constant),
        Configuration("lion", "Lion", "lion", 1e-4, **constant),
        Configuration("elra-wd", "ELRA+WD", weight_decay=3e-4, epochs=200),
        Configuration("elra-wd-ft", "ELRA+WD+FT", weight_decay=3e-4, gradient_decay=True, epochs=200),
    )
    return tuple(dataclasses.replace(column, paper=papers.get(column.name, "")) for column in columns)


@dataclass(frozen=True)
class Table:
    """One of the paper's rows of results.

    Attributes:
        architecture: one of ``image_models.ARCHITECTURES``.
        hub: name of the data set on the hub.
        augmentation: of the training images.
        columns: the runs.
    """

    architecture: str
    hub: str
    augmentation: str
    columns: tuple[Configuration, ...]


# "Actually, we suspect that (3) alone might suffice as a control mechanism" (section 3.3).
_STALL_ALONE = Configuration(
    "elra-wd-stall", "ELRA+WD, growth by condition (3) alone", weight_decay=3e-4, conditions=("stall",), epochs=200
)


def _papers(*numbers: str) -> dict[str, str]:
    return dict(zip(("elra", "elra-ft", "adam", "lion", "elra-wd", "elra-wd-ft"), numbers, strict=True))


_MNIST = _papers("94.25 ± 0.21", "94.41 ± 0.10", "93.90 ± 0.56", "93.82 ± 0.49", "94.70 ± 0.25", "94.67 ± 0.19")
_FASHION = _papers("92.58 ± 0.13", "92.71 ± 0.11", "92.37 ± 0.14", "92.48 ± 0.13", "92.77 ± 0.08", "93.31 ± 0.10")
_C10_R18 = _papers("94.34 ± 0.14", "94.11 ± 0.07", "93.01 ± 0.10", "92.77 ± 0.10", "94.83 ± 0.65", "95.77 ± 0.16")
_C10_R34 = _papers("94.54 ± 0.19", "94.09 ± 0.42", "93.26 ± 0.07", "93.04 ± 0.13", "94.77 ± 0.77", "95.80 ± 0.08")
_C10_WRN = _papers("95.11 ± 0.11", "94.86 ± 0.15", "", "", "96.21 ± 0.10", "96.21 ± 0.03")
_C100_R18 = _papers("73.99 ± 0.38", "74.05 ± 0.30", "70.22 ± 0.31", "70.24 ± 0.16", "78.12 ± 0.16", "79.35 ± 0.16")

# The paper takes SGD's results from DeVries & Taylor; here it runs on the same images: Nesterov momentum 0.9, weight
# decay 5e-4, batch 128, a rate of 0.1 divided by 5 after 60, 120 and 160 of 200 epochs.
SGD_MILESTONES = (0.3, 0.6, 0.8)
_SGD = Configuration("sgd", "SGD+WD", "sgd", 0.1, micro_batch=128, initial_accumulation=1, epochs=200)
_SGD_C10 = dataclasses.replace(_SGD, paper="95.28 ± 0.21")

TABLES: dict[str, Table] = {
    "mnist": Table("mnist-mlp", "mnist", "none", (*image_columns(_MNIST), _STALL_ALONE)),
    "fashion-mnist": Table("fashion-cnn", "fashion_mnist", "flip", (*image_columns(_FASHION), _STALL_ALONE)),
    "cifar10-resnet18": Table("resnet18", "cifar10", "flip+crop", (*image_columns(_C10_R18), _SGD_C10)),
    "cifar10-resnet34": Table("resnet34", "cifar10", "flip+crop", (*image_columns(_C10_R34), _SGD)),
    "cifar10-wrn": Table(
        "wrn-28-10", "cifar10", "flip+crop",
        (*image_columns(_C10_WRN), dataclasses.replace(_SGD, paper="96.13 ± 0.08")),
    ),
    "cifar100-resnet18": Table(
        "resnet18", "cifar100", "flip+crop",
        (*image_columns(_C100_R18), dataclasses.replace(_SGD, paper="77.54 ± 0.31")),
    ),
    "alpha0": Table(
        "mnist-mlp", "mnist", "none",
        tuple(Configuration(f"elra-{10.0**k:.0e}", f"α_0 = {10.0**k:.0e}", lr=10.0**k) for k in range(-8, 1)),
    ),
}  # fmt: skip
"""By name: CIFAR's are for a GPU."""


def build_network(table: str, data: ImageSplits, seed: int) -> torch.nn.Module:
    """The untrained network of a table for these images, on their device."""
    torch.manual_seed(seed)
    channels, _, size = data.train.shape
    return ARCHITECTURES[TABLES[table].architecture](channels, size, len(data.classes)).to(data.train.images.device)


def build_optimizer(configuration: Configuration, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of one column."""
    if configuration.optimizer == "elra":
        paper: Any = {"max_relative_step": None}
        return ELRA(parameters, lr=configuration.lr, weight_decay=configuration.weight_decay, **paper)
    if configuration.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=configuration.lr)
    if configuration.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=configuration.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
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
    """Train one configuration with one seed and write its epochs to ``path``; a finished run is left alone.

    Raises:
        ConfigurationError: ``path`` holds a finished run on other images or of other length.
    """
    if is_finished(path, epochs, data.name):
        return
    model = build_network(table, data, seed)
    ours = configuration.optimizer == "elra"
    controller = None
    if ours:
        controller = BatchSizeController(configuration.initial_accumulation, conditions=configuration.conditions)
    data.train.seed = seed
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = build_optimizer(configuration, model.parameters())
    schedule = None
    if configuration.optimizer == "sgd":
        milestones = [round(share * epochs) for share in SGD_MILESTONES]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=1 / 5)
    with path.open("w", encoding="utf-8") as file:
        about = {
            **header,
            "images": data.name,
            "lossy_copy": data.lossy_copy,
            "seed": seed,
            "epochs": epochs,
            "configuration": dataclasses.asdict(configuration),
        }
        print(json.dumps(about), file=file, flush=True)
        results = light_loop.train(
            model,
            data.train,
            data.test,
            optimizer,
            epochs=epochs,
            micro_batch=configuration.micro_batch,
            controller=controller,
            gradient_decay=configuration.gradient_decay,
            boost_every=10,
            seed=seed,
        )
        for result in results:
            if schedule is not None:
                schedule.step()
            if result.epoch % max(1, epochs // 5) == 0 and result.epoch < epochs:
                show(f"{table} {configuration.name} seed {seed}: epoch {result.epoch} of {epochs}")
            print(json.dumps(dataclasses.asdict(result)), file=file, flush=True)
    best = max(reported_accuracy(about, result) for result in read(path)[1])
    show(f"{table} {configuration.name} seed {seed}: best test accuracy {100 * best:.2f} %")


def alphas_of_first_epoch(table: str, configuration: Configuration, data: ImageSplits, seed: int) -> list[float]:
    """The first learning rate and the one in force after every update of the first epoch (Fig. 2a)."""
    model = build_network(table, data, seed)
    optimizer = build_optimizer(configuration, model.parameters())
    assert isinstance(optimizer, ELRA)
    alphas = [configuration.lr]
    optimizer.register_step_post_hook(lambda *_: alphas.append(optimizer.alpha))
    controller = BatchSizeController(configuration.initial_accumulation)
    next(light_loop.train(model, data.train, data.test, optimizer, epochs=1, controller=controller, seed=seed))
    return alphas


def reported_accuracy(header: dict[str, Any], epoch: dict[str, Any]) -> float:
    """The accuracy that the paper reports: with boosting for ELRA, without it for the others."""
    boosted = header["configuration"]["optimizer"] == "elra" and epoch["boosted_accuracy"] is not None
    return float(epoch["boosted_accuracy"] if boosted else epoch["test_accuracy"])


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and epochs of a run's file."""
    header, *epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return header, epochs


def is_finished(path: Path, epochs: int, images: str) -> bool:
    """Whether the file holds a run of so many epochs on these images to its end.

    Raises:
        ConfigurationError: it holds a finished run, but another one, which is not to be lost.
    """
    if not path.is_file():
        return False
    try:
        header, done = read(path)
    except ValueError:
        return False
    if len(done) < header["epochs"]:
        return False
    before = header.get("images", images)
    if header["epochs"] != epochs or before != images:
        raise ConfigurationError(
            f"{path} holds a finished run of {header['epochs']} epochs on {before}, not of {epochs} on {images}; "
            "choose another --output, or remove it."
        )
    return True


@dataclass(frozen=True)
class Summary:
    """Means and standard deviations over seeds, in per cent.

    Attributes:
        seeds, epochs: what they are over.
        lossy_copy: the images were a compressed copy, so that nothing published compares.
        best: best test accuracy of a run's epochs, as in the paper (:func:`reported_accuracy`); it picks the epoch by
            the test images.
        last: the same after the last epoch.
        other: after the last epoch, boosted where ``last`` is not and the other way round.
        batch: batch size at the end.
    """

    seeds: int
    epochs: int
    lossy_copy: bool
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
        any(header.get("lossy_copy", False) for header, _ in runs),
        spread([max(reported_accuracy(header, e) for e in epochs) for header, epochs in runs]),
        spread([reported_accuracy(header, epochs[-1]) for header, epochs in runs]),
        spread([_other_accuracy(header, epochs[-1]) for header, epochs in runs]),
        statistics.mean(epochs[-1]["batch"] for _, epochs in runs),
    )


def _other_accuracy(header: dict[str, Any], epoch: dict[str, Any]) -> float:
    both = [float(epoch[name]) for name in ("test_accuracy", "boosted_accuracy") if epoch[name] is not None]
    return sum(both) - reported_accuracy(header, epoch) if len(both) == 2 else both[0]
