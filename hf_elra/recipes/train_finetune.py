"""``hf-elra finetune``: one run, from a model and a file of texts to the evaluated classifier.

Arguments, texts and models are in ``finetune.py``, what every run does in ``training_run.py``.
"""

from __future__ import annotations

from transformers import DataCollatorWithPadding, set_seed

from hf_elra.errors import needed_by_recipes
from hf_elra.recipes import accuracy, finetune
from hf_elra.recipes.training_run import TABLE, TrainingRun
from hf_elra.report.names import METRICS
from hf_elra.trainer import ElraTrainer
from hf_elra.trainer.arguments import optimizer_name


def main(words: list[str]) -> None:
    """Train, evaluate, save."""
    recipe, training = finetune.parse_arguments(words)
    needed_by_recipes("evaluate")  # a missing package is reported before the training, not at its end
    defaults = finetune.defaults_of(optimizer_name(training))
    run = TrainingRun(recipe, training, finetune.NOT_OF_THE_TRAJECTORY, "samples", defaults)

    rows, validation_rows, classes = finetune.load_rows(recipe)
    set_seed(training.seed)  # the head is new
    model, tokenizer = finetune.load_model(recipe, classes)
    train, validation = (
        finetune.tokenise(part, tokenizer, classes, recipe.max_length) for part in (rows, validation_rows)
    )
    trainer = ElraTrainer(
        model,
        training,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=accuracy.compute_accuracy,
        preprocess_logits_for_metrics=accuracy.classes_of,
        callbacks=run.callbacks,
    )
    evaluations = run.train(
        trainer,
        f"{recipe.model}: {model.num_parameters():,} parameters; {recipe.train_file}: {len(train):,} texts for "
        f"training and {len(validation):,} for validation, of {len(classes)} classes",
    )
    if not trainer.is_world_process_zero():
        return

    loss, hits = (evaluations[-1][f"eval_{name}"] for name in ("loss", "accuracy"))
    metrics = run.write_results(
        trainer,
        {
            "validation_loss": loss,
            "validation_accuracy": hits,
            "dataset": recipe.train_file,
            "card": finetune.for_card(recipe, model.num_parameters(), classes, (len(train), len(validation))),
        },
    )
    print(f"validation accuracy {100 * hits:.2f} %, validation loss {loss:.4f}; {run.speed(metrics)}")
    print(f"model, tokenizer, {METRICS} and {TABLE} are in {run.folder}")
    print(f"hf-elra report {run.folder} draws the run")
    run.check_finite(loss)
