"""Many runs: nothing is repeated, every number of the report is one of the runs', verdicts are statistics."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

import report
import reproduce
import train
from resume import lock_folder, take_lock

ROOT = Path(__file__).resolve().parents[1]
STAGE = ["--epochs", "1", "--lr", "1e-3", "--ntk", "20"]


@pytest.fixture(scope="module")
def folder(random_folder, tmp_path_factory):
    """Runs of every method and two seeds, as reproduce.py leaves them."""
    out = tmp_path_factory.mktemp("reproduction")
    args = reproduce.parse_args(["--model", str(random_folder), "--data", "tiny-plain", "--max-train", "60", "--epochs",
                                 "1", "--seeds", "2", "--ntk", "20", "--out", str(out)])
    for name, flags in reproduce.main_runs(args, {}).items():
        assert train.main([*flags, "--out", str(out / "runs" / name)]) == 0
        (out / "runs" / name / "flags.json").write_text(json.dumps(flags))
    return out


@pytest.fixture(scope="module")
def written(folder):
    (folder / "command.txt").write_text("the command\n")
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
    shown = f"{report.number(cell['mean'])} ± {report.number(cell['std'])}"
    assert shown in (folder / "report.md").read_text()


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_the_interval_is_that_of_a_paired_t_test(n):
    a, b = stats.norm.rvs(size=(2, n), random_state=n)
    mean, lower, upper = report.confidence_interval(list(a - b))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (lower, upper) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert mean == pytest.approx((a - b).mean())


def test_the_parts_of_claims_by_hand(folder, written):
    """Paired by seed: the difference of two methods on the same seed."""
    def part(number, start):
        found, = [p for p in written["claims"][number - 1]["parts"] if p["part"].startswith(start)]
        return found["values"]

    lp, ft = (values(folder, name, "head_norm") for name in ("LP", "FT"))
    start = values(folder, "FT", "head_norm_initial")
    assert part(1, "growth of the norm: LP - 2 x FT") == pytest.approx([x - 2 * (y - z) for x, y, z in zip(lp, ft, start)])
    a, b = ([statistics.mean(v) for v in zip(*(values(folder, name, "features", split, "diff")
                                               for split in ("films", "hotels", "meals")))] for name in ("FT", "LP-FT"))
    assert part(2, "Diff(F): FT - LP-FT, out") == pytest.approx([x - y for x, y in zip(a, b)])
    a, b = (values(folder, name, "ntk", "ft_ratio") for name in ("FT", "LP-FT"))
    assert part(4, "FT ratio") == pytest.approx([y - x for x, y in zip(a, b)])
    assert written["claims"][5]["verdict"] == "not measured"  # no scaled heads here


def made_up(sign):
    """Results of three seeds in which every part of every claim holds (sign 1) or none does (sign -1)."""
    results = {}
    better = {"LP": 0.0, "FT": 0.2, "LoRA": 0.2, "LP-FT": 0.3, "LP-LoRA": 0.25}  # accuracy
    for seed in (1, 2, 3):
        noise = 0.001 * seed
        for name in report.METHODS:
            lp = 1 if name == "LP-FT" else 0
            spectrum = [10 ** -(0.05 * i * (1 if sign > 0 or "LoRA" in name else 20)) for i in range(8)]
            result = {
                "head_norm_initial": 0.0, "head_norm": (9.0 if (name == "LP") == (sign > 0) else 1.0) + noise,
                "accuracy": {}, "features": {}, "calibration": {},
                "ntk": {"ft_ratio": 0.5 + sign * 0.4 * lp, "P": {"rank": 6, "test_accuracy": 0.5},
                        "F": {"rank": 6 + sign * 2 if sign > 0 or "LoRA" in name else 2,
                              "test_accuracy": 0.5 + 0.2 * sign, "singular_values": spectrum}}}
            for split in ("test", "web"):
                result["accuracy"][split] = 0.5 + sign * better[name] + noise
                result["features"][split] = {"diff": 5 - sign * lp + noise, "cs": 0.5 + 0.1 * sign * lp,
                                             "fdr": 3 - sign * lp}
                result["calibration"][split] = {"ece": 0.2 + 0.1 * sign * lp, "ece_scaled": 0.1 - 0.01 * sign * lp}
            results[f"{name}-seed{seed}"] = result
            for scale in reproduce.SCALES:
                moved = {"features": {"test": {"diff": 5 - sign * lp - sign * math.log10(scale) + noise}}}
                results[f"{name}-scale{scale}-seed{seed}"] = moved
    return results


def test_every_claim_holds_where_it_is_true_and_not_in_the_mirror():
    for sign, verdict in ((1, "holds"), (-1, "does not hold")):
        for claim in report.judge("accuracy", ["test", "web"], made_up(sign), [1, 2, 3]):
            assert {part["verdict"] for part in claim["parts"]} == {verdict}, claim
            assert claim["verdict"] == verdict
    fall = report.judge("accuracy", ["test", "web"], made_up(1), [1, 2, 3])[5]["parts"][0]
    assert fall["mean"] == pytest.approx(1)  # per factor of ten


def test_a_verdict_is_where_the_interval_lies():
    """One seed against the others: undecided; without OOD tests, claims about them are not measured."""
    results = made_up(1) | {"LP-FT-seed2": made_up(-1)["LP-FT-seed2"]}
    features = report.judge("accuracy", ["test", "web"], results, [1, 2, 3])[1]
    assert features["verdict"] == "undecided"
    assert all(part["lower"] < 0 < part["upper"] for part in features["parts"])
    third = report.judge("accuracy", ["test"], made_up(1), [1, 2, 3])[2]
    assert third["verdict"] == "undecided"
    assert [part["verdict"] for part in third["parts"]].count("not measured") == 1


def test_tables_and_claims_use_the_same_seeds(folder):
    """A further run of one method alone changes nothing; nor does one that was killed while it was moved."""
    results, _ = report.read_results(folder)
    assert report.complete_seeds(results | {"LP-seed3": results["LP-seed1"]}) == [1, 2]
    rows = [("row", ("head_norm",))]
    more = report.fill_table(rows, results | {"LP-seed3": results["LP-seed1"]}, [1, 2])
    assert more == report.fill_table(rows, results, [1, 2])
    partial = folder / "runs" / "FT-seed9.partial"
    partial.mkdir()
    (partial / "flags.json").write_text("[]")
    assert report.read_results(folder)[0].keys() == results.keys()
    partial.joinpath("flags.json").unlink()
    partial.rmdir()


def test_learning_rates_are_chosen_on_validation_alone():
    tuning = {f"tune-FT={rate}-seed{seed}": {"metric": "accuracy", "val_accuracy": val, "accuracy": {"test": 1 - val}}
              for rate, seed, val in (("1e-3", 101, 0.9), ("1e-3", 102, 0.7), ("3e-3", 101, 0.85), ("3e-3", 102, 0.8))}
    assert report.choose_rates(tuning) == {"FT": "3e-3"}
    equal = {run: result | {"val_accuracy": 0.5} for run, result in tuning.items()}
    assert report.choose_rates(equal) == {"FT": "1e-3"}  # of equals the smallest
    args = reproduce.parse_args(["--seeds", "9"])
    assert all(run.split("-seed")[1] in ("101", "102") for run in reproduce.tuning_runs(args))
    assert len(reproduce.tuning_runs(args)) == 4 * 3 * 2
    args.max_test = 100  # of the tables; tuning measures nothing on a test split
    assert all(train.parse_args(flags).max_test == 0 for flags in reproduce.tuning_runs(args).values())
    assert all(train.parse_args(flags).max_test == 100 for flags in reproduce.main_runs(args, {}).values())


def test_the_report_is_one_file_with_every_figure(folder, written):
    page = (folder / "report.html").read_text()
    assert "http" not in page and "<script" not in page and page.count("data:image/svg+xml;base64,") == 5
    for name in ("head-norm", "spectra", "trace-norms", "features", "reliability"):
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 5000
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_figure_packages_the_tables_still_come(folder, written, tmp_path):
    for name in ("matplotlib", "sklearn"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    (folder / "report.md").unlink()
    done = subprocess.run([sys.executable, "report.py", str(folder)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "pip install -r requirements-dev.txt" in done.stdout and (folder / "report.md").is_file()


def test_a_killed_reproduction_goes_on_and_repeats_nothing(random_folder, tmp_path):
    """SIGKILL in the second run: the first stays as it is, the second starts again."""
    args = reproduce.parse_args(["--model", str(random_folder), "--data", "tiny-plain", "--max-train", "60", "--seeds",
                                 "2", "--jobs", "1", "--out", str(tmp_path)])
    runs = {name: flags for name, flags in reproduce.main_runs(args, {}).items() if name.startswith("LP-seed")}
    code = (f"import reproduce, json\nargs = reproduce.parse_args({['--jobs', '1', '--out', str(tmp_path)]!r})\n"
            f"reproduce.run_all(args, {runs!r})")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL,
                               start_new_session=True)
    first, second = (tmp_path / "runs" / name for name in runs)
    deadline = time.monotonic() + 120
    while not second.with_name(second.name + ".partial").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.is_dir() and not second.exists()
    take_lock(second.with_name(second.name + ".partial") / "lock", wait=True).release()  # until its child is gone, too
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    reproduce.run_all(args, runs)
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert (second / "result.json").is_file() and not second.with_name(second.name + ".partial").exists()
    with pytest.raises(ValueError, match="choose another --out"):
        reproduce.run_all(args, {name: [*flags, "--max-length", "64"] for name, flags in runs.items()})


def test_a_run_that_fails_names_its_log(tmp_path):
    args = reproduce.parse_args(["--jobs", "1", "--out", str(tmp_path)])
    with pytest.raises(RuntimeError, match="bad ended with status 2; its last words are in .*bad.log"):
        reproduce.run_all(args, {"bad": ["--lr", "-1"]})


def test_a_flag_that_train_refuses_ends_before_the_first_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        reproduce.main(["--ntk", "300", "--out", str(tmp_path / "x")])
    assert end.value.code == 2 and "--ntk is 300" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_scaled_runs_are_those_of_fig_3_with_the_chosen_rates():
    args = reproduce.parse_args(["--seeds", "2"])
    runs = reproduce.scale_runs(args, {"FT": "7e-4"})
    assert len(runs) == 2 * 7 * 2 and "FT-scale1-seed1" not in runs
    parsed = train.parse_args(runs["FT-scale0.1-seed2"])
    assert (parsed.head_scale, parsed.lr, parsed.seed, parsed.method) == (0.1, 7e-4, 2, "ft")
    assert train.parse_args(reproduce.main_runs(args, {"FT": "7e-4"})["FT-seed1"]).lr == 7e-4
    assert reproduce.scale_runs(reproduce.parse_args(["--scales", "1"]), {}) == {}
    few = reproduce.scale_runs(reproduce.parse_args(["--scales", "0.1", "1", "10"]), {})
    assert set(report.scale_names(few)) == {0.1, 1.0, 10.0} and report.scale_names({})[1.0]["FT"] == "FT"


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
    commands = []

    class Process:
        def __init__(self, command, **more):
            commands.append([str(word) for word in command[2:]])

        def wait(self):
            return 1

    monkeypatch.setattr(reproduce.subprocess, "Popen", Process)
    args, partial = reproduce.parse_args(["--out", str(tmp_path)]), tmp_path / "runs" / "one.partial"
    for flags in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):  # the last one is another run
        with pytest.raises(RuntimeError):
            reproduce.run_all(args, {"one": flags})
        partial.mkdir(exist_ok=True)
        (partial / "config.json").write_text("{}")
    assert commands == [["--seed", "1", "--out", str(partial)], ["--resume", str(partial)],
                        ["--seed", "2", "--out", str(partial)]]
