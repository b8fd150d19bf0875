"""Train a BabyLlama from scratch.

    python scripts/train_babyllama.py                                   # tiny, on the documentation in every Python
    python scripts/train_babyllama.py --preset 15m                      # stories15M on TinyStories from the hub
    python scripts/train_babyllama.py --train_file my.txt.gz --optim adamw_torch

--help lists all flags. Ctrl-C saves a checkpoint; the same command with --resume goes on from there.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from transformers import PrinterCallback, set_seed

from hf_elra import ConfigurationError, ElraTrainer
from hf_elra.recipes import babyllama, text_data
from hf_elra.recipes.command_line import command_line, recorded_settings
from hf_elra.recipes.run_folder import (
    LOG,
    METRICS,
    SAMPLE,
    AlreadyFinished,
    check_run_folder,
    start_run,
    write_json,
)
from hf_elra.report.environment import environment
from hf_elra.report.model_card import build_model_card
from hf_elra.report.table import training_table
from hf_elra.trainer.callbacks import ProgressLine, StopOnSignal


def main(words: list[str]) -> int:
    """Train, evaluate, save; return the exit code."""
    recipe, training = babyllama.parse_arguments(words)
    settings = recorded_settings(recipe, training, babyllama.NOT_OF_THE_TRAJECTORY)
    folder = training.output_dir
    checkpoint = check_run_folder(folder, settings, resume=recipe.resume, overwrite=recipe.overwrite)

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
    stop, progress = StopOnSignal(), ProgressLine()
    trainer = ElraTrainer(
        model,
        training,
        data_collator=babyllama.collate,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[stop, progress],
    )
    trainer.remove_callback(PrinterCallback)
    progress.trainer = trainer
    main_process = trainer.is_world_process_zero()
    if main_process:
        start_run(folder, settings, checkpoint)
        print(
            f"{model.num_parameters():,} parameters; {texts.name}: {len(train) * recipe.block_size:,} training tokens "
            f"of {len(tokenizer):,} kinds; unigram entropy of the validation text {entropy:.4f} nats per token"
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

    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not evaluated or evaluated[-1]["step"] != trainer.state.global_step:
        evaluated.append(trainer.evaluate())
    loss = evaluated[-1]["eval_loss"]
    trainer.save_model(folder)
    if not main_process:
        return 0
    sample = babyllama.generate_sample(trainer.model, tokenizer, recipe.prompt, recipe.sample_tokens)
    metrics = {
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "unigram_entropy": entropy,
        "text": texts.name,
        "train_tokens": len(train) * recipe.block_size,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "updates": trainer.state.global_step,
        "parameters": model.num_parameters(),
        "resumed_from": checkpoint,
        "train_seconds": result.metrics["train_runtime"],
        "tokens_per_second": progress.done / result.metrics["train_runtime"],
        "command": command_line(),
        **environment(training.device),
        "settings": settings,
    }
    table = training_table(trainer.state.log_history)
    write_json(Path(folder, LOG), trainer.state.log_history)
    Path(folder, SAMPLE).write_text(sample + "\n", encoding="utf-8")
    Path(folder, "training.md").write_text(table + "\n", encoding="utf-8")
    write_json(Path(folder, METRICS), metrics)

    print(f"\n{table}\n\n{sample}\n")
    since = " since the last resume" if checkpoint else ""
    print(
        f"validation loss {loss:.4f} nats per token (perplexity {math.exp(loss):.2f}); "
        f"unigram entropy {entropy:.4f}; {metrics['train_seconds']:.0f} s, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s{since}"
    )
    print(f"model, tokenizer, {METRICS}, {SAMPLE} and training.md are in {folder}")
    if recipe.model_card:
        card = Path(recipe.model_card)
        card.parent.mkdir(parents=True, exist_ok=True)
        build_model_card(folder).save(card)
        print(f"model card: {card}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except AlreadyFinished as notice:
        print(notice)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
