"""Tables and model cards from the files of a run."""

import json

import pytest
from huggingface_hub import ModelCard

from hf_elra import ConfigurationError
from hf_elra.report.model_card import build_model_card
from hf_elra.report.table import training_table

HISTORY = [
    {"loss": 6.5, "learning_rate": 0.25, "alpha": 0.25, "step_norm": 0.1, "restarts": 0, "step": 1},
    {"loss": 6.0, "learning_rate": 0.5, "alpha": 0.5, "step_norm": 0.2, "restarts": 1, "cosine": -0.5, "step": 2},
    {"eval_loss": 5.9, "step": 2},
    {"train_runtime": 3.0, "train_loss": 6.2, "step": 2},
]
METRICS = {
    "validation_loss": 5.9,
    "perplexity": 365.0,
    "unigram_entropy": 6.1,
    "text": "my|text<script>.txt",
    "train_tokens": 1000,
    "tokens_seen": 2000,
    "updates": 2,
    "parameters": 1234,
    "resumed_from": None,
    "train_seconds": 3.0,
    "tokens_per_second": 667.0,
    "command": "python train.py",
    "machine": "x86_64",
    "versions": {"torch": "2.13.0"},
    "settings": {"preset": "tiny", "optim": "elra", "seed": 42, "train_file": "x.txt", "dataset": "python-docs"},
}


def test_table_shows_training_logs_with_their_evaluations():
    lines = training_table(HISTORY).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[-1].split("|")[1:-1]] == [
        "2",
        "6.0000",
        "5.9000",
        "0.5",
        "0.2",
        "-0.500",
        "1",
    ]


def test_table_is_thinned_and_keeps_the_last_row():
    history = [{"loss": 1.0, "learning_rate": 1.0, "step": step} for step in range(1, 101)]
    lines = training_table(history, rows=10).splitlines()
    assert len(lines) == 12
    assert lines[-1].split("|")[1].strip() == "100"


def folder_of_a_run(folder, sample="Once upon a time", **metrics):
    (folder / "metrics.json").write_text(json.dumps({**METRICS, **metrics}))
    (folder / "log_history.json").write_text(json.dumps(HISTORY))
    (folder / "sample.txt").write_text(sample)
    return str(folder)


def test_card_has_valid_metadata_and_the_numbers_of_the_run(tmp_path):
    card = ModelCard(str(build_model_card(folder_of_a_run(tmp_path))))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"loss": 5.9, "perplexity": 365.0}
    assert "| validation loss | 5.9000 nats per token |" in card.content
    assert "python train.py" in card.content


@pytest.mark.parametrize(
    ("train_file", "dataset", "stated"),
    [
        (None, "python-docs", ("en", "mit")),
        (None, "roneneldan/TinyStories", ("en", "mit")),
        (None, "somebody/german", (None, None)),
        ("meins.txt", "python-docs", (None, None)),
    ],
)
def test_card_states_language_and_licence_of_known_texts_alone(tmp_path, train_file, dataset, stated):
    settings = {**METRICS["settings"], "train_file": train_file, "dataset": dataset}
    card = ModelCard(str(build_model_card(folder_of_a_run(tmp_path, settings=settings))))
    assert (card.data.language, card.data.license) == stated
    assert "null" not in str(card).split("---")[1]


def test_card_of_a_run_whose_loss_is_too_high_for_a_perplexity(tmp_path):
    card = ModelCard(str(build_model_card(folder_of_a_run(tmp_path, validation_loss=1e3, perplexity=float("inf")))))
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["perplexity"] == float("inf")


def test_card_escapes_what_it_quotes(tmp_path):
    content = str(build_model_card(folder_of_a_run(tmp_path, sample="```\n# not a heading\n```")))
    assert "my\\|text&lt;script>.txt" in content
    assert "````text\n```\n# not a heading\n```\n````" in content


def test_card_needs_a_finished_run(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no finished run"):
        build_model_card(str(tmp_path))
