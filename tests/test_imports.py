"""``hf_elra.optim`` needs PyTorch alone; ``import hf_elra`` is enough for Transformers, in whatever order they come."""

import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap

import pytest

from hf_elra.after_import import after_import
from tests.conftest import ROOT

NOT_TORCH = (
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "safetensors",
    "psutil",
    "tokenizers",
    "huggingface_hub",
)
REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_TORCH}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""
TRAIN = """
import torch
from hf_elra.optim import ELRA, ELRASpectral, WeightAverage, embeddings_of
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
mean = WeightAverage(model)
for optimizer in (ELRA(model.parameters()), ELRASpectral(model.parameters(), embeddings=embeddings_of(model))):
    for _ in range(5):
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())
        optimizer.zero_grad()
        mean.add()
    optimizer.load_state_dict(optimizer.state_dict())
print("trained", mean.count)
"""


def fresh(*texts):
    """Run texts in a new Python; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    text = "\n".join(map(textwrap.dedent, texts))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_optimizers_work_where_only_torch_is_installed():
    assert fresh(REFUSE, TRAIN) == ["trained", "10"]


def test_optimizers_load_and_change_nothing_of_hugging_face():
    loaded = f"print(*[name for name in {NOT_TORCH} if name in sys.modules])"
    assert fresh("import sys", TRAIN, loaded) == ["trained", "10"]


USE_THE_NAMES = """
from transformers import HfArgumentParser, TrainingArguments
print(HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--optim", "elra"])[0].optim.value)
from transformers import AutoConfig
print(AutoConfig.for_model("hf_elra_image_classifier").architecture)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_elra; import transformers",
        "from transformers import AutoConfig, HfArgumentParser, TrainingArguments; import hf_elra",
        "from hf_elra.optim import ELRA; from transformers import Trainer",
        "from hf_elra import ElraTrainer",
    ],
)
def test_names_are_registered_whatever_the_order_of_imports(imports):
    assert fresh(imports, USE_THE_NAMES) == ["elra", "mnist-mlp"]


def test_a_registration_that_fails_is_a_warning():
    """As where Transformers is there for something else, without Accelerate."""
    text = """
        import sys, warnings
        sys.modules["hf_elra.trainer"] = None
        warnings.simplefilter("error")
        import hf_elra
        try:
            import transformers.training_args
        except UserWarning as warning:
            print(*str(warning).split()[:6])
    """
    assert fresh(text) == ["hf_elra", "cannot", "register", "--optim", "elra:", "import"]


def test_every_public_name_is_there_and_no_other():
    text = """
        import hf_elra
        assert set(hf_elra.__all__) <= set(dir(hf_elra))
        assert "optim" in dir(hf_elra)
        assert hf_elra.optim.ELRA is hf_elra.ELRA
        assert "transformers" not in __import__("sys").modules
        print(hasattr(hf_elra, "nothing"))
    """
    assert fresh(text) == ["False"]


# ---- after_import ----


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose first module is half imported when its second one is."""
    name = f"package_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "first.py").write_text(f"import {name}.second\nfinished = True\n")
    (folder / "second.py").write_text("class Thing:\n    pass\n")
    (folder / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield name
    sys.meta_path[:] = before
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_acts_once_and_when_nothing_is_half_imported(package):
    seen, before = [], list(sys.meta_path)
    after_import(f"{package}.second", lambda: seen.append(sys.modules[f"{package}.first"].finished))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(f"{package}.broken")
    assert seen == []
    importlib.import_module(f"{package}.first")
    assert seen == [True]
    assert sys.meta_path == before
    importlib.reload(sys.modules[f"{package}.second"])
    assert seen == [True]
    after_import(f"{package}.second", lambda: seen.append("at once"))
    assert seen == [True, "at once"]
    assert sys.meta_path == before


def test_modules_are_what_they_are_without_it(package):
    """Their loaders, specs, reloading and pickling, while it waits for another one."""
    after_import(f"{package}.never", lambda: pytest.fail("it was never imported"))
    after_import(f"{package}.nor_this", lambda: pytest.fail("it was never imported"))
    spec = importlib.util.find_spec(f"{package}.second")
    assert f"{package}.second" not in sys.modules
    assert spec.origin.endswith("second.py")
    assert "class Thing" in spec.loader.get_source(spec.name)
    assert importlib.util.find_spec(f"{package}.missing") is None
    assert importlib.util.find_spec("json") is not None
    second = importlib.import_module(f"{package}.second")
    kind = type(sys.modules[__name__].textwrap.__loader__)
    for module in (second, importlib.reload(second)):
        assert type(module.__loader__) is type(module.__spec__.loader) is kind
    assert type(pickle.loads(pickle.dumps(second.Thing()))) is second.Thing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{package}.missing")


def test_an_error_of_the_action_comes_out_of_the_import_once(package):
    after_import(f"{package}.second", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(f"{package}.second")
    assert importlib.import_module(f"{package}.second").Thing
