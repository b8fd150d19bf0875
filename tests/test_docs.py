"""The pages of docs/: public names, code blocks of a Trainer, commands, flags and messages are what they say."""

import ast
import re
import runpy
import shlex
import sys

import pytest
import torch
import transformers

from hf_elra import WeightAverage, cli
from hf_elra.recipes import babyllama, finetune, image_classifier
from hf_elra.trainer import ElraSettings
from tests.conftest import ROOT, llama, token_rows
from tests.test_readme import LOOPS, PAGES

docs_hooks = runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))
BLOCKS = {
    f"{page} {number}": (language, text)
    for page, words in PAGES.items()
    for number, (language, text) in enumerate(re.findall(r"```(\w+)\n(.*?)```", words, re.S))
}
PYTHON = {
    name: text for name, (language, text) in BLOCKS.items() if language == "python" and text not in LOOPS.values()
}
DIFFS = {name: text for name, (language, text) in BLOCKS.items() if language == "diff"}
COMMANDS = [
    command.partition("  #")[0].strip()
    for language, text in BLOCKS.values()
    if language == "bash"
    for command in text.replace("\\\n", " ").splitlines()
]
RECIPES = {
    "hf-elra babyllama": babyllama,
    "python scripts/train_babyllama.py": babyllama,
    "hf-elra classify-images": image_classifier,
    "python scripts/train_image_classifier.py": image_classifier,
    "hf-elra finetune": finetune,
}


# ---- public names ----


def test_every_public_name_has_a_page_and_a_docstring():
    assert docs_hooks["missing"]() == []
    assert {"ELRA", "ElraTrainer", "BatchSizeController"} <= docs_hooks["public_names"]().keys()


def test_a_name_without_page_or_docstring_is_told(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("::: package.shown\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(
        '__all__ = ["shown", "hidden"]\nfrom package.inner import hidden\ndef shown(): "Yes."\n'
    )
    (tmp_path / "package" / "inner.py").write_text("def hidden(): ...\n")
    found = docs_hooks["missing"].__globals__
    for name, value in {"ROOT": tmp_path, "DOCS": tmp_path / "docs", "PUBLIC": ("package",)}.items():
        monkeypatch.setitem(found, name, value)
    assert docs_hooks["missing"]() == [
        "package.hidden has no page: write '::: package.hidden' into one of docs/*.md",
        "package.hidden has no docstring",
    ]


def test_pages_that_no_menu_lists_are_put_into_theirs():
    nav = [{title: [{"First": f"{folder}/first.md"}]} for title, folder in docs_hooks["MENUS"].items()]
    docs_hooks["on_config"]({"nav": nav})
    optimizers, evidence = ([entry for entry in menu if isinstance(entry, str)] for (menu,) in map(dict.values, nav))
    assert {"optimizers/elra.md", "optimizers/pls.md"} <= set(optimizers)
    assert "results/lm.md" in evidence
    assert not any(page.startswith("results/lm/") for page in evidence)


# ---- code ----


@pytest.mark.parametrize("block", [*PYTHON, *DIFFS])
def test_a_block_that_is_no_loop_runs_without_training(block, tmp_path, monkeypatch):
    trained = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.Trainer, "train", lambda self: trained.append(self))
    text = PYTHON.get(block) or "\n".join(line[1:] for line in DIFFS[block].splitlines() if not line.startswith("-"))
    model, data = llama(num_hidden_layers=1), token_rows(64)
    tokens = data[0]["input_ids"][None]

    def loss_of(batch):
        return model(input_ids=batch, labels=batch).loss

    average = WeightAverage(model, power=8)
    average.add()
    average.save("out/checkpoint-500")
    names = {
        "model": model, "data": data, "loader": [data], "torch": torch, "__name__": "shown",
        "batch": tokens, "large_batch": tokens, "loss": loss_of(tokens),
        "loss_of": loss_of, "loss_of_batch": lambda: loss_of(tokens), "LambdaLR": torch.optim.lr_scheduler.LambdaLR,
    }  # fmt: skip
    exec(text, names)
    assert trained == ([names["trainer"]] if "trainer" in names else [])


def test_all_python_is_run():
    assert {text for language, text in BLOCKS.values() if language == "python"} <= {*LOOPS.values(), *PYTHON.values()}
    assert len(PYTHON) >= 4
    assert len(DIFFS) == 1


# ---- commands ----


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_that_is_shown_can_be_given(command, monkeypatch):
    words = [word for word in shlex.split(command) if word != "..."]
    for name in re.findall(r"scripts/[\w/]+\.py", command):
        assert (ROOT / name).is_file()
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.M)
    if words[:1] == ["hf-elra"]:
        assert words[1] in cli.COMMANDS
    for extra in re.findall(r"\.\[(\w+)\]", command):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    recipe = RECIPES.get(" ".join(words[:2]))
    if recipe is not None:
        monkeypatch.setattr(sys, "argv", words)
        recipe.parse_arguments(words[2:])


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_ours_are_known(page):
    known = {*vars(ElraSettings())}
    assert set(re.findall(r"--(elra_\w*[a-z])", PAGES[page])) <= known


def test_every_flag_of_ours_is_on_a_page():
    shown = {flag for page in PAGES.values() for flag in re.findall(r"`--(elra_\w+)", page)}
    assert {*vars(ElraSettings())} <= shown


# ---- messages ----


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    first_cells = re.findall(r"^\| (.*?) \|", PAGES["troubleshooting"], re.M)
    messages = [message for cell in first_cells for message in re.findall(r"^`([^`]* [^`]*)`$", cell)]
    literals = [
        node.value
        for file in sorted((ROOT / "hf_elra").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(messages) > 10
    assert [message for message in messages if not any(message in literal for literal in literals)] == []


# ---- model cards ----


def test_every_card_has_a_target_and_every_target_a_row():
    makefile, page = ((ROOT / name).read_text("utf-8") for name in ("Makefile", "model_cards/README.md"))
    cards = re.search(r"^CARDS := (.*)$", makefile, re.M)[1].split()
    assert re.findall(r"^card-([\w-]+): setup$", makefile, re.M) == cards
    assert re.findall(r"`make card-([\w-]+)` \|", page) == cards
    written = {file.stem for file in (ROOT / "model_cards").glob("*.md")} - {"README"}
    assert set(re.findall(r"^\| \[([\w-]+)\]\(\1\.md\)", page, re.M)) == written <= set(cards)
