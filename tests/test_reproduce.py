"""Many runs: nothing is repeated or lost, and every number of the report is one of the runs'."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import train
from data import draw
from lab import claims, figures, report, reproduce, runs
from plumbing.flags import configuration
from plumbing.run_folder import lock_folder
from test_claims import made_up

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(random_folder, tmp_path_factory):
    """Runs of every method and two seeds, as lab.reproduce leaves them."""
    out = tmp_path_factory.mktemp("reproduction")
    args = reproduce.parse_args(["--model", str(random_folder), "--data", "tiny-plain", "--max-train", "60", "--max-test",
                                 "80", "--epochs", "1", "--seeds", "2", "--ntk", "20", "--scales", "1", "10", "--out", str(out)])
    planned = reproduce.main_runs(args, {}) | reproduce.scale_runs(args, {})
    for name, flags in planned.items():
        assert train.main([*flags, "--out", str(out / "runs" / name)]) == 0
    plan = {"command": "the command", "seeds": 2, "tuning": {}, "rates": {}, "runs": planned}
    (out / "plan.json").write_text(json.dumps(plan))
    return out


@pytest.fixture(scope="module")
def written(folder):
    report.write_report(folder)
    return json.loads((folder / "tables.json").read_text())


def values(folder, method, *keys):
    """The number under `keys` in the result.json of each seed."""
    found = []
    for seed in (1, 2):
        value = json.loads((folder / "runs" / f"{method}-seed{seed}" / "result.json").read_text())
        for key in keys:
            value = value[key]
        found.append(value)
    return found


@pytest.mark.parametrize("table, row, column, method, keys", [
    ("Accuracy", "films", "LoRA", "LoRA", ("accuracy", "films")),
    ("Features", "Diff(F), hotels", "LP-FT", "LP-FT", ("features", "hotels", "diff")),
    ("Features", "CS(F), test", "pre-trained", "FT", ("features_pretrained", "test", "cs")),
    ("Head", "Diff(C)", "FT", "FT", ("head_diff",)),
    ("Kernel", "rank, F", "LP-LoRA", "LP-LoRA", ("ntk", "F", "rank")),
    ("Kernel", "FT ratio", "FT", "FT", ("ntk", "ft_ratio")),
    ("Calibration", "ECE with T, meals", "LP", "LP", ("calibration", "meals", "ece_scaled")),
    ("Calibration", "MCE, test", "LoRA", "LoRA", ("calibration", "test", "mce")),
    ("Calibration", "T", "LP-FT", "LP-FT", ("temperature",)),
    ("Head", "Norm(C)", "LP-FT", "LP-FT", ("head_norm",)),
])
def test_a_cell_of_each_table_by_hand(folder, written, table, row, column, method, keys):
    """Mean and standard deviation over seeds of the number in result.json; the cell names files and key."""
    title, = (title for title in written["tables"] if title.startswith(table))
    cell, expected = written["tables"][title][row][column], values(folder, method, *keys)
    assert cell["values"] == expected
    assert cell["mean"] == pytest.approx(statistics.mean(expected))
    assert cell["std"] == pytest.approx(statistics.stdev(expected))
    assert cell["key"] == ".".join(keys) and len(cell["runs"]) == 2
    for path in cell["runs"]:
        assert (folder / path).is_file()
    lines = (folder / "report.md").read_text().split(f"## {title}")[1].splitlines()
    columns = [name.strip() for name in lines[2].split("|")]
    line, = [line for line in lines[:60] if line.startswith(f"| {row} |")]
    shown = line.split("|")[columns.index(column)].strip()
    assert shown == f"{report.number(statistics.mean(expected))} ± {report.number(statistics.stdev(expected))}"


def test_feature_change_by_factor_by_hand(folder, written):
    """Fig. 3 as numbers; factor 1 is the run that all other tables are about."""
    title, = (title for title in written["tables"] if "factor" in title)
    for row, run in (("LP-FT × 1", "LP-FT"), ("LP-FT × 10", "LP-FT-scale10")):
        found = written["tables"][title][row]["Diff(F), films"]
        assert found["values"] == values(folder, run, "features", "films", "diff")
        assert found["runs"][1] == f"runs/{run}-seed2/result.json" and found["key"] == "features.films.diff"
    assert written["tables"][title]["FT × 10"]["kept epoch"]["values"] == [1, 1]


def test_a_temperature_that_was_not_fitted_is_marked_and_explained(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in (copy / "runs").glob("*/result.json"):
        reason = "every sample is right" if path.parent.name in ("LoRA-seed1", "FT-scale10-seed2") else None
        temperature = {"temperature": 1.0 if reason else 3.0, "temperature_reason": reason}
        path.write_text(json.dumps(json.loads(path.read_text()) | temperature))
    monkeypatch.setattr(figures, "make_all", lambda *some: ({}, []))
    report.write_report(copy)
    text = (copy / "report.md").read_text()
    row, = [line for line in text.splitlines() if line.startswith("| T |")]
    assert row == "| T | 3 ± 0 | 3 ± 0 | 2 ± 1.414, 1 not fitted | 3 ± 0 | 3 ± 0 |"
    assert "T is 1, not fitted, in LoRA-seed1: every sample is right." in text
    assert "not measured: T of LoRA-seed1 is 1: every sample is right |" in text
    assert text.count("1 not fitted") == 1
    path = copy / "runs" / "LoRA-seed1" / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature_reason": "all right"}))
    drawn, _, _ = figures.load_runs(copy, None, 1)
    assert drawn["LoRA"][2] is None and drawn["LP-FT"][2] == values(folder, "LP-FT", "temperature")[0]


def test_what_temperature_takes_off(folder, written):
    """Before minus after: a fall is positive."""
    title, = (title for title in written["tables"] if title.startswith("Calibration"))
    found = written["tables"][title]["MCE fall by T, hotels"]["LP-LoRA"]
    before, after = (values(folder, "LP-LoRA", "calibration", "hotels", key) for key in ("mce", "mce_scaled"))
    assert found["values"] == [a - b for a, b in zip(before, after)]
    assert found["key"] == "calibration.hotels.mce - mce_scaled"


def test_the_parts_of_claims_by_hand(folder, written):
    """Paired by seed: the difference of two methods on the same seed; the row shows mean, interval, bound, verdict."""
    def part(number, start):
        found, = [p for p in written["claims"][number - 1]["parts"] if p["part"].startswith(start)]
        return found

    lp, ft = (values(folder, name, "head_norm") for name in ("LP", "FT"))
    start = values(folder, "FT", "head_norm_initial")
    first = part(1, "growth of the norm: LP - 2 x FT")
    assert first["values"] == pytest.approx([x - 2 * (y - z) for x, y, z in zip(lp, ft, start)])
    a, b = ([statistics.mean(v) for v in zip(*(values(folder, name, "features", split, "diff")
                                               for split in ("films", "hotels", "meals")))] for name in ("FT", "LP-FT"))
    assert part(2, "Diff(F): FT - LP-FT, out")["values"] == pytest.approx([x - y for x, y in zip(a, b)])
    a, b = (values(folder, name, "ntk", "ft_ratio") for name in ("FT", "LP-FT"))
    assert part(4, "FT ratio")["values"] == pytest.approx([y - x for x, y in zip(a, b)])
    row = (f"| growth of the norm: LP - 2 x FT | {report.number(first['mean'])} | {report.number(first['lower'])} to "
           f"{report.number(first['upper'])} | > 0 | {first['verdict']} |")
    assert row in (folder / "report.md").read_text()


def test_the_report_names_the_command_behind_each_claim(folder, written):
    text = (folder / "report.md").read_text()
    line, = [line for line in text.splitlines() if line.startswith("| LP-FT | 2, 3, 4, 5, 6, 7 | `OMP_NUM_THREADS=1 python train.py")]
    assert "--seed $seed" in line and "--ntk 20" in line
    assert any(line.startswith("| FT-scale10 | 6 | ") and "--head-scale 10" in line for line in text.splitlines())
    config = json.loads((folder / "runs" / "FT-seed1" / "config.json").read_text())
    assert f": FT {config['lr']:g} ({config['batch_size']}, 1), LoRA" in text


def test_tables_use_the_seeds_that_every_method_has(folder):
    """A further run of one method alone changes nothing."""
    results = runs.read_results(folder, json.loads((folder / "plan.json").read_text())["runs"])
    assert runs.complete_seeds(results | {"LP-seed3": results["LP-seed1"]}, 5) == [1, 2]
    with pytest.raises(ValueError, match="1 of 1 seeds"):
        runs.complete_seeds(results, 1)


def tuned(scores):
    """{tuning run: result} for {rate: (score of seed 101, of seed 102)}."""
    return {f"tune-FT={rate}-seed{seed}": {"metric": "accuracy", "val_accuracy": score, "accuracy": {}}
            for rate, pair in scores.items() for seed, score in zip((101, 102), pair)}


def test_learning_rates_are_chosen_on_validation_alone():
    tuning = tuned({"1e-3": (0.9, 0.7), "3e-3": (0.85, 0.8), "9e-3": (0.1, 0.1)})
    for result in tuning.values():
        result["accuracy"]["test"] = 1 - result["val_accuracy"]
    assert runs.choose_rates(tuning, [*tuning]) == {"FT": "3e-3"}
    equal = {run: result | {"val_accuracy": 0.5} for run, result in tuning.items()}
    assert runs.choose_rates(equal, [*tuning]) == {"FT": "1e-3"}  # of equals the smallest
    table = report.tuning_table(tuning, {"tuning": dict.fromkeys(tuning), "rates": {"FT": "3e-3"}})["FT"]
    assert table["rate 2"]["note"] == " at 3e-3, chosen" and table["rate 2"]["values"] == [0.85, 0.8]
    assert table["rate 1"]["note"] == " at 1e-3" and table["rate 1"]["mean"] == pytest.approx(0.8)
    edge = report.tuning_table(tuning, {"tuning": dict.fromkeys(tuning), "rates": {"FT": "9e-3"}})["FT"]["rate 3"]
    assert edge["note"] == " at 9e-3, chosen, at the edge of the grid"
    args = reproduce.parse_args(["--seeds", "9"])
    assert all(run.split("-seed")[1] in ("101", "102") for run in reproduce.tuning_runs(args))
    assert len(reproduce.tuning_runs(args)) == 4 * 3 * 2
    rates = [train.parse_args(flags).lr for run, flags in reproduce.tuning_runs(args).items() if "LP-FT=" in run][::2]
    assert rates == pytest.approx([1e-3 / 3, 1e-3, 3e-3], rel=0.02)
    wide = reproduce.tuning_runs(reproduce.parse_args(["--rates", "0.1", "0.5", "2", "10"]))
    assert [run for run in wide if run.startswith("tune-FT=")][::2] == [
        f"tune-FT={rate}-seed101" for rate in ("1.5e-04", "7.5e-04", "3.0e-03", "1.5e-02")]
    args.max_test = 100  # of the tables; tuning measures nothing on a test split
    assert all(train.parse_args(flags).max_test == 0 for flags in reproduce.tuning_runs(args).values())
    assert all(train.parse_args(flags).max_test == 100 for flags in reproduce.main_runs(args, {}).values())


def test_a_rate_of_which_a_run_failed_is_no_choice():
    tuning = tuned({"1e-3": (0.5, 0.5), "3e-3": (0.9, 0.9)})
    planned = [*tuning]
    del tuning["tune-FT=3e-3-seed102"]
    assert runs.choose_rates(tuning, planned) == {"FT": "1e-3"}
    with pytest.raises(ValueError, match="no learning rate of FT"):
        runs.choose_rates({}, planned)
    cell = report.tuning_table(tuning, {"tuning": dict.fromkeys(planned), "rates": {"FT": "1e-3"}})["FT"]["rate 2"]
    assert report.as_text(cell) == "0.900 at 3e-3, a run failed"  # what there is, is shown; one has no deviation


def test_numbers_are_short():
    assert [report.number(x) for x in (300.0, 95.4, 1234.56, 0.12345, 0.0098, 0.00054, 0.0, -0.0, -2.0)] == [
        "300", "95.4", "1235", "0.123", "0.010", "0.0005", "0", "0", "-2"]


def test_the_report_is_one_file_with_every_figure(folder, written):
    page = (folder / "report.html").read_text()
    assert "http" not in page and "<script" not in page and page.count("data:image/svg+xml;base64,") == 6
    for name in ("head-norm", "head-scale", "spectra", "trace-norms", "features", "reliability"):
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 5000
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_packages_of_the_lab_one_line_says_how_to_get_them(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import importlib.util as u\nfind = u.find_spec\n"
                                               "u.find_spec = lambda name: None if name == 'markdown' else find(name)\n")
    done = subprocess.run([sys.executable, "-m", "lab.report", "x"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "markdown; pip install -r requirements-dev.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_killed_reproduction_goes_on_and_repeats_nothing(random_folder, tmp_path):
    """SIGKILL in the second run: the first stays as it is, the second goes on."""
    args = reproduce.parse_args(["--model", str(random_folder), "--data", "tiny-plain", "--max-train", "60",
                                 "--seeds", "2", "--jobs", "1", "--out", str(tmp_path)])
    planned = {name: flags for name, flags in reproduce.main_runs(args, {}).items() if name.startswith("LP-seed")}
    (tmp_path / "runs").mkdir()
    code = ("from lab import reproduce\n"
            f"args = reproduce.parse_args({['--jobs', '1', '--out', str(tmp_path)]!r})\n"
            f"reproduce.run_all(args, {planned!r})")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    first, second = (tmp_path / "runs" / name for name in planned)
    deadline = time.monotonic() + 120
    while not (second / "config.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (first / "result.json").is_file() and not (second / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert reproduce.run_all(args, planned) == {}
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert (second / "result.json").is_file()
    with pytest.raises(ValueError, match="made with --max-length 128; now it would be with 64; choose another --out"):
        reproduce.refuse_other_flags(args, {name: [*flags, "--max-length", "64"] for name, flags in planned.items()})


def test_a_run_that_fails_names_its_log(tmp_path):
    args = reproduce.parse_args(["--jobs", "1", "--out", str(tmp_path)])
    (tmp_path / "runs").mkdir()
    failed = reproduce.run_all(args, {"bad": ["--lr", "-1"]})
    assert failed["bad"] == f"--lr is -1.0; expected a number above 0 (all it said: {tmp_path}/runs/bad.log)"


def test_a_flag_that_train_refuses_ends_before_the_first_run(tmp_path, capsys):
    for flags, said in ((["--ntk", "300"], "--ntk is 300"), (["--max-length", "3"], "--max-length is 3"),
                        (["--seeds", "101"], "expected 2 to 100"), (["--seed", "3"], "unrecognized arguments: --seed"),
                        (["--scales", "0"], "--scales are 0"),
                        (["--rates", "1", "-1"], "--rates are 1 -1"),
                        (["--no-tuning", "--rates", "1"], "--rates has no effect: --no-tuning")):
        with pytest.raises(SystemExit) as end:
            reproduce.main([*flags, "--out", str(tmp_path / "x")])
        assert end.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_data_that_a_run_would_refuse_are_refused_before_the_first(random_folder, tmp_path, capsys):
    """A folder without test, too few of a class for some seed's kernel, no such model: nothing is begun."""
    for name in ("train", "val"):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "good\tyes\nbad\tno\n" * 20)
    for flags, said in ((["--data", str(tmp_path)], "has no test split"),
                        (["--data", "tiny", "--ntk", "20", "--seeds", "30"], "drawn with seed"),
                        (["--data", "nothing"], "no such folder"),
                        (["--model", str(tmp_path / "no")], "no such"),
                        (["--model", str(random_folder), "--max-length", "600"], "has positions for 128 tokens"),
                        (["--max-train", "2", "--ntk", "0", "--model", str(random_folder)], "every class needs samples")):
        assert reproduce.main([*flags, "--out", str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["train, val and test", "train and test"])
def test_data_that_fit_are_not_refused(random_folder, tmp_path, name):
    """Without val, validation is the end of train: it is counted there."""
    for split in name.replace("and ", "").replace(",", "").split():
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + "good\tyes\nbad\tno\n" * 40)
    reproduce.check_data(reproduce.parse_args(["--data", str(tmp_path), "--model", str(random_folder), "--ntk", "30"]))


