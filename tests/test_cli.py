"""The ``hf-elra`` command itself; what its commands do is tested where they live."""

import sys

import pytest

from hf_elra import cli, metrics
from hf_elra.errors import ConfigurationError
from hf_elra.recipes.command_line import command_line
from tests.test_imports import fresh


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["hf-elra", *words])
    return cli.main()


def test_help_lists_every_command_with_a_line(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    for name, (_, line) in cli.COMMANDS.items():
        assert any(shown.split(maxsplit=1) == [name, line] for shown in output.splitlines())
    assert call(monkeypatch) == 2
    assert capsys.readouterr().err == output
    assert call(monkeypatch, "--version") == 0


def test_help_loads_neither_torch_nor_transformers():
    text = "import sys; sys.argv = ['hf-elra', '--help']; from hf_elra.cli import main; main()"
    assert fresh(text, "print([name for name in ('torch', 'transformers') if name in sys.modules])")[-1] == "[]"


@pytest.mark.parametrize(("word", "hint"), [("babylama", "Did you mean 'babyllama'? "), ("xyz", "")])
def test_an_unknown_command_is_answered_with_the_nearest(monkeypatch, capsys, word, hint):
    assert call(monkeypatch, word) == 2
    assert capsys.readouterr().err == (
        f"hf-elra: error: unknown command '{word}'. {hint}hf-elra --help lists all commands.\n"
    )


@pytest.mark.parametrize(
    ("command", "module"),
    [("babyllama", "hf_elra.recipes.train_babyllama"), ("classify-images", "hf_elra.recipes.train_image_classifier")],
)
def test_recipes_get_their_words_and_give_exit_codes(monkeypatch, capsys, command, module):
    seen = []
    monkeypatch.setattr(f"{module}.main", seen.append)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, command, "--max_steps", "3")
    assert seen == [["--max_steps", "3"]]
    assert not end.value.code
    monkeypatch.undo()
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, command, "--preset", "tinny")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --preset tinny is unknown.")


def test_help_of_a_recipe_names_the_command(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "babyllama", "--help")
    assert capsys.readouterr().out.startswith("usage: hf-elra babyllama [-h]")


@pytest.mark.parametrize("package", ["evaluate", "datasets"])
def test_a_recipe_that_lacks_a_package_says_how_to_install_it(monkeypatch, tmp_path, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "babyllama", "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--use_cpu")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"needs the package {package}, which is missing" in error
    assert "pip install 'hf_elra[recipes]'" in error
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_there_but_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "evaluate.py").write_text("import no_such_package\n")
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as raised:
        metrics.load("accuracy")
    assert not isinstance(raised.value, ConfigurationError)


def test_the_command_that_goes_on_is_one_that_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    installed = tmp_path / "hf-elra"
    installed.write_text("")
    installed.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(installed), "babyllama", "--seed", "1"])
    assert command_line() == f"{installed} babyllama --seed 1"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_line() == "hf-elra babyllama --seed 1"
    monkeypatch.setattr(sys, "argv", [cli.__file__, "babyllama", "--seed", "1"])
    assert command_line().endswith("python -m hf_elra.cli babyllama --seed 1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    assert command_line() == "torchrun --nproc_per_node 2 -m hf_elra.cli babyllama --seed 1"
