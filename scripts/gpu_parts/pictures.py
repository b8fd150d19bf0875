"""Part 4: ResNet-18 on CIFAR-10 in bfloat16, equal epochs.

The pictures are the JPEG copy of the bundle, the small digits of this package without it. How many epochs there are is
settled once, from the speed of the first updates, so that all rows fit into the time.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

from gpu_parts.language_model import _timed
from gpu_parts.part import Part, lines

TITLE = "ResNet-18, CIFAR-10 (JPEG copy)"
SECONDS = 150
ROWS: dict[str, dict[str, Any]] = {
    "elra_spectral": {"optim": "elra_spectral", "per_device_train_batch_size": 256},
    "SGD with momentum, cosine, 0.1": {
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "cosine", "weight_decay": 5e-4,
        "optim_args": "momentum=0.9,nesterov=True", "per_device_train_batch_size": 128,
    },
    "AdamW, cosine, 1e-3": {
        "optim": "adamw_torch_fused", "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.05,
        "per_device_train_batch_size": 128,
    },
    "elra": {
        "optim": "elra", "elra_boost": True, "per_device_train_batch_size": 64, "elra_batch_control": "elra",
        "elra_max_micro_batch": "512",
    },
}  # fmt: skip


def rows(tiny: bool) -> list[str]:
    """Names of what is trained."""
    return list(ROWS)[: 2 if tiny else None]


def run(part: Part) -> None:
    """Train everything."""
    from hf_elra.recipes.image_data import load_images

    file = None if part.bundle is None else part.bundle / "pictures.npz"
    found = file is not None and file.is_file() and not part.tiny
    data = load_images(str(file) if found else "digits", augmentation="flip+crop" if found else "none", seed=0)
    data.train.to(part.device)
    data.test.to(part.device)
    plan = part.about("plan")
    if plan is None:
        begun = time.monotonic()
        per_update = {}
        for name in rows(part.tiny):
            updates = 8 if part.tiny else 24
            per_update[name] = _train(part, data, ROWS[name], {"max_steps": updates}, updates)["seconds_per_update"]
        epoch = {
            name: seconds * len(data.train) / ROWS[name]["per_device_train_batch_size"]
            for name, seconds in per_update.items()
        }
        epochs = int(0.85 * part.left / sum(epoch.values()))
        plan = {"epochs": 1 if part.tiny else min(max(epochs, 1), 30), "seconds_per_epoch": epoch}
        part.write(plan=plan, took=round(time.monotonic() - begun, 2), pictures=data.name)
    for name in rows(part.tiny):
        part.measure(
            name,
            lambda name=name: _train(part, data, ROWS[name], {"num_train_epochs": plan["epochs"]}),
            needs=plan["epochs"] * plan["seconds_per_epoch"][name],
        )


def table(entries: list[dict[str, Any]], tiny: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    header = ["optimizer", "test accuracy, %", "best epoch, %", "epochs", "seconds", "images a second"]

    def cells(entry: dict[str, Any]) -> list[str]:
        return [
            f"{100 * entry['accuracies'][-1]:.2f}", f"{100 * max(entry['accuracies']):.2f}", f"{entry['epochs']:g}",
            f"{entry['seconds']:.1f}", f"{entry['images'] / entry['seconds']:,.0f}",
        ]  # fmt: skip

    return header, lines(rows(tiny), entries, 5, cells)


def _train(part: Part, data: Any, row: dict[str, Any], length: dict[str, Any], skip: int = 0) -> dict[str, Any]:
    """Train once; with ``skip`` only to time some updates, the first half of which warms up."""
    import torch
    from transformers import PrinterCallback, TrainerCallback, set_seed

    from hf_elra import ElraTrainer, ElraTrainingArguments
    from hf_elra.recipes import accuracy
    from hf_elra.recipes.image_data import as_batch
    from hf_elra.recipes.image_models import SmallImageClassifier, SmallImageClassifierConfig

    set_seed(0)
    channels, _, size = data.train.shape
    model = SmallImageClassifier(
        SmallImageClassifierConfig(
            architecture="mnist-mlp" if part.tiny else "resnet18", image_size=size, num_channels=channels,
            num_labels=len(data.classes),
        )
    )  # fmt: skip
    if not part.tiny:
        model = model.to(memory_format=torch.channels_last)
    times: list[float] = []

    class Times(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if skip and state.global_step in (skip // 2, skip):
                if part.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = ElraTrainingArguments(
            folder, **row, **length, bf16=True, eval_strategy="no" if skip else "epoch", logging_strategy="epoch",
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=part.device == "cpu",
            per_device_eval_batch_size=500, dataloader_pin_memory=False, remove_unused_columns=False,
        )  # fmt: skip
        trainer = _timed(ElraTrainer)(
            model, arguments, data_collator=as_batch, train_dataset=data.train, eval_dataset=data.test,
            compute_metrics=accuracy.compute_accuracy,
            preprocess_logits_for_metrics=accuracy.classes_of, callbacks=[Times()],
        )  # fmt: skip
        trainer.pop_callback(PrinterCallback)
        begun = time.perf_counter()
        trainer.train()
        if part.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun - trainer.evaluating
    if skip:
        return {"seconds_per_update": (times[1] - times[0]) / (skip - skip // 2)}
    history = trainer.state.log_history
    return {
        "accuracies": [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry],
        "epochs": length["num_train_epochs"], "seconds": seconds, "images": trainer.elra_callback.samples,
        "pictures": data.name, "settings": row, "log_history": history,
    }  # fmt: skip
