"""Tasks of ``no_rate.py`` for encoders: sentences, pairs, words, masked tokens.

All-MiniLM-L6-v2 learns which sentences of SST-2 are positive, that captions of Multi30k mean the same in German and
English (contrastive), and which German words begin with a capital (token classification). A small BERT learns from
scratch to fill in masked tokens. MiniLM computes in bfloat16 under autocast, as people train it. Data:
``rate_scan_bundle.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from rate_scan import SETTINGS, Sentences, Stories, Task

SCALE = 20.0
"""Of cosines in the contrastive loss, as sentence-transformers has it."""
HIDDEN = 0.15
"""Share of the tokens that are masked."""


class Sentiment(Sentences):
    """MiniLM with a fresh head on so many sentences of SST-2, whole or by LoRA.

    Attributes:
        pieces: sentences are cut after so many.
        computes_in: type of its products.
    """

    pieces, computes_in = 48, torch.bfloat16

    def __init__(self, trained: Any, given: Any, *_: Any) -> None:
        setting = replace(SETTINGS["minilm-4000"], examples=trained.examples, rank=trained.rank)
        super().__init__(setting, Path(given.bundle), given.device, tiny=False)
        if self.size < trained.examples:
            raise ValueError(
                f"--bundle {given.bundle} has {self.size} sentences and the task needs {trained.examples}: make it "
                f"with rate_scan_bundle.py --sentences {trained.examples}"
            )
        self.trained = trained

    def _logits(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        longest = min(self.pieces, int(mask.sum(1).max()))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.computes_in is torch.bfloat16):
            return super()._logits(model, ids[:, :longest], mask[:, :longest]).float()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy, in batches of about the same length."""
        ids, mask, labels = self.validation
        rows = mask.sum(1).argsort()
        logits = torch.cat([self._logits(model, ids[part], mask[part]) for part in rows.split(64)])
        hits = (logits.argmax(1) == labels[rows]).float().mean().item()
        return {"loss": functional.cross_entropy(logits, labels[rows]).item(), "accuracy": hits}


class Captions(Task):
    """Captions as word pieces of MiniLM."""

    head: str | None = None

    def __init__(self, trained: Any, given: Any, *_: Any) -> None:
        self.trained, self.device, bundle = trained, given.device, Path(given.bundle)
        self.config = json.loads((bundle / "minilm.json").read_text(encoding="utf-8"))
        self.weights = load_file(bundle / "minilm.safetensors")
        with np.load(bundle / "captions.npz") as arrays:
            self.weights["embeddings.word_embeddings.weight"] = torch.from_numpy(arrays["table"])
            self.sides = {
                (name, language): self._side(arrays, f"{name}_{language}")
                for name in ("train", "val")
                for language in ("de", "en")
            }  # fmt: skip
            self.capitals = {
                name: torch.from_numpy(arrays[f"{name}_capitals"]).long().to(self.device) for name in ("train", "val")
            }
        self.config["vocab_size"] = len(self.weights["embeddings.word_embeddings.weight"])
        self.size = len(self.capitals["train"])

    def _side(self, arrays: Any, name: str) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(arrays[name].astype(np.int64))
        mask = torch.arange(ids.shape[1])[None] < torch.from_numpy(arrays[f"{name}_lengths"])[:, None]
        return ids.to(self.device), mask.to(self.device)

    def _encoder(self, kind: Any, **more: Any) -> nn.Module:
        """Return MiniLM, with a fresh head or without."""
        config = transformers.BertConfig(**{**self.config, **more})
        model: nn.Module = kind(config)
        inner: nn.Module = model if kind is transformers.BertModel else model.bert  # type: ignore[assignment]
        missing, unexpected = inner.load_state_dict(self.weights, strict=False)  # type: ignore[misc]
        if [name for name in (*missing, *unexpected) if "pooler" not in name and "_ids" not in name]:
            raise ValueError(f"minilm.safetensors: missing {missing}, unexpected {unexpected}")
        return model.to(self.device).train()


