"""Small models, data and trainers that the tests share."""

import logging
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test depends on a network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton reads it: kernels run in its interpreter
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_elra import ElraTrainer, ElraTrainingArguments, cli
from hf_elra.trainer.arguments import LAUNCHER_FLAGS

ROOT = Path(__file__).parents[1]
VOCABULARY = 64


@pytest.fixture(autouse=True)
def _no_flags_left_over():
    yield
    LAUNCHER_FLAGS.values, LAUNCHER_FLAGS.honoured, LAUNCHER_FLAGS.tell = {}, False, None


@pytest.fixture
def caplog_warnings(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


def llama(seed=0, **config):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


def classifier(seed=0, **config):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            **config,
        )
    )


def token_rows(count=64, length=16, seed=0, unequal=False):
    """Rows of tokens that count upwards from a random start: easy to learn. ``unequal`` masks some targets."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        start = torch.randint(0, VOCABULARY, (1,), generator=generator)
        tokens = (start + torch.arange(length)) % VOCABULARY
        labels = tokens.clone()
        if unequal:
            labels[torch.randint(2, length, (1,), generator=generator) :] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def ragged_rows(count=64):
    """Rows of tokens of different lengths, for :func:`padded`."""
    return [{"input_ids": row["input_ids"][: 3 + 5 * i % 13]} for i, row in enumerate(token_rows(count))]


def padded(rows):
    """Collate rows of different lengths, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens in (row["input_ids"] for row in rows):
        fill = (0, longest - len(tokens))
        batch["input_ids"].append(torch.nn.functional.pad(tokens, fill, value=0))
        batch["labels"].append(torch.nn.functional.pad(tokens, fill, value=-100))
        batch["attention_mask"].append(torch.nn.functional.pad(torch.ones_like(tokens), fill, value=0))
    return {key: torch.stack(values) for key, values in batch.items()}


def vit(seed=0):
    """An image classifier; it accepts num_items_in_batch and ignores it."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=4, **sizes))


def vit_rows(count=64, seed=0):
    """Images whose class is their brightest quarter, in float64."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    quarters = images.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(1, 4, 5)).flatten(1)
    return [
        {"pixel_values": image, "labels": int(quarter.argmax())}
        for image, quarter in zip(images, quarters, strict=True)
    ]


def arguments(folder, arguments_class=ElraTrainingArguments, **given):
    return arguments_class(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "max_steps": 10,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **given,
        }
    )


TRAINER_ONLY = ("callbacks", "eval_dataset", "data_collator", "compute_loss_func", "processing_class")


def trainer(folder, model=None, rows=None, trainer_class=ElraTrainer, **given):
    """A trainer on :func:`token_rows`; keywords are arguments of the Trainer or training arguments."""
    own = {name: given.pop(name) for name in TRAINER_ONLY if name in given}
    return trainer_class(
        model if model is not None else llama(),
        arguments(folder, **given),
        train_dataset=rows if rows is not None else token_rows(),
        **own,
    )


def logged(run, key):
    """The values of one key in the training logs."""
    return [entry[key] for entry in run.state.log_history if "loss" in entry and key in entry]


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.fixture
def command_here(monkeypatch, capsys):
    """Call the ``hf-elra`` command in this process, for what ends before a training: exit code, output and errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["hf-elra", *words])
        with pytest.raises(SystemExit) as end:
            sys.exit(cli.main())
        return end.value.code, *capsys.readouterr()

    return call


def finish(script, *words, folder=ROOT, path=None):
    """Run a script of this project to its end; return exit code, output and errors.

    What it starts looks for modules in ``path`` first.
    """
    from lib.ready import command  # here, as scripts of tests import this file, and only pytest knows the way to lib

    paths = os.pathsep.join(str(where) for where in (path, ROOT) if where)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = command([str(ROOT / "scripts" / script), *words], environment=environment, folder=folder)
    return done.returncode, done.stdout, done.stderr
