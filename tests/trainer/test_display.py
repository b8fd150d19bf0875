"""What a terminal shows: --elra_display rich, plain and none."""

import io
import re
import sys

import pytest

from hf_elra import ConfigurationError
from hf_elra.recipes.command_line import recorded_settings
from hf_elra.recipes.image_classifier import parse_arguments
from hf_elra.trainer.display import RichDisplay
from tests.conftest import arguments, token_rows, trainer
from tests.trainer.test_log_file import spiking

console = pytest.importorskip("rich.console", reason="rich is not installed")


@pytest.fixture
def screen(monkeypatch):
    """What a terminal of 100 columns would show, without its control codes."""
    text = io.StringIO()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    made = console.Console(file=text, force_terminal=True, width=100)
    monkeypatch.setattr(RichDisplay, "console", lambda self: made)
    return lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())


def test_rich_shows_the_true_total_and_what_the_optimizer_does(tmp_path, screen):
    run = trainer(
        tmp_path, elra_display="rich", max_steps=-1, num_train_epochs=2, elra_control_cycle="2ba",
        elra_batch_conditions="noise", compute_loss_func=spiking(6), eval_dataset=token_rows(8), eval_strategy="epoch",
    )  # fmt: skip
    run.train()
    last = screen().split("━")[-1]
    assert f"100% {run.progress.samples:,} of {run.progress.samples:,} samples" in last
    assert re.search(r"loss +[▁-█]+ +\d", last)
    assert re.search(r"α +[▁-█]+ +\d", last)
    assert f"update {run.state.global_step}   batch 8   taken back 1" in last
    assert re.search(r"validation loss \d.* \(update \d+\)", last)


def test_rich_gives_the_terminal_back_where_training_ends_in_an_error(tmp_path, screen):

    class Broken(Exception):
        pass

    class Data(list):
        def __getitem__(self, index):
            if self.taken > 30:
                raise Broken
            self.taken += 1
            return super().__getitem__(index)

    rows = Data(token_rows(64))
    rows.taken = 0
    run = trainer(tmp_path, rows=rows, elra_display="rich", optim="elra_spectral", max_steps=50)
    with pytest.raises(Broken):
        run.train()
    assert re.search(r"update \d", screen())
    (display,) = (c for c in run.callback_handler.callbacks if isinstance(c, RichDisplay))
    assert display._live is None


@pytest.mark.parametrize("display", ["plain", "rich"])
def test_where_output_is_no_terminal_there_is_a_line_a_log(tmp_path, capsys, display):
    trainer(tmp_path, elra_display=display, max_steps=4, logging_steps=2, disable_tqdm=False).train()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[:3] for line in lines] == [["50%", "update", "2"], ["100%", "update", "4"]]
    assert "tokens/s  loss" in lines[0]
    assert "it/s" not in captured.err


def test_none_shows_nothing_with_any_optimizer(tmp_path, capsys):
    for optim in ("elra", "adamw_torch"):
        run = trainer(tmp_path, elra_display="none", optim=optim, max_steps=2, disable_tqdm=False)
        run.train()
        assert capsys.readouterr().out == ""
        assert len([entry for entry in run.state.log_history if "loss" in entry]) == 2


def test_what_cannot_be_shown_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="elra_display='loud' must be one of rich, plain, none"):
        trainer(tmp_path, elra_display="loud")
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'hf_elra\[display\]', or use plain"):
        trainer(tmp_path, elra_display="rich")


def test_a_display_is_no_setting_of_the_run(tmp_path):
    recipe, training = parse_arguments(["--elra_display", "plain", "--output_dir", str(tmp_path)])
    assert "elra_display" not in recorded_settings(recipe, training, set())
    assert arguments(tmp_path, elra_display="rich").elra_display == "rich"