def test_scaled_runs_are_those_of_fig_3_with_the_chosen_rates():
    args = reproduce.parse_args(["--seeds", "2"])
    scaled = reproduce.scale_runs(args, {"FT": "7e-4"})
    assert len(scaled) == 2 * 7 * 2 and "FT-scale1-seed1" not in scaled
    parsed = train.parse_args(scaled["FT-scale0.1-seed2"])
    assert (parsed.head_scale, parsed.lr, parsed.seed, parsed.method) == (0.1, 7e-4, 2, "ft")
    assert train.parse_args(reproduce.main_runs(args, {"FT": "7e-4"})["FT-seed1"]).lr == 7e-4
    assert reproduce.scale_runs(reproduce.parse_args(["--scales", "1", "1.0000001"]), {}) == {}
    few = reproduce.scale_runs(reproduce.parse_args(["--scales", "0.1", "1", "10"]), {})
    assert set(claims.scale_names(few)) == {0.1, 1.0, 10.0} and claims.scale_names({})[1.0]["FT"] == "FT"


def test_a_class_that_only_a_tuning_seed_would_miss_is_found_before_the_first_run(random_folder, tmp_path, capsys):
    rows = {seed: set(draw(range(90), 40, seed)) for seed in (1, 2, *reproduce.TUNING_SEEDS)}
    rare = (rows[1] & rows[2]) - rows[101]
    text = "text\tlabel\n" + "".join(f"good\t{'no' if i in rare else 'yes'}\n" for i in range(90))
    (tmp_path / "train.tsv").write_text(text)
    for name in ("val", "test"):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\ngood\tyes\nbad\tno\n")
    flags = ["--data", str(tmp_path), "--max-train", "40", "--model", str(random_folder), "--ntk", "0", "--seeds", "2"]
    assert reproduce.main([*flags, "--out", str(tmp_path / "x")]) == 2
    assert "the 40 training samples drawn with seed 101 have no no" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    reproduce.check_data(reproduce.parse_args([*flags, "--no-tuning"]))  # then that seed is not drawn


