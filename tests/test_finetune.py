"""``hf-elra finetune``: rows of files, wrong input, and a small run from end to end."""

import gzip
import json
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from hf_elra import ConfigurationError
from hf_elra.recipes import finetune, train_finetune
from hf_elra.recipes.finetune import FinetuneArguments, load_model, load_rows, tokenise
from hf_elra.recipes.text_data import train_tokenizer

ROWS = [("good film", "pos"), ("the plot is dull", "neg"), ("a great film", "pos"), ('a "plot"', "neg")] * 10


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of an encoder without a head, whose tokenizer has no padding, as many have none."""
    folder = tmp_path_factory.mktemp("base") / "encoder"
    train_tokenizer([text for text, _ in ROWS], 280).save_pretrained(folder)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=280, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return str(folder)


def written(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def tsv(path, names="label\tsentence", rows=ROWS):
    return written(path, names + "\n" + "".join(f"{label}\t{text}\n" for text, label in rows))


def arguments(train_file, **given):
    return FinetuneArguments(model="m", train_file=train_file, **given)


def test_files_of_every_kind_hold_the_same_rows(tmp_path):
    quoted = "".join('"{}",{}\n'.format(text.replace('"', '""'), label) for text, label in ROWS)
    files = [
        tsv(tmp_path / "a.tsv"),
        tsv(tmp_path / "a.tsv.gz"),
        written(tmp_path / "a.csv", "\ufefftext,label\n" + quoted),
        written(tmp_path / "a.jsonl", "".join(json.dumps({"label": b, "text": a}) + "\n" for a, b in ROWS)),
    ]
    for file in files:
        rows = finetune.read_rows(file, "train_file", arguments(file))
        assert list(zip(rows.texts, rows.labels, strict=True)) == ROWS


def test_one_row_in_twenty_is_held_out_and_classes_are_in_their_order(tmp_path):
    rows = [(f"text {i}", str(11 - i % 3)) for i in range(60)]
    train, validation, classes = load_rows(arguments(tsv(tmp_path / "a.tsv", rows=rows)))
    assert classes == ["9", "10", "11"]
    assert (len(train.texts), len(validation.texts)) == (57, 3)
    assert {*train.texts, *validation.texts} == {text for text, _ in rows}


@pytest.mark.parametrize(
    ("name", "text", "given", "message"),
    [
        ("a.txt", "x", {}, "must be a csv, tsv or jsonl file"),
        ("a.csv", "", {}, "holds no rows"),
        ("a.csv.gz", None, {}, "cannot be read as csv: Not a gzipped file"),
        ("a.jsonl", '{"text": "a"', {}, "cannot be read as jsonl"),
        ("a.jsonl", "[1]", {}, "a line is no JSON object"),
        ("a.csv", "a,b,label\n1,2,3\n", {}, "columns a, b, label; say which holds the texts with --text_column"),
        ("a.csv", "text,lable\na,1\n", {}, "has no column 'label'. Did you mean 'lable'?"),
        ("a.csv", "text,label\na,1\n", {"text_column": "txt"}, "no column 'txt'. Did you mean 'text'?"),
        ("a.csv", "text,label\na,1\nb\n", {}, "row 2 lacks a text in 'text' or a label in 'label'"),
        ("a.csv", "text,label\na, b,1\n", {}, "row 1 lacks a text"),
        ("a.csv", "text,label\na,1\n", {}, "has 1 rows, too few to hold one in 20 out"),
        ("a.csv", "text,label\n" + "a,1\n" * 40, {}, "holds 1 different value(s) in 38 rows, which are no classes"),
        (
            "a.csv",
            "text,label\n" + "".join(f"a,{i}\n" for i in range(40)),
            {},
            "holds 38 different value(s) in 38 rows, which are no classes; choose another with --label_column",
        ),
    ],
)
def test_wrong_files(tmp_path, name, text, given, message):
    file = tmp_path / name
    file.write_bytes(b"no gzip" if text is None else text.encode())
    with pytest.raises(ConfigurationError) as error:
        load_rows(arguments(str(file), **given))
    assert message in str(error.value)


def test_a_label_of_validation_alone_is_named(tmp_path):
    train = tsv(tmp_path / "a.tsv")
    with pytest.raises(ConfigurationError, match="label 'other' of the validation rows is not among"):
        load_rows(arguments(train, validation_file=tsv(tmp_path / "b.tsv", rows=[("x", "other")])))
    with pytest.raises(ConfigurationError, match="validation_file='nowhere.csv' does not exist"):
        load_rows(arguments(train, validation_file="nowhere.csv"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_file", "a.tsv"], "the following arguments are required: --model"),
        (["--model", "./a.tsw", "--train_file", "a.tsv"], "It is no folder. Did you mean 'a.tsv'?"),
        (["--model", "m", "--train_file", "a.tsv", "--optim", "elra_spectrl"], "Did you mean 'elra_spectral'"),
        (["--model", "m", "--train_file", "a.tsv", "--max_length", "1"], "max_length=1 must be at least 4"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_leaves_nothing(tmp_path, monkeypatch, command_here, words, message):
    monkeypatch.chdir(tmp_path)
    tsv(tmp_path / "a.tsv")
    code, output, error = command_here("finetune", *words)
    assert (code, output) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_stock_optimizers_get_settings_of_their_own():
    words = ["--model", "a/encoder", "--train_file", "texts.csv.gz"]
    _, ours = finetune.parse_arguments(words)
    _, stock = finetune.parse_arguments([*words, "--optim", "adamw_torch"])
    assert (ours.output_dir, stock.output_dir) == ("runs/encoder-texts", "runs/encoder-texts-adamw_torch")
    assert (stock.learning_rate, stock.lr_scheduler_type, stock.weight_decay) == (5e-5, "linear", 0.01)


def test_a_head_for_the_classes_and_padding_for_a_tokenizer_without(base):
    model, tokenizer = load_model(FinetuneArguments(model=base, train_file="a.tsv"), ["neg", "pos"])
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert tokenizer.pad_token is not None
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rows = finetune.Rows(["good film " * 50, "dull"], ["pos", "neg"])
    tokens = tokenise(rows, tokenizer, ["neg", "pos"], 8)
    assert [row["labels"] for row in tokens] == [1, 0]
    assert len(tokens[0]["input_ids"]) == 8


def test_a_model_is_fine_tuned_and_saved_with_its_tokenizer(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    films = tsv(tmp_path / "films.tsv")
    words = ["--model", base, "--train_file", films, "--validation_file", films, "--output_dir", "run", "--use_cpu"]
    words += ["--max_steps", "12", "--optim_args", "warmup=2", "--eval_steps", "6", "--save_steps", "8"]
    monkeypatch.setattr(sys, "argv", ["hf-elra", "finetune", *words])
    train_finetune.main(words)
    assert "40 texts for training and 40 for validation, of 2 classes" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["samples_seen"] <= 12 * 16
    assert metrics["card"]["task"] == "text-classification"
    (first, *entries) = map(json.loads, (tmp_path / "run" / "elra_log.jsonl").read_text().splitlines())
    assert first["pretrained"] is True
    assert any("drift" in entry for entry in entries)
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.id2label == {0: "neg", 1: "pos"}
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("good")["input_ids"]
