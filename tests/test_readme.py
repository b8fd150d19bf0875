"""README, and the loops that it, the pages and docstrings show: they run, and tell the optimizer all it has to know."""

import doctest
import re

import pytest
import torch

import front_page
import hf_elra
from hf_elra import embeddings_of, outputs_of
from hf_elra.optim import OPTIMIZERS
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
ROOT_PAGES = ("README", "CONTRIBUTING", "CHANGELOG")
PAGES = {name: (ROOT / f"{name}.md").read_text("utf-8") for name in ROOT_PAGES} | {
    file.relative_to(ROOT / "docs").with_suffix("").as_posix(): file.read_text("utf-8")
    for file in sorted((ROOT / "docs").rglob("*.md"))
    if not file.name.startswith("_")
}
has_raw_files = pytest.mark.skipif(not front_page.LANGUAGE.is_dir(), reason="a source distribution has no raw files")
LOOPS = {
    f"{page} {number}": text
    for page, words in PAGES.items()
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", words, re.S))
    if "for epoch in" in text
}
for optimizer_class in OPTIMIZERS.values():
    if examples := doctest.DocTestParser().get_examples(optimizer_class.__doc__):
        LOOPS[optimizer_class.__name__] = "".join(example.source for example in examples)


class Model(torch.nn.Linear):
    def save_pretrained(self, folder):
        self.saved_in = folder


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_is_shown_ends_its_cycles_and_learns(loop, monkeypatch):
    ended, evaluated = [], []
    for kind in OPTIMIZERS.values():
        end = kind.end_cycle
        monkeypatch.setattr(kind, "end_cycle", lambda self, end=end: (ended.append(self), end(self)))
    torch.manual_seed(0)
    model, inputs, epochs = Model(4, 3), torch.randn(8, 4) + 0.1 * torch.randn(6, 8, 4), 20
    batches = [(x, x[:, :3]) for x in inputs]

    @torch.no_grad()
    def loss():
        return float(torch.nn.functional.mse_loss(model(inputs), inputs[..., :3]))

    start = loss()
    names = {
        "model": model, "epochs": epochs, "batches": batches, "loss_function": torch.nn.functional.mse_loss,
        "evaluate": evaluated.append, "embeddings_of": embeddings_of, "outputs_of": outputs_of,
        **{kind.__name__: kind for kind in OPTIMIZERS.values()},
    }  # fmt: skip
    exec(LOOPS[loop], names)
    assert ended == [names["optimizer"]] * epochs
    assert loss() < 0.8 * start
    assert evaluated == ([model] if "WeightAverage" in LOOPS[loop] else [])


def test_loops_of_readme_of_their_page_and_of_docstrings_are_found():
    assert sum(name.startswith("README") for name in LOOPS) == 1
    assert sum(name.startswith("guides/loops") for name in LOOPS) == 3
    assert {"ELRA", "ELRASpectral"} <= LOOPS.keys()


def test_the_optimizer_of_contributing_md_lowers_a_parabola():
    (text,) = re.findall(r"```python\n(.*?)```", PAGES["CONTRIBUTING"], re.S)
    names = {}
    exec(text, names)
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = names["SignDescent"]([x])
    for _ in range(40):
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        optimizer.step(loss=loss)
    assert float(x.detach().square().sum()) < 0.1


# ---- README, and what goes with a version ----


def test_readme_has_at_most_900_words_beside_its_code():
    text = re.sub(r"```.*?```|<!--.*?-->", "", README, flags=re.S)
    assert len(text.split()) <= 900


@has_raw_files
def test_numbers_and_picture_are_those_of_the_raw_files(monkeypatch):
    assert front_page.stale() == []
    assert front_page.table() in README
    monkeypatch.setattr(front_page, "cell", lambda *values: "other numbers")
    assert front_page.stale() == ["README.md", "docs/optimizers/elra_spectral.md"]


def test_ci_calls_the_test_command_of_readme():
    (command,) = re.findall(r"^(make test)\b", README, re.M)
    assert command in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


def test_changes_and_citation_are_of_this_version():
    (first, *_) = re.findall(r"^## (.*)", PAGES["CHANGELOG"], re.M)
    (date,) = re.findall(r'^date-released: "(.*)"$', citation := (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert f"\nversion: {hf_elra.__version__}\n" in citation
    assert first in (f"{hf_elra.__version__} - {date}", "Unreleased")


@has_raw_files
@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page):
    folder = ROOT if page in ROOT_PAGES else (ROOT / "docs" / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) + re.findall(r'(?:src|srcset)="([^"]+)"', PAGES[page])
    links = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in links if link and not (folder / link).exists()] == []