def test_another_folder_of_the_same_name_is_not_the_same_data(tmp_path, monkeypatch):
    """The flags are the same words; the run says where it read."""
    for place in ("a", "b"):
        (tmp_path / place / "mine").mkdir(parents=True)
    run = tmp_path / "out" / "runs" / "LP-seed1"
    run.mkdir(parents=True)
    args = reproduce.parse_args(["--data", "mine", "--out", str(tmp_path / "out")])
    flags = reproduce.common_flags(args, "LP", 1)
    monkeypatch.chdir(tmp_path / "a")
    (run / "config.json").write_text(json.dumps(configuration(train.parse_args(flags))))
    reproduce.refuse_other_flags(args, {"LP-seed1": flags})
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ValueError, match=f"made with --data {tmp_path}/a/mine.*choose another --out"):
        reproduce.refuse_other_flags(args, {"LP-seed1": flags})


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_two_commands_do_not_write_to_one_folder(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert reproduce.main(["--out", str(tmp_path)]) == 2 and "holds something else" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    lock = lock_folder(tmp_path)
    assert reproduce.main(["--out", str(tmp_path)]) == 2
    assert "another process that is still running" in capsys.readouterr().err
    lock.release()
    lock_folder(tmp_path)


def test_an_interrupted_run_is_resumed_and_not_begun_again(tmp_path, monkeypatch):
    commands, threads = [], []

    class Process:
        def __init__(self, command, **more):
            commands.append([str(word) for word in command[2:]])
            threads.append(more["env"]["OMP_NUM_THREADS"])

        def wait(self):
            return 1

    monkeypatch.setattr(reproduce.subprocess, "Popen", Process)
    args, run = reproduce.parse_args(["--out", str(tmp_path)]), tmp_path / "runs" / "one"
    (tmp_path / "runs").mkdir()
    for _ in range(2):
        assert reproduce.run_all(args, {"one": ["--seed", "1"]})["one"].startswith("status 1 (all it said: ")
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text("{}")
    assert commands == [["--seed", "1", "--out", str(run)], ["--resume", str(run)]]
    assert threads == ["1", "1"]


def test_a_run_that_outlived_its_parent_is_waited_for(tmp_path, monkeypatch):
    """lab.reproduce was killed, train.py was not: when it has ended, its folder is gone on with."""
    args, run = reproduce.parse_args(["--out", str(tmp_path)]), tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    code = (f"from plumbing import run_folder; import time; lock = run_folder.lock_folder({str(run)!r}); "
            "print(flush=True); time.sleep(1)")
    orphan = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    orphan.stdout.readline()
    states = []

    class Process:
        def __init__(self, command, **more):
            states.append(orphan.wait(20))  # once it is gone

        def wait(self):
            return 1

    monkeypatch.setattr(reproduce.subprocess, "Popen", Process)
    assert "one" in reproduce.run_all(args, {"one": ["--seed", "1"]}) and states == [0]
    orphan.stdout.close()


def test_the_last_error_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert runs.last_error(log) is None
    log.write_text("train.py: error: one\nsome progress\ntrain.py: error: two\nmore\n")
    assert runs.last_error(log) == "two"


def test_an_interruption_ends_the_run_that_is_going_and_begins_no_other(tmp_path, monkeypatch):
    """It is told by SIGTERM, at which it saves its state."""
    begun, ended = [], []

    class Process:
        def __init__(self, command, **more):
            self.told = threading.Event()
            begun.append(self)

        def wait(self):
            return 0 if self.told.wait(20) is None else 130

        def terminate(self):
            ended.append(self)
            self.told.set()

    def ctrl_c(futures):
        while not begun:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.subprocess, "Popen", Process)
    monkeypatch.setattr(reproduce, "as_completed", ctrl_c)
    (tmp_path / "runs").mkdir()
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_all(reproduce.parse_args(["--jobs", "1", "--out", str(tmp_path)]), {"one": [], "two": [], "three": []})
    assert len(begun) == 1 and set(begun) == set(ended)


