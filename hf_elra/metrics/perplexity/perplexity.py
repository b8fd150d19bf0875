"""Perplexity from losses."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Perplexity(evaluate.Metric):
    """The exponential of the mean loss per token, weighted by numbers of tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood per token, in nats.",
            citation="",
            inputs_description="predictions: mean loss per token of every batch; references: its number of tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"perplexity": float(np.exp(np.average(np.asarray(predictions), weights=np.asarray(references))))}
