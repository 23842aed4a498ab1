"""The command: what it prints, what it leaves behind, what it refuses. On a random tiny encoder."""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lpft
import ntk
import predict as predict_command
import train
from conftest import LORA
from data import encode, load_task, tiny
from data.corpora import CORPORA, RECIPES
from plumbing.export import load_classifier
from lpft import accuracy, feature_statistics, predict
from model import Classifier, add_lora
from plumbing import devices, flags
from plumbing.checkpoint import load_pretrained, read_safetensors

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"lp": [], "ft": [], "lpft": [], "ft-lora": LORA, "lpft-lora": LORA}


def command(name, *more):
    stage = [] if name == "lp" else ["--epochs", "2"]
    return ["--method", name.split("-")[0], *METHODS[name], *stage, "--max-train", "60", "--max-test", "80", *more]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_to_its_table_and_its_files(name, random_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(command(name, "--model", str(random_folder), "--out", str(out))) == 0
    printed = capsys.readouterr().out
    assert "configuration" in printed and printed.splitlines()[-1].startswith("result: method=")
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == name.split("-")[0] and result["lora"] == ("lora" in name)
    names = ["test", "films", "hotels", "meals"]
    assert list(result["accuracy"]) == list(result["features"]) == list(result["calibration"]) == names
    for split in names:
        assert result["features"][split].keys() == {"cs", "diff", "fdr", "norm"}
        assert result["calibration"][split].keys() == {"ece", "mce", "ece_scaled", "mce_scaled"}
    head, lora = 3 * 64 + 3, 4 * 2 * 4 * 64
    trainable = {"lp": head, "ft": result["total_parameters"], "lpft": result["total_parameters"]}
    assert result["trainable_parameters"] == trainable.get(name, head + lora)
    assert (result["features"]["test"]["diff"] == 0) == (name == "lp")
    assert json.loads((out / "config.json").read_text())["seed"] == 0
    stages = [json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert stages == {"lp": ["lp"], "ft": ["ft"] * 3}.get(name.split("-")[0], ["lp"] + ["ft"] * 3)


def test_another_seed_is_another_lora_other_dropout_and_other_samples(random_folder, tmp_path):
    """Runs that shared them would agree more than seeds do, and their standard deviation would be too small."""
    flags = ["--method", "lpft", *LORA, "--model", str(random_folder), "--max-train", "40", "--max-test", "0",
             "--epochs", "1", "--lr", "1e-9"]  # nearly where it started
    results, starts = [], []
    for seed in ("0", "1"):
        assert train.main([*flags, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
        results.append(json.loads((tmp_path / seed / "result.json").read_text()))
        starts.append(read_safetensors(tmp_path / seed / "model.safetensors"))
    first, second = (start["encoder.layers.0.attention.query.lora_A.weight"] for start in starts)
    assert (first - second).norm() > 0.5 * first.norm()
    assert results[0]["lp"]["head_norm"] != results[1]["lp"]["head_norm"]  # of other samples


@pytest.mark.parametrize("device, of_its_own, precision", [
    ("cuda", True, "bfloat16 autocast"), ("cuda", False, "float32"), ("cpu", True, "float32")])
def test_bfloat16_is_for_cards_that_have_it_and_is_announced(device, of_its_own, precision, monkeypatch):
    """Older cards only emulate bfloat16, slower than float32; a CPU computes in float32 whatever it has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        of_its_own or including_emulation)
    chosen = devices.choose_device(device)
    why = devices.describe(chosen)
    assert chosen.type == device and why.endswith(f"{precision} in the FT stage")
    assert ("a card" in why) == (device == "cuda")
    with devices.mixed_precision(chosen):
        assert torch.is_autocast_enabled(device) == (precision != "float32")


@pytest.mark.parametrize("command", [["train.py"], ["predict.py"], ["-m", "lab.pretrain"], ["-m", "lab.reproduce"]])
def test_threads_that_wait_give_way_in_every_command_that_computes(command):
    """GNU OpenMP reads this once, when torch is loaded, so it has to be set before."""
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | {"OMP_DISPLAY_ENV": "verbose"}
    said = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, env=env,
                          cwd=Path(train.__file__).parent).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this PyTorch does not use GNU OpenMP")
    assert "GOMP_SPINCOUNT = '1000'" in said


@pytest.fixture(scope="module")
def all_right(random_folder, tmp_path_factory):
    """(folder, what was printed) of a run whose validation samples are all right; test samples are not."""
    folder = tmp_path_factory.mktemp("all-right")
    rows = [("the screen was good .", "yes"), ("the screen was bad .", "no")]
    odd = [("the soup was good .", "no"), ("the screen was fine .", "yes"), ("the lift was bad .", "yes")]
    for name, some in (("train", rows * 20), ("val", rows * 5), ("test", rows * 5 + odd)):
        (folder / f"{name}.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in [("text", "label"), *some]))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main(["--method", "lp", "--model", str(random_folder), "--data", str(folder),
                           "--lp-inverse-l2", "10", "--out", str(folder / "run")]) == 0
    return folder / "run", out.getvalue()


def test_where_all_of_validation_is_right_t_is_one_and_the_table_says_why(all_right):
    """The loss falls all the way to T = 0, at which predictions would be certain."""
    folder, printed = all_right
    result = json.loads((folder / "result.json").read_text())
    reason = "every validation sample is right or tied, so the loss falls all the way to T = 0"
    assert result["val_accuracy"] == result["temperature"] == 1 and result["temperature_reason"] == reason
    of_test = result["calibration"]["test"]
    assert of_test["ece_scaled"] == of_test["ece"] > 0 and of_test["mce_scaled"] == of_test["mce"]
    assert f"ECE/T, MCE/T: with T = 1, not fitted: {reason}. Diff(F):" in printed
    assert "fitted on validation" not in printed and "val is small" in printed  # 10 texts
    assert " temperature=1.0000 " in printed.splitlines()[-1]


def test_predictions_of_such_a_run_are_those_without_t(all_right, tmp_path, capsys):
    """And one line on standard error says so."""
    folder, _ = all_right
    texts = ["the screen was good .", "the soup was bad .", "the lift was good ."]
    (tmp_path / "texts").write_text("\n".join(texts))
    assert predict_command.main([str(folder), str(tmp_path / "texts")]) == 0
    out, error = capsys.readouterr()
    model, tokenizer, _ = load_classifier(folder)
    expected = predict(model, encode(tokenizer, [(text, None, 0) for text in texts], 128))[1].softmax(1)
    found = [[float(cell) for cell in line.split("\t")[1:]] for line in out.splitlines()[1:]]
    assert np.allclose(found, expected, atol=1e-6)
    said = [line for line in error.splitlines() if "every validation sample is right" in line]
    assert len(said) == 1 and said[0].startswith("predict.py: T is 1, not fitted: ")


def test_a_fitted_temperature_has_no_reason(random_folder, tmp_path, capsys):
    assert train.main(command("lp", "--model", str(random_folder), "--out", str(tmp_path / "run"))) == 0
    printed = capsys.readouterr().out
    assert ", fitted on validation. Diff(F):" in printed and "val is small" not in printed  # 200 texts
    assert json.loads((tmp_path / "run" / "result.json").read_text())["temperature_reason"] is None
    (tmp_path / "texts").write_text("good\n")
    assert predict_command.main([str(tmp_path / "run"), str(tmp_path / "texts")]) == 0
    assert "T is 1" not in capsys.readouterr().err


def test_cola_is_selected_and_reported_by_matthews_correlation(random_folder, tmp_path, capsys):
    rows = [f"x\t{label}\t\tthe screen was {word}" for word, label in
            [("good", 1), ("bad", 0), ("fine", 1), ("great", 1)] * 20]
    (tmp_path / "glue" / "CoLA").mkdir(parents=True)
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "glue" / "CoLA" / file).write_text("\n".join(rows) + "\n")
    assert train.main(["--method", "ft", "--model", str(random_folder), "--data", "cola", "--data-dir",
                       str(tmp_path), "--epochs", "4", "--lr", "1e-3", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "highest validation matthews" in printed and "matthews accuracy" in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(records[1:], key=lambda record: record["val_matthews"])
    assert (best["epoch"], best["val_matthews"]) == (result["kept_epoch"], result["val_matthews"])
    assert result["metric"] == "matthews" and -1 <= result["matthews"]["test"] <= 1
    assert any(record["val_matthews"] != record["val_accuracy"] for record in records)


def test_the_printed_configuration_is_made_of_flags(random_folder, tmp_path, capsys):
    """What it prints, without the words in brackets, is a command: a flag that is off is not there."""
    for name in ("ft", "ft-lora"):
        arguments = command(name, "--model", str(random_folder), "--out", str(tmp_path / name))
        assert train.main(arguments) == 0
        lines, _, rest = capsys.readouterr().out.split("configuration\n")[1].partition("  samples")
        assert "skipped" not in rest  # of these texts none
        words = [word for line in lines.splitlines() for word in line.split("   (")[0].split()]
        ours, theirs = (flags.configuration(train.parse_args(words)) for words in (words, arguments))
        assert ours == theirs | {"device": ours["device"]}
        assert ("--lora" in words) == ("lora" in name)


def test_the_authors_settings_are_the_defaults_of_their_data_sets():
    """Batch size and learning rate in FT, LoRA, LP-FT and LP-LoRA."""
    for (method, lora), (batch_size, lr) in zip(flags.STAGES, RECIPES["wsc"]):
        args = train.parse_args(["--method", method, "--model", "x", "--data", "wsc"] + ["--lora"] * lora)
        assert (args.batch_size, args.lr) == (batch_size, lr)
    assert RECIPES["wsc"] == ((16, 1e-3), (16, 1e-4), (8, 1e-3), (8, 1e-4))
    assert set(CORPORA) <= set(RECIPES)


def test_the_same_seed_gives_the_same_result(random_folder, tmp_path):
    results = []
    for run, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        arguments = command("lpft", "--model", str(random_folder), "--seed", seed)
        assert train.main([*arguments, "--out", str(tmp_path / run)]) == 0
        results.append(json.loads((tmp_path / run / "result.json").read_text()))
        del results[-1]["seconds"]
    assert results[0] == results[1]
    assert results[0]["accuracy"] != results[2]["accuracy"]


def test_a_folder_of_your_own_without_test_file(random_folder, tmp_path, capsys):
    rows = [f"the screen was {word},{label}" for word, label in [("good", "pos"), ("bad", "neg")] * 20]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]))
    arguments = ["--method", "lpft", "--epochs", "1", "--model", str(random_folder)]
    assert train.main([*arguments, "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "only validation accuracy" in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"predict.py gives probabilities with T = 1, not fitted: {result['temperature_reason']}." in printed
    assert result["accuracy"] == {}


@pytest.mark.parametrize("name", ["ft", "ft-lora"])
def test_the_kernel_is_that_of_the_start_of_the_ft_stage(name, random_folder, tmp_path, capsys):
    """Saved for the samples and labels it says, with LoRA in place; the table is made from what is saved."""
    assert train.main(command(name, "--model", str(random_folder), "--ntk", "30", "--out", str(tmp_path / "run"))) == 0
    printed = capsys.readouterr().out
    assert "NTK   N = 30 training and 30 test samples" in printed and "FT ratio" in printed
    saved = np.load(tmp_path / "run" / "ntk.npz")
    encoder, tokenizer = load_pretrained(random_folder)
    torch.manual_seed(0)  # the same random head and LoRA as in the run
    model = Classifier(encoder, 3).eval()
    if "lora" in name:
        add_lora(encoder, r=4, lora_alpha=12)
    task = load_task("tiny", tokenizer, max_train=60, max_test=80)
    batches, labels = {}, {}
    for split, key in (("train", "train_indices"), ("test", "test_indices")):
        batches[split], labels[split] = task.splits[split].batch(saved[key])
    expected = ntk.empirical_ntk(model, [batches["train"]], [batches["test"]])
    for key in ("pretrain", "ft", "test_pretrain", "test_ft"):
        assert np.allclose(saved[key], getattr(expected, key), rtol=1e-4, atol=1e-5 * getattr(expected, key).max())
    assert (saved["labels"] == labels["train"].numpy()).all() and (saved["test_labels"] == labels["test"].numpy()).all()
    with torch.no_grad():
        deltas = ntk.initial_deltas(model(**batches["train"]), labels["train"])
    assert np.allclose(saved["deltas"], deltas, atol=1e-5)
    result = json.loads((tmp_path / "run" / "result.json").read_text())["ntk"]
    parts = {key: torch.from_numpy(saved[key]) for key in ("pretrain", "ft", "test_pretrain", "test_ft")}
    found = ntk.NTK(**parts)
    assert result["ft_ratio"] == pytest.approx(ntk.ft_ratio(found, torch.from_numpy(saved["deltas"])))
    for row, kernel, test_kernel in (("P", found.pretrain, found.test_pretrain), ("F", found.ft, found.test_ft),
                                     ("Theta", found.pretrain + found.ft, found.test_pretrain + found.test_ft)):
        statistics = ntk.kernel_statistics(kernel)
        assert result[row]["rank"] == statistics["rank"]
        assert result[row]["frobenius"] == pytest.approx(statistics["frobenius"])
        assert result[row]["singular_values"] == pytest.approx(statistics["singular_values"].tolist())
        regression = ntk.kernel_regression(kernel, labels["train"], test_kernel, labels["test"])
        assert {key: result[row][key] for key in regression} == regression


def test_the_kernel_needs_the_logits_of_its_own_samples_alone(random_folder, tmp_path, monkeypatch):
    """The whole training split, predicted for 30 deltas, may take longer than the kernel of them."""
    sizes = []

    def counted(model, split, **more):
        sizes.append(len(split))
        return predict(model, split, **more)

    monkeypatch.setattr(train, "predict", counted)
    arguments = command("ft", "--model", str(random_folder), "--ntk", "30", "--out", str(tmp_path / "run"))
    assert train.main(arguments) == 0
    assert 60 not in sizes and sizes.count(80) == 2 * 4 and sizes.count(200) == 1  # train, tests, validation


def test_features_that_are_not_finite_are_refused_even_if_only_a_test_text_has_them(random_folder, tmp_path, monkeypatch, capsys):
    """Else its row of the table would be NaN, and nobody would know why."""
    def spoiled(model, split, **more):
        features, logits = predict(model, split, **more)
        if len(split) == 80:  # a test split
            features[3] = float("nan")
        return features, logits

    monkeypatch.setattr(train, "predict", spoiled)
    arguments = command("ft", "--model", str(random_folder), "--out", str(tmp_path / "run"))
    assert train.main(arguments) == 2
    assert "features with NaN or infinity; the checkpoint is damaged" in capsys.readouterr().err


def test_the_kernel_changes_nothing_but_what_is_reported(random_folder, tmp_path):
    results = []
    for run, more in (("with", ["--ntk", "30"]), ("without", [])):
        arguments = command("lpft-lora", "--model", str(random_folder), *more)
        assert train.main([*arguments, "--out", str(tmp_path / run)]) == 0
        results.append(json.loads((tmp_path / run / "result.json").read_text()))
        del results[-1]["seconds"]
    assert 0 < results[0].pop("ntk")["ft_ratio"] and results[0] == results[1]


def test_ft_and_lp_ft_on_a_folder_take_the_same_number_of_steps():
    """Else the same learning rate would mean twice the steps for one of them."""
    folder = ["--model", "x", "--data", "mine"]
    assert {train.parse_args(["--method", method, *["--lora"] * lora, *folder]).batch_size
            for method, lora in flags.STAGES} == {8}


def test_lp_computes_no_features_twice(random_folder, tmp_path, monkeypatch):
    """Its encoder is the pre-trained one; and what it then says of test is what any other code says of it."""
    seen = []

    def counted(model, split, **more):
        seen.append(split)
        return predict(model, split, **more)

    monkeypatch.setattr(train, "predict", counted)
    assert train.main(command("lp", "--model", str(random_folder), "--out", str(tmp_path / "run"))) == 0
    assert len(seen) == len({id(split) for split in seen}) == 6  # train, val, test and three other domains
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    model, _, _ = load_classifier(tmp_path / "run")
    features, logits = predict(model, seen[2])
    assert result["accuracy"]["test"] == accuracy(logits, seen[2].labels)
    assert result["features"]["test"] == feature_statistics(features, features, seen[2].labels)
    assert result["val_accuracy"] == accuracy(predict(model, seen[1])[1], seen[1].labels)


def test_an_ordinary_gap_between_train_and_val_gets_no_hint(finished):
    folder = finished("cola", "lp")
    record = json.loads((folder / "result.json").read_text())["lp"]
    assert 0.05 < record["train_accuracy"] - record["val_accuracy"] < 0.2
    assert "try --lp-scoring" not in folder.with_suffix(".txt").read_text()


@pytest.mark.parametrize("flags, hint", [([], True), (["--lp-scoring", "log-loss"], False),
                                         (["--lp-inverse-l2", "100"], False)])
def test_lp_that_learns_by_heart_says_what_helps(flags, hint, random_folder, tmp_path, capsys, monkeypatch):
    """Labels without sense and a weak penalty: nearly every training sample right, validation at chance."""
    monkeypatch.setattr(lpft, "INVERSE_L2_GRID", np.array([1e4]))
    words, rng = tiny.vocabulary()[0][-200:], random.Random(0)
    for name, count in (("train", 50), ("val", 50)):
        rows = [f"{' '.join(rng.sample(words, 4))}\t{rng.choice(('yes', 'no'))}" for _ in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    arguments = ["--method", "lp", "--model", str(random_folder), "--data", str(tmp_path), *flags]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())["lp"]
    said = [line for line in capsys.readouterr().out.splitlines() if "try --lp-scoring log-loss" in line]
    assert len(said) == hint
    if hint:
        assert result["train_accuracy"] > result["val_accuracy"] + 0.2


def test_the_learning_rate_is_that_of_the_embedded_task_or_of_the_encoder():
    """A folder or a corpus on a tiny encoder trains as tiny does; on a real checkpoint at a real one's rate."""
    made_for_a_language = f"--model {tiny.ENCODER}"
    lr = {words: train.parse_args(["--method", "ft", *words.split()]).lr for words in (
        "", made_for_a_language, "--data mine", "--model other", "--data mine --model other", "--data cb --model other")}
    assert lr[""] == lr[made_for_a_language] == lr["--data mine"] == RECIPES["tiny"][0][1]
    assert lr["--data mine --model other"] == lr["--model other"] == RECIPES["folder"][0][1]
    assert lr["--data cb --model other"] == RECIPES["cb"][0][1]


def test_an_encoder_of_a_human_language_is_no_tiny_one(tmp_path):
    """config.json may name a language, as "en"; only a number makes it an encoder of the generated language."""
    for language, recipe in (("en", "folder"), (5, "tiny")):
        (tmp_path / "config.json").write_text(json.dumps({"language": language}))
        args = train.parse_args(["--method", "ft", "--model", str(tmp_path), "--data", "mine"])
        assert args.lr == RECIPES[recipe][0][1]


def test_an_encoder_of_another_language_is_refused(tmp_path, capsys):
    """Its words are liked and disliked otherwise: every number would be about nothing."""
    folder = tmp_path / "encoder"
    shutil.copytree(tiny.ENCODER, folder)
    for model, language, made_for in (("tiny", 3, tiny.LANGUAGE), (str(folder), 0, 5)):
        config = json.loads((tiny.ENCODER / "config.json").read_text()) | {"language": 5}
        (folder / "config.json").write_text(json.dumps(config))
        assert train.main(["--model", model, "--language", str(language), "--out", str(tmp_path / "run")]) == 2
        assert f"was made for --language {made_for}" in capsys.readouterr().err
    assert train.main(["--model", str(folder), "--language", "5", "--method", "lp", "--out", str(tmp_path / "run")]) == 0
    (folder / "config.json").write_text(json.dumps(config | {"language": None}))  # an encoder of none: no mismatch
    assert train.main(["--model", str(folder), "--method", "lp", "--out", str(tmp_path / "other")]) == 0
    results = [json.loads((tmp_path / name / "result.json").read_text())["accuracy"] for name in ("run", "other")]
    assert results[0] != results[1]  # other texts


def test_text_that_the_tiny_encoder_cannot_read_is_refused(random_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "ENCODER", random_folder)
    (tmp_path / "train.csv").write_text("text,label\n" + "quantum chromodynamics,a\nhadrons abound,b\n" * 20)
    assert train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "words that --model tiny does not know" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


REFUSED = [
    (["--method", "lp", "--lora"], "--lora"),
    (["--method", "lp", "--lr", "1e-3"], "--lr has no effect"),
    (["--method", "lp", "--head-scale", "3"], "--head-scale has no effect"), (["--head-scale", "0"], "--head-scale"),
    (["--method", "lp", "--epochs", "3"], "--epochs has no effect"),
    (["--method", "ft", "--lora-r", "4"], "--lora-r has no effect"),
    (["--method", "ft", "--lp-scoring", "log-loss"], "--lp-scoring has no effect"),
    (["--lp-scoring", "log-loss", "--lp-inverse-l2", "1"], "--lp-scoring has no effect"),
    (["--lr=-1"], "--lr is -1"), (["--lr", "nan"], "--lr is nan"), (["--lr", "fast"], "--lr"),
    (["--epochs", "0"], "--epochs is 0"), (["--batch-size", "0"], "--batch-size is 0"),
    (["--lora", "--lora-r", "0"], "--lora-r is 0"), (["--max-length", "2"], "--max-length is 2"),
    (["--max-length", "4000"], "positions for 128"), (["--max-train", "0"], "--max-train is 0"),
    (["--max-train", "6"], "training samples"), (["--ntk", "251"], "--ntk is 251"),
    (["--method", "lp", "--ntk"], "--ntk has no effect"), (["--ntk", "9"], "kernel regression needs 5"),
    (["--seed", "-1"], "--seed is -1"), (["--method", "linear"], "--method"),
    (["--model", "nowhere"], "nowhere"), (["--data", "nowhere"], "nowhere"),
    (["--out", "."], "holds something"), (["--out", "mine"], "is a file"),
    (["--data", "cb"], "python -m data.download cb"), (["--data-dir", "x"], "--data-dir has no effect"),
    (["--data", "cb", "--data-dir", "mine"], "mine"), (["--model", "no/where/at/all"], "no such folder"),
] + ([] if torch.cuda.is_available() else [(["--device", "cuda"], "--device cuda")])


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_bad_input_ends_in_one_line_and_status_2(arguments, message, random_folder, tmp_path,
                                                 monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    if "--model" not in arguments:
        arguments = ["--model", str(random_folder), *arguments]
    try:
        status = train.main(arguments)
    except SystemExit as exit:  # argparse
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and len(error.splitlines()) == 1 and error.startswith("train.py: error: ")
    assert message in error
    assert [p.name for p in tmp_path.rglob("*") if p.name != "runs"] == ["mine"]  # nothing left behind


def test_a_run_never_writes_over_another(random_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main(command("lp", "--model", str(random_folder))) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_command_needs_only_the_four_packages(random_folder, tmp_path):
    """Test-time packages are hidden: importing one would end the run."""
    hidden = "transformers peft sklearn scipy safetensors matplotlib".split()
    for name in hidden:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not a run-time package')")
    done = subprocess.run(
        [sys.executable, "train.py", *command("lpft", "--model", str(random_folder)),
         "--out", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_the_strength_of_lp_may_be_fixed(random_folder, tmp_path):
    """No cross-validation then, so two samples of a class are enough."""
    assert train.main(["--model", str(random_folder), "--method", "lp", "--lp-inverse-l2", "0.5", "--max-train", "12",
                       "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["lp"]["inverse_l2"] == 0.5


def test_help_teaches_every_flag(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    for flag in ("--method", "--lora-r", "--lp-scoring", "--data", "--max-train", "--lr", "--device"):
        assert flag in text


@pytest.mark.cuda
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_cuda(name, random_folder, tmp_path):
    arguments = command(name, "--model", str(random_folder), "--out", str(tmp_path / "run"))
    assert train.main([*arguments, "--device", "cuda"]) == 0
    on_cpu = [*command("lp", "--model", str(random_folder), "--out", str(tmp_path / "cpu"))]
    assert train.main([*on_cpu, "--device", "cpu"]) == 0
    cuda, cpu = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("run", "cpu"))
    if name == "lp":
        assert cuda["head_norm"] == pytest.approx(cpu["head_norm"], rel=1e-3)


def test_bad_data_are_refused_before_a_checkpoint_is_looked_for(tmp_path, capsys):
    """A download may take minutes."""
    assert train.main(["--data", str(tmp_path / "none"), "--model", str(tmp_path / "none either"), "--out",
                       str(tmp_path / "run")]) == 2
    assert f"{tmp_path / 'none'}: no such folder; --data" in capsys.readouterr().err


def test_lp_says_where_accuracy_cannot_tell_penalties_apart(tmp_path, capsys):
    """60 labels: several penalties have the same cross-validated accuracy, and the strongest is taken."""
    note = "LP    weaker penalties score the same; --lp-scoring log-loss may tell them apart"
    for scoring in ("accuracy", "log-loss"):
        assert train.main(["--method", "lp", "--lp-scoring", scoring, "--out", str(tmp_path / scoring)]) == 0
        assert (note in capsys.readouterr().out) == (scoring == "accuracy")
