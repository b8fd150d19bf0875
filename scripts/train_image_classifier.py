"""Train an image classifier.

    python scripts/train_image_classifier.py                                    # digits: seconds, no network
    python scripts/train_image_classifier.py --preset mnist                     # from the hub
    python scripts/train_image_classifier.py --preset cifar10 --weight_decay 3e-4 --num_train_epochs 200
    python scripts/train_image_classifier.py --dataset my_images/ --image_size 64 --model resnet18

--help lists all flags. Ctrl-C saves a checkpoint; the same command with --resume goes on from there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import PrinterCallback, set_seed

from hf_elra import ConfigurationError, ElraTrainer
from hf_elra.recipes import image_classifier
from hf_elra.recipes.command_line import command_line, recorded_settings
from hf_elra.recipes.image_data import as_batch, load_images
from hf_elra.recipes.image_models import ARCHITECTURES
from hf_elra.recipes.run_folder import LOG, METRICS, AlreadyFinished, check_run_folder, start_run, write_json
from hf_elra.report.environment import environment
from hf_elra.report.table import training_table
from hf_elra.trainer.callbacks import ProgressLine, StopOnSignal


def main(words: list[str]) -> int:
    """Train, evaluate, save; return the exit code."""
    recipe, training = image_classifier.parse_arguments(words)
    settings = recorded_settings(recipe, training, image_classifier.NOT_OF_THE_TRAJECTORY)
    folder = training.output_dir
    checkpoint = check_run_folder(folder, settings, resume=recipe.resume, overwrite=recipe.overwrite)

    with training.main_process_first():
        data = load_images(
            recipe.dataset, augmentation=recipe.augmentation, image_size=recipe.image_size, seed=training.seed
        )
    set_seed(training.seed)
    model = image_classifier.build_model(recipe, data)
    if recipe.model not in ARCHITECTURES:
        image_classifier.use_normalisation_of(recipe.model, data)
    stop, progress = StopOnSignal(), ProgressLine("images")
    trainer = ElraTrainer(
        model,
        training,
        data_collator=as_batch,
        train_dataset=data.train.to(training.device),
        eval_dataset=data.test.to(training.device),
        compute_metrics=image_classifier.compute_accuracy,
        preprocess_logits_for_metrics=image_classifier.classes_of,
        callbacks=[stop, progress],
    )
    trainer.remove_callback(PrinterCallback)
    progress.trainer = trainer
    main_process = trainer.is_world_process_zero()
    if main_process:
        start_run(folder, settings, checkpoint)
        print(
            f"{recipe.model}: {model.num_parameters():,} parameters; {data.name}: {len(data.train):,} training and "
            f"{len(data.test):,} test images of {len(data.classes)} classes"
        )
    trainer.accelerator.wait_for_everyone()

    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        stop.restore()
    if stop.received is not None:
        if main_process:
            again = command_line() + ("" if recipe.resume else " --resume")
            print(f"interrupted at update {trainer.state.global_step:,}; saved. Go on with:\n  {again}")
        return 128 + stop.received

    evaluated = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    if not evaluated or evaluated[-1]["step"] != trainer.state.global_step:
        evaluated.append(trainer.evaluate())
    trainer.save_model(folder)
    if not main_process:
        return 0
    accuracies = [entry["eval_accuracy"] for entry in evaluated]
    metrics = {
        "test_accuracy": accuracies[-1],
        "best_test_accuracy": max(accuracies),
        "test_loss": evaluated[-1]["eval_loss"],
        "boosted": training.elra_boost,
        "dataset": data.name,
        "images_seen": trainer.elra_callback.samples,
        "updates": trainer.state.global_step,
        "parameters": model.num_parameters(),
        "resumed_from": checkpoint,
        "train_seconds": result.metrics["train_runtime"],
        "command": command_line(),
        **environment(training.device),
        "settings": settings,
    }
    table = training_table(trainer.state.log_history)
    write_json(Path(folder, LOG), trainer.state.log_history)
    Path(folder, "training.md").write_text(table + "\n", encoding="utf-8")
    write_json(Path(folder, METRICS), metrics)
    print(f"\n{table}\n")
    print(
        f"test accuracy {100 * accuracies[-1]:.2f} % (best epoch {100 * max(accuracies):.2f} %), test loss "
        f"{metrics['test_loss']:.4f}; {metrics['train_seconds']:.0f} s"
    )
    print(f"model, {METRICS} and training.md are in {folder}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except AlreadyFinished as notice:
        print(notice)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
