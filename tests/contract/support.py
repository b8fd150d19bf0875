"""The support table of docs/guides/devices.md, made from the list of cases and from what the tests run of it.

    PYTHONPATH=scripts/experiments python -m tests.contract.support        # writes the table into the page

``test_support.py`` checks that the page has it. A cell is read off the tests: where a contract test runs a case, the
case is tested. What is run elsewhere is named here, beside where that is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hf_elra.optim import OPTIMIZERS
from hf_elra.optim.around import Around
from tests.conftest import ROOT
from tests.contract import test_contract
from tests.contract.cases import CASES, Case

PAGE = ROOT / "docs" / "guides" / "devices.md"
BEGIN, END = "<!-- made by tests/contract/support.py -->", "<!-- /made -->"
TESTED, NOT_RUN, AWAY, REFUSED = "tested", "not run", "not on the device", "refused"
LEGEND = {
    TESTED: "on CPUs, or on the device where one is named",
    NOT_RUN: "what differs is a rule or a direction; another optimizer was run so",
    AWAY: "it works as far as a CPU can show, and was not run on the device",
    REFUSED: "with an error; of CUDA graphs it is torch's, as numbers are decided on the host",
}
ON_A_GPU = ("elra", "elra_spectral")  # docs/results/gpu
ON_2D_MESHES = ("elra", "elra_spectral")  # tests/trainer/test_processes.py: shards, polar factors of shards
ON_FAKE_MPS = ("elra", "elra_spectral")  # tests/test_devices.py
WITH_A_SCALER = ("elra", "elra_spectral", "hypergradient_adamw")  # tests/trainer/test_half_precision.py
IN_A_GRAPH = ("elra", "elra_spectral")  # docs/results/gpu; what waits for the host is refused by torch


def ran(test: Callable[..., Any]) -> Callable[[Case], str]:
    """What a contract test shows of a case: whether it is among its parameters."""
    cases: set[Case] = set()
    for mark in test.pytestmark:  # type: ignore[attr-defined]
        for value in mark.args[1]:
            cases |= {one for one in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(one, Case)}
    return lambda case: TESTED if case in cases else NOT_RUN


def among(names: tuple[str, ...], otherwise: str) -> Callable[[Case], str]:
    """Tested for optimizers of these names."""
    return lambda case: TESTED if case.optim in names else otherwise


def on_shards(case: Case) -> str:
    """FSDP2: some refuse shards; those around another optimizer are refused by a Trainer, and run in a bare loop."""
    if not case.takes_shards:
        return REFUSED
    found = ran(test_contract.test_shards_are_trained_or_refused)(case)
    return f"{found}; {REFUSED} in a Trainer" if issubclass(case.optimizer, Around) else found


def on_meshes(case: Case) -> str:
    """HSDP and tensor parallelism."""
    return among(ON_2D_MESHES, NOT_RUN)(case) if case.takes_shards else REFUSED


def with_a_scaler(case: Case) -> str:
    """fp16."""
    return REFUSED if getattr(case.optimizer, "needs_line_loss", False) else among(WITH_A_SCALER, NOT_RUN)(case)


COLUMNS: dict[str, Callable[[Case], str]] = {
    "CPU": ran(test_contract.test_a_value_of_a_wrong_type_is_named),
    "CUDA": among(ON_A_GPU, AWAY),
    "MPS": among((), AWAY),
    "DDP": ran(test_contract.test_two_processes_stay_alike_whatever_one_of_them_meets),
    "FSDP2": on_shards,
    "HSDP": on_meshes,
    "TP": on_meshes,
    "bf16": ran(test_contract.test_bfloat16_is_trained),
    "fp16": with_a_scaler,
    "compiled step": ran(test_contract.test_in_a_compiled_training_step),
    "CUDA graph": among(IN_A_GRAPH, REFUSED),
    "LoRA": ran(test_contract.test_lora_alone_is_trained),
}


def table() -> str:
    """The table in Markdown, with its legend: a row for every optimizer, a cell for all of its cases."""
    lots: dict[type, list[Case]] = {}
    for case in CASES:
        lots.setdefault(case.optimizer, []).append(case)
    names = {optimizer: f"`{name}`" for name, optimizer in OPTIMIZERS.items()}
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for optimizer, cases in lots.items():
        name = names.get(optimizer, f"`{optimizer.__name__}`")
        lines.append(" | ".join([f"| {name}", *(_cell(column, cases) for column in COLUMNS.values())]) + " |")
    legend = [f"- **{word}**: {meaning}." for word, meaning in LEGEND.items()]
    return "\n".join([*lines, "", *legend])


def _cell(column: Callable[[Case], str], cases: list[Case]) -> str:
    """What all cases of an optimizer show; of one that differs, its name, if it was run so or is refused."""
    first, *others = [(column(case), case) for case in cases]
    told = [(found, case) for found, case in others if found not in (first[0], NOT_RUN)]
    differing = [f"{found} ({case.name.partition(', ')[2]})" for found, case in told]
    return "; ".join([first[0], *differing])


def with_table(page: str) -> str:
    """A page with the table between its marks."""
    return re.sub(f"{BEGIN}.*?{END}", lambda m: f"{BEGIN}\n\n{table()}\n\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
