"""Language models trained with no tuning, beside optimizers with and without it: validation loss, one table.

    python scripts/experiments/benchmark_lm.py --train_file input.txt --tokens 1000000 --output docs/results/lm
    python scripts/experiments/benchmark_lm.py --train_file train.txt.gz --validation_file validation.txt.gz \\
        --tokens 10000000 --output docs/results/lm --batches 16 --seeds 0
    python scripts/experiments/benchmark_lm.py --train_file input.txt --tokens 1000000 --output docs/results/lm --print
    python scripts/experiments/benchmark_lm.py --train_file input.txt --tokens 500000 --output docs/results/lm \\
        --start runs/stories --kept_file validation.txt.gz

A Llama of 128 x 4 layers (with --model mixture a Mixtral of these sizes and 8 experts) over a byte-level BPE of 1,024
pieces made from the text, 128 positions, float32. Every run has its own file under --output: what is finished there is
not repeated, so that the same command goes on after an interruption; two of them with other --seeds may run side by
side. Rows named "..., rate x" are a grid; all others run with one setting, whatever the text, the model, the batch and
the seed. Towards the end are elra_spectral with other ends of training than the mean of the run, for mixtures with one
polar factor for all experts, and AdamW as models are fine-tuned. With --start a saved model and its tokenizer are
trained further; --kept_file is text of the kind it was trained on, whose loss shows what it forgets. --help lists all
flags.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    set_seed,
)

from hf_elra import ConfigurationError, ELRASpectral, ElraTrainer, ElraTrainingArguments, embeddings_of
from hf_elra.optim.directions.spectral import Spectral
from hf_elra.recipes import text_data
from hf_elra.recipes.babyllama import collate
from hf_elra.recipes.run_folder import read_json, write_json
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table
from lib.partners import PARTNERS, Together

PIECES, POSITIONS = 1024, 128
SHAPE: dict[str, Any] = {
    "vocab_size": PIECES, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS, "tie_word_embeddings": True,
}  # fmt: skip
MIXTURE = {
    "intermediate_size": 128, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=344)),
    "mixture": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, **MIXTURE)),
}
HELD_OUT = 0.1
"""Share of a text without a validation file that is held out, at its end."""
KEPT_BLOCKS = 512
"""How much of a --kept_file is evaluated, from its beginning."""
OURS = {"optim": "elra_spectral"}
NO_MOMENTUM = {**OURS, "optim_args": "momentum=0"}
BY_HALVES = {"elra_batch_control": "schedule", "elra_batch_schedule": "0:1,0.5:2,0.75:4"}
COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "max_grad_norm": 1.0, "weight_decay": 0.1}
RATES = ("3e-4", "1e-3", "3e-3", "1e-2")
LINEAR = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "max_grad_norm": 1.0}
LINEAR_RATES = ("5e-5", "3e-4", "1e-3", "3e-3", "1e-2")  # the first is Transformers' default, with the settings above
CONSTANT_RATES = ("3e-4", "3e-3")  # beside torch's default, 1e-3
FIRST_RATES = ("1e-7", "1e-5", "1e-1")
STRONG = {
    "Muon, cosine": {**COSINE, "optim": "adamw_torch"},
    "Muon, constant": {"optim": "adamw_torch", "max_grad_norm": 1.0, "elra_boost_mean": "run"},
    "SOAP, cosine": {**COSINE, "optim": "adamw_torch"},
    "NadamW, cosine": {**COSINE, "optim": "adamw_torch"},
}
"""Partners of ``lib/partners.py``, which bring their weight decay; a constant rate has the mean of the run."""
STRONG_RATES = ("1e-3", "3e-3", "1e-2", "3e-2")
ENDS: dict[str, dict[str, Any]] = {
    "last point": {},
    "cosine": {"lr_scheduler_type": "cosine"},
    "falling over the last fifth": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": lambda updates, batch: {"num_decay_steps": updates // 5, "decay_type": "linear"},
    },
    "batch by halves": BY_HALVES,
    "batch by noise scale": {
        "elra_batch_control": "noise",
        "elra_control_cycle": "20ba",
        "per_device_train_batch_size": lambda updates, batch: batch // 2,
        "gradient_accumulation_steps": 2,
    },
}
"""What may stand in for the mean of the run: with a known number of updates, or by the batch."""


class Row(NamedTuple):
    """A way to train.

    Attributes:
        settings: of the Trainer; a function makes its value from the number of updates and the batch.
        make: an optimizer's class and arguments from the model, where it is none that the Trainer knows by name.
    """

    settings: dict[str, Any]
    make: Callable[[Any], tuple[type, dict[str, Any]]] | None = None


def rows() -> dict[str, Row]:
    """All rows of the table, by title."""
    return {
        "elra_spectral": Row(OURS),
        "elra_spectral, no momentum": Row(NO_MOMENTUM),
        "elra_spectral, no momentum, batch as it is": Row({**NO_MOMENTUM, "elra_batch_control": "off"}),
        "elra_spectral, no momentum, batch by halves": Row({**NO_MOMENTUM, **BY_HALVES}),
        **{f"elra_spectral, α_0 = {rate}": Row({**OURS, "learning_rate": float(rate)}) for rate in FIRST_RATES},
        "ELRA (paper)": Row({"optim": "elra", "optim_args": "max_relative_step=none"}),
        **{
            f"AdamW, cosine, rate {rate}": Row({**COSINE, "optim": "adamw_torch", "learning_rate": float(rate)})
            for rate in RATES
        },
        **{
            f"AdamW, constant, rate {rate}": Row({"optim": "adamw_torch", "learning_rate": float(rate)})
            for rate in CONSTANT_RATES
        },
        "AdamW, torch's defaults": Row({"optim": "adamw_torch"}, lambda model: (torch.optim.AdamW, {})),
        "AdamW, torch's defaults, mean of the run": Row(
            {"optim": "adamw_torch", "elra_boost_mean": "run"}, lambda model: (torch.optim.AdamW, {})
        ),
        "Prodigy": Row({"optim": "adamw_torch"}, _prodigy),
        "schedule-free AdamW": Row({"optim": "adamw_torch"}, _schedule_free),
        "Muon (AdamW for tables and vectors)": Row({"optim": "adamw_torch"}, _muon),
        "elra_spectral's rule over Adam's direction": Row(OURS, lambda model: (_OverAdam, {"embeddings": ()})),
        "elra_spectral's rule over averaged gradients": Row(OURS, lambda model: (_OverAverages, {"embeddings": ()})),
        **{
            f"elra_spectral, {end}": Row({**OURS, "elra_boost_mean": "off", **settings})
            for end, settings in ENDS.items()
        },
        "elra_spectral, experts as one matrix": Row(OURS, lambda model: (ELRASpectral, {"experts": ()})),
        **{f"AdamW, linear, rate {rate}": Row({**LINEAR, "learning_rate": float(rate)}) for rate in LINEAR_RATES},
        "elra_spectral, all in float32": Row({**OURS, "optim_args": "state_dtype=float32,polar_dtype=float32"}),
        **{
            f"{name}, rate {rate}": Row(settings, _partner(name, rate))
            for name, settings in STRONG.items()
            for rate in STRONG_RATES
        },
        "NadamW, cosine, rate 3e-4": Row(STRONG["NadamW, cosine"], _partner("NadamW, cosine", "3e-4")),
    }


def _prodigy(model: Any) -> tuple[type, dict[str, Any]]:
    from prodigyopt import Prodigy

    return Prodigy, {}


def _schedule_free(model: Any) -> tuple[type, dict[str, Any]]:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree, {}


def _muon(model: Any) -> tuple[type, dict[str, Any]]:
    """torch.optim.Muon for hidden matrices, torch.optim.AdamW for the rest, both at their defaults."""
    marked = {id(p) for p in embeddings_of(model)}
    hidden = [p for p in model.parameters() if p.dim() == 2 and id(p) not in marked]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return _Together, {"optimizers": [torch.optim.Muon(hidden), torch.optim.AdamW(others)]}


class _Together(Together):
    """As a Trainer makes it, which passes parameters first."""

    def __init__(self, params: Any, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__(optimizers)


def _partner(name: str, rate: str) -> Callable[[Any], tuple[type, dict[str, Any]]]:
    """Make a partner of ``lib/partners.py`` at a rate."""
    return lambda model: (_Together, {"optimizers": PARTNERS[name].make(model, float(rate), 0)})


class _Adam(Spectral):
    """Adam's direction: averaged gradients over the root of their averaged squares."""

    BETA, EPSILON = 0.999, 1e-8

    def apply(self, groups: Any, params: Any, gradients: Any, state: Any) -> list[list[Tensor]]:
        return [self._of_group(*group, state) for group in zip(params, gradients, strict=True)]

    def _of_group(self, params: list[Tensor], gradients: list[Tensor], state: Any) -> list[Tensor]:
        directions = []
        for p, gradient, average in zip(params, gradients, self.averaged(params, gradients, state), strict=True):
            mine = state[p]
            number = mine["number"] = mine.get("number", 0) + 1
            if number == 1:
                mine["squares"] = torch.zeros_like(p)
            squares = mine["squares"].lerp_(gradient.square(), 1 - self.BETA) / (1 - self.BETA**number)
            directions.append(average / (1 - self.momentum ** (number + 1)) / (squares.sqrt() + self.EPSILON))
        return directions


