"""elra_spectral with nothing chosen beside constant rates of its own direction, and beside strong partners.

    python scripts/experiments/no_rate.py --output docs/results/no_rate/no_rate.jsonl --bundle gpu-bundle/rate \\
        --data data --seeds 0 1 2

Tasks: a Llama of width 64 from scratch on stories (batches of 4, 16, 64); that Llama, trained for 1,024 updates on the
first half of the stories, trained further on the same, on tinyshakespeare and on German captions, and with a fresh head
on SST-2, whole and by LoRA; MiniLM on SST-2, whole and by LoRA, and on captions; from scratch a BERT on SST-2, a BERT
and a ModernBERT that fill in masked tokens of stories, a ResNet-20 and a ViT on CIFAR-10, an MLP on MNIST, a CNN on
Fashion-MNIST, an LSTM and a Mamba on stories, a CNN that takes the noise off pictures, a network that learns a picture
from coordinates, a T5 that translates captions, and Llamas of other widths and depths.
Partners are those of ``lib/partners.py``. Every run is one line, written at once; the same command makes what is
missing. The row "times" is elra_spectral at multiples of the rate that suits the weights, without corrections by
slopes: whether that rate is the right one. ``--bundle``: see ``rate_scan_bundle.py``; ``--data``: a folder with
``stories``, ``sst2``, ``tinyshakespeare``, ``multi30k``, ``mnist`` and ``fashion_mnist``. ``--only TASK…`` and
``--rows ROW…`` choose; ``--best`` makes more seeds at the best rate of those that were run, ``--rates`` runs at others
than those of the grids.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from hf_elra.optim.averaging import POWER, WeightAverage, power_after_first_pass
from hf_elra.optim.base import Parts
from hf_elra.optim.directions.spectral import embeddings_of, outputs_of
from hf_elra.optim.rules import Measurement
from hf_elra.optim.rules.end_slopes import EndSlopes
from hf_elra.optim.spectral import ELRASpectral
from hf_elra.recipes import text_data
from hf_elra.report.environment import environment
from lib.encoder_tasks import Capitals, Masked, SameCaption, Sentiment
from lib.other_tasks import Coordinates, Denoising, GreyPictures, Recurrent, StateSpace
from lib.partners import PARTNERS, Training
from rate_scan import LORA_ALPHA, SETTINGS, Lane, LoRALinear, Pictures, Sentences, Stories, Task, evaluated, order

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
        rank, alpha: of LoRA; rank 0 for none.
        constant: rates of the same direction.
        adamw: rates of the partners that need one; Muon also has :data:`BEYOND` the largest, where new models are best.
        model: what it is, by a key of ``MODELS``.
        shape: of a Llama, by a key of rate_scan's settings.
        length: tokens of a sequence of stories.
        times: multiples of the rate that suits the weights.
        examples: how many there are for training, of SST-2 with MiniLM.
    """

    text: str
    batch: int
    updates: int
    begins: str = "new"
    rank: int = 0
    constant: tuple[float, ...] = ()
    adamw: tuple[float, ...] = ()
    model: str = "llama"
    examples: int = SENTENCES
    alpha: int = LORA_ALPHA
    shape: str = "llama-width64"
    length: int = POSITIONS
    times: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)


