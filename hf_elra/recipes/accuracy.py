"""Accuracy of classes, as a Trainer is given it: ``compute_metrics`` and ``preprocess_logits_for_metrics``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_elra import metrics


def classes_of(logits: Any, labels: Any) -> torch.Tensor:
    """Return the predicted classes; called batch by batch, so that logits are not kept."""
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    return logits.argmax(-1)


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Return the accuracy: ``compute_metrics`` of the Trainer, after :func:`classes_of`."""
    result: dict[str, float] = metrics.load("accuracy").compute(
        predictions=np.asarray(prediction.predictions), references=np.asarray(prediction.label_ids)
    )
    return result
