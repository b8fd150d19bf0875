"""``hf-elra babyllama`` and ``scripts/train_babyllama.py``: one run, from the text to the evaluated model.

Texts are in ``text_data.py``, presets and the model in ``babyllama.py``, what every run does in ``training_run.py``.
"""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from hf_elra.errors import needed_by_recipes
from hf_elra.recipes import babyllama, text_data
from hf_elra.recipes.run_folder import METRICS, SAMPLE
from hf_elra.recipes.training_run import TABLE, TrainingRun
from hf_elra.report.model_card import build_model_card
from hf_elra.trainer import ElraTrainer
from hf_elra.trainer.arguments import optimizer_name


def main(words: list[str]) -> None:
    """Train, evaluate, save."""
    recipe, training = babyllama.parse_arguments(words)
    defaults = babyllama.defaults_of(recipe.preset, optimizer_name(training))
    for package in ("datasets", "evaluate"):  # a missing package is reported before the training, not at its end
        needed_by_recipes(package)
    run = TrainingRun(recipe, training, babyllama.NOT_OF_THE_TRAJECTORY, "tokens", defaults)

    # Text, tokenizer, blocks of tokens. On several processes the first one fills the cache for the others.
    with training.main_process_first():
        texts = text_data.load_texts(
            dataset=recipe.dataset,
            dataset_config=recipe.dataset_config,
            text_column=recipe.text_column,
            train_file=recipe.train_file,
            validation_file=recipe.validation_file,
        )
        if recipe.tokenizer:
            tokenizer = text_data.load_tokenizer(recipe.tokenizer)
        else:
            tokenizer = text_data.train_tokenizer(texts.train, recipe.vocab_size)
        train = text_data.tokenise(texts.train, tokenizer, recipe.block_size, "training")
        validation = text_data.tokenise(texts.validation, tokenizer, recipe.block_size, "validation")
    entropy = text_data.unigram_entropy(validation)

    set_seed(training.seed)
    model = babyllama.build_model(recipe, tokenizer)
    trainer = ElraTrainer(
        model,
        training,
        data_collator=babyllama.collate,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=run.callbacks,
    )
    evaluations = run.train(
        trainer,
        f"{model.num_parameters():,} parameters; {texts.name}: {len(train) * recipe.block_size:,} training tokens "
        f"of {len(tokenizer):,} kinds; unigram entropy of the validation text {entropy:.4f} nats per token",
    )
    if not trainer.is_world_process_zero():
        return

    loss = evaluations[-1]["eval_loss"]
    perplexity = babyllama.perplexity(loss)
    sample = babyllama.generate_sample(trainer.model, tokenizer, recipe.prompt, recipe.sample_tokens)
    Path(run.folder, SAMPLE).write_text(sample + "\n", encoding="utf-8")
    metrics = run.write_results(
        trainer,
        {
            "validation_loss": loss,
            "perplexity": perplexity,
            "unigram_entropy": entropy,
            "text": texts.name,
            "train_tokens": len(train) * recipe.block_size,
        },
    )
    print(
        f"{sample}\n\nvalidation loss {loss:.4f} nats per token (perplexity {perplexity:.2f}); unigram entropy "
        f"{entropy:.4f}; {run.speed(metrics)}"
    )
    print(f"model, tokenizer, {METRICS}, {SAMPLE} and {TABLE} are in {run.folder}")
    if recipe.model_card:
        card = Path(recipe.model_card)
        card.parent.mkdir(parents=True, exist_ok=True)
        build_model_card(run.folder).save(card)
        print(f"model card: {card}")
    run.check_finite(loss)
