"""BabyLlama: the presets, the model, and the training settings that go with each optimizer.

``tiny`` runs in minutes on two CPU cores; ``15m`` is llama2.c's stories15M, the model of the paper's section 4.4. Texts
and tokenizers are in ``text_data.py``; the run itself is ``train_babyllama.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from hf_elra.errors import ConfigurationError
from hf_elra.recipes.command_line import choose, choose_optimizer, given, parse
from hf_elra.recipes.text_data import PYTHON_DOCS
from hf_elra.trainer import ElraTrainingArguments

# Every name below is a flag of the script; a flag given by the user wins.
PRESETS: dict[str, dict[str, Any]] = {
    # A Llama of 1.0 M parameters. The paper's control cycle, 45,000 of 51.2 M sequences, would be 17 sequences here,
    # too few for a mean and its σ. 400 give 48 cycles, of 100 updates at first (docs/results/tiny_preset.md).
    "tiny": {
        "dataset": PYTHON_DOCS,
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 344,
        "block_size": 128,
        "vocab_size": 2048,
        "elra_max_samples": 19_200,
        "per_device_train_batch_size": 8,
        "elra_min_step_norm": 0.2,
        "per_device_eval_batch_size": 32,
        "elra_control_cycle": "400sp",
        "logging_steps": 40,
        "eval_steps": 400,
    },
    # llama2.c's stories15M: 15,191,712 parameters.
    "15m": {
        "dataset": "roneneldan/TinyStories",
        "hidden_size": 288,
        "num_layers": 6,
        "num_heads": 6,
        "intermediate_size": 768,
        "block_size": 256,
        "vocab_size": 32_000,
        "elra_max_samples": 12_800_000,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "elra_control_cycle": "45000sp",
        "logging_steps": 100,
        "eval_steps": 5000,
    },
}

OPTIMIZER = "elra_spectral"
"""The default: of the optimizers that need no tuning, it was the best on every text tried (docs/results/lm.md)."""

_TINY = PRESETS["tiny"]
NOT_OF_THE_TRAJECTORY = {"resume", "overwrite", "model_card", "prompt", "sample_tokens"}
_NOT_OF = {"elra": (), "elra_spectral": ("elra_min_step_norm",)}  # other optimizers get all of these
_ELRA_ONLY = ("elra_min_step_norm", "elra_control_cycle")

# Sensible settings by optimizer family, for comparisons with the same script. The first one that fits a name counts.
_SCHEDULED = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "max_grad_norm": 1.0}
_ADAMW = {**_SCHEDULED, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95}
FAMILIES: dict[str, dict[str, Any]] = {
    "elra_spectral": {"per_device_train_batch_size": {"tiny": 8, "15m": 16}},
    "elra": {"per_device_train_batch_size": {"tiny": 4, "15m": 16}},  # it grows
    "schedule_free": {"lr_scheduler_type": "constant", "learning_rate": 3e-3, "adam_beta1": 0.9, "adam_beta2": 0.95},
    "adamw": {**_ADAMW, "learning_rate": {"tiny": 3e-3, "15m": 5e-4}},  # llama2.c's, at its batch of 512: 5e-4
    "stable_adamw": {**_ADAMW, "learning_rate": {"tiny": 3e-3, "15m": 5e-4}},
    "lion": {**_SCHEDULED, "weight_decay": 0.1, "learning_rate": {"tiny": 3e-4, "15m": 1e-4}},
    "sgd": {**_SCHEDULED, "learning_rate": 0.3},
    "adafactor": {**_SCHEDULED, "learning_rate": 1e-2},
    "rmsprop": {**_SCHEDULED, "learning_rate": 1e-3},
    "adagrad": {**_SCHEDULED, "learning_rate": 1e-2},
}


@dataclass
class BabyLlamaArguments:
    """What to train on, the size of the model, and what to do with the run; defaults come from the preset.

    Args:
        preset (str): ``tiny`` or ``15m``.
        dataset (str): ``python-docs`` (in every Python, no network) or a data set of the hub with a text column.
        dataset_config, text_column (str): configuration and column of that data set.
        train_file, validation_file (str): local text in its place: txt with ``<|endoftext|>`` between documents, jsonl,
            csv or parquet, gzipped or not.
        tokenizer (str): a tokenizer of the hub, a folder or a ``tokenizer.model``; without it a BPE is trained.
        vocab_size (int): number of pieces of a tokenizer that is trained here.
        hidden_size, num_layers, num_heads, intermediate_size, block_size (int): the Llama; ``block_size`` is the number
            of positions and the length of a training sequence, in tokens.
        prompt (str): beginning of the sample.
        sample_tokens (int): length of the sample.
        model_card (str): where to write a model card.
        resume (bool): go on from the last checkpoint of an interrupted run.
        overwrite (bool): replace the run in the output folder. Together with ``--resume`` an interrupted run goes on, a
            finished one is left alone, and only a run with other settings is replaced.
    """

    preset: str = field(default="tiny", metadata={"help": "tiny (minutes on two CPU cores) or 15m (stories15M)."})
    dataset: str = field(default=PYTHON_DOCS, metadata={"help": "python-docs or a name on the hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub's data set."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    train_file: str | None = field(default=None, metadata={"help": "Local txt, jsonl, csv or parquet file, maybe .gz."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for validation."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub name, folder or tokenizer.model."})
    vocab_size: int = field(default=_TINY["vocab_size"], metadata={"help": "Pieces of the tokenizer trained here."})
    hidden_size: int = field(default=_TINY["hidden_size"], metadata={"help": "Width of the model."})
    num_layers: int = field(default=_TINY["num_layers"], metadata={"help": "Number of layers."})
    num_heads: int = field(default=_TINY["num_heads"], metadata={"help": "Number of attention heads."})
    intermediate_size: int = field(default=_TINY["intermediate_size"], metadata={"help": "Feed-forward width."})
    block_size: int = field(default=_TINY["block_size"], metadata={"help": "Tokens in a sequence; positions."})
    prompt: str = field(default="The", metadata={"help": "Beginning of the generated sample."})
    sample_tokens: int = field(default=120, metadata={"help": "Tokens in the generated sample."})
    model_card: str | None = field(default=None, metadata={"help": "Write a model card to this path."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in the output folder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what is in the output folder."})

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigurationError(
                f"hidden_size={self.hidden_size} must be an even multiple of num_heads={self.num_heads}."
            )


def parse_arguments(words: list[str]) -> tuple[BabyLlamaArguments, ElraTrainingArguments]:
    """Read the command line: preset, then the optimizer's own settings, then the flags given."""
    preset = choose("--preset", words, "tiny", PRESETS)
    optim = choose_optimizer(words, OPTIMIZER)
    if given("--dataset", words) and given("--train_file", words):
        raise ConfigurationError("--dataset and --train_file are two texts; give one of them.")
    output_dir = f"runs/babyllama-{preset}" + ("" if optim == OPTIMIZER else f"-{optim}")
    return parse(BabyLlamaArguments, words, {"output_dir": output_dir, **defaults_of(preset, optim)})