class _Averages(Spectral):
    """Averaged gradients, those of a group scaled together to a mean square of one."""

    def apply(self, groups: Any, params: Any, gradients: Any, state: Any) -> list[list[Tensor]]:
        return [self._of_group(*group, state) if group[0] else [] for group in zip(params, gradients, strict=True)]

    def _of_group(self, params: list[Tensor], gradients: list[Tensor], state: Any) -> list[Tensor]:
        averages = self.averaged(params, gradients, state)
        size = get_total_norm(averages) / sum(average.numel() for average in averages) ** 0.5
        return [average / size for average in averages]


class _OverAdam(ELRASpectral):
    """The rule for α over Adam's direction."""

    def direction(self, momentum: float) -> Spectral:
        return _Adam(momentum)


class _OverAverages(ELRASpectral):
    """The rule for α over averaged gradients."""

    def direction(self, momentum: float) -> Spectral:
        return _Averages(momentum)


# ---- one run ----


class Text:
    """Blocks of tokens for training and validation, and maybe of a text that a model should not forget."""

    def __init__(self, given: argparse.Namespace) -> None:
        if given.validation_file:
            texts = text_data.load_texts(train_file=given.train_file, validation_file=given.validation_file)
            train, validation = texts.train, texts.validation
        else:
            whole = "\n".join(text_data.read_documents(given.train_file, "train_file", "text"))
            cut = int(len(whole) * (1 - HELD_OUT))
            train, validation = [whole[:cut]], [whole[cut:]]
        self.name = given.name or Path(given.train_file).absolute().parent.name
        tokenizer = text_data.load_tokenizer(given.start) if given.start else text_data.train_tokenizer(train, PIECES)
        self.train = text_data.tokenise(train, tokenizer, POSITIONS, "training")
        self.validation = text_data.tokenise(validation, tokenizer, POSITIONS, "validation")
        self.kept: Dataset | None = None
        if given.kept_file:
            kept = text_data.read_documents(given.kept_file, "kept_file", "text")
            blocks = text_data.tokenise(kept, tokenizer, POSITIONS, "kept")
            self.kept = blocks.select(range(min(len(blocks), KEPT_BLOCKS)))


