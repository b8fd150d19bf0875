"""``hf-elra classify-images`` and ``scripts/train_image_classifier.py``: one run, from images to the evaluated model.

Images are in ``image_data.py``, presets and models in ``image_classifier.py``, what every run does in
``training_run.py``.
"""

from __future__ import annotations

from transformers import set_seed

from hf_elra.errors import needed_by_recipes
from hf_elra.recipes import accuracy, image_classifier
from hf_elra.recipes.image_data import as_batch, load_images
from hf_elra.recipes.training_run import TABLE, TrainingRun
from hf_elra.report.names import METRICS
from hf_elra.trainer import ElraTrainer
from hf_elra.trainer.arguments import optimizer_name


def main(words: list[str]) -> None:
    """Train, evaluate, save."""
    recipe, training = image_classifier.parse_arguments(words)
    defaults = image_classifier.defaults_of(recipe.preset, optimizer_name(training))
    needed_by_recipes("evaluate")  # a missing package is reported before the training, not at its end
    run = TrainingRun(recipe, training, image_classifier.NOT_OF_THE_TRAJECTORY, "images", defaults)

    with training.main_process_first():
        data = load_images(
            recipe.dataset,
            augmentation=recipe.augmentation,
            image_size=recipe.image_size,
            crop_size=recipe.crop_size,
            seed=training.seed,
        )
    if training.dataloader_num_workers == 0:  # batches are made on the device, unless loader processes make them
        data.train.to(training.device)
        data.test.to(training.device)
    set_seed(training.seed)
    model = image_classifier.build_model(recipe, data)
    image_classifier.use_normalisation_of(recipe, model, data)
    trainer = ElraTrainer(
        model,
        training,
        data_collator=as_batch,
        train_dataset=data.train,
        eval_dataset=data.test,
        processing_class=image_classifier.build_processor(recipe, data),
        compute_metrics=accuracy.compute_accuracy,
        preprocess_logits_for_metrics=accuracy.classes_of,
        callbacks=run.callbacks,
    )
    evaluations = run.train(
        trainer,
        f"{recipe.model}: {model.num_parameters():,} parameters; {data.name}: {len(data.train):,} training and "
        f"{len(data.test):,} test images of {len(data.classes)} classes",
    )
    if not trainer.is_world_process_zero():
        return

    accuracies = [entry["eval_accuracy"] for entry in evaluations]
    metrics = run.write_results(
        trainer,
        {
            "test_accuracy": accuracies[-1],
            "best_test_accuracy": max(accuracies),
            "test_loss": evaluations[-1]["eval_loss"],
            "boosted": trainer.average_over != "off",
            "dataset": data.name,
            "card": image_classifier.for_card(recipe, data, model.num_parameters()),
        },
    )
    print(
        f"test accuracy {100 * accuracies[-1]:.2f} % (best epoch {100 * max(accuracies):.2f} %), test loss "
        f"{metrics['test_loss']:.4f}; {run.speed(metrics)}"
    )
    print(f"model, {METRICS} and {TABLE} are in {run.folder}")
    print(f"hf-elra report {run.folder} draws the run")
    run.check_finite(metrics["test_loss"])