NEW = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
GENTLE = (6e-5, 2e-4, 6e-4, 2e-3)
ADAMW = (1e-3, 3e-3, 1e-2)
TUNING = (1e-4, 3e-4, 1e-3, 3e-3)
LORA = (3e-4, 1e-3, 3e-3, 1e-2)
ENCODER = (5e-5, 1e-4, 2e-4, 4e-4)
BEYOND = 3.0
"""Times the largest rate of a grid."""
TASKS = {
    "scratch, batch 4": Trained("stories", 4, 384, constant=NEW, adamw=ADAMW),
    "scratch, batch 16": Trained("stories", 16, 384, constant=NEW, adamw=ADAMW),
    "scratch, batch 64": Trained("stories", 64, 96, constant=NEW, adamw=ADAMW),
    "scratch, batch 256": Trained("stories", 256, 48),
    "batch 64, 384 updates": Trained("stories", 64, 384, times=(0.5, 1.0, 2.0)),
    "sequences of 1,024": Trained("stories", 2, 384, length=1024),
    "width 128": Trained("stories", 16, 384, shape="llama-width128"),
    "width 256": Trained("stories", 16, 384, shape="llama-width256"),
    "width 512": Trained("stories", 16, 384, shape="llama-width512"),
    "12 layers": Trained("stories", 16, 384, shape="llama-depth12"),
    "stories, further": Trained("stories", 16, 192, "trained", adamw=LORA),
    "shakespeare": Trained("shakespeare", 16, 192, "trained", constant=GENTLE, adamw=LORA),
    "german": Trained("german", 16, 192, "trained", constant=GENTLE, adamw=LORA),
    "sst2": Trained("sst2", 16, 192, "trained", constant=GENTLE, adamw=TUNING),
    "sst2, LoRA": Trained("sst2", 16, 192, "trained", rank=8, constant=GENTLE, adamw=LORA),
    **{
        f"sst2, LoRA rank {rank}, alpha {alpha}": Trained(
            "sst2", 16, 192, "trained", rank=rank, alpha=alpha, adamw=LORA
        )
        for rank in (2, 8, 32, 64)
        for alpha in (rank, 4 * rank)
    },
    **{
        f"MiniLM, {examples:,} sentences, batch {batch}": Trained(
            "sst2",
            batch,
            passes * examples // batch,
            "trained",
            constant=GENTLE,
            adamw=ENCODER,
            model="minilm",
            examples=examples,
        )
        for examples, batch, passes in ((500, 16, 3), (4000, 8, 1), (4000, 16, 1), (4000, 64, 2), (67_349, 64, 1))
    },
    **{
        "MiniLM, LoRA" + f" rank {rank}" * (rank != 8): Trained(
            "sst2", 16, 250, "trained", rank=rank, constant=GENTLE, adamw=(5e-4, 1e-3, 2e-3, 4e-3), model="minilm"
        )
        for rank in (2, 8, 32, 64)
    },
    "BERT, scratch": Trained("sst2", 32, 250, constant=NEW, adamw=TUNING, model="bert"),
    "ResNet-20": Trained("cifar", 64, 312, constant=NEW, adamw=ADAMW, model="resnet20"),
    "ViT": Trained("cifar", 64, 312, constant=NEW, adamw=TUNING, model="vit"),
    "T5": Trained("captions", 32, 400, constant=NEW, adamw=ADAMW, model="t5"),
    "masked BERT": Trained("stories", 16, 384, constant=NEW, adamw=ADAMW, model="masked"),
    "masked ModernBERT": Trained("stories", 16, 512, constant=NEW, adamw=(3e-4, *ADAMW), model="masked-modern"),
    "MNIST, MLP": Trained("mnist", 64, 600, constant=NEW, adamw=TUNING, model="mnist-mlp"),
    "Fashion-MNIST, CNN": Trained("fashion_mnist", 64, 300, constant=NEW, adamw=TUNING, model="fashion-cnn"),
    "LSTM": Trained("stories", 16, 256, constant=NEW, adamw=ADAMW, model="lstm"),
    "Mamba (held out)": Trained("stories", 16, 128, constant=NEW, adamw=ADAMW, model="mamba"),
    "noise off pictures": Trained("fashion_mnist", 64, 400, constant=NEW, adamw=ADAMW, model="denoising"),
    "picture of coordinates (held out)": Trained("fashion_mnist", 512, 400, adamw=ADAMW, model="coordinates"),
    "MiniLM, pairs": Trained("captions", 32, 64, "trained", constant=GENTLE, adamw=ENCODER, model="pairs"),
    "MiniLM, words": Trained("captions", 16, 96, "trained", constant=GENTLE, adamw=ENCODER, model="words"),
}


