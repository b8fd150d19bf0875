"""``hf-elra report`` and ``hf-elra card``: their flags, what they write, their exit codes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hf_elra.errors import ConfigurationError, nearest
from hf_elra.report.runs import find_runs


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        _, is_unknown, flag = message.partition("unrecognized arguments: ")
        hint = nearest(flag.split()[0], self._option_string_actions) if is_unknown else ""
        raise ConfigurationError(f"{message}.{hint} {self.prog} --help lists all flags.")


def report(words: list[str]) -> NoReturn:
    """Show runs; leave with 0, or with 2 for wrong input."""
    _leave_with(_report, words)


def card(words: list[str]) -> NoReturn:
    """Write a model card; leave with 0, or with 2 for wrong input."""
    _leave_with(_card, words)


def _leave_with(command: Callable[[list[str]], None], words: list[str]) -> NoReturn:
    try:
        command(words)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _report(words: list[str]) -> None:
    parser = _Parser(
        prog="hf-elra report",
        description="Show what runs did, from their own logs: finished runs, running ones, checkpoints, copies.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, or a folder of several")
    parser.add_argument("-o", "--output", default="report.html", help="the page; report.html by default")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--text", action="store_true", help="print it to the terminal instead")
    instead.add_argument("--json", action="store_true", help="print numbers and verdicts as JSON instead")
    given = parser.parse_args(words)
    runs = find_runs(given.runs)
    if given.text or given.json:
        from hf_elra.report.text import as_json, as_text

        text = json.dumps(as_json(runs), indent=2, default=str) + "\n" if given.json else as_text(runs)
        print_all(text)
        return
    from hf_elra.report.page import build_page

    _write(Path(given.output), build_page(runs))
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{what}: {given.output} (open it in a browser; hf-elra report --text prints it here)")


def _card(words: list[str]) -> None:
    parser = _Parser(
        prog="hf-elra card", description="Write the model card of a finished run, with its curves beside it."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of the run; further ones are seeds of it")
    parser.add_argument(
        "-o", "--output", help="the card; README.md in the run's folder by default, which goes to the hub"
    )
    parser.add_argument("--name", help="of the model")
    parser.add_argument("--data", help="what it was trained on")
    parser.add_argument("--data-licence", help="of the data, in words")
    parser.add_argument("--licence", help="of the model, as the hub abbreviates it: mit, apache-2.0, …")
    given: dict[str, Any] = vars(parser.parse_args(words))
    from hf_elra.report.model_card import NOT_RECORDED, write_card

    runs, output = given.pop("runs"), given.pop("output")
    file = Path(output or Path(runs[0], "README.md"))
    if file.is_dir():
        raise ConfigurationError(f"output={str(file)!r} is a folder; name a file in it, as {str(file / 'card.md')!r}.")
    card = write_card(runs, file, **given)
    print(f"model card: {file}")
    if NOT_RECORDED in card.content:
        print("It does not say what the data are, or their licence: give --data and --data-licence.")


def print_all(text: str) -> None:
    """Print text also on a terminal that does not know all of its characters."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"output={str(file)!r} cannot be written: {error.strerror}; name another file."
        ) from error
