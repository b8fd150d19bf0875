"""Everything that has to be shown on a GPU, in one command with a time limit.

    python scripts/gpu_check.py --output runs/gpu                          # twelve minutes, all parts
    python scripts/gpu_check.py --output runs/gpu --only pictures memory   # some of them
    python scripts/gpu_check.py --output runs/gpu --print                  # the tables of what was measured
    python scripts/gpu_check.py --output runs/check --tiny --minutes 2     # everything small, on a CPU too

Parts run one after the other, in the order of their worth, each in a process of its own with a time budget: what takes
longer is cut, what fails does not stop the next. Every measurement is written at once, as a line of
``OUTPUT/PART.jsonl``; the same command goes on where the files end. Rows without a measurement say "not measured".
``--bundle`` is a folder with text, pictures and packages, see ``gpu_bundle.py`` and docs/gpu_check.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_HERE = Path(__file__).absolute().parent
sys.path[:0] = [str(_HERE), str(_HERE / "experiments"), str(_HERE.parent)]

from gpu_parts import PARTS  # noqa: E402 - found by the lines above
from gpu_parts.part import Part, failed, measured, read  # noqa: E402

MINUTES = 12
GRACE = 6.0
"""Seconds that a part may take beyond its budget before it is stopped."""
WHOLE_PART = "the part as a whole"
"""The row of what goes wrong outside of all others."""
SITE = "packages"
"""Where the packages of the bundle are installed, in the output folder."""


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for the measurements")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything. Default: {MINUTES}.")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="parts to run. Default: all.")
    parser.add_argument("--bundle", type=Path, help="folder that was brought along, as made by gpu_bundle.py")
    parser.add_argument("--tiny", action="store_true", help="everything as small as it gets, to try this script")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="Default: cuda if there is one.")
    parser.add_argument("--print", action="store_true", help="only print the tables of what is in --output")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes:g} must be above 0")
    if given.bundle is not None and not given.bundle.is_dir():
        parser.error(f"--bundle {given.bundle} is no folder; make one with: python scripts/gpu_bundle.py --output DIR")
    if given.output.exists() and not given.output.is_dir():
        parser.error(f"--output {given.output} is a file; give a folder")
    return given


def main(words: list[str]) -> int:
    """Run the parts, print the tables; 1 if a check failed or could not be made."""
    given = parse(words)
    begun = time.monotonic()
    if given.print:
        print(tables(given.output, given.tiny))
        return 0
    given.output.mkdir(parents=True, exist_ok=True)
    install(given.bundle, given.output / SITE)
    given.device = given.device or device_here()
    if given.part:
        return run_here(given)
    if given.device == "cpu" and not given.tiny:
        print("No GPU was found, and for a CPU all of this is far too large: try --tiny.", flush=True)
    names = [name for name in PARTS if given.only is None or name in given.only]
    for index, name in enumerate(names):
        left = 60 * given.minutes - (time.monotonic() - begun)
        to_come = sum(PARTS[other].SECONDS for other in names[index:])
        # Time that an earlier part did not need is shared out.
        budget = left * PARTS[name].SECONDS / to_come
        run_part(name, max(budget - GRACE, 1.0), given)
    print(f"\n{tables(given.output, given.tiny)}\n\n{time.monotonic() - begun:.0f} seconds", flush=True)
    return int(any(problems(name, given.output) for name in names))


def install(bundle: Path | None, site: Path) -> None:
    """Make the packages of a bundle importable, here and in the processes that are started."""
    wheels = sorted(bundle.glob("wheels/*.whl")) if bundle is not None else []
    wanted = [wheel for wheel in wheels if importlib.util.find_spec(wheel.name.split("-")[0]) is None]
    if wanted and not site.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(site), *map(str, wanted)], check=True)
    if site.is_dir():
        sys.path.insert(0, str(site))
    paths = [str(site.absolute()), str(Path(__file__).absolute().parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def device_here() -> str:
    """``"cuda"`` where there is a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_part(name: str, seconds: float, given: argparse.Namespace) -> None:
    """Run a part in a process of its own, and stop it and its children at the end of its time."""
    print(f"\n== {PARTS[name].TITLE}: {seconds:.0f} seconds", flush=True)
    command = [sys.executable, __file__, "--part", name, "--seconds", f"{seconds:.1f}", "--output", str(given.output)]
    command += ["--device", given.device]
    command += ["--bundle", str(given.bundle)] if given.bundle is not None else []
    command += ["--tiny"] if given.tiny else []
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped, its time is over", flush=True)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_here(given: argparse.Namespace) -> int:
    """Be the process of one part."""
    import torch
    import transformers

    from hf_elra.report.environment import environment

    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")  # as people train
    part = Part(given.part, given.output, given.seconds, given.device, given.bundle, tiny=given.tiny)
    packages = ("lion-pytorch", "prodigyopt", "schedulefree", "triton", "datasets")
    command = " ".join(["python", "scripts/gpu_check.py", "--only", given.part, *(["--tiny"] if given.tiny else [])])
    part.write(command=command, **environment(given.device, *packages), seconds=given.seconds, tiny=given.tiny)
    try:
        PARTS[given.part].run(part)
    except Exception as error:  # outside of any row
        traceback.print_exc()
        part.write(row=WHOLE_PART, error=f"{type(error).__name__}: {str(error)[:400]}")
        return 1
    part.write(row=WHOLE_PART)
    return 0


def problems(name: str, folder: Path) -> list[str]:
    """What failed or was found wrong in a part."""
    entries = read(folder / f"{name}.jsonl")
    wrong = [row for row, entry in measured(entries).items() if entry.get("ok") is False]
    return [*wrong, *failed(entries)]


def tables(folder: Path, tiny: bool) -> str:
    """All tables, in Markdown, each with where it was measured and what failed."""
    from hf_elra.report.table import markdown_table

    texts = []
    for name, module in PARTS.items():
        entries = read(folder / f"{name}.jsonl")
        where: dict[str, Any] = next((entry for entry in reversed(entries) if "machine" in entry), {})
        header, table = module.table(entries, tiny)
        text = f"## {module.TITLE}\n\n"
        if where:
            versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
            text += f"`{where['command']}`: {where['machine']}; {versions}.\n\n"
        text += markdown_table(header, table)
        for row, error in failed(entries).items():
            text += f"\n\nFailed: {row}: {error.splitlines()[0] if error else ''}"
        texts.append(text)
    return "\n\n".join(texts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