# ---------------------------------------------------------------------------- the whole command, its runs made up


@pytest.fixture
def made_up_runs(monkeypatch, tmp_path):
    """run_one writes made-up results instead of training; returns {name: flags} of what it was asked for."""
    asked, results = {}, made_up(seeds=(1, 2, 3))

    def run_one(args, name, flags, processes, stopping):
        asked[name] = flags
        parsed = train.parse_args(flags)
        if name in FAILING:
            return "the loss became infinite"
        result = results.get(name, {})
        if name.startswith("tune"):  # the larger the rate the better
            result = {"metric": "accuracy", "accuracy": {}, "val_accuracy": parsed.lr}
        result = {"metric": "accuracy", "val_accuracy": 0.5, "accuracy": {"test": 0.5}} | result
        folder = args.out / "runs" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.json").write_text(json.dumps(configuration(parsed)))

    FAILING = set()
    monkeypatch.setattr(reproduce, "run_one", run_one)
    monkeypatch.setattr(reproduce, "check_data", lambda args: None)
    monkeypatch.setattr(figures, "make_all", lambda *some: ({}, []))
    return asked, FAILING


def interrupted(*some):
    raise KeyboardInterrupt


def test_the_whole_command(made_up_runs, tmp_path, capsys, monkeypatch):
    """Tuning, then every other run at the chosen rate, then the report; the second time nothing but the report."""
    asked, _ = made_up_runs
    command = ["--seeds", "3", "--epochs", "4", "--max-length", "32", "--out", str(tmp_path / "my folder")]
    assert reproduce.main(command) == 0
    assert len(asked) == 4 * 3 * 2 + 5 * 3 + 2 * 7 * 3
    ft = train.parse_args(asked["FT-seed2"])
    assert ft.lr == pytest.approx(4.5e-3) and (ft.epochs, ft.max_length, ft.ntk) == (4, 32, 100)
    assert train.parse_args(asked["LP-FT-scale0.1-seed3"]).lr == pytest.approx(3e-3)
    said = capsys.readouterr()
    assert "tuning: 100%" in said.err and "1. The head norm" in said.out
    plan = json.loads((tmp_path / "my folder" / "plan.json").read_text())
    assert plan["command"].endswith(f"--out '{tmp_path}/my folder'")  # to be pasted
    assert plan["rates"]["FT"] == "4.5e-03" and len(plan["tuning"]) == 24
    text = (tmp_path / "my folder" / "report.md").read_text()
    assert "FT 0.0045 (8, 4)" in text and "a rate beyond may be better: FT, LoRA, LP-FT, LP-LoRA." in text
    assert "at 4.5e-03, chosen, at the edge of the grid" in text
    asked.clear()
    assert reproduce.main(command) == 0 and not asked
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "run_all", interrupted)
        assert reproduce.main(command) == 130 and "the same command goes on" in capsys.readouterr().err
    assert reproduce.main([*command, "--epochs", "5"]) == 2  # refused, and the plan is still that of the runs
    assert "choose another --out" in capsys.readouterr().err
    assert json.loads((tmp_path / "my folder" / "plan.json").read_text()) == plan


