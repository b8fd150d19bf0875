"""The ``hf-elra`` command. Each subcommand calls one function of the package; the work is done there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import hf_elra
from hf_elra.errors import nearest


def _run(words: list[str]) -> NoReturn:
    from hf_elra.trainer.launcher import run_and_leave

    run_and_leave(words)


def _babyllama(words: list[str]) -> NoReturn:
    from hf_elra.recipes.train_babyllama import main
    from hf_elra.recipes.training_run import run_script

    run_script(main, words)


def _classify_images(words: list[str]) -> NoReturn:
    from hf_elra.recipes.train_image_classifier import main
    from hf_elra.recipes.training_run import run_script

    run_script(main, words)


def _finetune(words: list[str]) -> NoReturn:
    from hf_elra.recipes.train_finetune import main
    from hf_elra.recipes.training_run import run_script

    run_script(main, words)


def _report(words: list[str]) -> NoReturn:
    from hf_elra.report.commands import report

    report(words)


def _card(words: list[str]) -> NoReturn:
    from hf_elra.report.commands import card

    card(words)


def _doctor(words: list[str]) -> NoReturn:
    from hf_elra.doctor import main

    main(words)


COMMANDS: dict[str, tuple[Callable[[list[str]], NoReturn], str]] = {
    "run": (_run, "run a training script that does not know this package, with our --optim names and --elra_* flags"),
    "babyllama": (_babyllama, "train a small language model from scratch"),
    "classify-images": (_classify_images, "train an image classifier"),
    "finetune": (_finetune, "fine-tune a model on texts with labels"),
    "report": (_report, "show what runs did: one page, or text, or JSON"),
    "card": (_card, "write the model card of a finished run"),
    "doctor": (_doctor, "say what works on this machine, and what does not"),
}
"""By the name of a command: the function that gets the words after the name, and one line that says what it does."""


def usage() -> str:
    """Return the text that lists all commands, one per line."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:{width}}{text}" for name, (_, text) in COMMANDS.items())
    first = "usage: hf-elra COMMAND [ARGS ...]\n       hf-elra --version"
    return f"{first}\n\n{lines}\n\nhf-elra COMMAND --help says more."


def main() -> int:
    """Entry point of the ``hf-elra`` command; returns the exit code."""
    if not sys.argv[1:]:
        print(usage(), file=sys.stderr)
        return 2
    name, *words = sys.argv[1:]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(hf_elra.__version__)
        return 0
    if name not in COMMANDS:
        text = f"hf-elra: error: unknown command {name!r}.{nearest(name, COMMANDS)} hf-elra --help lists all commands."
        print(text, file=sys.stderr)
        return 2
    COMMANDS[name][0](words)


if __name__ == "__main__":
    sys.exit(main())
