"""The golden paths of scripts/experiments/golden.py: optimizers and Trainer walk as they did."""

import functools

import pytest

from lib.ready import together
from scripts.experiments import golden

on_two_processes = functools.cache(lambda: together(golden.walk_together, 2))


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, cases in golden.BY_NAME.items() for name in cases])
def test_the_path_is_as_recorded(file, name):
    found = on_two_processes()[name] if file == "processes" else golden.walked(file, name)
    assert golden.differences(file, name, found) == []


def test_every_recorded_case_is_walked():
    kernels = {name for name in golden.recorded("loops")["cases"] if "kernels" in name}  # where there is Triton
    for file, cases in golden.BY_NAME.items():
        assert golden.recorded(file)["cases"].keys() - kernels == cases.keys() - kernels