def test_a_run_that_fails_is_named_and_the_others_go_on(made_up_runs, tmp_path, capsys):
    """In tuning its rate is no choice; elsewhere its seed is left out of the report, and the status is 1."""
    asked, failing = made_up_runs
    failing |= {"tune-FT=4.5e-03-seed102", "LoRA-seed2"}
    command = ["--seeds", "3", "--scales", "1", "--out", str(tmp_path / "x")]
    assert reproduce.main(command) == 1
    said = capsys.readouterr()
    assert "tune-FT=4.5e-03-seed102 failed: the loss became infinite" in said.out
    assert "  tune-FT=4.5e-03-seed102: the loss became infinite\n  LoRA-seed2: the loss became" in said.err
    assert said.err.splitlines()[-1].startswith("lab.reproduce: error: 2 runs failed")
    text = (tmp_path / "x" / "report.md").read_text()
    assert "Not finished: LoRA-seed2. A seed" in text and "at 4.5e-03, a run failed" in text
    assert train.parse_args(asked["FT-seed1"]).lr == pytest.approx(1.5e-3)
    assert json.loads((tmp_path / "x" / "tables.json").read_text())["seeds"] == [1, 3]
    failing.clear()
    asked.clear()
    capsys.readouterr()
    assert reproduce.main(command) == 0 and [*asked] == ["LoRA-seed2"]  # the rate stays, or nothing would fit it
    assert json.loads((tmp_path / "x" / "tables.json").read_text())["seeds"] == [1, 2, 3]
    assert reproduce.main([*command, "--no-tuning"]) == 2 and "choose another --out" in capsys.readouterr().err
    failing |= {"LoRA-seed1", "LoRA-seed2"}
    assert reproduce.main(["--no-tuning", "--scales", "1", "--seeds", "2", "--out", str(tmp_path / "y")]) == 1
    assert "no report" in capsys.readouterr().err


