"""``hf-elra doctor``: what works on this machine and what does not, with a remedy for each thing that does not.

It looks at versions, devices, fast paths, and the three gates through which ``--optim elra`` has to pass in
Transformers. It trains nothing and asks no network.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple, NoReturn

from hf_elra.report.commands import print_all

MARKS = {"good": "✓", "note": "·", "bad": "✗"}


EXTRAS = {
    "datasets": ("hf-elra babyllama", "hf_elra[recipes]"),
    "evaluate": ("every recipe", "hf_elra[recipes]"),
    "PIL": ("hf-elra classify-images with pictures", "hf_elra[recipes]"),
    "rich": ("--elra_display rich", "hf_elra[display]"),
    "tensorboard": ("--report_to tensorboard", "tensorboard"),
    "trackio": ("--report_to trackio", "trackio"),
}
"""What nobody has to have: what needs it, and how it is installed."""


class Finding(NamedTuple):
    """One line of the doctor.

    Attributes:
        kind: ``"good"``; ``"note"``, where something is missing that nobody has to have; ``"bad"``, what is broken.
        text: what was found.
        remedy: what to do about it.
    """

    kind: str
    text: str
    remedy: str = ""


def main(words: list[str]) -> NoReturn:
    """Print all findings; leave with 1 if something is broken."""
    if words in (["-h"], ["--help"]):
        print(
            "usage: hf-elra doctor\n\nSays what works on this machine, and what does not; exit code 1 if it is broken."
        )
        sys.exit(0)
    if words:
        print(f"error: unknown argument {words[0]}; hf-elra doctor takes none.", file=sys.stderr)
        sys.exit(2)
    broken = 0
    for title, look in SECTIONS.items():
        print_all(f"{title}\n")
        for finding in look():
            broken += finding.kind == "bad"
            remedy = f"      → {finding.remedy}\n" if finding.remedy else ""
            print_all(f"  {MARKS[finding.kind]} {finding.text}\n{remedy}")
    print(f"\n{broken} broken" if broken else "\nall well")
    sys.exit(1 if broken else 0)


def versions() -> Iterator[Finding]:
    """Python and packages, against what this package needs."""
    yield Finding("good", f"Python {platform.python_version()} on {platform.platform()}")
    try:
        required = [text for text in requires("hf_elra") or [] if "extra ==" not in text]
    except PackageNotFoundError:
        yield Finding("note", "hf_elra is not installed but found as files", "pip install -e . in its folder")
        required = ["torch", "transformers", "accelerate"]
    from packaging.requirements import Requirement

    for requirement in map(Requirement, ["hf_elra", *required]):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if requirement.name != "hf_elra":
                yield Finding("bad", f"{requirement.name} is missing", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding("good", f"{requirement.name} {found}")
        else:
            yield Finding("bad", f"{requirement.name} {found} is not {requirement}", f"pip install '{requirement}'")
    for package, (needs_it, extra) in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            yield Finding("note", f"{package} is missing, which {needs_it} needs", f"pip install '{extra}'")


def devices() -> Iterator[Finding]:
    """What can be trained on."""
    import torch

    yield Finding("good", f"CPU with {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(number).total_memory / 2**30
            bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            yield Finding("good", f"{torch.cuda.get_device_name(number)}, {memory:.0f} GiB, {bf16}")
    elif torch.backends.mps.is_available():
        yield Finding("good", "Apple GPU (MPS); it has no float64, so that sums are made on the host")
    elif torch.version.cuda is not None:
        yield Finding("note", f"no GPU is seen, though PyTorch is built for CUDA {torch.version.cuda}", "nvidia-smi")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "bad", "there is an NVIDIA GPU, but this PyTorch is built for CPUs", "https://pytorch.org/get-started"
        )
    else:
        yield Finding("note", "no GPU; small models train on a CPU")


def fast_paths() -> Iterator[Finding]:
    """What makes updates and passes fast, and whether it is open here."""
    import torch

    try:
        torch._foreach_add_([torch.zeros(1)], 1.0)
        yield Finding("good", "updates of all parameters at once (foreach)")
    except (AttributeError, RuntimeError) as error:
        yield Finding("bad", f"updates of all parameters at once (foreach) fail: {error}", "reinstall torch")
    has_triton = importlib.util.find_spec("triton") is not None
    if not torch.cuda.is_available():
        yield Finding("note", "ELRA's kernels (Triton) are for CUDA; here updates are made by tensor operations")
    elif not has_triton:
        yield Finding("note", "ELRA's kernels need Triton; updates are made by tensor operations", "pip install triton")
    else:
        yield Finding("good", "ELRA's kernels (Triton)")
    if torch.cuda.is_available():
        yield Finding(
            "good" if has_triton else "note", "torch.compile" + ("" if has_triton else " needs Triton"),
            "" if has_triton else "pip install triton",
        )  # fmt: skip
    elif any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        yield Finding("good", "torch.compile (a C++ compiler is there)")
    else:
        yield Finding("note", "torch.compile needs a C++ compiler on a CPU", "apt install g++")


def gates() -> Iterator[Finding]:
    """Whether Transformers takes ``--optim elra``: the command line, the arguments, the Trainer."""
    import hf_elra

    try:
        from transformers import HfArgumentParser, Trainer, TrainingArguments
        from transformers.training_args import OptimizerNames

        import hf_elra.trainer
        from hf_elra.optim import OPTIMIZERS
        from hf_elra.trainer.upstream import UPSTREAM, optimizer_handlers
    except ImportError as error:
        yield Finding(
            "bad", f"Transformers cannot be reached: {error}", "pip install 'transformers>=5.8,<6' accelerate"
        )
        return
    remedy = f"this is hf_elra {hf_elra.__version__} with an unknown Transformers; pip install -U hf_elra"
    choices: list[str] = []
    for action in HfArgumentParser(TrainingArguments)._actions:  # type: ignore[arg-type]
        if action.dest == "optim":
            choices = [str(getattr(choice, "value", choice)) for choice in action.choices or ()]

    def gate(number: int, what: str, is_open: Callable[[str], bool]) -> Iterator[Finding]:
        passed = []
        for name in OPTIMIZERS:
            try:
                fault = "" if is_open(name) else "is closed"
            except Exception as error:  # whatever another version does
                fault = f"fails ({type(error).__name__}: {error})"
            if fault:
                yield Finding("bad", f"gate {number}, {what}: --optim {name} {fault}", remedy)
            else:
                passed.append(name)
        if passed:
            yield Finding("good", f"gate {number}, {what}, is open for --optim {', '.join(passed)}")

    yield from gate(1, "the command line", lambda name: name in choices)
    yield from gate(2, "TrainingArguments", lambda name: OptimizerNames(name).value == name)
    yield from gate(3, "the Trainer's table", lambda name: OptimizerNames(name) in optimizer_handlers())
    wrapped = hasattr(Trainer.__init__, "_hf_elra")
    yield Finding(
        *(("good", "Trainers are told the loss") if wrapped else ("bad", "no Trainer is told the loss", remedy))
    )
    moved = []
    for entry in UPSTREAM:
        if not entry.name.startswith("trainer."):
            try:
                entry.check(None)
            except (AttributeError, TypeError, ImportError) as error:
                moved.append(f"{entry.name} ({error})")
    if moved:
        yield Finding("bad", f"private names that this package uses have moved: {'; '.join(moved)}", remedy)
    else:
        yield Finding("good", "private names of Transformers and Accelerate are where they were")


SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Versions": versions,
    "Devices": devices,
    "Fast paths": fast_paths,
    "--optim elra in Transformers": gates,
}
