"""Part 3: BabyLlama 15m in bfloat16, at equal tokens and at equal seconds.

Updates of 64 x 256 tokens. How many there are is settled once, from the speed of the first ones, so that all rows of
the first seed fit into the time; the same number of updates is the same tokens. A row "at the seconds of elra_spectral"
makes as many updates as fit into the seconds that elra_spectral took, and its schedule is of that length.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any, NamedTuple

from gpu_parts.part import Part, lines, measured

TITLE = "BabyLlama 15m"
SECONDS = 300
OURS = "elra_spectral"
ADAMW_RATES = ("1e-3", "2e-3", "4e-3")
MUON_RATES = ("2e-3", "1e-3", "4e-3")
MOST_UPDATES = 2000
EVALUATIONS = 5
COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "max_grad_norm": 1.0, "weight_decay": 0.1}
ADAMW = {**COSINE, "optim": "adamw_torch_fused", "adam_beta2": 0.95}


class Row(NamedTuple):
    """A way to train.

    Attributes:
        settings: of the Trainer.
        muon: the rate of Muon, where that is the optimizer.
    """

    settings: dict[str, Any]
    muon: float | None = None


def _rows() -> dict[str, Row]:
    rows = {OURS: Row({"optim": OURS})}
    rows |= {f"AdamW, cosine, {rate}": Row({**ADAMW, "learning_rate": float(rate)}) for rate in ADAMW_RATES[1::-1]}
    muon = {"optim": "adamw_torch", "elra_boost_mean": "run"}
    of_muon = {f"Muon, constant, with the mean of the run, {rate}": Row(muon, float(rate)) for rate in MUON_RATES}
    first = next(iter(of_muon))
    rows[first] = of_muon[first]  # the other rates come last
    rows[f"AdamW, cosine, {ADAMW_RATES[2]}"] = Row({**ADAMW, "learning_rate": float(ADAMW_RATES[2])})
    rows["elra"] = Row({"optim": "elra", "elra_batch_control": "off"})
    return rows | of_muon


SAME_SECONDS = "best AdamW, at the seconds of elra_spectral"


def rows(tiny: bool) -> list[str]:
    """Names of what is trained; the rows of the second seed come last."""
    names = list(_rows())
    first = [*(name for name in names if name.split(", ")[-1] not in ADAMW_RATES[::2]), SAME_SECONDS]
    if not tiny:
        first = [*names, SAME_SECONDS]
    again = [] if tiny else [f"{name}, seed 1" for name in (OURS, *names[1:3])]
    return [*first, *again]


def run(part: Part) -> None:
    """Train everything."""
    text = _load(part)
    plan = part.about("plan")
    if plan is None:
        plan = _plan(part, text)
        part.write(plan=plan)
    known = _rows()
    for name in rows(part.tiny):
        if name == SAME_SECONDS:
            chosen = _at_the_same_seconds(part)
            if chosen is None:
                print(f"{part.name}: {name}: what it is compared with was not measured", flush=True)
                continue
            source, updates = chosen
        else:
            source, updates = name.removesuffix(", seed 1"), plan["updates"]
        needs = plan["seconds_per_update"].get(source, 0.0) * updates
        seed = 1 if name.endswith(", seed 1") else 0
        part.measure(
            name,
            lambda source=source, updates=updates, seed=seed: (
                _train(part, text, known[source], updates, seed) | {"source": source}
            ),
            needs=needs,
        )


def table(entries: list[dict[str, Any]], tiny: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    header = ["optimizer", "validation loss, nats", "updates", "tokens, M", "seconds", "tokens a second", "last rate"]

    def cells(entry: dict[str, Any]) -> list[str]:
        return [
            f"{entry['validation_loss']:.4f}", f"{entry['updates']:,}", f"{entry['tokens'] / 1e6:.1f}",
            f"{entry['seconds']:.1f}", f"{entry['tokens'] / entry['seconds']:,.0f}", f"{entry['rate']:.2g}",
        ]  # fmt: skip

    return header, lines(rows(tiny), entries, 6, cells)


class _Blocks:
    """Rows of tokens on the device, handed out as whole batches."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        import torch

        found = self.tokens[torch.as_tensor(indices, device=self.tokens.device)]
        return {"input_ids": found, "labels": found}