def test_without_tuning_rates_are_those_of_train_py(made_up_runs, tmp_path):
    """And tuning runs that lie there of an earlier, unfinished command are not spoken of."""
    asked, _ = made_up_runs
    assert reproduce.main(["--no-tuning", "--scales", "1", "--ntk", "0", "--seeds", "2", "--out", str(tmp_path / "x")]) == 0
    assert train.parse_args(asked["FT-seed1"]).lr == 1.5e-3 and train.parse_args(asked["FT-seed1"]).ntk is None
    assert len(asked) == 10
    for path in (tmp_path / "x" / "runs").glob("*/result.json"):  # as train.py writes it without a kernel
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "ntk"}))
    assert report.main([str(tmp_path / "x")]) == 0
    assert "## Kernel" not in (tmp_path / "x" / "report.md").read_text()  # no table without cells
    extra = tmp_path / "x" / "runs" / "tune-FT=5.0e-04-seed101"
    extra.mkdir()
    (extra / "result.json").write_text('{"metric": "accuracy", "accuracy": {}, "val_accuracy": 0.5}')
    shutil.copytree(tmp_path / "x" / "runs" / "FT-seed1", tmp_path / "x" / "runs" / "FT-scale3-seed1")
    assert report.main([str(tmp_path / "x")]) == 0
    text = (tmp_path / "x" / "report.md").read_text()
    assert "Tuning" not in text and "not tuned here" in text and "scale3" not in text and "no runs from scaled heads" in text


