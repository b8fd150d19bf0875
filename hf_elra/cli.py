"""The ``hf-elra`` command: thin, each subcommand calls one function of the package."""

from __future__ import annotations

import sys

import hf_elra
from hf_elra.trainer.launcher import USAGE, run_and_leave


def main() -> int:
    """Entry point of the ``hf-elra`` command; returns the exit code."""
    words = sys.argv[1:]
    if words[:1] == ["run"]:
        run_and_leave(words[1:])
    if words[:1] == ["--version"]:
        print(hf_elra.__version__)
        return 0
    asked = words[:1] in (["-h"], ["--help"])
    print(USAGE, "       hf-elra --version", sep="\n", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
