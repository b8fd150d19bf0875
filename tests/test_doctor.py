"""hf-elra doctor: what is well, what is broken, and what to do about it."""

import builtins
import importlib.metadata

import pytest
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from hf_elra import doctor
from hf_elra.trainer.upstream import UPSTREAM, Upstream


def kinds(section):
    return {finding.kind for finding in section()}


def told(section, kind):
    return [(finding.text, finding.remedy) for finding in section() if finding.kind == kind]


def test_here_nothing_is_broken(command_here):
    code, output, error = command_here("doctor")
    assert (code, error) == (0, "")
    assert output.endswith("all well\n")
    for title in doctor.SECTIONS:
        assert title in output
    for name in ("elra", "elra_spectral"):
        for number in (1, 2, 3):
            assert any(f"✓ gate {number}" in line and f" {name}, " in line for line in output.splitlines())


@pytest.mark.parametrize(
    ("gate", "shut"),
    [
        (1, lambda patch: patch.delitem(OptimizerNames._member_map_, "ELRA")),
        (2, lambda patch: patch.delitem(OptimizerNames._value2member_map_, "elra")),
        (3, lambda patch: patch.delitem(trainer_optimizer._OPTIMIZER_HANDLERS, OptimizerNames("elra"))),
    ],
)
def test_a_gate_that_is_shut_is_broken(monkeypatch, command_here, gate, shut):
    shut(monkeypatch)
    if gate == 1:
        names = [name for name in OptimizerNames._member_names_ if name != "ELRA"]
        monkeypatch.setattr(OptimizerNames, "_member_names_", names)
    code, output, _ = command_here("doctor")
    assert code == 1
    assert f"✗ gate {gate}" in output
    assert "→ this is hf_elra" in output
    assert "broken" in output.splitlines()[-1]


def test_a_private_name_that_has_moved_is_broken(monkeypatch):
    gone = Upstream("transformers.Trainer._no_such_hook", "trainer.mixin", "a test")
    monkeypatch.setattr("hf_elra.trainer.upstream.UPSTREAM", (*UPSTREAM, gone))
    ((text, remedy),) = told(doctor.gates, "bad")
    assert "transformers.Trainer._no_such_hook" in text
    assert remedy


def test_transformers_that_cannot_be_imported_is_broken(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("transformers"):
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    ((text, remedy),) = told(doctor.gates, "bad")
    assert "cannot be reached" in text
    assert remedy.startswith("pip install")


def test_versions_that_are_too_old_or_missing(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", "nothing-of-the-kind", "rich>=1; extra == 'x'"])
    monkeypatch.setattr(doctor, "version", real)
    broken = told(doctor.versions, "bad")
    assert [remedy for _, remedy in broken] == ["pip install 'torch>=99'", "pip install 'nothing-of-the-kind'"]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert {remedy for _, remedy in told(doctor.versions, "note")} >= {
        "pip install 'hf_elra[recipes]'",
        "pip install 'trackio'",
    }


def test_what_is_missing_for_speed_is_a_note_with_a_remedy(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert ("torch.compile needs a C++ compiler on a CPU", "apt install g++") in told(doctor.fast_paths, "note")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in [remedy for _, remedy in told(doctor.fast_paths, "note")]
    assert kinds(doctor.fast_paths) == {"good", "note"}


def test_an_nvidia_gpu_that_pytorch_cannot_use_is_broken(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert kinds(doctor.devices) == {"good", "bad"}


def test_it_takes_no_arguments(command_here):
    assert command_here("doctor", "--quick")[::2] == (
        2,
        "error: unknown argument --quick; hf-elra doctor takes none.\n",
    )
    assert command_here("doctor", "--help")[0] == 0
