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
    report.write_report(folder, "the command")
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
    ("Calibration", "ECE / T, meals", "LP", "LP", ("calibration", "meals", "ece_scaled")),
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


def test_a_verdict_is_where_the_interval_lies(folder, written):
    for claim in written["claims"]:
        for part in claim["parts"]:
            assert (part["verdict"] == "holds") == (part["lower"] > 0)
            assert (part["verdict"] == "does not hold") == (part["upper"] < 0)
        verdicts = [part["verdict"] for part in claim["parts"]]
        assert (claim["verdict"] == "holds") == (bool(verdicts) and set(verdicts) == {"holds"})
        assert (claim["verdict"] == "does not hold") == ("does not hold" in verdicts)
    assert len(written["claims"]) == 7 and written["claims"][5]["verdict"] == "not measured"  # no scaled heads


def test_the_parts_of_claims_by_hand(folder, written):
    """Paired by seed: the difference of two methods on the same seed."""
    def part(number, start):
        return next(p for p in written["claims"][number - 1]["parts"] if p["part"].startswith(start))["values"]

    lp, ft = (values(folder, name, "head_norm") for name in ("LP", "FT"))
    start = values(folder, "FT", "head_norm_initial")
    assert part(1, "growth of Norm(C): LP - FT") == pytest.approx([x - (y - z) for x, y, z in zip(lp, ft, start)])
    a, b = ([statistics.mean(v) for v in zip(*(values(folder, name, "features", split, "diff")
                                               for split in ("films", "hotels", "meals")))] for name in ("FT", "LP-FT"))
    assert part(2, "Diff(F): FT - LP-FT, out") == pytest.approx([x - y for x, y in zip(a, b)])
    a, b = (values(folder, name, "ntk", "ft_ratio") for name in ("FT", "LP-FT"))
    assert part(4, "FT ratio") == pytest.approx([y - x for x, y in zip(a, b)])


def made_up(**diffs):
    """Results in which Diff(F) is `diffs[method]` times the scale to the power -1/2, and FT comes from `ft`."""
    results = {}
    for seed in (1, 2):
        for name in ("FT", "LP-FT"):
            for scale in report.SCALES:
                run = f"{name}-seed{seed}" if scale == 1 else f"{name}-scale{scale}-seed{seed}"
                diff = diffs[name.replace("-", "")] - math.log10(scale) + 0.01 * seed
                results[run] = {"features": {"test": {"diff": diff}}}
    return results


def test_claim_6_is_the_slope_over_factors_of_ten():
    judged = report.judge("accuracy", ["test"], made_up(FT=5, LPFT=3), [1, 2])[5]
    assert judged["verdict"] == "holds"
    assert [part["mean"] for part in judged["parts"]] == pytest.approx([1, 1])


def test_learning_rates_are_chosen_on_validation_alone():
    tuning = {f"tune-FT={rate}-seed{seed}": {"metric": "accuracy", "val_accuracy": val, "accuracy": {"test": 1 - val}}
              for rate, seed, val in (("1e-3", 101, 0.9), ("1e-3", 102, 0.7), ("3e-3", 101, 0.85), ("3e-3", 102, 0.8))}
    assert report.choose_rates(tuning) == {"FT": "3e-3"}
    args = reproduce.parse_args(["--seeds", "9"])
    assert all(run.split("-seed")[1] in ("101", "102") for run in reproduce.tuning_runs(args))
    assert len(reproduce.tuning_runs(args)) == 4 * 3 * 2


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


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
