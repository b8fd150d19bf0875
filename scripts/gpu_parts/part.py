"""What every part has: its time, its file of results, and what an earlier call has already measured.

Results are JSON lines, written at once. A line with a ``row`` is a measurement of that row; a row that has one without
an ``error`` is done and is not measured again.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured"


class Part:
    """A part that runs.

    Args:
        name (str): of the part.
        folder (Path): where ``NAME.jsonl`` is.
        seconds (float): how long it may take from now on.
        device (str): ``"cuda"`` or ``"cpu"``.
        bundle (Path, optional): what was brought along, see ``gpu_bundle.py``.
        tiny (bool): everything as small as it gets.
    """

    def __init__(
        self, name: str, folder: Path, seconds: float, device: str, bundle: Path | None, *, tiny: bool = False
    ) -> None:
        self.name, self.file = name, folder / f"{name}.jsonl"
        self.device, self.bundle, self.tiny = device, bundle, tiny
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self.entries = read(self.file)
        if self.file.is_file() and not self.file.read_bytes().endswith(b"\n"):  # the last line was cut short
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n")

    @property
    def left(self) -> float:
        """Seconds until the part has to be over."""
        return self._end - time.monotonic()

    def write(self, **entry: Any) -> None:
        """Append a line to the file of results."""
        self.entries.append(entry)
        with self.file.open("a", encoding="utf-8") as file:
            print(json.dumps(entry), file=file, flush=True)

    def about(self, kind: str) -> dict[str, Any] | None:
        """The last line that holds this key: a decision that a call that goes on has to keep."""
        return next((entry[kind] for entry in reversed(self.entries) if kind in entry), None)

    def is_done(self, row: str) -> bool:
        """Whether a row was measured."""
        return row in measured(self.entries)

    def measure(self, row: str, work: Callable[[], dict[str, Any]], *, needs: float = 0.0) -> None:
        """Measure a row and write what ``work`` returns; an error is written as well and ends nothing.

        Nothing is done where the row was measured before, or where less than ``needs`` seconds are left.
        """
        if self.is_done(row):
            return
        if self.left < max(needs, 1.0):
            print(f"{self.name}: {row}: no time left", flush=True)
            return
        begun = time.monotonic()
        try:
            result = work()
        except Exception as error:  # the next row may work
            traceback.print_exc()
            self.write(row=row, error=f"{type(error).__name__}: {str(error)[:400]}")
            return
        self.write(row=row, **result, took=round(time.monotonic() - begun, 2))
        print(f"{self.name}: {row}: {time.monotonic() - begun:.1f} s", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; a last one that was cut short is left out."""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def measured(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last good measurement of every row."""
    return {entry["row"]: entry for entry in entries if "row" in entry and "error" not in entry}


def failed(entries: list[dict[str, Any]]) -> dict[str, str]:
    """The error of every row that has nothing but errors."""
    good = measured(entries)
    return {entry["row"]: entry["error"] for entry in entries if "error" in entry and entry["row"] not in good}


def lines(
    names: list[str], entries: list[dict[str, Any]], width: int, cells: Callable[[dict[str, Any]], list[str]]
) -> list[list[str]]:
    """One line of a table for each row, measured or not.

    Args:
        names: of the rows.
        entries: of the part.
        width: columns beside the name.
        cells: what a measurement shows in them.
    """
    good, bad = measured(entries), failed(entries)
    table = []
    for name in names:
        if name in good:
            table.append([name, *cells(good[name])])
        else:
            table.append([name, "failed" if name in bad else NOT_MEASURED, *[""] * (width - 1)])
    return table
