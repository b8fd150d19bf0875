"""The card that a Trainer writes and pushes says what the optimizer did."""

import types

from huggingface_hub import ModelCard

from hf_elra.report.model_card import MADE_BY
from tests.conftest import token_rows, trainer


def pushed(run, folder, monkeypatch):
    """What ``push_to_hub`` uploads as README.md, the upload itself left out."""
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **given: types.SimpleNamespace(**given))
    # Older versions of Transformers import the function.
    given_back = lambda **given: types.SimpleNamespace(**given)  # noqa: E731
    monkeypatch.setattr("transformers.trainer.upload_folder", given_back, raising=False)
    monkeypatch.setattr(run, "init_hf_repo", lambda **given: None)
    run.hub_model_id = "somebody/model"
    uploaded = run.push_to_hub()
    assert uploaded.folder_path == str(folder)
    return (folder / "README.md").read_text()


def test_the_stock_card_gets_what_the_optimizer_did(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=3, eval_dataset=token_rows(8))
    run.train()
    text = pushed(run, tmp_path, monkeypatch)
    assert "No update was taken back." in text
    assert "| update |" in text
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert text.count("## What the optimizer did") == 1
    assert pushed(run, tmp_path, monkeypatch).count("## What the optimizer did") == 1


def test_a_card_of_hf_elra_card_stays(tmp_path, monkeypatch, command_here):
    run = trainer(tmp_path, max_steps=3)
    run.train()
    assert command_here("card", str(tmp_path), "--name", "mine", "--licence", "mit")[0] == 0
    text = pushed(run, tmp_path, monkeypatch)
    assert MADE_BY in text
    assert "# mine" in text
    assert (tmp_path / "training.svg").is_file()


def test_the_card_of_another_optimizer_is_stock(tmp_path, monkeypatch):
    run = trainer(tmp_path, optim="adamw_torch", max_steps=3)
    run.train()
    assert "What the optimizer did" not in pushed(run, tmp_path, monkeypatch)
