"""Private names of Transformers and Accelerate: a release that moves one of them fails the test of that name."""

import ast
from pathlib import Path

import pytest

import hf_elra
from hf_elra.trainer.upstream import UPSTREAM, Upstream
from tests.conftest import trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("upstream"), max_steps=1)
    run.train()
    return run


@pytest.mark.parametrize("private", UPSTREAM, ids=lambda private: private.name)
def test_the_name_is_where_it_was(trained, private):
    private.check(trained)
    room = Path(hf_elra.__file__).parent.joinpath(*private.room.split(".")).with_suffix(".py")
    assert private.name.rpartition(".")[2] in room.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "parameters", "error"),
    [
        ("transformers.Trainer._went_away", None, AttributeError),
        ("trainer.accelerator.went_away", None, AttributeError),
        ("transformers.Trainer.training_step", ("model", "batch"), TypeError),
    ],
)
def test_a_name_that_has_moved_is_found_out(trained, name, parameters, error):
    with pytest.raises(error):
        Upstream(name, "trainer.mixin", "is not there", parameters).check(trained)


def test_every_private_name_in_the_trainers_rooms_is_in_the_table():
    """Attributes with an underscore that a module of ``trainer/`` reads of anything but itself, its own, and torch."""
    known = {private.name.rpartition(".")[2] for private in UPSTREAM}
    torchs = {"_foreach_mul_", "_foreach_sub_", "_foreach_copy_", "_disabled_torch_function_impl", "_C"}
    others = {"_exit", "_run_exitfuncs", "_actions", "_orig_mod"}  # of os, atexit, argparse, torch.compile
    enums = {"_name_", "_value_", "_sort_order_", "_hashable_values_"}
    room = Path(hf_elra.__file__).parent / "trainer"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in room.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    ours |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    ours |= {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    hooks = {n.attr for n in nodes if isinstance(n, ast.Attribute) and _is_of_super(n)}
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute)} - ours - torchs - others - enums
    assert {name for name in read | hooks if name.startswith("_") and not name.startswith("__")} <= known


def _is_of_super(node):
    value = node.value
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_what_transformers_deprecates_is_an_error_here(kind):
    told = compile("import warnings; warnings.warn('it goes away', kind)", "trainer.py", "exec")
    with pytest.raises(kind):
        exec(told, {"__name__": "transformers.trainer", "kind": kind})