def _load(part: Part) -> dict[str, Any]:
    """Training and validation blocks on the device, from the bundle; random ones that can be learnt without it."""
    import numpy as np
    import torch

    positions, pieces = (32, 256) if part.tiny else (256, 32_000)
    file = None if part.bundle is None else part.bundle / "text.npz"
    if file is not None and file.is_file():
        with np.load(file, allow_pickle=False) as arrays:
            text = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in ("train", "validation")}
            pieces, name = int(arrays["pieces"]), str(arrays["name"])
        if part.tiny:
            text = {name: tokens[: 64 * positions] for name, tokens in text.items()}
    else:
        generator = torch.Generator().manual_seed(0)
        name = "counting (no text was brought along)"
        number = 64 if part.tiny else 4096
        starts = torch.randint(0, pieces, (number, 1), generator=generator)
        rows = (starts + torch.arange(positions)) % pieces
        text = {"train": rows.flatten(), "validation": rows[: number // 4].flatten()}
    blocks = {
        key: tokens[: len(tokens) // positions * positions].view(-1, positions).to(part.device)
        for key, tokens in text.items()
    }
    print(f"{part.name}: {name}: {blocks['train'].numel():,} training tokens", flush=True)
    return {"name": name, "pieces": pieces, "positions": positions, **blocks}


def _model(part: Part, text: dict[str, Any]) -> Any:
    from hf_elra.recipes import babyllama

    words = ["--preset", "15m", "--vocab_size", str(text["pieces"]), "--block_size", str(text["positions"])]
    if part.tiny:
        words += ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--intermediate_size", "64"]
    return babyllama.build_model(babyllama.parse_arguments(words)[0])


def _train(part: Part, text: dict[str, Any], row: Row, updates: int, seed: int) -> dict[str, Any]:
    """Train once; what it took leaves out evaluations."""
    import torch
    from transformers import PrinterCallback, set_seed

    from hf_elra import ElraTrainer, ElraTrainingArguments
    from hf_elra.recipes.image_data import as_batch

    set_seed(seed)
    model = _model(part, text)
    batch = 4 if part.tiny else 64
    with tempfile.TemporaryDirectory() as folder:
        arguments = ElraTrainingArguments(
            folder, per_device_train_batch_size=batch, per_device_eval_batch_size=batch, max_steps=updates, seed=seed,
            bf16=True, eval_strategy="steps", eval_steps=max(1, updates // EVALUATIONS),
            logging_steps=max(1, updates // 50), save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=part.device == "cpu", dataloader_pin_memory=False, remove_unused_columns=False,
            **row.settings,
        )  # fmt: skip
        trainer = _timed(ElraTrainer)(
            model, arguments, data_collator=as_batch, train_dataset=_Blocks(text["train"]),
            eval_dataset=_Blocks(text["validation"]),
            optimizer_cls_and_kwargs=None if row.muon is None else _muon(row.muon),
        )  # fmt: skip
        trainer.pop_callback(PrinterCallback)
        if part.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        trainer.train()
        if part.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun - trainer.evaluating
    losses = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = losses[-1]["eval_loss"] if losses and losses[-1]["step"] == updates else trainer.evaluate()["eval_loss"]
    return {
        "validation_loss": last, "updates": updates, "tokens": updates * batch * text["positions"], "seconds": seconds,
        "rate": logs[-1]["learning_rate"], "text": text["name"], "seed": seed, "settings": row.settings,
        "muon": row.muon, "log_history": trainer.state.log_history,
        "peak_bytes": torch.cuda.max_memory_allocated() if part.device == "cuda" else None,
    }  # fmt: skip


def _timed(trainer_class: Any) -> Any:
    """A Trainer that knows how long its evaluations took."""

    class Timed(trainer_class):  # type: ignore[misc]
        evaluating = 0.0

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begun = time.perf_counter()
            result = super().evaluate(*args, **kwargs)
            self.evaluating += time.perf_counter() - begun
            return result

    return Timed


def _muon(rate: float) -> tuple[type, dict[str, Any]]:
    """torch.optim.Muon at the size of AdamW's steps, AdamW for embeddings and vectors; one rate, decay 0.1."""
    import torch

    class MuonAndAdamW(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
            everything = [p for group in groups for p in group["params"]]
            largest = max(everything, key=lambda p: p.numel())  # the tied embedding
            hidden = [p for p in everything if p.dim() == 2 and p is not largest]
            rest = [p for p in everything if p.dim() != 2 or p is largest]
            self.inner = [
                torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(rest, lr=lr, weight_decay=0.1, fused=True),
            ]
            super().__init__(everything, {})
            self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for optimizer in self.inner:
                optimizer.step()

    return MuonAndAdamW, {"lr": rate}


def _plan(part: Part, text: dict[str, Any]) -> dict[str, Any]:
    """Settle the number of updates from the speed of the first ones."""
    known, warm_up = _rows(), 6 if part.tiny else 60
    speeds = {}
    for kind in {name.split(",")[0]: name for name in rows(part.tiny) if name in known}.values():
        trial = _train(part, text, known[kind], warm_up, seed=0)
        if kind == OURS:  # the very first run also warms the device up
            trial = _train(part, text, known[kind], warm_up, seed=0)
        speeds[kind.split(",")[0]] = trial["seconds"] / warm_up
    per_update = {name: speeds[name.split(",")[0]] for name in known if name.split(",")[0] in speeds}
    first_seed = [name for name in rows(part.tiny) if name in known]
    # The row at the same seconds takes as long as elra_spectral; a quarter is for evaluations and making models.
    all_of_it = sum(per_update[name] for name in first_seed) + per_update[OURS]
    updates = int(0.75 * part.left / all_of_it)
    lowest, highest = (12, 20) if part.tiny else (100, MOST_UPDATES)
    return {"updates": min(max(updates, lowest), highest), "seconds_per_update": per_update}


def _at_the_same_seconds(part: Part) -> tuple[str, int] | None:
    """The best row of AdamW, and how many updates it makes in the seconds of elra_spectral."""
    good = measured(part.entries)
    adamw = {name: entry for name, entry in good.items() if name.startswith("AdamW") and entry["seed"] == 0}
    if OURS not in good or not adamw:
        return None
    best = min(adamw, key=lambda name: adamw[name]["validation_loss"])
    pace = adamw[best]["seconds"] / adamw[best]["updates"]
    return best, max(1, round(good[OURS]["seconds"] / pace))
