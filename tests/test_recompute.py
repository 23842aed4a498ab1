"""Every number of result.json is what recompute.py makes of the same files, with no code of the project."""

import json
import math
import os
import random
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import recompute
import torch
from recompute import Run, accuracy, cross_entropy, leaves, softmax

import predict
import train
from conftest import FINISHED
from data import tiny

TASKS = ("reviews", "cola")
FLAGS = ("method", "lora", "seed", "model", "data")
NOT_NUMBERS = {*FLAGS, "metric", "temperature_reason", "lp.stage", "ntk.test_split"}


def on(*methods):
    return pytest.mark.parametrize("task, method", [(task, method) for task in TASKS for method in methods])


on_every_run, on_every_ft_stage = on(*FINISHED), on(*[method for method in FINISHED if method != "lp"])
on_every_kernel, on_every_lp = on("lpft", "lpft-lora"), on("lp", "lpft", "lpft-lora")
on_every_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def opened(finished):
    """opened(task, method): the finished run as a recompute.Run with `found`, its numbers recomputed."""
    @cache
    def open_run(task, method):
        run = Run(finished(task, method), finished(task, "lp"))
        run.found = run.numbers()
        return run

    return open_run


def close(number):
    """To what float32 leaves of it; exact where it counts samples."""
    return pytest.approx(number, rel=1e-5, abs=1e-6)


def check(run, *keys):
    """The numbers under each of the keys of result.json are those recomputed."""
    for key in keys:
        found, expected = ({name: x for name, x in leaves(tree).items() if f"{name}.".startswith(f"{key}.")}
                           for tree in (run.result, run.found))
        assert found and found == close(expected), key


# ------------------------------------------------------------------------------------ what is measured


@on_every_run
def test_accuracy_and_matthews_are_those_of_the_saved_weights_on_each_split(opened, task, method):
    run = opened(task, method)
    check(run, "accuracy", run.metric, "val_accuracy", f"val_{run.metric}")
    assert run.result["metric"] == run.metric == {"reviews": "accuracy", "cola": "matthews"}[task]


@on_every_task
def test_most_runs_of_these_tests_give_more_than_one_answer(opened, task):
    """One and the same answer to all would hide what is wrong."""
    runs = [opened(task, method) for method in FINISHED]
    assert sum(len(np.unique(run.logits["test"].argmax(1))) > 1 for run in runs) >= 3


@on_every_run
def test_features_are_measured_on_the_trained_encoder_against_the_pretrained_one(opened, task, method):
    """CS, Diff, FDR and Norm of every test split, of either encoder, not swapped."""
    run = opened(task, method)
    check(run, "features", "features_pretrained")
    for split in run.test_names:
        before, after = run.result["features_pretrained"][split], run.result["features"][split]
        assert before["diff"] == 0 and (after["diff"] == 0) == (method == "lp")
        assert (after == before) == (method == "lp")


@on_every_run
def test_the_temperature_is_that_of_the_least_loss_on_validation_and_on_no_other_split(opened, task, method):
    run = opened(task, method)
    assert run.result["temperature"] == pytest.approx(run.found["temperature"], rel=1e-4)
    assert run.result.get("temperature_reason") is None
    for split in run.test_names:
        other = recompute.temperature(run.logits[split], run.labels[split])
        assert other != pytest.approx(run.found["temperature"], rel=1e-3)


@on_every_run
def test_ece_and_mce_of_each_split_before_and_after_dividing_its_logits_by_t(opened, task, method):
    check(opened(task, method), "calibration")


@on_every_run
def test_the_norm_of_the_head_and_its_way_from_the_head_of_the_start(opened, task, method):
    """||V||, ||V_0||, ||V - V_0||: V_0 is 0 in LP, drawn by seed in FT, LP's in LP-FT, times --head-scale."""
    check(opened(task, method), "head_norm", "head_norm_initial", "head_diff")


@on_every_run
def test_parameters_and_samples_are_counted(opened, task, method):
    check(opened(task, method), "trainable_parameters", "total_parameters", "samples")