def defaults_of(preset: str, optim: str) -> dict[str, Any]:
    """Return the values of the flags that are not given, for this preset and optimizer."""
    return {
        "optim": optim,
        "report_to": ["none"],
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 1,
        "include_num_input_tokens_seen": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_steps": PRESETS[preset]["eval_steps"],
        **{name: value for name, value in PRESETS[preset].items() if name not in _NOT_OF.get(optim, _ELRA_ONLY)},
        **{name: pick(value, preset) for name, value in settings_for(optim).items()},
    }


def settings_for(optim: str) -> dict[str, Any]:
    """Return the training settings that suit an optimizer of this name; AdamW's for a family not listed."""
    family = next((f for f in FAMILIES if optim.startswith(f) or f"_{f}" in optim), "adamw")
    return FAMILIES[family]


def pick(value: Any, preset: str) -> Any:
    """Return a setting that may differ by preset."""
    return value[preset] if isinstance(value, dict) else value


def build_model(recipe: BabyLlamaArguments, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaForCausalLM:
    """Build an untrained Llama with tied embeddings in the sizes of ``recipe``; weights from torch's global seed.

    The vocabulary is the tokenizer's; without one it has ``recipe.vocab_size`` pieces.
    """
    config = LlamaConfig(
        vocab_size=recipe.vocab_size if tokenizer is None else len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=recipe.block_size,
        tie_word_embeddings=True,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stack blocks of equal length; the labels are the tokens themselves (the model shifts them)."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def perplexity(loss: float) -> float:
    """Return e to the power of a loss in nats; infinity where that is more than a float holds (a loss above 709)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def generate_sample(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """Return ``prompt`` continued by ``tokens`` tokens, sampled at temperature 0.8 with a fixed seed."""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    limit = model.config.max_position_embeddings
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_length=min(limit, inputs["input_ids"].shape[1] + tokens),
            do_sample=True,
            temperature=0.8,
            top_k=50,
            remove_invalid_values=True,  # a model that diverged gets a sample too, so that its run ends with results
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