class Data:
    """All data as tokens of one byte-level BPE, which is made of the stories."""

    def __init__(self, given: argparse.Namespace) -> None:
        texts = text_data.load_texts(
            train_file=str(given.data / "stories/train.txt.gz"),
            validation_file=str(given.data / "stories/validation.txt.gz"),
        )
        tokenizer: PreTrainedTokenizerFast = text_data.train_tokenizer(texts.train, PIECES)
        self.blocks: dict[str, tuple[Tensor, Tensor]] = {}
        plain = (given.data / "tinyshakespeare/input.txt").read_text("utf-8").split("\n\n")
        with gzip.open(given.data / "multi30k/train.de.gz", "rt", encoding="utf-8") as file:
            german = file.read().split("\n")
        for name, documents in (("shakespeare", plain), ("german", german[:23_000])):
            blocks = self._blocks(tokenizer, documents)
            number = len(blocks) * 9 // 10
            self.blocks[name] = blocks[:number], blocks[number:][:512]
        self.sentences = {}
        for name, number in (("train", SENTENCES), ("dev", None)):
            with gzip.open(given.data / f"sst2/{name}.tsv.gz", "rt", encoding="utf-8") as file:
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
        super().__init__(SETTINGS[task.shape], given.bundle, given.device, tiny=False, length=task.length)
        self.trained, self.start = task, start
        if task.text in data.blocks:
            self.train, self.validation = (blocks.to(self.device) for blocks in data.blocks[task.text])
        if task.text == "stories" and task.begins == "trained":  # the half that it knows: the other one differs
            self.train = self.train[: len(self.train) // 2]
        self.sentences = {name: [part.to(self.device) for part in parts] for name, parts in data.sentences.items()}
        self.size = SENTENCES if task.text == "sst2" else len(self.train)

    def model(self, seed: int) -> nn.Module:
        """Make or load it."""
        model: Any = super().model(seed)
        if self.trained.begins == "trained":
            model.load_state_dict(torch.load(self.start, map_location=self.device))
        torch.manual_seed(seed)
        if self.trained.rank:
            model.requires_grad_(False)
            for parent in list(model.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is nn.Linear and name != "lm_head":
                        beside = LoRALinear(child, self.trained.rank)
                        beside.scale = self.trained.alpha / self.trained.rank
                        setattr(parent, name, beside)
        if self.trained.text == "sst2":
            model.score = nn.Linear(WIDTH, 2)
        return cast(nn.Module, model.to(self.device))

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Nats a token, or cross-entropies."""
        if self.trained.text != "sst2":
            return super().losses(model, rows)
        ids, lengths, labels = (part[rows] for part in self.sentences["train"])
        return functional.cross_entropy(self._logits(model, ids, lengths), labels, reduction="none")

    def _logits(self, model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        mask = self.mask[:, :, :OF_SENTENCES, :OF_SENTENCES].expand(len(ids), -1, -1, -1)
        places = self.places[:, :OF_SENTENCES].expand(len(ids), -1)
        hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=places).last_hidden_state
        counts = (torch.arange(OF_SENTENCES, device=self.device)[None] < lengths[:, None]).float()[..., None]
        logits: Tensor = model.score((hidden * counts).sum(1) / counts.sum(1))
        return logits

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation loss, and accuracy of classes."""
        if self.trained.text != "sst2":
            return super().evaluate(model)
        ids, lengths, labels = self.sentences["dev"]
        logits = self._logits(model, ids, lengths)
        hits = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": functional.cross_entropy(logits, labels).item(), "accuracy": hits}


class Encoder(Sentences):
    """A small BERT on sentences, from scratch."""

    def __init__(self, task: Trained, given: argparse.Namespace, *_: Any) -> None:
        super().__init__(
            replace(SETTINGS["minilm-4000"], examples=task.examples), given.bundle, given.device, tiny=False
        )
        self.trained = task

    def model(self, seed: int) -> nn.Module:
        """Make it."""
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=self.config["vocab_size"], hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=256, max_position_embeddings=64, num_labels=2, attn_implementation="eager",
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).to(self.device).train()


class Images(Pictures):
    """CIFAR-10 with a ResNet-20 or a small ViT, from scratch."""

    def __init__(self, task: Trained, given: argparse.Namespace, *_: Any) -> None:
        super().__init__(SETTINGS["resnet20"], given.bundle, given.device, tiny=False)
        self.trained = task

    def model(self, seed: int) -> nn.Module:
        """Make it."""
        if self.trained.model == "resnet20":
            return super().model(seed)
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            image_size=32, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=3,
            intermediate_size=192, num_labels=10,
        )  # fmt: skip
        return LogitsOfViT(config).to(self.device).train()


