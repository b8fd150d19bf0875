"""Model cards, from the files of runs: results, data and licences, machine, curves, what the optimizer did, limits.

A recipe says under ``"card"`` in its ``metrics.json`` what only it knows: title, task, language, licences. For the run
of any other Trainer these are options of ``hf-elra card``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_elra.errors import ConfigurationError
from hf_elra.report.names import SAMPLE
from hf_elra.report.page import picture
from hf_elra.report.runs import Run, find_runs, grouped
from hf_elra.report.table import markdown_table, training_table
from hf_elra.report.text import duration, number, table
from hf_elra.report.verdicts import MARKS, verdicts

MADE_BY = "<!-- made by hf-elra card -->"
"""What a card says that is not to be replaced by the Trainer's own."""
NOT_RECORDED = "not recorded"
RESULTS = {
    "validation_loss": "loss", "test_loss": "loss", "perplexity": "perplexity", "test_accuracy": "accuracy",
    "validation_accuracy": "accuracy",
}  # fmt: skip
"""What recipes write down at the end, and the metric's name."""
TASKS = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
    "ImageClassifier": "image-classification", "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForSeq2SeqLM": "text2text-generation", "ForConditionalGeneration": "text2text-generation",
}  # fmt: skip
"""The task of a model whose class ends like this."""


def build_model_card(
    folders: list[str] | str,
    *,
    name: str | None = None,
    data: str | None = None,
    data_licence: str | None = None,
    licence: str | None = None,
    picture_file: str | None = None,
) -> ModelCard:
    """Build the card of the model in a run's folder.

    Args:
        folders: the run, and further seeds of it, which are told in a table.
        name: of the model; by default what the recipe or the folder is called.
        data, data_licence: what it was trained on; by default what the recipe says.
        licence: of the model, as the hub abbreviates it (``mit``).
        picture_file: where its curves are drawn, as the card is to name it; see :func:`write_card`.

    Raises:
        ConfigurationError: there is no finished run.
    """
    folders = [folders] if isinstance(folders, str) else folders
    runs = find_runs(folders)
    for run in runs:
        if not run.finished:
            raise ConfigurationError(
                f"{str(run.folder)!r} holds no finished run: its log ends at update {run.updates:,}. Train to the end "
                "first; hf-elra report shows a run that goes on."
            )
    run = runs[0]
    told = {"title": name, "data": data, "data_licence": data_licence, "licence": licence}
    told = {**run.facts.get("card", {}), **{key: value for key, value in told.items() if value is not None}}
    title = str(told.get("title", run.name))
    return ModelCard(
        "\n\n".join(
            [
                f"---\n{_metadata(run, title, told).to_yaml()}\n---",
                f"{MADE_BY}\n\n# {title}",
                _first_sentence(run, told, len(runs)),
                _facts(run, told),
                f"Made by\n\n{_fence(run.facts['command'])}" if "command" in run.facts else "",
                *_of_all_seeds(runs),
                "## What the optimizer did",
                f"![Loss and learning rate over the run]({picture_file})" if picture_file else "",
                "\n".join(f"- {MARKS[verdict.kind]} {_escape(verdict.text)}" for verdict in verdicts(run)),
                training_table(run.history),
                *_sample(run),
                "## Limits",
                _limits(runs, told),
            ]
        ).replace("\n\n\n\n", "\n\n")
        + "\n"
    )


def write_card(folders: list[str], file: Path, **options: Any) -> ModelCard:
    """Write the card into ``file``, and its curves beside it."""
    drawing = file.with_suffix(".svg") if file.name != "README.md" else file.with_name("training.svg")
    card = build_model_card(folders, picture_file=drawing.name, **options)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        card.save(file)
        drawing.write_text(picture(find_runs(folders)[0]), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{str(file)!r} cannot be written: {error.strerror}; name another file.") from error
    return card


def _metadata(run: Run, title: str, told: dict[str, Any]) -> ModelCardData:
    task, data = _task(run, told), told.get("data")
    results = None
    if task is not None and data is not None:
        kind = data if re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)) and told.get("on_hub") else task.partition("-")[0]
        results = [
            EvalResult(
                task_type=task, dataset_type=kind, dataset_name=str(data), metric_type=metric, metric_value=value
            )
            for metric, value in _results(run).items()
        ] or None
    return ModelCardData(
        language=told.get("language"),
        license=told.get("licence"),
        library_name="transformers",
        pipeline_tag=task,
        tags=["hf_elra", run.optimizer],
        datasets=[str(data)] if told.get("on_hub") else None,
        model_name=title,
        eval_results=results,
    )


