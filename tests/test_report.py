"""Tables and model cards from the files of a run."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_elra import ConfigurationError
from hf_elra.recipes import babyllama, image_classifier
from hf_elra.recipes.image_data import load_images
from hf_elra.report import environment
from hf_elra.report.environment import versions
from hf_elra.report.model_card import MADE_BY, build_model_card
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
    "card": {"title": "babyllama-tiny", "task": "text-generation", "data": "my|text<script>.txt"},
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


def test_an_evaluation_after_the_last_log_stands_at_its_own_update():
    last = {"eval_loss": 5.5, "epoch": 1.0, "step": 3}
    lines = training_table([*HISTORY, last]).splitlines()
    assert len(lines) == 5
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:]]
    assert [row[0] for row in rows] == ["2", "3"]
    assert "5.9000" in rows[0]
    assert "5.5000" in rows[1]
    assert "6.0000" not in rows[1]


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
    """``ModelCard.validate`` asks the hub; this is what it looks for that can be looked for here."""
    card = ModelCard(str(build_model_card(folder_of_a_run(tmp_path))))
    metadata = card.data.to_dict()
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"hf_elra", "elra"} <= set(card.data.tags)
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "babyllama-tiny"
    assert {result.metric_type: result.metric_value for result in results} == {"loss": 5.9, "perplexity": 365.0}
    assert all(result.task_type == "text-generation" and result.dataset_name for result in results)
    for text in (
        "| loss on held-out data | 5.9 |",
        "| licence of the data | not recorded |",
        "python train.py",
        "## Limits",
        MADE_BY,
    ):
        assert text in card.content
    assert "1 of 2 updates was taken back" in card.content


@pytest.mark.parametrize(
    ("given", "stated"),
    [
        ({}, ("en", "mit")),
        ({"dataset": "roneneldan/TinyStories"}, ("en", "mit")),
        ({"dataset": "somebody/german"}, (None, None)),
        ({"train_file": "meins.txt"}, (None, None)),
    ],
)
def test_card_states_language_and_licences_of_known_texts_alone(tmp_path, given, stated):
    told = babyllama.for_card(babyllama.BabyLlamaArguments(**given), "a text", 10, 3, 6.1)
    card = ModelCard(str(build_model_card(folder_of_a_run(tmp_path, card=told))))
    assert (card.data.language, card.data.license) == stated
    assert ("licence of the data | not recorded" in card.content) == (stated == (None, None))
    assert "null" not in str(card).split("---")[1]


def test_card_of_an_image_classifier(tmp_path):
    recipe = image_classifier.ImageClassifierArguments()
    told = image_classifier.for_card(recipe, load_images("digits"), 760)
    changed = {"validation_loss": None, "perplexity": None, "test_accuracy": 0.9, "test_loss": 0.4}
    card = ModelCard(str(build_model_card(folder_of_a_run(tmp_path, card=told, **changed))))
    assert card.data.pipeline_tag == "image-classification"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "loss": 0.4,
        "accuracy": 0.9,
    }
    assert "| accuracy on held-out data | 90.00 % |" in card.content
    assert "CC BY 4.0" in card.content
    assert "1,437 for training, 360 for testing" in card.content


def test_card_of_a_run_whose_loss_is_too_high_for_a_perplexity(tmp_path):
    card = ModelCard(str(build_model_card(folder_of_a_run(tmp_path, validation_loss=1e3, perplexity=float("inf")))))
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["perplexity"] == float("inf")


def test_the_version_is_that_of_the_code_whatever_is_installed(monkeypatch):
    monkeypatch.setattr("hf_elra.__version__", "9.9")
    assert versions()["hf_elra"] == "9.9"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_a_checkout_and_marked_where_it_was_changed(tmp_path, monkeypatch):
    package = tmp_path / "hf_elra"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr("hf_elra.__file__", str(package / "__init__.py"))
    assert "commit" not in versions()
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    environment._commit.cache_clear()
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    commit = versions()["commit"]
    assert re.fullmatch("[0-9a-f]{10}", commit)
    (package / "__init__.py").write_text("changed = True")
    environment._commit.cache_clear()
    assert versions()["commit"] == commit + "+"
    environment._commit.cache_clear()


def test_card_escapes_what_it_quotes(tmp_path):
    content = str(build_model_card(folder_of_a_run(tmp_path, sample="```\n# not a heading\n```")))
    assert "my\\|text&lt;script>.txt" in content
    assert "````text\n```\n# not a heading\n```\n````" in content


def test_card_command_writes_card_and_curves_and_tells_further_seeds(tmp_path, command_here):
    for seed in (1, 2):
        (tmp_path / f"seed-{seed}").mkdir()
        settings = {**METRICS["settings"], "seed": seed}
        folder_of_a_run(tmp_path / f"seed-{seed}", settings=settings, card={})
    folders = [str(tmp_path / f"seed-{seed}") for seed in (1, 2)]
    file = tmp_path / "cards" / "mine.md"
    options = ["--name", "mine", "--data", "poems", "--data-licence", "public domain", "--licence", "cc0-1.0"]
    assert command_here("card", *folders, "-o", str(file), *options) == (0, f"model card: {file}\n", "")
    card = ModelCard.load(file)
    assert card.data.license == "cc0-1.0"
    assert "| licence of the data | public domain |" in card.content
    assert "first of 2 seeds" in card.content
    assert re.search(r"\| +seed-2 \|", card.content)
    assert "| median of 2 |" in card.content
    assert "(mine.svg)" in card.content
    drawing = ElementTree.fromstring((tmp_path / "cards" / "mine.svg").read_text())
    assert len([part for part in drawing.iter() if part.get("class", "").startswith("curve")]) >= 3
    code, output, _ = command_here("card", folders[0])
    assert (code, output.count("give --data and --data-licence")) == (0, 1)
    assert MADE_BY in (tmp_path / "seed-1" / "README.md").read_text()


def test_card_needs_a_finished_run(tmp_path, command_here):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log_history.json").write_text(json.dumps(HISTORY[:1]))
    with pytest.raises(ConfigurationError, match="holds no finished run: its log ends at update 1"):
        build_model_card(str(tmp_path / "run"))
    assert command_here("card", str(tmp_path / "none"))[0] == 2
    assert "is a folder" in command_here("card", str(tmp_path / "run"), "-o", str(tmp_path))[2]
