"""What the input pipeline and boosting cost beside the training of an image classifier.

    python scripts/experiments/benchmark_images.py --output docs/results/images/cpu.jsonl

Every round times the same number of updates three times in this process: on one ready batch, on batches made by the
pipeline (gathered, augmented, normalised), and with boosting on top, its mean taken every k-th update. Medians of the
rounds and their ratios are printed; every measurement is written to --output, one JSON line each, the first line being
command, machine and versions. The images are random: only speed is measured. --help lists all flags.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_elra import ELRA
from hf_elra.optim.averaging import WeightAverage
from hf_elra.recipes.image_data import ImageDataset
from hf_elra.recipes.image_models import ARCHITECTURES
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table

# Network: channels, size of the images, augmentation, number of images (that of the training set).
CASES = {
    "mnist-mlp": (1, 28, "none", 60_000),
    "fashion-cnn": (1, 28, "flip", 60_000),
    "resnet18": (3, 32, "flip+crop", 50_000),
}
KINDS = ("ready batch", "pipeline", "pipeline and boosting")


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file for the measurements, one JSON line each")
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="images an update")
    parser.add_argument("--updates", type=int, default=50, help="updates a measurement")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured")
    parser.add_argument("--boost_every", type=int, default=19, help="50 points in an epoch of MNIST at batch 64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def seconds_per_update(
    kind: str, model: torch.nn.Module, data: ImageDataset, rows: Tensor, batch: int, given: argparse.Namespace
) -> float:
    """Train for ``given.updates`` updates on ``rows`` and time them."""
    optimizer = ELRA(model.parameters())
    mean = WeightAverage(model) if kind == KINDS[2] else None
    ready = data.__getitems__(rows[:batch])  # type: ignore[arg-type]
    synchronise = torch.cuda.synchronize if given.device.startswith("cuda") else lambda: None
    synchronise()
    start = time.perf_counter()
    for number in range(given.updates):
        chosen = rows[number * batch : (number + 1) * batch]
        inputs = ready if kind == KINDS[0] else data.__getitems__(chosen)  # type: ignore[arg-type]
        loss = torch.nn.functional.cross_entropy(model(inputs["pixel_values"]), inputs["labels"])
        loss.backward()
        optimizer.step(loss=loss.detach())
        optimizer.zero_grad()
        if mean is not None and (number + 1) % given.boost_every == 0:
            mean.add()
    synchronise()
    return (time.perf_counter() - start) / given.updates


def main(words: list[str]) -> int:
    """Measure, write, print."""
    given = parse(words)
    path = Path(given.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with path.open("w", encoding="utf-8") as file:

        def write(**entry: Any) -> None:
            print(json.dumps(entry), file=file, flush=True)

        write(command=shlex.join(["python", *sys.argv]), **environment(given.device), seed=0)
        for name in given.networks:
            channels, size, augmentation, number = CASES[name]
            torch.manual_seed(0)
            images = torch.randint(0, 256, (number, channels, size, size), dtype=torch.uint8)
            data = ImageDataset(images, torch.randint(0, 10, (number,)), augmentation=augmentation).to(given.device)
            for batch in given.batches:
                model = ARCHITECTURES[name](channels, size, 10).to(given.device)
                measured: dict[str, list[float]] = {kind: [] for kind in KINDS}
                for turn in range(given.rounds + 1):
                    print(f"{name}, batch {batch}: round {turn} of {given.rounds}", file=sys.stderr)
                    chosen = torch.randint(0, number, (given.updates * batch,))
                    for kind in KINDS if turn % 2 else KINDS[::-1]:
                        seconds = seconds_per_update(kind, model, data, chosen, batch, given)
                        if turn:  # the first round warms up
                            measured[kind].append(seconds)
                            write(network=name, batch=batch, kind=kind, seconds_per_update=seconds)
                ready, pipeline, boosted = (statistics.median(measured[kind]) for kind in KINDS)
                rows.append(
                    [name, str(batch), f"{1000 * ready:.2f}", f"{pipeline / ready:.3f}", f"{boosted / pipeline:.3f}"]
                )
    header = ["network", "batch", "ms an update, ready batch", "with pipeline, ratio", "with boosting too, ratio"]
    print(markdown_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