def _task(run: Run, told: dict[str, Any]) -> str | None:
    if "task" in told:
        return str(told["task"])
    model = str(run.facts.get("model", ""))
    return next((task for ending, task in TASKS.items() if model.endswith(ending)), None)


def _results(run: Run) -> dict[str, float]:
    """The results at the end: those of the recipe, or of the last evaluation."""
    found = {metric: run.facts[key] for key, metric in RESULTS.items() if key in run.facts}
    if not found:
        names = ["eval_loss", *run.metrics]
        found = {key.removeprefix("eval_"): value for key in names if (value := run.last(key)) is not None}
    return found


def _first_sentence(run: Run, told: dict[str, Any], seeds: int) -> str:
    parameters = f" of {run.facts['parameters']:,} parameters" if "parameters" in run.facts else ""
    what = str(told.get("description", f"A model{parameters}, trained with `hf_elra`."))
    return what + (
        " One run, one seed." if seeds == 1 else f" The numbers of this card are those of the first of {seeds} seeds."
    )


def _facts(run: Run, told: dict[str, Any]) -> str:
    facts = run.facts
    seen = [f"{position(run.updates):,.0f} {axis}" for axis in ("tokens", "samples") if (position := run.axis(axis))]
    for key, unit in (("tokens_seen", "tokens"), ("images_seen", "images")):
        if isinstance(facts.get(key), int):
            seen = [f"{facts[key]:,} {unit}"]
    seconds = facts.get("train_seconds", run.last("train_runtime"))
    speeds = [
        f", {facts[key]:,.0f} {unit}/s"
        for unit in ("tokens", "images", "samples")
        if (key := f"{unit}_per_second") in facts
    ]
    since = " since the last resume" if facts.get("resumed_from") else ""
    versions = facts.get("versions")
    rows = {
        "parameters": f"{facts['parameters']:,}" if "parameters" in facts else None,
        "optimizer": run.optimizer + (f", {facts['optim_args']}" if facts.get("optim_args") else ""),
        "data": told.get("data", NOT_RECORDED),
        "licence of the data": told.get("data_licence", NOT_RECORDED),
        "seen in training": f"{', '.join(seen)} in {run.updates:,} updates" if seen else f"{run.updates:,} updates",
        **{f"{name} on held-out data": _shown(name, value) for name, value in _results(run).items()},
        "training time": None if seconds is None else f"{duration(seconds)}{''.join(speeds)}{since}",
        "machine": facts.get("machine"),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "seed": facts.get("seed"),
        **told.get("more", {}),
    }
    lines = "\n".join(f"| {key} | {_escape(str(value))} |" for key, value in rows.items() if value is not None)
    return f"| | |\n|---|---|\n{lines}"


def _shown(metric: str, value: float) -> str:
    return f"{100 * value:.2f} %" if metric == "accuracy" else number(value)


def _of_all_seeds(runs: list[Run]) -> list[str]:
    if len(runs) == 1:
        return []
    header, rows = table(grouped(runs))
    return ["## All seeds", markdown_table(header, rows)]


def _sample(run: Run) -> list[str]:
    file = run.folder / SAMPLE
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    return ["## A sample", "Temperature 0.8, top 50, fixed seed, the beginning given:", _fence(text)]


def _limits(runs: list[Run], told: dict[str, Any]) -> str:
    seeds = "one seed, which says nothing of the spread over seeds" if len(runs) == 1 else f"{len(runs)} seeds"
    found = [
        f"Measured on {seeds}, on one split of {told.get('data', 'data that were not recorded')}.",
        "Neither other data nor harmful output were tested.",
        str(told.get("limits", "")),
    ]
    return " ".join(filter(None, found))


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _fence(text: str) -> str:
    """Quote text as a code block, with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"
