"""scripts/experiments/stress.py, in a shorter form; its part about processes is in test_processes.py."""

import json

import pytest

import stress
from tests.conftest import finish


def test_kills_and_faults(tmp_path):
    file = tmp_path / "stress.json"
    # 7 has no factor in common with the numbers of faults, moments and layouts.
    words = ["--parts", "faults", "kills", "--every", "7", "--kills", "1", "--updates", "20"]
    code, output, error = finish("experiments/stress.py", "--output", str(file), *words)
    assert code == 0, error + output
    results = json.loads(file.read_text())
    assert results["kills"]["kills"] == 1
    assert results["kills"]["weights_identical"] is True
    assert len(results["faults"]) == -(-12 * 5 * (3 * 2 + 2) // 7)
    assert all(result["finite"] and result["learnt"] for result in results["faults"])
    # What is not finite is always taken back.
    counted = [r["restarts"] for r in results["faults"] if r["fault"] == "loss NaN" and r["moment"] == "three in a row"]
    assert min(counted) >= 3
    # α of elra_spectral, which hardly moves by itself here, is where it is without a fault.
    single = [r for r in results["faults"] if r["optimizer"] == "elra_spectral" and r["moment"] == "in mid-run"]
    assert single
    assert all(0.5 < r["alpha_later"] < 2 for r in single)
    nothing = [r for r in results["faults"] if r["fault"].startswith("a batch without") and r["moment"] == "in mid-run"]
    assert [r["skipped"] for r in nothing] == [1] * len(nothing) != []
    assert "(SIGKILL) and resumed: weights identical to those of the run without: yes" in output


def test_wrong_input(tmp_path, capsys):
    words = ["--output", str(tmp_path / "x.json"), "--kills", "20", "--updates", "100"]
    with pytest.raises(SystemExit, match="2"):
        stress.main(words)
    assert "--updates 100 is too few to be killed 20 times; pass 200" in capsys.readouterr().err
