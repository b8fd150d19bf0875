"""elra_spectral with nothing chosen beside constant rates of its own direction and beside AdamW, on small tasks.

    python scripts/experiments/no_rate.py --output docs/results/no_rate/no_rate.jsonl --bundle gpu-bundle/rate \\
        --stories stories --sst2 sst2 \\
        --shakespeare tinyshakespeare/input.txt --german multi30k/train.de.gz --seeds 0 1 2

Tasks: a Llama of width 64 from scratch on stories (batches of 4, 16, 64); that Llama, trained for 1,024 updates on the
first half of the stories, trained further on tinyshakespeare and on German captions; and with a fresh head on SST-2,
whole and by LoRA. Every run is one line, written at once; the same command makes what is missing. ``--bundle``: see
``rate_scan_bundle.py``. ``--only TASK…`` and ``--rows ours constant adamw`` choose.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from hf_elra.optim.averaging import WeightAverage
from hf_elra.optim.directions.spectral import embeddings_of
from hf_elra.optim.spectral import ELRASpectral
from hf_elra.recipes import text_data
from hf_elra.report.environment import environment
from rate_scan import SETTINGS, Lane, LoRALinear, Stories, order

WIDTH, POSITIONS, PIECES, SENTENCES = 64, 128, 1024, 4000
OF_SENTENCES = 64
"""Tokens of a sentence."""


@dataclass(frozen=True)
class Trained:
    """What is trained.

    Attributes:
        text: what on.
        batch, updates: of a run; the mean is evaluated at a third of them, too.
        begins: ``"new"`` or ``"trained"``.
        rank: of LoRA; 0 for none.
        constant, adamw: grids of rates.
    """

    text: str
    batch: int
    updates: int
    begins: str = "new"
    rank: int = 0
    constant: tuple[float, ...] = ()
    adamw: tuple[float, ...] = ()


NEW = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
GENTLE = (6e-5, 2e-4, 6e-4, 2e-3)
ADAMW = (1e-3, 3e-3, 1e-2)
TASKS = {
    "scratch, batch 4": Trained("stories", 4, 384, constant=NEW, adamw=ADAMW),
    "scratch, batch 16": Trained("stories", 16, 384, constant=NEW, adamw=ADAMW),
    "scratch, batch 64": Trained("stories", 64, 96, constant=NEW, adamw=ADAMW),
    "shakespeare": Trained("shakespeare", 16, 192, "trained", constant=GENTLE, adamw=(3e-4, 1e-3, 3e-3, 1e-2)),
    "german": Trained("german", 16, 192, "trained", constant=GENTLE, adamw=(3e-4, 1e-3, 3e-3, 1e-2)),
    "sst2": Trained("sst2", 16, 192, "trained", constant=GENTLE, adamw=(1e-4, 3e-4, 1e-3, 3e-3)),
    "sst2, LoRA": Trained("sst2", 16, 192, "trained", rank=8, constant=GENTLE, adamw=(3e-4, 1e-3, 3e-3, 1e-2)),
}


class Data:
    """All data as tokens of one byte-level BPE, which is made of the stories."""

    def __init__(self, given: argparse.Namespace) -> None:
        texts = text_data.load_texts(
            train_file=str(given.stories / "train.txt.gz"), validation_file=str(given.stories / "validation.txt.gz")
        )
        tokenizer: PreTrainedTokenizerFast = text_data.train_tokenizer(texts.train, PIECES)
        self.blocks: dict[str, tuple[Tensor, Tensor]] = {}
        plain = given.shakespeare.read_text("utf-8").split("\n\n")
        with gzip.open(given.german, "rt", encoding="utf-8") as file:
            german = file.read().split("\n")
        for name, documents in (("shakespeare", plain), ("german", german[:23_000])):
            blocks = self._blocks(tokenizer, documents)
            number = len(blocks) * 9 // 10
            self.blocks[name] = blocks[:number], blocks[number:][:512]
        self.sentences = {}
        for name, number in (("train", SENTENCES), ("dev", None)):
            with gzip.open(given.sst2 / f"{name}.tsv.gz", "rt", encoding="utf-8") as file:
                rows = [line.rstrip("\n").split("\t") for line in file][1:]
            chosen = np.random.default_rng(0).permutation(len(rows))[:number] if number else range(len(rows))
            ids = [tokenizer(rows[k][1])["input_ids"][:OF_SENTENCES] for k in chosen]
            padded = torch.tensor([row + [0] * (OF_SENTENCES - len(row)) for row in ids])
            labels = torch.tensor([int(rows[k][0]) for k in chosen])
            self.sentences[name] = padded, torch.tensor([len(row) for row in ids]), labels

    @staticmethod
    def _blocks(tokenizer: Any, documents: list[str]) -> Tensor:
        ids = tokenizer("\n\n".join(documents))["input_ids"]
        number = len(ids) // POSITIONS
        return torch.tensor(ids[: number * POSITIONS]).view(number, POSITIONS)


class Llama(Stories):
    """A small Llama on one of the texts, or with a fresh head on sentences."""

    def __init__(self, task: Trained, given: argparse.Namespace, data: Data, start: Path) -> None:
        super().__init__(SETTINGS["llama-width64"], given.bundle, "cpu", tiny=False)
        self.trained, self.start, self.data = task, start, data
        if task.text in data.blocks:
            self.train, self.validation = data.blocks[task.text]
        self.size = SENTENCES if task.text == "sst2" else len(self.train)

    def model(self, seed: int) -> nn.Module:
        """Make or load it."""
        model: Any = super().model(seed)
        if self.trained.begins == "trained":
            model.load_state_dict(torch.load(self.start))
        torch.manual_seed(seed)
        if self.trained.rank:
            model.requires_grad_(False)
            for parent in list(model.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is nn.Linear and name != "lm_head":
                        setattr(parent, name, LoRALinear(child, self.trained.rank))
        if self.trained.text == "sst2":
            model.score = nn.Linear(WIDTH, 2)
        return model

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Nats a token, or cross-entropies."""
        if self.trained.text != "sst2":
            return super().losses(model, rows)
        ids, lengths, labels = (part[rows] for part in self.data.sentences["train"])
        return functional.cross_entropy(self._logits(model, ids, lengths), labels, reduction="none")

    def _logits(self, model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        mask = self.mask[:, :, :OF_SENTENCES, :OF_SENTENCES].expand(len(ids), -1, -1, -1)
        places = self.places[:, :OF_SENTENCES].expand(len(ids), -1)
        hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=places).last_hidden_state
        counts = (torch.arange(OF_SENTENCES)[None] < lengths[:, None]).float()[..., None]
        logits: Tensor = model.score((hidden * counts).sum(1) / counts.sum(1))
        return logits

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation loss, and accuracy of classes."""
        if self.trained.text != "sst2":
            return super().evaluate(model)
        ids, lengths, labels = self.data.sentences["dev"]
        logits = self._logits(model, ids, lengths)
        hits = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": functional.cross_entropy(logits, labels).item(), "accuracy": hits}


# ---- runs ----


def with_a_constant_rate(task: Llama, seed: int, rate: float, *, adamw: bool = False) -> dict[str, Any]:
    """Train with the direction of elra_spectral at a constant rate, or with AdamW, clipping and a cosine to zero."""
    updates = task.trained.updates
    lane = Lane(task, task.model(seed), task.trained.batch, updates, adamw=adamw)
    rates = [rate * (0.5 + 0.5 * math.cos(math.pi * t / updates)) if adamw else rate for t in range(updates)]
    lane.reset(rates, seed, decay=0.1 if adamw else 0.0, beta2=0.95 if adamw else 0.999)
    found: dict[str, Any] = {}
    for number in range(1, updates + 1):
        lane.next()
        if number in (updates // 3, updates):
            found[str(number)] = lane.evaluate(last=True)
    return {"found": found}


def with_nothing_chosen(task: Llama, seed: int, _: Any) -> dict[str, Any]:
    """Train with elra_spectral as a user gets it."""
    trained, model = task.trained, task.model(seed)
    params = [p for p in model.parameters() if p.requires_grad]
    pairs = [(m.A, m.B, m.scale) for m in model.modules() if isinstance(m, LoRALinear)]
    optimizer = ELRASpectral(params, embeddings=[p for p in embeddings_of(model) if p.requires_grad], adapters=pairs)
    optimizer.updates_per_epoch = task.size // trained.batch
    lane = Lane(task, model, trained.batch, trained.updates)  # for its evaluation
    average, found, rates = WeightAverage(model, power=8), {}, []
    names = {id(p): name for name, p in model.named_parameters()}
    for number, rows in enumerate(order(task.size, trained.batch, trained.updates, seed), start=1):
        loss = task.losses(model, rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())
        average.add()
        rates.append(optimizer.alpha)
        if number in (trained.updates // 3, trained.updates):
            lane.mean = [average.mean[names[id(p)]] for p in params]
            found[str(number)] = lane.evaluate(last=True)
    marks = {str(k): rates[k - 1] for k in (1, 12, trained.updates // 3, trained.updates)}
    return {"found": found, "alpha": marks, "restarts": optimizer.restarts}


ROWS: dict[str, Callable[[Llama, int, Any], dict[str, Any]]] = {
    "ours": with_nothing_chosen,
    "constant": with_a_constant_rate,
    "adamw": lambda task, seed, rate: with_a_constant_rate(task, seed, rate, adamw=True),
}


def wanted(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is to be run, the first seed of everything first."""
    for seed, name, row in itertools.product(given.seeds, given.only, given.rows):
        grid = {"ours": (None,), "constant": TASKS[name].constant, "adamw": TASKS[name].adamw}[row]
        for rate in grid:
            yield {"task": name, "row": row, "rate": rate, "seed": seed}


