"""What comparisons of optimizers train, small enough for one core: small pictures, a translator, an encoder.

Data sets have what ``compare.train`` asks for: a length, the loss of rows, and loss and accuracy on what is kept for
tests.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_elra.recipes.image_data import load_images
from lib.encoder_tasks import Sentiment
from rate_scan import resnet20


class Pictures:
    """CIFAR-10 with half the height and width: means of 2×2 pixels, normalised, on the CPU."""

    TRAINED, TESTED = 40_000, 2_000

    def __init__(self, source: str, trained: int = TRAINED, tested: int = TESTED) -> None:
        splits = load_images(source)
        of_training = range(0, len(splits.train), len(splits.train) // trained)[:trained]  # files are sorted in part
        of_tests = range(0, len(splits.test), len(splits.test) // tested)
        self.images, self.labels = self._small(splits.train, of_training)
        self.test_images, self.test_labels = self._small(splits.test, of_tests)

    def __len__(self) -> int:
        return len(self.images)

    def network(self, hidden: int) -> nn.Module:
        """ResNet-20 with BatchNorm, whatever ``hidden`` is."""
        return resnet20()

    @staticmethod
    def _small(images: Any, rows: Any) -> tuple[Tensor, Tensor]:
        batch = images.__getitems__(rows)
        return nn.functional.avg_pool2d(batch["pixel_values"], 2), batch["labels"]

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The mean over these rows."""
        return nn.functional.cross_entropy(model(self.images[rows]), self.labels[rows])

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy on test images, with the averages of BatchNorm."""
        model.eval()
        with torch.no_grad():
            scores = torch.cat([model(part) for part in self.test_images.split(500)])
        model.train()
        loss = nn.functional.cross_entropy(scores, self.test_labels).item()
        return loss, (scores.argmax(1) == self.test_labels).double().mean().item()


class Translator(nn.Module):
    """A Transformer from words to words: two layers on each side, 8 heads."""

    def __init__(self, words: int, length: int, width: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        self.positions = nn.Embedding(length, width)
        self.transformer = nn.Transformer(width, 8, 2, 2, 2 * width, batch_first=True)
        self.transformer.encoder.use_nested_tensor = False  # torch warns of it as a prototype
        self.output = nn.Linear(width, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores of every next word."""
        numbers, number = torch.arange(source.shape[1]), target.shape[1]
        later = torch.ones(number, number, dtype=torch.bool).triu(1)
        no_word = source == 0
        states: Tensor = self.transformer(
            self.source(source) + self.positions(numbers), self.target(target) + self.positions(numbers[:number]),
            tgt_mask=later, src_key_padding_mask=no_word, memory_key_padding_mask=no_word, tgt_is_causal=True,
        )  # fmt: skip
        scores: Tensor = self.output(states)
        return scores


class Captions:
    """Multi30k, German to English: frequent words in lower case, the others as one. The validation part is for tests.

    Args:
        folder: holds ``train.de.gz`` and so on.
        rows: captions to train on.
    """

    LENGTH, WORDS = 24, 2000
    NO_WORD, BEGINS, ENDS, RARE = range(4)

    def __init__(self, folder: Path, rows: int = 4000) -> None:
        texts = {
            (part, language): self._read(folder / f"{part}.{language}.gz")
            for part in ("train", "val") for language in ("de", "en")
        }  # fmt: skip
        known = {}
        for language in ("de", "en"):
            counts = Counter(word for words in texts["train", language][:rows] for word in words)
            frequent = sorted(counts, key=lambda word: (-counts[word], word))[: self.WORDS - 4]
            known[language] = {word: number for number, word in enumerate(frequent, 4)}
        self.source, self.target = (self._rows(texts["train", name][:rows], known[name]) for name in ("de", "en"))
        self.test_source, self.test_target = (self._rows(texts["val", name], known[name]) for name in ("de", "en"))

    @staticmethod
    def _read(file: Path) -> list[list[str]]:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return [re.findall(r"\w+|[^\w\s]", line.lower()) for line in lines]

    def _rows(self, texts: list[list[str]], known: dict[str, int]) -> Tensor:
        rows = torch.full((len(texts), self.LENGTH), self.NO_WORD)
        for row, words in zip(rows, texts, strict=True):
            numbers = [known.get(word, self.RARE) for word in words[: self.LENGTH - 2]]
            row[: len(numbers) + 2] = torch.tensor([self.BEGINS, *numbers, self.ENDS])
        return rows

    def __len__(self) -> int:
        return len(self.source)

    def network(self, hidden: int) -> nn.Module:
        """Of this width."""
        return Translator(self.WORDS, self.LENGTH, hidden)

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The mean over the English words of these rows."""
        return self._loss(model, self.source[rows], self.target[rows])[0]

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss, and the share of words that are foreseen, without dropout."""
        model.eval()
        parts = zip(self.test_source.split(256), self.test_target.split(256), strict=True)
        with torch.no_grad():
            told = [(*self._loss(model, *part), (part[1][:, 1:] != self.NO_WORD).sum()) for part in parts]
        model.train()
        number = sum(words for *_, words in told)
        return (
            float(sum(loss * words for loss, _, words in told) / number),
            float(sum(right for _, right, _ in told) / number),
        )

    def _loss(self, model: nn.Module, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and how many words are foreseen."""
        scores, wanted = model(source, target[:, :-1]), target[:, 1:]
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=self.NO_WORD)
        return loss, ((scores.argmax(-1) == wanted) & (wanted != self.NO_WORD)).sum()


class ShortSentences(Sentiment):
    """The same for ``compare.py``: the beginnings of sentences, without dropout, in float32, as lines need it.

    Args:
        bundle: made by ``rate_scan_bundle.py``.
    """

    TRAINED, TESTED = 500, 400
    pieces, computes_in = 24, torch.float32

    def __init__(self, bundle: Path) -> None:
        super().__init__(SimpleNamespace(examples=self.TRAINED, rank=0), SimpleNamespace(bundle=bundle, device="cpu"))
        self.validation = tuple(part[: self.TESTED] for part in self.validation)  # type: ignore[assignment]
        self.config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def __len__(self) -> int:
        return self.size

    def network(self, hidden: int) -> nn.Module:
        """Load it; the head is of torch's random numbers, whatever ``hidden`` is."""
        return self.model(int(torch.randint(2**31, ())))

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The mean over these sentences."""
        return self.losses(model, rows).mean()

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy."""
        found = self.evaluate(model)
        return found["loss"], found["accuracy"]