class LogitsOfViT(transformers.ViTForImageClassification):
    """A ViT that returns its logits."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Classify pictures."""
        logits: Tensor = super().forward(pixel_values=images).logits
        return logits


class Translation(Task):
    """Captions of Multi30k from German to English with a small T5, from scratch.

    The loss is in nats a piece of the English side. BLEU is of captions that are written greedily.
    """

    LONGEST, PADDING, ENDS = 40, 0, 1
    WRITTEN = 500
    """Captions that are translated for BLEU."""

    def __init__(self, task: Trained, given: argparse.Namespace, *_: Any) -> None:
        from sacrebleu import corpus_bleu  # before anything is trained

        self.trained, self.device, self.corpus_bleu = task, given.device, corpus_bleu
        sides = {
            (name, language): self._lines(given.data / f"multi30k/{name}.{language}.gz")
            for name in ("train", "val")
            for language in ("de", "en")
        }  # fmt: skip
        self.tokenizer: Any = text_data.train_tokenizer([*sides["train", "de"], *sides["train", "en"]], 2048)
        self.pieces = len(self.tokenizer) + 2
        ids = {key: self._padded(lines) for key, lines in sides.items()}
        self.right = sides["val", "en"][: self.WRITTEN]
        self.train = ids["train", "de"], ids["train", "en"]
        self.validation = ids["val", "de"], ids["val", "en"]
        self.size = len(self.train[0])

    @staticmethod
    def _lines(path: Path) -> list[str]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read().strip().split("\n")

    def _padded(self, lines: list[str]) -> Tensor:
        pieces = (self.tokenizer(line)["input_ids"][: self.LONGEST - 1] for line in lines)
        rows = [[*(piece + 2 for piece in row), self.ENDS] for row in pieces]
        return torch.tensor([row + [self.PADDING] * (self.LONGEST - len(row)) for row in rows], device=self.device)

    def model(self, seed: int) -> nn.Module:
        """Make it."""
        torch.manual_seed(seed)
        config = transformers.T5Config(
            vocab_size=self.pieces, d_model=96, d_kv=32, d_ff=192, num_layers=2, num_heads=3, dropout_rate=0.0,
            pad_token_id=self.PADDING, eos_token_id=self.ENDS, decoder_start_token_id=self.PADDING,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).to(self.device).train()

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Losses of captions, so that their mean is that of all pieces."""
        return self._of(model, *(side.index_select(0, rows) for side in self.train))

    def _of(self, model: nn.Module, german: Tensor, english: Tensor) -> Tensor:
        labels = english.masked_fill(english == self.PADDING, -100)
        logits = model(input_ids=german, attention_mask=(german != self.PADDING).long(), labels=labels).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        return losses.sum(1) * len(labels) / (labels != -100).sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation loss, and BLEU."""
        parts = zip(*(side.split(128) for side in self.validation), strict=True)
        pieces = [
            ((english != self.PADDING).sum().item(), self._of(model, german, english)) for german, english in parts
        ]
        loss = sum(n * losses.mean().item() for n, losses in pieces) / sum(n for n, _ in pieces)
        return {"loss": loss, "bleu": self._bleu(model)}

    def _bleu(self, model: Any) -> float:
        written = []
        for german in self.validation[0][: self.WRITTEN].split(128):
            mask = (german != self.PADDING).long()
            found = model.generate(
                german, attention_mask=mask, max_new_tokens=self.LONGEST, num_beams=1, do_sample=False
            )
            rows = [[piece - 2 for piece in row if piece > self.ENDS] for row in found.tolist()]
            written += self.tokenizer.batch_decode(rows)
        return float(self.corpus_bleu(written, [self.right]).score)


