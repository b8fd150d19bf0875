"""The model card that a Trainer writes, and pushes to the hub: what the optimizer did is added to it.

Cards of this package's own are in ``report/model_card.py``; one that lies in the output folder stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_elra.report.model_card import MADE_BY
from hf_elra.report.runs import Run
from hf_elra.report.table import training_table
from hf_elra.report.verdicts import verdicts


def create_card(trainer: Any, stock_create: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Write ``README.md`` in the output folder, unless ``hf-elra card`` has.

    Args:
        trainer (Trainer): whose card it is.
        stock_create: writes the stock card, told ``args`` and ``kwargs``.
    """
    file = Path(str(trainer.args.output_dir), "README.md")
    if file.is_file() and MADE_BY in file.read_text(encoding="utf-8"):
        return
    stock_create(*args, **kwargs)
    history = trainer.state.log_history
    if not trainer.elra_active or not trainer.is_world_process_zero() or not any("loss" in entry for entry in history):
        return
    said = "\n".join(f"- {verdict.text}" for verdict in verdicts(Run(file.parent, history)))
    with file.open("a", encoding="utf-8") as card:
        card.write(f"\n## What the optimizer did\n\n{said}\n\n{training_table(history)}\n")
