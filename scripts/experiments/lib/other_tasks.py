"""Tasks of ``no_rate.py`` for networks that are no Transformers: small pictures, and language models of other kinds.

The MLP and the CNN of the recipes learn MNIST and Fashion-MNIST. An LSTM goes on with stories; the rate of embeddings
was chosen with it. A network takes the noise off pictures, by squared errors; where corrections downwards end was
chosen with it. Two tasks are held out, of kinds on which nothing of ``elra_spectral`` was chosen or tried: a
state-space model (Mamba) on stories, and a network that learns one picture as a function of coordinates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from hf_elra.recipes.image_data import load_images
from hf_elra.recipes.image_models import ARCHITECTURES
from rate_scan import SETTINGS, Stories, Task

WIDTH = 128
"""Of the LSTM."""
TESTED = 2000
"""Pictures."""
NOISE = 0.5
"""Standard deviation of what is added to pictures whose pixels are between 0 and 1."""


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


class Denoising(GreyPictures):
    """Pictures of Fashion-MNIST with noise, of which a small CNN is to find the pictures; mean squared errors."""

    def __init__(self, trained: Any, given: Any, *_: Any) -> None:
        super().__init__(trained, given)
        generator = torch.Generator().manual_seed(0)
        self.noisy = {}
        for name, (images, labels) in self.parts.items():
            clean = images - images.min()
            self.parts[name] = clean / clean.max(), labels
            noise = torch.randn(clean.shape, generator=generator).to(clean.device)
            self.noisy[name] = self.parts[name][0] + NOISE * noise

    def model(self, seed: int) -> nn.Module:
        """Make it: down to 7 x 7 places, and up again."""
        torch.manual_seed(seed)
        down = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
        between = [nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU()]
        up = [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)]
        return nn.Sequential(*down, *between, *up).to(self.device).train()

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean squared errors of pictures."""
        found = model(self.noisy["train"].index_select(0, rows))
        return (found - self.parts["train"][0].index_select(0, rows)).square().mean((1, 2, 3))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean squared error."""
        found = torch.cat([model(part) for part in self.noisy["test"].split(1000)])
        return {"loss": (found - self.parts["test"][0]).square().mean().item()}


class Waves(nn.Module):
    """Sines and cosines of coordinates at random frequencies, which are not trained."""

    def __init__(self, number: int, deviation: float) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", deviation * torch.randn(2, number))

    def forward(self, places: Tensor) -> Tensor:
        """Features of places between 0 and 1."""
        angles = 2 * torch.pi * places @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)


class Coordinates(GreyPictures):
    """Grey values of 64 pictures side by side from coordinates: half of the pixels, by squared errors.

    The other half is for validation.
    """

    SIDE, PICTURES = 28, 8
    FREQUENCIES, DEVIATION = 64, 12.0

    def __init__(self, trained: Any, given: Any, *_: Any) -> None:
        super().__init__(trained, given)
        images = self.parts["train"][0][: self.PICTURES**2]
        clean = (images - images.min()) / (images.max() - images.min())
        rows = clean.view(self.PICTURES, self.PICTURES, self.SIDE, self.SIDE).transpose(1, 2)
        number = self.PICTURES * self.SIDE
        values, steps = rows.reshape(number * number, 1), torch.arange(number, device=self.device) / number
        places = torch.cartesian_prod(steps, steps)
        chosen = torch.randperm(number * number, generator=torch.Generator().manual_seed(0)).to(self.device)
        halves = chosen.chunk(2)
        self.parts = {name: (places[half], values[half]) for name, half in zip(("train", "test"), halves, strict=True)}
        self.size = len(halves[0])

    def model(self, seed: int) -> nn.Module:
        """Make it: three layers on top of waves."""
        torch.manual_seed(seed)
        layers = [nn.Linear(2 * self.FREQUENCIES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)]
        return nn.Sequential(Waves(self.FREQUENCIES, self.DEVIATION), *layers).to(self.device).train()

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Squared errors of pixels."""
        places, values = (part.index_select(0, rows) for part in self.parts["train"])
        return (model(places) - values).square().mean(1)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean squared error."""
        places, values = self.parts["test"]
        return {"loss": (model(places) - values).square().mean().item()}


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


class StateSpace(Recurrent):
    """A Mamba on stories, from scratch, 64 pieces at a time."""

    def __init__(self, trained: Any, given: Any, *_: Any) -> None:
        super().__init__(trained, given)
        self.train, self.validation = (blocks[:, :64] for blocks in (self.train, self.validation))

    def model(self, seed: int) -> nn.Module:
        """Make it: two layers of width 96."""
        torch.manual_seed(seed)
        config = transformers.MambaConfig(
            vocab_size=self.pieces, hidden_size=96, num_hidden_layers=2, state_size=8, use_cache=False
        )
        return Logits(transformers.MambaForCausalLM(config)).to(self.device).train()


class Logits(nn.Module):
    """A language model that returns its logits."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer, as Transformers' models do."""
        layer: nn.Module = self.inner.get_output_embeddings()
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next piece at every place."""
        logits: Tensor = self.inner(input_ids=ids).logits
        return logits
