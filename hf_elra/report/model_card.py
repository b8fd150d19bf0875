"""A model card for a finished run, from the files in its output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_elra.errors import ConfigurationError
from hf_elra.recipes.run_folder import LOG, METRICS, SAMPLE
from hf_elra.report.table import training_table

ENGLISH = ("python-docs", "roneneldan/TinyStories")
"""The presets' texts. Language and licence of another text are not known here, so that cards name none."""


def build_model_card(folder: str) -> ModelCard:
    """Build the card of the language model whose run is in ``folder``.

    Raises:
        ConfigurationError: the folder holds no finished run.
    """
    path = Path(folder)
    if not (path / METRICS).is_file():
        raise ConfigurationError(f"{folder!r} holds no finished run (no {METRICS}); train first.")
    metrics: dict[str, Any] = json.loads((path / METRICS).read_text(encoding="utf-8"))
    history = json.loads((path / LOG).read_text(encoding="utf-8"))
    sample = (path / SAMPLE).read_text(encoding="utf-8")
    settings = metrics["settings"]
    name = f"babyllama-{settings['preset']}"
    ours = not settings["train_file"] and settings["dataset"] in ENGLISH
    from_hub = not settings["train_file"] and settings["dataset"] != "python-docs"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=metrics["text"] if from_hub else "text",
            dataset_name=metrics["text"],
            metric_type=kind,
            metric_value=metrics[key],
        )
        for kind, key in (("loss", "validation_loss"), ("perplexity", "perplexity"))
    ]
    data = ModelCardData(
        language="en" if ours else None,
        license="mit" if ours else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama", "hf_elra", settings["optim"]],
        datasets=[metrics["text"]] if from_hub else None,
        model_name=name,
        eval_results=results,
    )
    facts = {
        "parameters": f"{metrics['parameters']:,}",
        "optimizer": settings["optim"],
        "training text": f"{metrics['text']}, {metrics['train_tokens']:,} tokens",
        "seen in training": f"{metrics['tokens_seen']:,} tokens in {metrics['updates']:,} updates",
        "validation loss": f"{metrics['validation_loss']:.4f} nats per token",
        "perplexity": f"{metrics['perplexity']:.2f}",
        "unigram entropy of the validation text": f"{metrics['unigram_entropy']:.4f} nats per token",
        "training time": f"{metrics['train_seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s"
        + (" since the last resume" if metrics["resumed_from"] else ""),
        "machine": metrics["machine"],
        "versions": ", ".join(f"{package} {version}" for package, version in metrics["versions"].items()),
        "seed": str(settings["seed"]),
    }
    lines = "\n".join(f"| {key} | {_escape(value)} |" for key, value in facts.items())
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {name}

A Llama of {metrics["parameters"]:,} parameters, trained from scratch with `hf_elra`. It shows what one short run does;
it is no assistant and knows nothing beyond its text. One run, one seed.

| | |
|---|---|
{lines}

Made by

{_fence(metrics["command"])}

## What the optimizer did

{training_table(history)}

## A sample

Temperature 0.8, top 50, fixed seed, the beginning given:

{_fence(sample)}
"""
    )


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _fence(text: str) -> str:
    """Quote text as a code block, with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"
