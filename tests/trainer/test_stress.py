"""scripts/stress.py: kills and faults are survived, and the table says what was tried."""

import json

from tests.conftest import finish


def test_kills_and_faults(tmp_path):
    file = tmp_path / "stress.json"
    code, output, error = finish("stress.py", "--output", str(file), "--kills", "1", "--updates", "60")
    assert code == 0, error + output
    results = json.loads(file.read_text())
    assert results["kills"]["kills"] == 1
    assert results["kills"]["weights_identical"] is True
    assert len(results["faults"]) == 8 * 5 * 3
    assert all(result["finite"] and result["learnt"] for result in results["faults"])
    # What is not finite is always taken back.
    counted = [r["restarts"] for r in results["faults"] if r["fault"] == "loss NaN" and r["moment"] == "three in a row"]
    assert min(counted) >= 3
    assert "weights after all kills identical to those of the run without: yes" in output
