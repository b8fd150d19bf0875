"""scripts/train_image_classifier.py and scripts/reproduce.py from end to end, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_elra.recipes.image_data import load_images

ROOT = Path(__file__).parents[2]


def finish(script, *words, folder=ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *words],
        env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=folder,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_digits_are_learned_and_the_saved_model_is_the_mean(tmp_path):
    folder = tmp_path / "run"
    words = ["--output_dir", str(folder), "--num_train_epochs", "4", "--elra_boost_every", "2", "--use_cpu"]
    code, output, error = finish("train_image_classifier.py", *words)
    assert code == 0, error
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.7
    assert metrics["images_seen"] <= 4 * 1437
    assert f"test accuracy {100 * metrics['test_accuracy']:.2f} %" in output
    assert "| accuracy |" in output

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    test = load_images("digits").test
    with torch.no_grad():
        logits = model(test.__getitems__(range(len(test)))["pixel_values"]).logits
    accuracy = (logits.argmax(1) == test.labels).double().mean().item()
    assert accuracy == pytest.approx(metrics["test_accuracy"])

    code, _, error = finish("train_image_classifier.py", *words)
    assert code == 2
    assert "holds a finished run; pass --overwrite" in error


def test_own_images_and_a_stock_optimizer(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(64) % 4
    np.savez(
        tmp_path / "mine.npz", train_images=pixels, train_labels=labels, test_images=pixels[:8], test_labels=labels[:8]
    )
    code, output, error = finish(
        "train_image_classifier.py",
        *("--dataset", "mine.npz", "--model", "fashion-cnn", "--augmentation", "flip+crop", "--optim", "adamw_torch"),
        *("--num_train_epochs", "2", "--per_device_train_batch_size", "16", "--output_dir", "out", "--use_cpu"),
        folder=tmp_path,
    )
    assert code == 0, error
    assert "64 training and 8 test images of 4 classes" in output
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert (settings["learning_rate"], settings["elra_boost"]) == (1e-3, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "mnits"], "--preset mnits is unknown. Did you mean 'mnist'"),
        (["--model", "resnet81"], "model='resnet81' is none of"),
        (["--dataset", "./nowhere"], "dataset='./nowhere' does not exist"),
        (["--image_size", "4"], "image_size=4 must be at least 8"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_leaves_nothing(tmp_path, words, message):
    code, output, error = finish("train_image_classifier.py", "--output_dir", str(tmp_path / "run"), *words)
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    assert output == ""


def test_tables_of_networks_are_printed_beside_the_papers(tmp_path):
    given = ["--data", "digits", "--seeds", "2", "--epochs", "1", "--output", str(tmp_path), "--processes", "1"]
    code, output, error = finish("reproduce.py", "mnist", *given, "--columns", "elra", "adam")
    assert code == 0, error
    table = [[cell.strip() for cell in line.split("|")[1:]] for line in output.splitlines() if line.startswith("|")]
    rows = {name: cells for name, *cells in table}
    assert rows["ELRA"][:3] == ["94.25 ± 0.21", "2", "1"]
    assert rows["Adam"][1] == "2"
    assert "not run" in rows["Lion"]
    assert sorted(p.name for p in (tmp_path / "mnist").glob("*.jsonl")) == [
        *("adam-seed0.jsonl", "adam-seed1.jsonl", "elra-seed0.jsonl", "elra-seed1.jsonl")
    ]
    code, _, error = finish("reproduce.py", "mnist", *given, "--columns", "eve")
    assert code == 2
    assert "--columns eve is unknown. Choose from elra, elra-ft, adam" in error
