"""Fine-tuning a text classifier: its arguments, the rows of a file, and the model with a head for their classes.

The run itself is ``train_finetune.py``; what goes with which optimizer is below, too.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_elra.errors import ConfigurationError, nearest
from hf_elra.recipes.command_line import choose_optimizer, parse, value_of
from hf_elra.trainer import ElraTrainingArguments

OPTIMIZER = "elra_spectral"
STOCK = {"learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01}
"""Of every optimizer that is not ours, as BERT is fine-tuned; other optimizers than AdamW need another rate."""
KINDS = ("csv", "tsv", "jsonl")
NOT_OF_THE_TRAJECTORY = {"resume", "overwrite"}
_HELD_OUT = 20  # one row in this many, chosen at random, is for validation, if no validation file is given


@dataclass
class FinetuneArguments:
    """What to fine-tune, on what, and what to do with the run.

    Args:
        model (str): a model of the hub or a folder, with its tokenizer.
        train_file (str): texts and their labels: csv, tsv (without quoting) or jsonl, gzipped or not; csv and tsv begin
            with a line of names.
        validation_file (str): the same for validation. Without it one row in twenty is held out.
        text_column (str): name of the texts. Default: the column beside the labels, if there is one alone.
        label_column (str): name of the labels, which are numbers or names.
        max_length (int): tokens of a text; what is longer is cut.
        resume (bool): go on from the last checkpoint of an interrupted run.
        overwrite (bool): replace the run in the output folder. Together with ``--resume`` an interrupted run goes on, a
            finished one is left alone, and only a run with other settings is replaced.
    """

    model: str = field(metadata={"help": "Name on the hub, or a folder."})
    train_file: str = field(metadata={"help": "csv, tsv or jsonl file of texts and labels, maybe .gz."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for validation."})
    text_column: str | None = field(default=None, metadata={"help": "Of the texts. Default: the one beside labels."})
    label_column: str = field(default="label", metadata={"help": "Of the labels, numbers or names."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; what is longer is cut."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in the output folder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what is in the output folder."})

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise ConfigurationError(f"max_length={self.max_length} must be at least 4.")


@dataclass
class Rows:
    """Texts and their labels, as text."""

    texts: list[str]
    labels: list[str]


def parse_arguments(words: list[str]) -> tuple[FinetuneArguments, ElraTrainingArguments]:
    """Read the command line; what is not given suits the optimizer."""
    optim = choose_optimizer(words, OPTIMIZER)
    model, text = (Path(value_of(flag, words, "")).name for flag in ("--model", "--train_file"))
    output_dir = f"runs/{model}-{text.partition('.')[0]}" + ("" if optim == OPTIMIZER else f"-{optim}")
    return parse(FinetuneArguments, words, {"output_dir": output_dir, **defaults_of(optim)})


def defaults_of(optim: str) -> dict[str, Any]:
    """Return the values of the flags that are not given, for this optimizer."""
    return {
        "optim": optim,
        "report_to": ["none"],
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 1,
        "logging_steps": 0.02,  # shares of the run
        "eval_steps": 0.1,
        "save_steps": 0.1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **({} if optim.startswith("elra") else STOCK),
    }


# ---- texts and labels ----


def load_rows(recipe: FinetuneArguments) -> tuple[Rows, Rows, list[str]]:
    """Return rows for training and for validation, and the names of the classes.

    Raises:
        ConfigurationError: a file or a column is missing, a row is incomplete, or labels are no classes.
    """
    train = read_rows(recipe.train_file, "train_file", recipe)
    if recipe.validation_file:
        validation = read_rows(recipe.validation_file, "validation_file", recipe)
    else:
        if len(train.texts) < _HELD_OUT:
            raise ConfigurationError(
                f"train_file={recipe.train_file!r} has {len(train.texts)} rows, too few to hold one in {_HELD_OUT} "
                "out; give a --validation_file."
            )
        mixed = random.Random(0).sample(range(len(train.texts)), len(train.texts))  # files are often sorted
        number = len(mixed) // _HELD_OUT
        train, validation = (
            Rows([train.texts[i] for i in part], [train.labels[i] for i in part])
            for part in (sorted(mixed[number:]), sorted(mixed[:number]))
        )
    classes = sorted(set(train.labels), key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
    if not 2 <= len(classes) <= max(2, len(train.labels) // 2):
        raise ConfigurationError(
            f"train_file={recipe.train_file!r}: its column {recipe.label_column!r} holds {len(classes)} different "
            f"value(s) in {len(train.labels)} rows, which are no classes; choose another with --label_column."
        )
    if unknown := sorted(set(validation.labels) - set(classes)):
        raise ConfigurationError(
            f"label {unknown[0]!r} of the validation rows is not among those of the training rows."
        )
    return train, validation, classes


def read_rows(path: str, flag: str, recipe: FinetuneArguments) -> Rows:
    """Read a csv, tsv or jsonl file, gzipped or not."""
    file = Path(path)
    kind = file.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in KINDS:
        raise ConfigurationError(
            f"{flag}={path!r} must be a {', '.join(KINDS[:-1])} or {KINDS[-1]} file, or .gz of one."
        )
    if not file.is_file():
        raise ConfigurationError(f"{flag}={path!r} does not exist or is not a file.")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig", newline="") as stream:
            rows = _rows_of(stream, kind)
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:  # also of what is no UTF-8 or no JSON
        raise ConfigurationError(f"{flag}={path!r} cannot be read as {kind}: {error}.") from error
    if not rows:
        raise ConfigurationError(f"{flag}={path!r} holds no rows.")
    columns = [name for name in rows[0] if name is not None]
    label = _column(recipe.label_column, columns, f"{flag}={path!r}", "--label_column")
    others = [name for name in columns if name != label]
    if recipe.text_column is None and len(others) != 1:
        raise ConfigurationError(
            f"{flag}={path!r} has the columns {', '.join(columns)}; say which holds the texts with --text_column."
        )
    text = _column(recipe.text_column or others[0], columns, f"{flag}={path!r}", "--text_column")
    for number, row in enumerate(rows, start=1):
        if None in row or not isinstance(row.get(text), str) or not row[text].strip() or row.get(label) in (None, ""):
            raise ConfigurationError(
                f"{flag}={path!r}: row {number} lacks a text in {text!r} or a label in {label!r}, or has more columns "
                "than the first line. Correct it or take it out."
            )
    return Rows([row[text] for row in rows], [str(row[label]) for row in rows])


def _rows_of(stream: Any, kind: str) -> list[dict[Any, Any]]:
    if kind == "jsonl":
        rows = [json.loads(line) for line in stream if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
        return rows
    csv.field_size_limit(2**31 - 1)  # texts may be long
    how: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
    return list(csv.DictReader(stream, **how))


def _column(name: str, columns: list[str], source: str, flag: str) -> str:
    if name not in columns:
        raise ConfigurationError(
            f"{source} has no column {name!r}.{nearest(name, columns)} Its columns: {', '.join(columns)}. Choose with "
            f"{flag}."
        )
    return name


# ---- the model ----


def load_model(recipe: FinetuneArguments, classes: list[str]) -> tuple[Any, Any]:
    """Return the model, with a head for these classes, and its tokenizer.

    Raises:
        ConfigurationError: it is neither in a folder nor on the hub, or is none that can classify texts.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        model = AutoModelForSequenceClassification.from_pretrained(
            recipe.model,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: i for i, name in enumerate(classes)},
            ignore_mismatched_sizes=True,  # of a head for other classes
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        path, what = Path(recipe.model), ""
        if not path.exists():
            beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            what = f" It is no folder.{nearest(path.name, beside)}"
        raise ConfigurationError(
            f"model={recipe.model!r} could not be loaded as a text classifier with its tokenizer.{what} "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if tokenizer.pad_token is None:  # many language models have none
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def tokenise(rows: Rows, tokenizer: Any, classes: list[str], max_length: int) -> list[dict[str, Any]]:
    """Return what a Trainer takes: a dict a row, of the tokenizer's columns and ``labels``."""
    length = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(rows.texts, truncation=True, max_length=length)
    numbers = {name: i for i, name in enumerate(classes)}
    return [
        {**{name: values[i] for name, values in encoded.items()}, "labels": numbers[label]}
        for i, label in enumerate(rows.labels)
    ]


def for_card(recipe: FinetuneArguments, parameters: int, classes: list[str], sizes: tuple[int, int]) -> dict[str, Any]:
    """Return what the model card of a run has to say that its log does not.

    Args:
        recipe: of the run.
        parameters: how many the model has.
        classes: their names.
        sizes: how many rows there are for training and for validation.
    """
    base, data = Path(recipe.model).name, Path(recipe.train_file).name
    shown = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
    return {
        "title": f"{base}-{data.partition('.')[0]}",
        "task": "text-classification",
        "description": f"{base}, a model of {parameters:,} parameters, fine-tuned with `hf_elra` to classify texts.",
        "data": data,
        "more": {"texts": f"{sizes[0]:,} for training, {sizes[1]:,} for validation", "classes": shown},
    }