MODELS: dict[str, Callable[..., Any]] = {
    "llama": Llama, "minilm": Sentiment, "bert": Encoder, "resnet20": Images, "vit": Images, "t5": Translation,
    "masked": Masked, "masked-modern": Masked, "pairs": SameCaption, "words": Capitals, "mnist-mlp": GreyPictures,
    "fashion-cnn": GreyPictures, "lstm": Recurrent, "mamba": StateSpace, "denoising": Denoising,
    "coordinates": Coordinates,
}  # fmt: skip
"""Who makes a model and its data."""


# ---- runs ----


def with_a_constant_rate(task: Any, seed: int, rate: float, *, adamw: bool = False) -> dict[str, Any]:
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


class Multiple(ELRASpectral):
    """elra_spectral at a multiple of the rate that suits the weights, which slopes do not correct."""

    multiple = 1.0

    class Uncorrected(EndSlopes):
        """A rate that falls."""

        def _corrected(self, alpha: float, measured: Measurement) -> float:
            return alpha

    def _look_at_weights(self) -> float:
        return self.multiple * super()._look_at_weights()

    def parts(self) -> Parts:
        """Those of elra_spectral, but for corrections."""
        s = self.param_groups[0]
        return super().parts()._replace(rule=self.Uncorrected(s["warmup"], fresh=self.updates_per_epoch))


def our_optimizer(task: Any, model: nn.Module, multiple: float | None = None) -> ELRASpectral:
    """Make elra_spectral as a user gets it, or at a multiple of the rate that suits the weights."""
    params = [p for p in model.parameters() if p.requires_grad]
    pairs = [(m.A, m.B, m.scale, m.base.weight) for m in model.modules() if isinstance(m, LoRALinear)]
    tables, outputs = ([p for p in find(model) if p.requires_grad] for find in (embeddings_of, outputs_of))
    kind = ELRASpectral if multiple is None else Multiple
    optimizer = kind(params, embeddings=tables, outputs=outputs, adapters=pairs)
    if isinstance(optimizer, Multiple):
        optimizer.multiple = multiple
    optimizer.updates_per_epoch = task.size // task.trained.batch
    return optimizer