def new_model(given: argparse.Namespace) -> Any:
    """The model that a run begins with."""
    return AutoModelForCausalLM.from_pretrained(given.start) if given.start else MODELS[given.model]()


def losses_before(given: argparse.Namespace, text: Text) -> dict[str, float]:
    """What a saved model's losses are before it is trained further; nothing of a new one."""
    if not given.start:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        settings = ElraTrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=64,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = ElraTrainer(new_model(given), settings, data_collator=collate)
        found = {"validation_loss_before": trainer.evaluate(text.validation)["eval_loss"]}
        if text.kept is not None:
            found["kept_loss_before"] = trainer.evaluate(text.kept)["eval_loss"]
    return found


def _same(before: dict[str, float], result: dict[str, Any]) -> bool:
    """Whether a run began where these losses were measured, to rounding."""
    found = {name: value for name, value in result.items() if name.endswith("_before")}
    return found.keys() == before.keys() and all(math.isclose(found[n], before[n], rel_tol=1e-4) for n in found)


def run(title: str, text: Text, given: argparse.Namespace, batch: int, seed: int) -> dict[str, Any]:
    """Train once; return losses and what was logged."""
    row, tokens = rows()[title], given.tokens
    updates = tokens // (batch * POSITIONS)
    set_seed(seed)
    model = new_model(given)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder, "per_device_train_batch_size": batch, "per_device_eval_batch_size": 64,
            "elra_max_tokens": tokens, "seed": seed, "logging_steps": max(1, updates // 40), "eval_strategy": "steps",
            "eval_steps": max(1, updates // 4), "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **{name: value(updates, batch) if callable(value) else value for name, value in row.settings.items()},
        }  # fmt: skip
        trainer = ElraTrainer(
            model,
            ElraTrainingArguments(**settings),
            data_collator=collate,
            train_dataset=text.train,
            eval_dataset=text.validation,
            optimizer_cls_and_kwargs=None if row.make is None else row.make(model),
        )
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        if evaluations and evaluations[-1]["step"] == trainer.state.global_step:
            loss = evaluations[-1]["eval_loss"]
        else:
            loss = trainer.evaluate()["eval_loss"]
        kept = {} if text.kept is None else {"kept_loss": trainer.evaluate(text.kept)["eval_loss"]}
    return {
        "validation_loss": loss, **kept, "updates": trainer.state.global_step, "seconds": seconds,
        "training_tokens": len(text.train) * POSITIONS, "log_history": trainer.state.log_history,
    }  # fmt: skip


def pending(given: argparse.Namespace, text: str) -> Iterator[tuple[str, int, int, Path]]:
    """Title, batch, seed and file of every run that was asked for."""
    titles = list(rows())
    for seed in given.seeds:
        for batch in given.batches:
            for number, title in enumerate(titles):
                if given.rows is None or number in given.rows:
                    name = "".join(c if c.isalnum() or c in "-." else "_" for c in title.replace("α", "alpha"))
                    kind = "" if _kind(given) == "llama" else f"-{_kind(given).replace(' ', '-')}"
                    folder = Path(given.output, f"{text}{kind}-{given.tokens}")
                    yield title, batch, seed, folder / f"{name}-batch{batch}-seed{seed}.json"


def table(given: argparse.Namespace, text: str) -> str:
    """Mean and standard deviation over seeds of the losses, of what there is."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for title, batch, _, path in pending(given, text):
        if path.is_file():
            found.setdefault((title, batch), []).append(read_json(path))
    results = [result for several in found.values() for result in several]
    kinds = {"validation_loss": "nats (runs)"}
    if any("kept_loss" in result for result in results):
        kinds["kept_loss"] = "kept text"
    lines = [["before", *([_cell(results[:1], f"{kind}_before") for kind in kinds] * len(given.batches))]]
    for title in rows():
        lines.append(
            [title, *(_cell(found.get((title, batch), []), kind) for batch in given.batches for kind in kinds)]
        )
    heads = [f"batch {batch}: {kind}" for batch in given.batches for kind in kinds.values()]
    return f"{text}, {_kind(given)}, {given.tokens:,} tokens\n\n" + markdown_table(
        ["", *heads], [line for line in lines if any(line[1:])]
    )


def _cell(results: list[dict[str, Any]], kind: str) -> str:
    losses = [result[kind] for result in results if kind in result]
    if not losses:
        return ""
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    runs = f" ({len(losses)})" if kind == "validation_loss" else ""
    return f"{statistics.fmean(losses):.3f}{spread}{runs}"


def _kind(given: argparse.Namespace) -> str:
    return f"from {Path(given.start).absolute().name}" if given.start else given.model


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    titles = "; ".join(f"{number}: {title}" for number, title in enumerate(rows()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help="txt, jsonl, csv or parquet, gzipped or not")
    parser.add_argument("--validation_file", help="without it the last tenth of the text is held out")
    parser.add_argument("--name", help="of the text; default: that of its folder")
    parser.add_argument("--model", choices=MODELS, default="llama", help="default: llama")
    parser.add_argument("--start", help="folder of a saved model and tokenizer to train further, instead of a new one")
    parser.add_argument("--kept_file", help="text of the kind that the model of --start was trained on")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of every run; default: 1000000")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="sequences an update; default: 16 64")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help=f"numbers of rows; default: all. {titles}")
    parser.add_argument("--output", required=True, help="folder of the raw files")
    parser.add_argument("--print", action="store_true", help="only the table of what is there")
    given = parser.parse_args(words)
    for name, least in (("tokens", 20 * POSITIONS * max(given.batches)), ("batches", 1), ("seeds", 0), ("rows", 0)):
        values = getattr(given, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < least:
                parser.error(f"--{name} {value} must be at least {least}")
    if given.start and not given.print and not Path(given.start, "config.json").is_file():
        parser.error(f"--start {given.start} is no folder of a saved model: there is no config.json in it")
    if given.start and not given.print and not list(Path(given.start).glob("tokenizer*")):
        parser.error(f"--start {given.start} has no tokenizer saved beside the model (tokenizer.save_pretrained)")
    if given.start and given.model != "llama":
        parser.error(f"--model {given.model} is for new models; leave it out beside --start")
    if given.kept_file and not given.start:
        parser.error("--kept_file needs --start: a new model has nothing to forget")
    if given.rows and max(given.rows) >= len(rows()):
        parser.error(f"--rows {max(given.rows)} is no row; {titles}")
    return given


def main(words: list[str]) -> int:
    """Make the runs that are missing; print the table."""
    given = parse(words)
    transformers.utils.logging.set_verbosity_error()
    try:
        text = Text(given) if not given.print else None
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = text.name if text is not None else given.name or Path(given.train_file).absolute().parent.name
    wanted = list(pending(given, name))
    before = losses_before(given, text) if text is not None else {}
    for *_, path in wanted:
        if text is not None and path.is_file() and not _same(before, read_json(path)):
            print(
                f"error: --start {given.start}: {path.parent} holds runs of another saved model or kept text, whose "
                "losses before training were others. Give another --name or --output.",
                file=sys.stderr,
            )
            return 2
    for number, (title, batch, seed, path) in enumerate(wanted, start=1):
        if text is None or path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        result = run(title, text, given, batch, seed)
        about = {"row": title, "text": name, "model": _kind(given)}
        about |= {"tokens": given.tokens, "batch": batch, "seed": seed, **before}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        command = shlex.join(["python", *sys.argv])
        write_json(path, {**about, "command": command, **environment(device), **result})
        loss = result["validation_loss"]
        text_of_loss = f"{loss:.4f}" if math.isfinite(loss) else str(loss)
        print(
            f"{number} of {len(wanted)}: {title}, batch {batch}, seed {seed}: {text_of_loss} nats, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )
    print(f"\n{table(given, name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
