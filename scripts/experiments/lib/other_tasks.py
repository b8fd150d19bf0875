"""Tasks of ``no_rate.py`` for networks that are no Transformers: small pictures, and a recurrent language model.

The MLP and the CNN of the recipes learn MNIST and Fashion-MNIST. An LSTM goes on with stories: it is the task that was
held out, of a kind on which no constant of ``elra_spectral`` was chosen or tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_elra.recipes.image_data import load_images
from hf_elra.recipes.image_models import ARCHITECTURES
from rate_scan import SETTINGS, Stories, Task

WIDTH = 128
"""Of the LSTM."""
TESTED = 2000
"""Pictures."""


class GreyPictures(Task):
    """MNIST by an MLP, or Fashion-MNIST by a CNN, from scratch."""

    def __init__(self, trained: Any, given: Any, *_: Any) -> None:
        self.trained, self.device = trained, given.device
        splits = load_images(str(Path(given.data) / trained.text))
        self.parts = {}
        for name, pictures in (("train", splits.train), ("test", splits.test)):
            batch = pictures.__getitems__(range(len(pictures) if name == "train" else TESTED))
            self.parts[name] = batch["pixel_values"].to(self.device), batch["labels"].to(self.device)
        self.size = len(self.parts["train"][0])

    def model(self, seed: int) -> nn.Module:
        """Make it."""
        torch.manual_seed(seed)
        return ARCHITECTURES[self.trained.model](1, 28, 10).to(self.device).train()

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Cross-entropies."""
        images, labels = (part.index_select(0, rows) for part in self.parts["train"])
        return functional.cross_entropy(model(images), labels, reduction="none")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy."""
        images, labels = self.parts["test"]
        logits = torch.cat([model(part) for part in images.split(1000)])
        hits = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": functional.cross_entropy(logits, labels).item(), "accuracy": hits}


class LanguageLSTM(nn.Module):
    """Two layers of LSTM between an embedding and a linear layer."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(pieces, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, pieces)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next piece at every place."""
        logits: Tensor = self.head(self.lstm(self.embedding(ids))[0])
        return logits


class Recurrent(Stories):
    """An LSTM on stories, from scratch."""

    def __init__(self, trained: Any, given: Any, *_: Any) -> None:
        super().__init__(SETTINGS["llama-width64"], Path(given.bundle), given.device, tiny=False)
        self.trained = trained

    def model(self, seed: int) -> nn.Module:
        """Make it."""
        torch.manual_seed(seed)
        return LanguageLSTM(self.pieces).to(self.device).train()

    def _of(self, model: nn.Module, ids: Tensor) -> Tensor:
        losses = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1).mean(1)