@pytest.mark.parametrize("file, content, said", [
    ("runs/FT-seed1/result.json", "", "FT-seed1/result.json: not a JSON file"),
    ("runs/FT-seed1/result.json", "[]", "FT-seed1/result.json: expected a JSON object"),
    ("runs/FT-seed1/result.json", "{}", "FT-seed1/result.json: not what train.py writes"),
    ("runs/FT-seed1/result.json", '{"metric": "accuracy", "val_accuracy": 1, "accuracy": {}, "seed": 2}', "is of seed 2"),
    ("runs/LP-seed1/config.json", "{", "LP-seed1/config.json: not a JSON file"),
    ("runs/LP-seed1/result.json", '{"metric": "accuracy", "val_accuracy": 1, "accuracy": {"web": 1}}', "no test split"),
    ("plan.json", "{}", "plan.json: not what lab.reproduce writes"),
    ("plan.json", None, "holds no plan.json"),
])
def test_a_damaged_file_is_one_line_with_its_name(made_up_runs, tmp_path, capsys, file, content, said):
    assert reproduce.main(["--no-tuning", "--scales", "1", "--seeds", "2", "--out", str(tmp_path / "x")]) == 0
    (tmp_path / "x" / file).unlink()
    if content is not None:
        (tmp_path / "x" / file).write_text(content)
    capsys.readouterr()
    assert report.main([str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
