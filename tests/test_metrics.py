"""Metrics that need no hub."""

import math

import pytest

from hf_elra import ConfigurationError, metrics


def test_accuracy():
    metric = metrics.load("accuracy")
    assert metric.compute(predictions=[0, 1, 2, 3], references=[0, 1, 1, 3]) == {"accuracy": 0.75}
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[2], references=[2])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


def test_perplexity_weighs_by_tokens():
    result = metrics.load("perplexity").compute(predictions=[1.0, 3.0], references=[300, 100])
    assert result == {"perplexity": pytest.approx(math.exp(1.5))}


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match="'acuracy' is unknown. Did you mean 'accuracy'"):
        metrics.load("acuracy")
