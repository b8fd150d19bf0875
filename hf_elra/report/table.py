"""What ELRA did in a run, as a Markdown table made from the Trainer's log history."""

from __future__ import annotations

from typing import Any


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table, columns aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def training_table(history: list[dict[str, Any]], rows: int = 12) -> str:
    """Return a table of about ``rows`` evenly spaced training logs, the last one included.

    A row shows the last evaluation since the row before. An evaluation after the last log has a row of its own. Empty
    where there is no log.

    Args:
        history: the Trainer's ``state.log_history``.
        rows: how many logs to show at most.
    """
    logs = [entry for entry in history if "loss" in entry]
    stride = max(1, -(-len(logs) // rows))
    shown = logs[::-1][::stride][::-1]
    found = [entry for entry in history if "eval_loss" in entry]
    if found and logs and found[-1]["step"] > logs[-1]["step"]:
        shown = [*shown, found[-1]]
    evaluations: dict[int, dict[str, Any]] = {}
    for evaluation in found if shown else ():
        evaluations[next(row["step"] for row in shown if evaluation["step"] <= row["step"])] = evaluation
    columns = {
        "update": lambda e: f"{e['step']:,}",
        "epoch": lambda e: "" if "num_input_tokens_seen" in e else f"{e['epoch']:.2f}" if "epoch" in e else "",
        "tokens": lambda e: f"{e['num_input_tokens_seen']:,}" if "num_input_tokens_seen" in e else "",
        "training loss": lambda e: f"{e['loss']:.4f}" if "loss" in e else "",
        "validation loss": lambda e: f"{evaluations[e['step']]['eval_loss']:.4f}" if e["step"] in evaluations else "",
        "accuracy": lambda e: _percent(evaluations.get(e["step"], {}).get("eval_accuracy")),
        "batch": lambda e: f"{e['batch_size']:g}" if "batch_size" in e else "",
        "learning rate": lambda e: f"{e['learning_rate']:.3g}" if "learning_rate" in e else "",
        "step norm": lambda e: f"{e['step_norm']:.3g}" if "step_norm" in e else "",
        "cosine": lambda e: f"{e['cosine']:+.3f}" if "cosine" in e else "",
        "restarts": lambda e: f"{e['restarts']}" if "restarts" in e else "",
    }
    if not shown:
        return ""
    table = [[show(entry) for show in columns.values()] for entry in shown]
    used = [i for i in range(len(columns)) if any(row[i] for row in table)]
    return markdown_table([list(columns)[i] for i in used], [[row[i] for i in used] for row in table])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"