class SameCaption(Captions):
    """Which of a batch's English captions belongs to a German one: cross-entropy of scaled cosines."""

    whole_batches = True

    def model(self, seed: int) -> nn.Module:
        """Load MiniLM."""
        torch.manual_seed(seed)
        return self._encoder(transformers.BertModel)

    def _embedded(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        with torch.autocast(self.device, torch.bfloat16):
            hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return functional.normalize(mean, dim=1)

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """One number a pair."""
        german, english = (
            self._embedded(model, *(part.index_select(0, rows) for part in self.sides["train", language]))
            for language in ("de", "en")
        )
        right = torch.arange(len(rows), device=self.device)
        return functional.cross_entropy(SCALE * german @ english.mT, right, reduction="none")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss in batches of 32, and the mean reciprocal rank among all (none below the tenth)."""
        german, english = (
            torch.cat([
                self._embedded(model, ids, mask)
                for ids, mask in zip(*(part.split(128) for part in self.sides["val", language]), strict=True)
            ])
            for language in ("de", "en")
        )  # fmt: skip
        cosines = german @ english.mT
        ranks = (cosines >= cosines.diagonal()[:, None]).sum(1)
        number = len(cosines) // 32
        blocks = torch.stack([cosines[32 * k : 32 * k + 32, 32 * k : 32 * k + 32] for k in range(number)])
        right = torch.arange(32, device=self.device).repeat(number)
        loss = functional.cross_entropy(SCALE * blocks.flatten(0, 1), right)
        return {"loss": loss.item(), "accuracy": torch.where(ranks <= 10, 1 / ranks, 0.0).mean().item()}


class Capitals(Captions):
    """Which words of a German caption begin with a capital, told from its pieces in lower case."""

    head = "classifier"

    def model(self, seed: int) -> nn.Module:
        """Load MiniLM, with a head that depends on the seed."""
        torch.manual_seed(seed)
        return self._encoder(transformers.BertForTokenClassification, num_labels=2)

    def _of(self, model: nn.Module, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = (part.index_select(0, rows) for part in self.sides[name, "de"])
        with torch.autocast(self.device, torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
        return logits.float(), self.capitals[name].index_select(0, rows)

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """One number a caption, so that their mean is that of all words."""
        logits, labels = self._of(model, "train", rows)
        losses = functional.cross_entropy(logits.mT, labels, ignore_index=-1, reduction="none")
        return losses.sum(1) * len(rows) / (labels >= 0).sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy of words."""
        rows = torch.arange(len(self.capitals["val"]), device=self.device)
        parts = [self._of(model, "val", lot) for lot in rows.split(128)]
        logits, labels = (torch.cat([part[k] for part in parts]).flatten(0, 1) for k in (0, 1))
        logits, labels = logits[labels.flatten() >= 0], labels.flatten()[labels.flatten() >= 0]
        hits = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": functional.cross_entropy(logits, labels).item(), "accuracy": hits}


class Masked(Stories):
    """A small BERT or ModernBERT from scratch that fills in masked tokens of stories."""

    def __init__(self, trained: Any, given: Any, *_: Any) -> None:
        super().__init__(SETTINGS["llama-width64"], Path(given.bundle), given.device, tiny=False)
        self.trained = trained
        self.hidden = self._masks(self.validation.shape, 0)

    def _masks(self, shape: torch.Size, seed: int) -> Tensor:
        """Which tokens are masked; the same on all devices."""
        return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < HIDDEN).to(self.device)

    def model(self, seed: int) -> nn.Module:
        """Make it; its mask is one token more."""
        torch.manual_seed(seed)
        size: dict[str, Any] = {
            "vocab_size": self.pieces + 1, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": self.positions,
        }  # fmt: skip
        model: Any
        if self.trained.model == "masked":
            dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model = transformers.BertForMaskedLM(transformers.BertConfig(**size, **dropout, intermediate_size=256))
        else:
            names = (f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep"))
            special: dict[str, Any] = dict.fromkeys(names, 0)
            model = transformers.ModernBertForMaskedLM(
                transformers.ModernBertConfig(**size, **special, intermediate_size=172)
            )
        return cast(nn.Module, model.to(self.device).train())

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Nats a masked token; the mask of a batch depends on its first row alone."""
        ids = self.train.index_select(0, rows)
        return self._filled(model, ids, self._masks(ids.shape, int(rows[0])))

    def _filled(self, model: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
        logits = model(input_ids=ids.masked_fill(hidden, self.pieces)).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        return (losses * hidden).sum(1) * len(ids) / hidden.sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation loss."""
        return {"loss": self._filled(model, self.validation, self.hidden).mean().item()}