@on_every_run
def test_no_number_of_result_json_is_left_out_of_this_file(opened, task, method):
    """A new number needs a test here first."""
    run = opened(task, method)
    checked = {*leaves(run.found)}
    checked |= {f"lp.{name}" for name in ("inverse_l2", "head_norm", "path", *LP_SCORES[task])}
    checked |= {f"ntk.{name}" for name in ("ft_ratio", "train_samples", "test_samples")}
    checked |= {f"ntk.{kernel}.{name}" for kernel in ("P", "F", "Theta") for name in KERNEL_NUMBERS}
    assert {*leaves(run.result)} - checked - NOT_NUMBERS == {"seconds"} and run.result["seconds"] > 0
    assert all(run.result[flag] == run.config.get(flag, False) for flag in FLAGS)


def test_the_recomputation_needs_nothing_of_the_project(opened, finished, tmp_path):
    """Not even train.evaluate: as a program, from a folder where nothing of the project can be imported."""
    done = subprocess.run([sys.executable, recompute.__file__, finished("reviews", "lp")], cwd=tmp_path,
                          text=True, capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    assert json.loads(done.stdout) == opened("reviews", "lp").found, done.stderr


# ------------------------------------------------------------------------------------ the FT stage's records


@on_every_ft_stage
def test_the_kept_epoch_is_the_first_best_on_validation_and_its_weights_are_saved(opened, task, method):
    run = opened(task, method)
    assert run.result["kept_epoch"] == run.found["kept_epoch"]
    record = run.records[run.result["kept_epoch"]]
    assert record[f"val_{run.metric}"] == close(run.found[f"val_{run.metric}"])
    assert record["val_accuracy"] == close(run.found["val_accuracy"])
    assert record["head_norm"] == close(run.found["head_norm"])


@on_every_ft_stage
def test_the_ft_stage_starts_from_v_and_b_both_times_the_head_scale(opened, task, method):
    """Epoch 0: its loss and scores are those of the scaled head on phi_0. LP's b is not 0, so it counts."""
    run = opened(task, method)
    weight, bias = run.first_head
    assert method.startswith("ft") or np.abs(bias).max() > 0.01
    logits = {split: run.features_0[split] @ weight.T + bias for split in ("train", "val")}
    record = run.records[0]
    assert record["loss"] == close(cross_entropy(logits["train"], run.labels["train"]))
    assert record["train_accuracy"] == close(accuracy(logits["train"], run.labels["train"]))
    for name, score in run.scores(logits, "val").items():
        assert record[f"val_{name}"] == close(score)
    assert record["head_norm"] == close(np.linalg.norm(weight))


@on_every_ft_stage
def test_the_learning_rate_of_the_records_falls_linearly_to_zero(opened, task, method):
    run = opened(task, method)
    epochs = run.config["epochs"]
    assert [run.records[epoch]["lr"] for epoch in range(epochs + 1)] == close(
        [run.config["lr"] * (1 - epoch / epochs) for epoch in range(epochs + 1)])


# ------------------------------------------------------------------------------------ LP

SOLVER = {"solver": "newton-cholesky", "tol": 1e-8, "l1_ratios": (0,), "use_legacy_attributes": False}
LP_SCORES = {"reviews": ("train_accuracy", "val_accuracy"),
             "cola": ("train_accuracy", "val_accuracy", "val_matthews")}


@on_every_task
def test_the_head_of_lp_is_where_the_gradient_of_its_objective_vanishes(opened, task):
    """C sum_i loss_i + 1/2 ||V||^2; for two classes, where scikit-learn fits one w, ||V||^2. None on b."""
    run = opened(task, "lp")
    (weight, bias), phi, labels = run.head, run.features_0["train"], run.labels["train"]
    errors = softmax(phi @ weight.T + bias) - np.eye(len(bias))[labels]  # (N, C)
    penalty = weight * (2 if len(bias) == 2 else 1)
    gradient = run.result["lp"]["inverse_l2"] * errors.T @ phi + penalty
    assert np.linalg.norm(gradient) < 1e-3 * np.linalg.norm(penalty)
    assert np.abs(errors.sum(0)).max() < 1e-4 and bias.sum() == pytest.approx(0, abs=1e-5)


@on_every_task
def test_the_strength_of_lp_is_the_choice_of_scikit_learns_cross_validation(opened, task):
    linear_model = pytest.importorskip("sklearn.linear_model")
    run = opened(task, "lp")
    scoring = {"reviews": "neg_log_loss", "cola": "accuracy"}[task]
    reference = linear_model.LogisticRegressionCV(Cs=10, cv=5, scoring=scoring, **SOLVER)
    reference.fit(run.features_0["train"], run.labels["train"])
    assert run.result["lp"]["inverse_l2"] == pytest.approx(float(reference.C_))


@on_every_lp
def test_the_scores_of_lp_are_those_of_its_head_on_train_and_on_validation(opened, task, method):
    """In LP-FT too the numbers under "lp" are those before the FT stage; its path ends at its head."""
    run, lp = opened(task, method), opened(task, method).result["lp"]
    weight, bias = opened(task, "lp").head
    logits = {split: run.features_0[split] @ weight.T + bias for split in ("train", "val")}
    expected = {"train_accuracy": accuracy(logits["train"], run.labels["train"])}
    expected |= {f"val_{name}": score for name, score in run.scores(logits, "val").items()}
    assert {name: lp[name] for name in LP_SCORES[task]} == close(expected)
    assert expected["train_accuracy"] != expected["val_accuracy"]
    assert lp["head_norm"] == close(np.linalg.norm(weight)) and lp == run.records["lp"]
    of_zeros = [0, (run.labels["train"] == 0).mean()]  # V = 0 says class 0 of everything
    assert lp["path"][0] == close(of_zeros) and len(lp["path"]) > 2
    assert lp["path"][-1] == close([lp["head_norm"], lp["train_accuracy"]])


# ------------------------------------------------------------------------------------ the kernel

KERNEL_NUMBERS = ("rank", "frobenius", "singular_values", "inverse_l2", "train_accuracy", "test_accuracy",
                  "train_logit_accuracy", "test_logit_accuracy")


def kernels(run):
    """(ntk.npz, {"P", "F", "Theta": (kernel, test kernel), as matrices (N C, N C) and (M C, N C)})."""
    saved = np.load(run.folder / "ntk.npz")
    P, F = ([saved[name].reshape(-1, saved["pretrain"].shape[2] * saved["pretrain"].shape[3])
             for name in (part, f"test_{part}")] for part in ("pretrain", "ft"))
    return saved, {"P": P, "F": F, "Theta": [p + f for p, f in zip(P, F)]}


@on_every_kernel
def test_p_and_the_deltas_are_those_of_the_scaled_head_on_pretrained_features(opened, task, method):
    """P = (<phi, phi'> + 1) I, delta = onehot(y) - softmax(f_0(x)), of the samples that are named."""
    run = opened(task, method)
    saved, found = kernels(run)
    phi = run.features_0["train"][saved["train_indices"]]
    test_phi = run.features_0["test"][saved["test_indices"]]
    weight, bias = run.first_head
    labels, eye = run.labels["train"][saved["train_indices"]], np.eye(len(bias))
    assert (saved["labels"] == labels).all()
    assert (saved["test_labels"] == run.labels["test"][saved["test_indices"]]).all()
    assert np.abs(saved["deltas"] - eye[labels] + softmax(phi @ weight.T + bias)).max() < 1e-5
    for kernel, features in zip(found["P"], (phi, test_phi)):
        np.testing.assert_allclose(kernel, np.kron(features @ phi.T + 1, eye), rtol=1e-5, atol=1e-12)
    assert run.result["ntk"]["train_samples"] == len({*saved["train_indices"].tolist()}) == 40
    assert run.result["ntk"]["test_samples"] == len({*saved["test_indices"].tolist()}) == 40
    assert run.result["ntk"]["test_split"] == "test"


@on_every_kernel
def test_the_samples_of_the_kernel_are_those_of_the_seed_of_the_run(opened, task, method):
    run = opened(task, method)
    generator = torch.Generator().manual_seed(3)
    for split in ("train", "test"):
        picked = torch.randperm(len(run.labels[split]), generator=generator)[:40].numpy()
        assert (kernels(run)[0][f"{split}_indices"] == picked).all()


@on_every_kernel
def test_rank_norm_and_singular_values_are_those_of_the_saved_kernels(opened, task, method):
    """P, F and Theta = P + F in their own rows of the table."""
    run = opened(task, method)
    for name, (kernel, _) in kernels(run)[1].items():
        row, values = run.result["ntk"][name], np.linalg.svd(kernel, compute_uv=False)
        assert row["rank"] == (values > len(values) * np.finfo(np.float32).eps * values[0]).sum()
        assert row["frobenius"] == pytest.approx(math.sqrt((kernel**2).sum()))
        assert row["singular_values"] == pytest.approx((values / values[0]).tolist(), abs=1e-10)


@on_every_kernel
def test_the_ft_ratio_is_the_mean_over_samples_of_the_share_of_f(opened, task, method):
    run = opened(task, method)
    saved, found = kernels(run)
    delta = saved["deltas"].flatten()  # (N C,)
    of_ft, of_all = (np.linalg.norm((found[name][0] @ delta).reshape(saved["deltas"].shape), axis=1)
                     for name in ("F", "Theta"))
    assert run.result["ntk"]["ft_ratio"] == pytest.approx((of_ft / of_all).mean())


@on_every_kernel
def test_kernel_regression_is_scikit_learns_on_the_saved_kernels(opened, task, method):
    """One row per sample and logit, target "is it the label"; a sample's rows stay in one fold."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    selection = pytest.importorskip("sklearn.model_selection")
    run = opened(task, method)
    saved, found = kernels(run)
    C, labels = saved["deltas"].shape[1], saved["labels"]
    fold_of = np.empty(len(labels), dtype=int)
    for fold, (_, tested) in enumerate(selection.StratifiedKFold(5).split(labels, labels)):
        fold_of[tested] = fold
    for name, (kernel, test_kernel) in found.items():
        row, scale = run.result["ntk"][name], kernel.diagonal().mean()
        folds = selection.PredefinedSplit(fold_of.repeat(C))
        model = linear_model.LogisticRegressionCV(Cs=10, cv=folds, scoring="accuracy", **SOLVER)
        model.fit(kernel / scale, np.eye(C)[labels].flatten())
        assert row["inverse_l2"] == pytest.approx(float(model.C_))
        for split, rows, y in (("train", kernel, labels), ("test", test_kernel, saved["test_labels"])):
            score = model.decision_function(rows / scale).reshape(-1, C)
            assert row[f"{split}_accuracy"] == pytest.approx((score.argmax(1) == y).mean())
            assert row[f"{split}_logit_accuracy"] == pytest.approx(((score > 0) == np.eye(C)[y]).mean())


# ------------------------------------------------------------------------------------ what is printed


def lines_of(run, start):
    """The lines that the run printed and that begin with `start`, as lists of their words behind it."""
    printed = run.folder.with_suffix(".txt").read_text().splitlines()
    return [line[len(start):].split() for line in printed if line.startswith(start)]


def shown(number):
    """Three digits behind the point are printed; of the last line four."""
    return pytest.approx(number, abs=6e-4)


@on_every_run
def test_the_printed_table_has_each_number_of_result_json_under_its_title(opened, task, method):
    run, result = opened(task, method), opened(task, method).result
    titles, = (words for words in lines_of(run, " " * 12) if "ECE/T" in words)
    assert len(run.test_names) == len(result["features"])
    for split in run.test_names:
        cells, = lines_of(run, f"{split} ")
        calibration, features = result["calibration"][split], result["features"][split]
        expected = {run.metric: result[run.metric][split], "accuracy": result["accuracy"][split],
                    "ECE": calibration["ece"], "ECE/T": calibration["ece_scaled"], "MCE": calibration["mce"],
                    "MCE/T": calibration["mce_scaled"], "CS(F)": features["cs"], "Diff(F)": features["diff"],
                    "FDR(F)": features["fdr"], "Norm(F)": features["norm"]}
        assert dict(zip(titles, map(float, cells), strict=True)) == shown(expected)


@on_every_run
def test_the_printed_last_line_has_the_scores_the_head_norm_and_t_of_result_json(opened, task, method):
    run, result = opened(task, method), opened(task, method).result
    last, = (dict(word.split("=") for word in words) for words in lines_of(run, "result:"))
    assert (last.pop("method"), last.pop("seed")) == (method, "3") and last.pop("data") == run.config["data"]
    expected = {name: result[name] for name in ("head_norm", "temperature", "seconds")}
    for name in {"accuracy", run.metric}:
        expected |= {f"{split}_{name}": result[name][split] for split in run.test_names}
        expected[f"val_{name}"] = result[f"val_{name}"]
    assert {name: float(value) for name, value in last.items()} == shown(expected)


@on_every_run
def test_the_printed_lines_of_lp_and_of_each_epoch_are_their_records(opened, task, method):
    run = opened(task, method)
    val = "val matthews" if task == "cola" else "val accuracy"
    for epoch, record in run.records.items():
        if record is None:
            continue
        start = "LP    inverse_l2" if epoch == "lp" else f"FT    epoch {epoch:2d}"
        text, = (" ".join(words) for words in lines_of(run, start))
        wanted = {"train": "train_accuracy", val: f"val_{run.metric}", "head norm": "head_norm"}
        for title, key in (wanted if epoch == "lp" else wanted | {"loss": "loss"}).items():
            assert float(text.split(f"{title} ")[1].split()[0]) == shown(record[key]), title


@on_every_kernel
def test_the_printed_kernel_table_has_the_numbers_of_p_f_and_theta(opened, task, method):
    run, ntk = opened(task, method), opened(task, method).result["ntk"]
    for name in ("P", "F", "Theta"):
        (rank, frobenius, *accuracies), = lines_of(run, f"{name:8s}")
        row = ntk[name]
        expected = [row[f"{split}_{of}"] for of in ("accuracy", "logit_accuracy")
                    for split in ("train", "test")]
        assert int(rank) == row["rank"] and float(frobenius) == pytest.approx(row["frobenius"], abs=0.06)
        assert list(map(float, accuracies)) == shown(expected + [ntk["ft_ratio"]] * (name == "F"))


# ------------------------------------------------------------------------------------ what else reads a run


@on_every_run
def test_what_predict_py_needs_is_saved_as_it_was_in_training(opened, task, method):
    run = opened(task, method)
    assert run.settings["temperature"] == run.result["temperature"]
    assert run.settings["lora"] == ([4, 12] if "lora" in method else None)
    assert run.settings["pairs"] == (task == "reviews") and run.settings["max_length"] == 16
    classes = {"reviews": list(tiny.LABELS), "cola": ["unacceptable", "acceptable"]}[task]
    assert run.settings["labels"] == classes and run.settings["data"] == run.config["data"]


@on_every_run
def test_predict_py_says_the_softmax_of_logits_over_t(opened, task, method, tmp_path, capsys):
    run = opened(task, method)
    texts = [text for text, _ in run.splits["test"]]
    lines = [text if task == "cola" else "\t".join(text) for text in texts]
    (tmp_path / "texts").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert predict.main([str(run.folder), str(tmp_path / "texts")]) == 0
    header, *lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    expected = softmax(run.logits["test"] / run.found["temperature"])
    assert np.abs(np.array([cells[1:] for cells in lines], float) - expected).max() < 1e-4
    assert [cells[0] for cells in lines] == [header[1:][i] for i in expected.argmax(1)]


# ------------------------------------------------------------------------------------ no best temperature


def run_lp(folder, encoder, val):
    """A finished LP run on two words, which a probe can tell apart without an error; `val` {word: label}."""
    folder.mkdir()
    for split, label_of in (("train", {"good": "pos", "bad": "neg"}), ("val", val),
                            ("test", {"good": "pos", "bad": "neg", "great": "pos"})):
        rng = random.Random(0)
        rows = [{"text": f"the {rng.choice(tiny.SHARED_NOUNS)} was {word}", "label": label_of[word]}
                for word in [*label_of] * 15]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert train.main(["--method", "lp", "--model", str(encoder), "--data", str(folder), "--max-length", "16",
                       "--lp-inverse-l2", "100", "--out", str(folder / "run")]) == 0
    run = Run(folder / "run")
    run.found = run.numbers()
    return run


@pytest.mark.parametrize("swapped", [False, True], ids=["all-right", "worse-than-chance"])
def test_without_a_best_temperature_on_validation_t_is_one_and_why_is_saved(random_folder, tmp_path, swapped):
    """All right: the loss falls to T = 0. Worse than chance: it falls to T = infinity."""
    val = {"good": "neg", "bad": "pos"} if swapped else {"good": "pos", "bad": "neg"}
    run = run_lp(tmp_path / "data", random_folder, val)
    assert run.result["val_accuracy"] == (0 if swapped else 1)
    assert run.result["temperature"] == run.settings["temperature"] == run.found["temperature"] == 1
    assert isinstance(run.result["temperature_reason"], str) and run.result["temperature_reason"]
    check(run, "calibration", "accuracy", "features")
    of_test = run.result["calibration"]["test"]
    assert (of_test["ece"], of_test["mce"]) == (of_test["ece_scaled"], of_test["mce_scaled"])