def trained_llama(given: argparse.Namespace, data: Data) -> Path:
    """Return the file of a Llama that was trained for 1,024 updates on the first half of the stories."""
    file: Path = given.output.parent / "trained_llama.pt"
    if not file.exists():
        task = Llama(Trained("stories", 16, 1024), given, data, file)
        task.train = task.train[: len(task.train) // 2]
        task.size = len(task.train)
        model: Any = task.model(0)
        optimizer = ELRASpectral(model.parameters(), embeddings=embeddings_of(model))
        average = WeightAverage(model, power=8)
        for number, rows in enumerate(order(task.size, 16, 1024, 0), start=1):
            loss = task.losses(model, rows).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss.detach())
            average.add()
            if number % 128 == 0:
                print(f"the model to train further: update {number}, loss {loss:.3f}", flush=True)
        average.put()
        torch.save(model.state_dict(), file)
    return file


def table(lines: list[str]) -> str:
    """Return a table of the mean's loss at the end, and accuracy: one row a task, the mean of what seeds there are."""
    runs: dict[tuple[str, str, float | None], list[dict[str, float]]] = {}
    for run in map(json.loads, lines):
        end = list(run["found"].values())[-1]["mean"]
        runs.setdefault((run["task"], run["row"], run["rate"]), []).append(end)

    def cell(ends: list[dict[str, float]]) -> str:
        loss = f"{sum(end['loss'] for end in ends) / len(ends):.3f}"
        if "accuracy" in ends[0]:
            loss += f", {sum(end['accuracy'] for end in ends) / len(ends):.1%}"
        return loss + (f" ({len(ends)})" if len(ends) > 1 else "")

    rows = ["| task | elra_spectral | constant rate: loss | AdamW, cosine: loss |", "|---|---:|---|---|"]
    for task in TASKS:
        cells = []
        for row in ROWS:
            of_row = [(rate, cell(ends)) for (name, kind, rate), ends in runs.items() if (name, kind) == (task, row)]
            cells.append(" · ".join(text if rate is None else f"{rate:g}: {text}" for rate, text in of_row) or "–")
        rows.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(words: list[str]) -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("output", "file of JSON lines"), ("bundle", "folder of rate_scan_bundle.py"), ("stories", "folder of texts"),
        ("sst2", "folder of train.tsv.gz and dev.tsv.gz"), ("shakespeare", "text"), ("german", "text, gzip"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", required=True, type=Path, help=what)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--print", action="store_true", help="only the table of what is there")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    lines = given.output.read_text("utf-8").splitlines() if given.output.exists() else []
    if given.print:
        print(table(lines))
        return 0
    keys = ("task", "row", "rate", "seed")
    done = [{key: line[key] for key in keys} for line in map(json.loads, lines)]
    data = Data(given)
    start = trained_llama(given, data)
    for run in wanted(given):
        if run in done:
            continue
        begun = time.perf_counter()
        task = Llama(TASKS[run["task"]], given, data, start)
        result = {**run, **ROWS[run["row"]](task, run["seed"], run["rate"])}
        result |= {"seconds": round(time.perf_counter() - begun, 1), **environment("cpu")}
        with given.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        end = list(result["found"].values())[-1]["mean"]
        print(f"{run}: {end}, {result['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