def with_ours(task: Any, seed: int, multiple: float | None = None) -> dict[str, Any]:
    """Train with elra_spectral as a user gets it, or at a multiple of the rate that suits the weights."""
    trained, model = task.trained, task.model(seed)
    optimizer = our_optimizer(task, model, multiple)
    params = [p for p in model.parameters() if p.requires_grad]
    lane = Lane(task, model, trained.batch, trained.updates)  # for its evaluation
    average, found, rates, power = WeightAverage(model, POWER), {}, [], POWER
    names = {id(p): name for name, p in model.named_parameters()}
    for number, rows in enumerate(order(task.size, trained.batch, trained.updates, seed).to(task.device), start=1):
        loss = task.losses(model, rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())
        if number - 1 == optimizer.updates_per_epoch:
            power = power_after_first_pass(optimizer)
        average.add(power)
        rates.append(optimizer.alpha)
        if number in (trained.updates // 3, trained.updates):
            lane.mean = [average.mean[names[id(p)]] for p in params]
            found[str(number)] = lane.evaluate(last=True)
    marks = {str(k): rates[k - 1] for k in (1, 12, trained.updates // 3, trained.updates)}
    return {"found": found, "alpha": marks, "restarts": optimizer.restarts}


def with_a_partner(name: str, task: Any, seed: int, rate: float | None) -> dict[str, Any]:
    """Train with another optimizer; evaluate where it would, and the weighted mean of all points."""
    trained, model, partner = task.trained, task.model(seed), PARTNERS[name]
    training = Training(partner, model, rate, trained.updates)
    average, found = WeightAverage(model, power=8), {}
    names = {id(p): name for name, p in model.named_parameters()}
    for number, rows in enumerate(order(task.size, trained.batch, trained.updates, seed).to(task.device), start=1):
        training.step(task.losses(model, rows).mean())
        average.add()
        if number in (trained.updates // 3, trained.updates):
            mean = [average.mean[names[id(p)]] for p in training.params]
            training.to_evaluate()
            last = evaluated(task, model, training.params, None)
            training.to_train()
            found[str(number)] = {"mean": evaluated(task, model, training.params, mean), "last": last}
    return {"found": found, "state_bytes": training.state_bytes()}


ROWS: dict[str, Callable[[Any, int, Any], dict[str, Any]]] = {
    "ours": with_ours,
    "times": with_ours,
    "constant": with_a_constant_rate,
    "adamw": lambda task, seed, rate: with_a_constant_rate(task, seed, rate, adamw=True),
    **{name: partial(with_a_partner, name) for name in PARTNERS if name != "AdamW, cosine"},
}
"""Row → what makes a run; ``adamw`` is AdamW with clipping and a cosine without a warm-up."""
TITLES = {
    "ours": "elra_spectral",
    "times": "it at a multiple of its rate",
    "constant": "its direction, constant rate",
    "adamw": "AdamW, cosine",
}


def wanted(given: argparse.Namespace, lines: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what is to be run, the first seed of everything first."""
    for seed, name, row in itertools.product(given.seeds, given.only, given.rows):
        has_rate = row == "adamw" or (row in PARTNERS and PARTNERS[row].has_rate)
        grid: Sequence[float | None] = given.rates or TASKS[name].times if row == "times" else (None,)
        if row == "constant" or has_rate:
            grid = TASKS[name].constant if row == "constant" else TASKS[name].adamw
            if row == "Muon, cosine" and TASKS[name].model != "minilm":
                grid = (*grid, BEYOND * max(grid))
            grid = given.rates or grid
            if given.best:
                known = {
                    rate: ends for (task, kind, rate), ends in runs_of(lines).items() if (task, kind) == (name, row)
                }
                grid = [best_rate(known)] if known else []
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
        optimizer = ELRASpectral(model.parameters(), embeddings=embeddings_of(model), outputs=outputs_of(model))
        average = WeightAverage(model, power=8)
        for number, rows in enumerate(order(task.size, 16, 1024, 0).to(task.device), start=1):
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


Runs = dict[tuple[str, str, float | None], list[dict[str, float]]]


def runs_of(lines: list[str]) -> Runs:
    """Task, row and rate → what every seed came to: of ours the weighted mean of all points, else that or the last one.

    Of the two whichever is better, which is generous to the others.
    """
    runs: Runs = {}
    for run in map(json.loads, lines):
        end = list(run["found"].values())[-1]
        better = end["mean"] if run["row"] == "ours" else min(end.values(), key=lambda found: found["loss"])
        runs.setdefault((run["task"], run["row"], run["rate"]), []).append(better)
    return runs


def best_rate(found: dict[float | None, list[dict[str, float]]]) -> float | None:
    """The rate that ends lowest from the first seed; in the mean of seeds, of those that have as many as that one."""
    first = min(found, key=lambda rate: found[rate][0]["loss"])
    alike = [rate for rate, ends in found.items() if len(ends) == len(found[first])]
    return min(alike, key=lambda rate: statistics.mean(end["loss"] for end in found[rate]))


ONE_SETTING = ("NadamW, cosine", (1e-3, 3e-3))
"""A partner at these rates, each for all tasks: the control of arXiv 2505.24005."""


def tables(lines: list[str]) -> str:
    """Return three tables: beside what most people take, beside what needs no rate or no schedule, and beside one
    setting for all tasks."""
    others = [name for name in PARTNERS if name.startswith(("schedule-free", "Prodigy", "Momo", "Mechanic"))]
    runs = runs_of(lines)
    has_others = {task for task, row, _ in runs if row in others}
    first = {key: ends for key, ends in runs.items() if key[1] not in others}
    second = {key: ends for key, ends in runs.items() if key[0] in has_others and key[1] in ("ours", *others)}
    partner, rates = ONE_SETTING
    third = {
        (task, row if rate is None else f"NadamW at {rate:g}", None): ends
        for (task, row, rate), ends in runs.items()
        if row == "ours" or (row == partner and rate in rates)
    }
    has_both = {task for task, row, _ in third if row != "ours"} & {task for task, row, _ in third if row == "ours"}
    third = {key: ends for key, ends in third.items() if key[0] in has_both}
    return "\n\n".join(map(table, (first, second, third)))


def table(runs: Runs) -> str:
    """Return a table, one row a task: loss and accuracy at the end, the mean of what seeds there are.

    A constant rate and a partner have the best rate of the grid, which is named.
    """
    there = dict.fromkeys(kind for _, kind, _ in runs)
    kinds = [kind for kind in dict.fromkeys([*ROWS, *there]) if kind in there]
    rows = ["| task | " + " | ".join(TITLES.get(kind, kind) for kind in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for task in (task for task in TASKS if any(task == name for name, _, _ in runs)):
        cells = []
        for row in kinds:
            found = {rate: ends for (name, kind, rate), ends in runs.items() if (name, kind) == (task, row)}
            best = best_rate(found) if found else None
            cells.append(_cell(found[best], best) if found else "–")
        rows.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(ends: list[dict[str, float]], rate: float | None) -> str:
    loss = statistics.mean(end["loss"] for end in ends)
    text = f"{loss:.3f}" if loss > 0.05 else f"{loss:.4f}"
    if "accuracy" in ends[0]:
        text += f", {statistics.mean(end['accuracy'] for end in ends):.1%}"
    if bleus := [end["bleu"] for end in ends if "bleu" in end]:
        text += f", BLEU {statistics.mean(bleus):.1f}"
    notes = [] if rate is None else [f"{rate:g}"]
    notes += [f"{len(ends)} seeds"] if len(ends) > 1 else []
    return text + (f" ({'; '.join(notes)})" if notes else "")


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Let a command line say where things are."""
    for name, what in (
        ("output", "file of JSON lines"), ("bundle", "folder of rate_scan_bundle.py"), ("data", "folder of data sets"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", required=True, type=Path, help=what)


def main(words: list[str]) -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if row != "times"])
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rates", nargs="+", type=float, help="in place of the grids of all rows that have one")
    rates.add_argument("--best", action="store_true", help="of the rates only the best of those that were run")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes, each of one thread")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--print", action="store_true", help="only the table of what is there")
    given = parser.parse_args(words)
    if any(rate <= 0 for rate in given.rates or ()):
        parser.error(f"--rates {min(given.rates):g}: rates, and multiples of one, are above 0")
    torch.set_num_threads(1)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    lines = given.output.read_text("utf-8").splitlines() if given.output.exists() else []
    if given.print:
        print(tables(lines))
        return 0
    keys = ("task", "row", "rate", "seed")
    done = [{key: line[key] for key in keys} for line in map(json.loads, lines)]
    missing = [run for run in wanted(given, lines) if run not in done]
    data = Data(given)
    start, ends = trained_llama(given, data), time.monotonic() + given.seconds
    if given.workers == 1:
        for run in missing:
            make(run, given, data, start, ends)
        return 0
    # Forked, so that the data are there already; no CUDA device may have been asked for before.
    with multiprocessing.get_context("fork").Pool(given.workers) as pool:
        calls = [pool.apply_async(make, (run, given, data, start, ends)) for run in missing]
        failed = 0
        for run, call in zip(missing, calls, strict=True):
            try:
                call.get()
            except Exception as error:  # the others go on
                print(f"{run}: {type(error).__name__}: {error}", flush=True)
                failed = 1
    return failed


def make(run: dict[str, Any], given: argparse.Namespace, data: Data, start: Path, ends: float) -> None:
    """Make a run and write its line."""
    begun = time.perf_counter()
    if time.monotonic() > ends:
        return
    trained = TASKS[run["task"]]
    task = MODELS[trained.model](trained, given, data, start)
    result = {**run, **ROWS[run["row"]](task, run["seed"], run["rate"])}
    result |= {"seconds": round(time.perf_counter() - begun, 1), **environment(given.device)}
    with given.output.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result) + "\n")
    end = list(result["found"].values())[-1]["mean"]
    print(f"{run}: {end}, {result['seconds']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
