"""A plain training loop for small networks on images in memory, over the Trainer's own optimizer and controller.

One update of a tiny network costs less than the Trainer around it, so tables over many seeds use this loop. It walks
the Trainer's path step for step (tests/test_light_loop.py): groups of micro-batches, the incomplete one at an epoch's
end skipped, a control cycle an epoch, losses told as means. The micro-batches of an update are always one pass here.
For anything else use the Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_elra.control import CycleLosses
from hf_elra.control.batch_size import BatchSizeController
from hf_elra.errors import ConfigurationError
from hf_elra.optim import ELRA
from hf_elra.optim.averaging import BATCH_NORM_SAMPLES, WeightAverage, at_the_mean
from hf_elra.recipes.image_data import ImageDataset


@dataclass(frozen=True)
class EpochResult:
    """What one epoch did.

    Attributes:
        epoch: number of epochs trained.
        updates: updates so far.
        batch: samples of the next update.
        train_loss: mean loss of the epoch's updates.
        test_loss, test_accuracy: at the point where training stands.
        boosted_loss, boosted_accuracy: at the mean of the epoch's points; None without boosting.
        alpha: the learning rate in force; None for other optimizers than ELRA.
        restarts: soft restarts so far; None for other optimizers.
    """

    epoch: int
    updates: int
    batch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    boosted_loss: float | None
    boosted_accuracy: float | None
    alpha: float | None
    restarts: int | None


def train(
    model: nn.Module,
    data: ImageDataset,
    test: ImageDataset,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    micro_batch: int = 32,
    controller: BatchSizeController | None = None,
    gradient_decay: bool = False,
    boost_every: int | None = None,
    order: Callable[[int], Tensor] | None = None,
    seed: int = 0,
) -> Iterator[EpochResult]:
    """Train and yield a result after every epoch.

    Args:
        model: takes ``pixel_values`` and returns logits.
        data, test: images, on the model's device.
        optimizer: ELRA, which is told the loss, or any other.
        epochs: how many.
        micro_batch: samples of a micro-batch.
        controller: number of micro-batches of an update; it decides after every epoch. One without it.
        gradient_decay: scale gradients (ELRA's steps) by m_0/m.
        boost_every: take every k-th point into the mean that is evaluated beside the last one.
        order: indices of the rows of an epoch; by default a permutation by ``seed``.
        seed: of the order.

    Raises:
        ConfigurationError: the data are less than one micro-batch.
    """
    if len(data) < micro_batch:
        raise ConfigurationError(f"micro_batch={micro_batch} is more than the {len(data)} training images.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    mean = WeightAverage(model) if boost_every is not None else None
    all_micro_batches = len(data) // micro_batch
    updates = 0
    seen = CycleLosses()
    for epoch in range(epochs):
        rows = order(epoch) if order is not None else _permutation(len(data), seed, epoch)
        wanted = 1 if controller is None else min(controller.accumulation, all_micro_batches)
        size = wanted * micro_batch
        losses = torch.zeros(all_micro_batches // wanted, device=data.images.device)
        model.train()
        for number, start in enumerate(range(0, all_micro_batches // wanted * size, size)):
            batch = data.__getitems__(rows[start : start + size])  # type: ignore[arg-type]
            loss = nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])
            loss.backward()
            decay = controller.gradient_decay(wanted) if gradient_decay and controller is not None else 1.0
            if isinstance(optimizer, ELRA):
                optimizer.gradient_decay = decay
                optimizer.observe_loss(loss.detach())
            elif decay != 1:
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], decay)
            optimizer.step()
            optimizer.zero_grad()
            losses[number] = loss.detach()
            updates += 1
            if mean is not None and updates % (boost_every or 1) == 0:
                mean.add()
        for value in losses.tolist():
            if value == value and abs(value) != float("inf"):
                seen.add(value)
        statistics = seen.end_cycle()
        if isinstance(optimizer, ELRA):
            optimizer.end_cycle()
        if mean is not None:
            if updates % (boost_every or 1) != 0:  # the last point of a cycle is always in its mean
                mean.add()
            mean.end_cycle()
        if controller is not None and statistics.count:
            controller.end_cycle(statistics.mean, statistics.std)
        boosted: tuple[float | None, float | None] = (None, None)
        if mean is not None and mean.count:
            with at_the_mean(mean, model, _for_statistics(data)):
                boosted = evaluate(model, test)
        loss_now, accuracy_now = evaluate(model, test)
        elra: Any = optimizer if isinstance(optimizer, ELRA) else None
        yield EpochResult(
            epoch + 1,
            updates,
            micro_batch * (1 if controller is None else min(controller.accumulation, all_micro_batches)),
            statistics.mean,
            loss_now,
            accuracy_now,
            *boosted,
            elra.alpha if elra else None,
            elra.restarts if elra else None,
        )


def _permutation(number: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def _for_statistics(data: ImageDataset) -> Iterator[Tensor]:
    """Training images for the BatchNorm statistics of the mean."""
    seen = min(len(data), BATCH_NORM_SAMPLES)
    for start in range(0, seen, 512):
        yield data.__getitems__(range(start, min(start + 512, seen)))["pixel_values"]


@torch.no_grad()
def evaluate(model: nn.Module, test: ImageDataset, batch: int = 2000) -> tuple[float, float]:
    """Mean loss and share of right answers."""
    model.eval()
    loss = right = 0.0
    for start in range(0, len(test), batch):
        rows = test.__getitems__(range(start, min(start + batch, len(test))))
        logits = model(rows["pixel_values"])
        loss += float(nn.functional.cross_entropy(logits, rows["labels"], reduction="sum"))
        right += float((logits.argmax(1) == rows["labels"]).sum())
    return loss / len(test), right / len(test)
