"""Many runs: nothing is repeated or lost, and every number of the report is one of the runs'."""

import base64
import json
import os
import re
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from pathlib import Path

import numpy as np
import pytest

import train
from data import draw, tiny
from lab import figures, map as lab_map, report, reproduce, runs
from plumbing.flags import configuration
from plumbing.run_folder import lock_folder
from test_claims import made_up

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(random_folder, tmp_path_factory):
    """Runs of every method and two seeds, as lab.reproduce leaves them."""
    out = tmp_path_factory.mktemp("reproduction")
    data = out / "mine"
    data.mkdir()
    for split, count in (("train", 60), ("val", 40), ("test", 80), ("ood_films", 80)):
        rows = [f"the screen was {word}\t{label}" for word, label in (("good", "pos"), ("bad", "neg"))] * (count // 2)
        (data / f"{split}.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    args = reproduce.parse_args(["--model", str(random_folder), "--data", str(data), "--epochs", "1", "--seeds", "2",
                                 "--rates", "10", "--ntk", "20", "--scales", "10", "--out", str(out / "out")])
    rates = {name: reproduce.rates_of(args, name)[0] for name in runs.METHODS if name != "LP"}
    planned = reproduce.main_runs(args, rates)
    for name, flags in planned.items():
        assert train.main([*flags, "--out", str(args.out / "runs" / name)]) == 0
    plan = {"command": "the command", "unit": "seed", "units": [0, 1], "tuning": {}, "rates": rates, "runs": planned}
    (args.out / "plan.json").write_text(json.dumps(plan))
    return args.out


@pytest.fixture(scope="module")
def written(folder):
    report.write_report(folder)
    return json.loads((folder / "tables.json").read_text()) | {
        "claims": json.loads((folder / "claims.json").read_text())}


def values(folder, method, *keys):
    """The number under `keys` in the result.json of each unit."""
    found = []
    for unit in (0, 1):
        value = json.loads((folder / "runs" / f"{method}-{unit}" / "result.json").read_text())
        for key in keys:
            value = value[key]
        found.append(value)
    return found


@pytest.mark.parametrize("table, row, column, method, keys", [
    ("Accuracy", "films", "LoRA", "LoRA", ("accuracy", "films")),
    ("Features", "Diff(F), films", "LP-FT", "LP-FT", ("features", "films", "diff")),
    ("Features", "CS(F), test", "pre-trained", "FT", ("features_pretrained", "test", "cs")),
    ("Head", "Diff(C)", "FT", "FT", ("head_diff",)),
    ("Kernel", "rank, F", "LP-LoRA", "LP-LoRA", ("ntk", "F", "rank")),
    ("Kernel", "FT ratio", "FT", "FT", ("ntk", "ft_ratio")),
    ("Calibration", "ECE with T, films", "LP", "LP", ("calibration", "films", "ece_scaled")),
    ("Calibration", "MCE, test", "LoRA", "LoRA", ("calibration", "test", "mce")),
    ("Calibration", "T", "LP-FT", "LP-FT", ("temperature",)),
    ("Head", "Norm(C)", "LP-FT", "LP-FT", ("head_norm",)),
    ("Diff(F) by factor", "LP-FT × 10", "films", "LP-FT-scale10", ("features", "films", "diff")),
    ("Diff(F) by factor", "FT × 1", "test", "FT", ("features", "test", "diff")),
])
def test_a_cell_of_each_table_by_hand(folder, written, table, row, column, method, keys):
    """Mean and standard deviation over units of the number in result.json; the cell names files and key."""
    title, = (title for title in written["tables"] if title.startswith(table))
    cell, expected = written["tables"][title][row][column], values(folder, method, *keys)
    assert cell["values"] == expected
    assert cell["mean"] == pytest.approx(statistics.mean(expected))
    assert cell["std"] == pytest.approx(statistics.stdev(expected))
    assert cell["key"] == ".".join(keys) and all(
        (folder / cell["file"].replace("UNIT", str(unit))).is_file() for unit in (0, 1))
    lines = (folder / "report.md").read_text().split(f"## {title}")[1].splitlines()
    columns = [name.strip() for name in lines[2].split("|")]
    line = next(line for line in lines if line.startswith(f"| {row} |"))
    shown = line.split("|")[columns.index(column)].strip()
    assert shown == f"{report.number(statistics.mean(expected))} ± {report.number(statistics.stdev(expected))}"


def test_a_number_that_not_every_unit_has_is_the_mean_of_those_that_do_and_their_count_is_shown():
    """T does not exist where every validation sample is right; one unit alone has no standard deviation."""
    results = {f"LP-{unit}": {"temperature": t, "rest": rest} for unit, t, rest in ((0, 1.0, 5.0), (1, None, None), (2, 2.0, None))}
    rows = {"T": {"LP": ("LP", "temperature")}, "rest": {"LP": ("LP", "rest")}}
    table = report.fill(rows, results, [0, 1, 2])
    assert [*table] == ["T"] and table["T"]["LP"]["values"] == [1.0, None, 2.0]
    assert "| T | 1.500 ± 0.707 (2 units) |" in report.table_grid(table)


def test_the_numbers_of_claims_by_hand(folder, written):
    """Paired by unit: the difference of two methods in the same unit; the report shows mean, interval, verdict."""
    lp, ft = (values(folder, name, "head_norm") for name in ("LP", "FT"))
    start = values(folder, "FT", "head_norm_initial")
    first = written["claims"][0]["primary"]
    assert first["values"] == pytest.approx([x - (y - z) for x, y, z in zip(lp, ft, start)])
    a, b = (values(folder, name, "features", "films", "diff") for name in ("FT", "LP-FT"))
    part, = (p for p in written["claims"][1]["parts"] if p["measure"] == "Diff(F) out of distribution: FT - LP-FT")
    assert part["values"] == pytest.approx([x - y for x, y in zip(a, b)])
    a, b = (values(folder, name, "ntk", "ft_ratio") for name in ("FT", "LP-FT"))
    assert written["claims"][3]["primary"]["values"] == pytest.approx([y - x for x, y in zip(a, b)])
    text = (folder / "report.md").read_text()
    measure = first["measure"].replace("|", "\\|")  # no column ends there
    assert (f"{measure}, above 0? | {report.number(first['mean'])} ({report.number(first['lower'])} to "
            f"{report.number(first['upper'])}) | **{first['verdict']}** |") in text
    keys = {"claim", "says", "primary", "parts", "why"}
    assert len(written["claims"]) == 7 and all(claim.keys() == keys for claim in written["claims"])
    assert all({"measure", "verdict"} <= claim["primary"].keys() for claim in written["claims"])


def test_the_report_stands_alone(folder, written):
    """It names paper and question, links its contents, shows each command, and is one file with every figure."""
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    first = text.split("\n\n")[1]
    assert "Tomihari" in first and "LP-FT" in first and "RoBERTa-base" in first
    anchors = re.findall(r"\]\(#([\w-]+)\)", text)
    assert len(anchors) == text.count("\n## ") and all(f'id="{anchor}"' in page for anchor in anchors)
    line, = [line for line in text.splitlines() if line.startswith("| LP-FT | `OMP_NUM_THREADS=1 python train.py")]
    assert "--seed $unit" in line and "--ntk 20" in line
    assert any(line.startswith("| FT-scale10 | ") and "--head-scale 10" in line for line in text.splitlines())
    assert "http" not in page and "<script" not in page and page.count("data:image/svg+xml;base64,") == 5
    for name in ("head-norm", "head-scale", "spectra", "trace-norms", "reliability"):
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 5000
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_map_beside_the_folder_is_in_the_report(folder, tmp_path):
    """In report.md as a link to it, in report.html as itself; also where the folder is a link to another place."""
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "map.svg").write_text("<svg>the map</svg>")
    (tmp_path / "linked").symlink_to(folder, target_is_directory=True)
    page = report.as_html("![map](../map/map.png)", tmp_path / "linked")
    assert base64.b64encode(b"<svg>the map</svg>").decode() in page and "../map" not in page


def test_tables_use_the_units_that_every_method_has(folder):
    """A further run of one method alone changes nothing."""
    results = runs.read_results(folder, json.loads((folder / "plan.json").read_text())["runs"])
    assert runs.complete_units(results | {"LP-2": results["LP-1"]}, [0, 1, 2]) == [0, 1]
    with pytest.raises(ValueError, match="1 of 1 units"):
        runs.complete_units(results, [1])


def tuned(scores):
    """{tuning run: result} for {rate: (score of unit 101, of unit 102)}."""
    return {f"tune-FT={rate}-{unit}": {"metric": "accuracy", "val_accuracy": score, "accuracy": {}}
            for rate, pair in scores.items() for unit, score in zip((101, 102), pair)}


def test_learning_rates_are_chosen_on_validation_alone():
    """A wrong OOD file changes no choice: tuning runs do not even read one."""
    tuning = tuned({"1e-3": (0.9, 0.7), "3e-3": (0.85, 0.8), "9e-3": (0.1, 0.1)})
    for result in tuning.values():
        result["accuracy"] |= {"test": 1 - result["val_accuracy"], "ood": 1 - result["val_accuracy"]}
    assert runs.choose_rates(tuning, tuning) == {"FT": "3e-3"}
    equal = {run: result | {"val_accuracy": 0.5} for run, result in tuning.items()}
    assert runs.choose_rates(equal, equal) == {"FT": "1e-3"}  # of equals the smallest
    plan = {"tuning": dict.fromkeys(tuning), "rates": {"FT": "3e-3"}}
    assert "| FT | 0.800 at 1e-3 | **0.825 at 3e-3** | 0.100 at 9e-3 |" in report.tuning_grid(tuning, plan)
    args = reproduce.parse_args(["--languages", "9", "--max-test", "100"])
    planned = reproduce.tuning_runs(args)
    assert len(planned) == 4 * 3 * 2 and {run.rsplit("-", 1)[1] for run in planned} == {"101", "102"}
    assert not {101, 102} & {*args.units}
    parsed = [train.parse_args(flags) for flags in planned.values()]
    assert {of.max_test for of in parsed} == {0} and {of.language for of in parsed} == {101, 102}
    assert all(train.parse_args(flags).max_test == 100 for flags in reproduce.main_runs(args, dict.fromkeys(
        runs.METHODS, "1e-3")).values())
    rates = [train.parse_args(flags).lr for run, flags in planned.items() if "LP-FT=" in run][::2]
    default = train.parse_args(["--method", "lpft"]).lr
    assert rates == pytest.approx([default / 3, default, 3 * default], rel=0.04)


def test_planted_test_and_ood_files_change_no_number_of_tuning(random_folder, tmp_path):
    """With all labels of test and OOD turned round, a tuning run is the same to the last digit."""
    said = []
    for name, (good, bad) in (("right", ("yes", "no")), ("planted", ("no", "yes"))):
        data = write_data(tmp_path / name)
        for file in ("test", "ood_web"):
            (data / f"{file}.tsv").write_text(f"text\tlabel\ngood\t{good}\nbad\t{bad}\n")
        args = reproduce.parse_args(["--data", str(data), "--model", str(random_folder), "--epochs", "1"])
        run, flags = next(item for item in reproduce.tuning_runs(args).items() if "tune-LP-FT=" in item[0])
        assert train.main([*flags, "--out", str(tmp_path / f"{name}-run")]) == 0
        said.append((run, (tmp_path / f"{name}-run" / "metrics.jsonl").read_text()))
        assert json.loads((tmp_path / f"{name}-run" / "result.json").read_text())["accuracy"] == {}
    assert said[0] == said[1]


def test_a_rate_of_which_a_run_failed_is_no_choice():
    tuning = tuned({"1e-3": (0.5, 0.5), "3e-3": (0.9, 0.9)})
    planned = dict.fromkeys(tuning)
    del tuning["tune-FT=3e-3-102"]
    assert runs.choose_rates(tuning, planned) == {"FT": "1e-3"}
    with pytest.raises(ValueError, match="no learning rate of FT"):
        runs.choose_rates({}, planned)
    assert "3e-3: a run failed" in report.tuning_grid(tuning, {"tuning": planned, "rates": {"FT": "1e-3"}})


def test_a_further_flag_goes_to_the_methods_that_it_means_something_to():
    """LP has no FT stage, FT no linear probing; --flag=value and --flag value are the same."""
    args = reproduce.parse_args(["--epochs=4", "--batch-size", "16", "--lora-r=4", "--lp-inverse-l2", "1", "--max-length=64"])
    flags = {name: train.parse_args(reproduce.common_flags(args, name, 0)) for name in runs.METHODS}
    assert {name: (of.epochs, of.batch_size, of.lora_r, of.lp_inverse_l2, of.max_length) for name, of in flags.items()} == {
        "LP": (None, None, None, 1, 64), "FT": (4, 16, None, None, 64), "LoRA": (4, 16, 4, None, 64),
        "LP-FT": (4, 16, None, 1, 64), "LP-LoRA": (4, 16, 4, 1, 64)}


def test_every_language_has_an_encoder_of_its_own(tmp_path):
    """One is shipped; the others are made once, beside the folder of the runs, and read from there."""
    args = reproduce.parse_args(["--languages", "3", "--out", str(tmp_path / "tiny")])
    made = reproduce.encoders(args)
    assert [*made] == ["encoder-101", "encoder-102", "encoder-0", "encoder-1", "encoder-2"]
    assert made["encoder-2"] == ["--seed", "2", "--out", str(tmp_path / "encoders" / "2")]
    for unit, model in ((tiny.LANGUAGE, "tiny"), (2, str(tmp_path / "encoders" / "2"))):
        flags = train.parse_args(reproduce.common_flags(args, "LP-FT", unit))
        assert (flags.language, flags.seed, flags.model) == (unit, unit, model)
    assert reproduce.encoder_of(reproduce.parse_args(["--out", "x"]), 2) == "./encoders/2"  # no name of the hub
    assert not reproduce.leaves(args, "encoder-2", made["encoder-2"]).exists()
    make_encoder(tmp_path / "encoders" / "2")
    assert reproduce.leaves(args, "encoder-2", made["encoder-2"]).exists()


def test_what_the_draw_of_one_unit_lacks_is_refused_before_the_first_run(tmp_path, capsys):
    """Each unit draws with its own seed; an encoder that is not made yet does not matter."""
    command = ["--languages", "3", "--rates", "1", "--out", str(tmp_path / "x"), "--list", "--ntk"]
    assert reproduce.main([*command, "20"]) == 2 and "drawn with seed 0 have 4 of" in capsys.readouterr().err
    assert reproduce.main([*command, "0", "--data", "tiny-30", "--max-train", "20"]) == 0  # seed 37 would have 3 of one
    assert reproduce.main([*command, "0", "--data", "tiny-30", "--max-train", "17"]) == 2
    assert "has 4" in capsys.readouterr().err


def test_without_the_packages_of_the_lab_one_line_says_how_to_get_them(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import importlib.util as u\nfind = u.find_spec\n"
                                               "u.find_spec = lambda name: None if name == 'markdown' else find(name)\n")
    done = subprocess.run([sys.executable, "-m", "lab.reproduce", "--report"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "markdown; pip install -r requirements-dev.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_killed_reproduction_goes_on_and_repeats_nothing(random_folder, tmp_path):
    """SIGKILL in the second run: it ends with its parent; the first stays as it is, the second goes on."""
    words = ["--model", str(random_folder), "--data", str(write_data(tmp_path / "data")), "--seeds", "2", "--jobs", "1",
             "--ntk", "0", "--out", str(tmp_path / "out")]
    args = reproduce.parse_args(words)
    planned = reproduce.main_runs(args, dict.fromkeys(runs.METHODS, "1e-3"))
    planned = {"LP-0": planned["LP-0"], "FT-1": [*planned["FT-1"], "--epochs", "40"]}  # the second takes seconds
    (args.out / "runs").mkdir(parents=True)
    code = (f"from lab import reproduce\nargs = reproduce.parse_args({words!r})\n"
            f"reproduce.run_all(args, {planned!r}, 'runs')")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    first, second = (args.out / "runs" / name for name in planned)
    deadline = time.monotonic() + 120
    while not (second / "config.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    while True:  # until the run of the parent that was killed has let its folder go
        try:
            lock_folder(second).release()
            break
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert (first / "result.json").is_file() and not (second / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert reproduce.run_all(args, planned, "runs") == {}
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert (second / "result.json").is_file()
    with pytest.raises(ValueError, match="made with --max-length 128; now it would be with 64; choose another --out"):
        reproduce.refuse_other_flags(args, {name: [*flags, "--max-length", "64"] for name, flags in planned.items()})


def write_data(folder, rows="good\tyes\nbad\tno\n" * 40):
    folder.mkdir()
    for split in ("train", "val", "test"):
        (folder / f"{split}.tsv").write_text("text\tlabel\n" + rows)
    return folder


def test_a_run_that_fails_names_its_log(tmp_path):
    args = reproduce.parse_args(["--jobs", "1", "--out", str(tmp_path)])
    (tmp_path / "runs").mkdir()
    failed = reproduce.run_all(args, {"bad": ["--lr", "-1"]}, "runs")
    assert failed["bad"] == f"--lr is -1.0; expected a number above 0 (all it said: {tmp_path}/runs/bad.log)"


@pytest.mark.parametrize("words", [["--seed", "5"], ["--method=ft"], ["--lr", "1e-3"], ["--lora"], ["--languages", "0"]])
def test_a_flag_that_every_run_has_of_its_own_is_refused(words, tmp_path, capsys):
    """--seed for --seeds would make all units one and the same, without any chance."""
    with pytest.raises(SystemExit) as ended:
        reproduce.parse_args([*words, "--out", str(tmp_path / "x")])
    assert ended.value.code == 2 and words[0].split("=")[0] in capsys.readouterr().err


def test_a_single_rate_that_changed_is_not_the_old_one(made_up_runs, tmp_path, capsys):
    """Without tuning, too, runs made at another rate are refused, not passed off as those of the new one."""
    command = ["--languages", "2", "--scales", "1", "--out", str(tmp_path / "x")]
    assert reproduce.main([*command, "--rates", "1"]) == 0
    assert reproduce.main([*command, "--rates", "3"]) == 2
    assert "was made with --lr" in capsys.readouterr().err


def test_wrong_flags_end_before_the_first_run(tmp_path, capsys):
    for flags, said in ((["--ntk", "300"], "--ntk is 300"), (["--max-length", "3"], "--max-length is 3"),
                        (["--languages", "1"], "--languages is 1"), (["--langauges", "3"], "unrecognized arguments"),
                        (["--seeds", "3"], "--seeds has no effect: the units of --data tiny are languages"),
                        (["--model", "x"], "--model has no effect"), (["--rates", "1", "-1"], "--rates are 1 -1")):
        with pytest.raises(SystemExit) as end:
            reproduce.main([*flags, "--out", str(tmp_path / "x")])
        assert end.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_data_that_a_run_would_refuse_are_refused_before_the_first(random_folder, tmp_path, capsys):
    """A folder without test, too few of a class for some seed's kernel, no such model: nothing is begun."""
    data, few = write_data(tmp_path / "data"), tmp_path / "few"
    write_data(few, "good\tyes\nbad\tno\n" * 6 + "good\tyes\n" * 40)
    (tmp_path / "no-test").mkdir()
    for name in ("train", "val"):
        (tmp_path / "no-test" / f"{name}.tsv").write_text((data / f"{name}.tsv").read_text())
    model = ["--model", str(random_folder)]
    for flags, said in ((["--data", str(tmp_path / "no-test"), *model], "has no test split"),
                        (["--data", str(few), "--ntk", "20", *model], "drawn with seed"),
                        (["--data", "nothing"], "no such folder"),
                        (["--data", str(data), "--model", str(tmp_path / "no")], "no such"),
                        (["--data", str(data), *model, "--max-length", "600"], "has positions for 128 tokens"),
                        (["--data", str(data), "--max-train", "2", "--ntk", "0", *model], "every class needs samples")):
        assert reproduce.main([*flags, "--out", str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "x").exists()
    reproduce.check_data(reproduce.parse_args(["--data", str(data), *model, "--ntk", "30"]))


def test_a_class_that_only_a_tuning_seed_would_miss_is_found_before_the_first_run(random_folder, tmp_path, capsys):
    rows = {seed: set(draw(range(90), 40, seed)) for seed in (0, 1, *reproduce.TUNING_UNITS)}
    rare = (rows[0] & rows[1]) - rows[101]
    data = write_data(tmp_path / "data")
    (data / "train.tsv").write_text("text\tlabel\n" + "".join(
        f"good\t{'no' if i in rare else 'yes'}\n" for i in range(90)))
    flags = ["--data", str(data), "--max-train", "40", "--model", str(random_folder), "--ntk", "0", "--seeds", "2"]
    assert reproduce.main([*flags, "--out", str(tmp_path / "x")]) == 2
    assert "the 40 training samples drawn with seed 101 have no no" in capsys.readouterr().err
    reproduce.check_data(reproduce.parse_args([*flags, "--rates", "1"]))  # no tuning: that seed is not drawn


def test_scaled_runs_are_those_of_fig_3_with_the_chosen_rates():
    args = reproduce.parse_args(["--languages", "2"])
    rates = {"FT": "7e-4", "LoRA": "1e-3", "LP-FT": "2e-4", "LP-LoRA": "1e-3"}
    planned = reproduce.main_runs(args, rates)
    assert len(planned) == 5 * 2 + 2 * 7 * 2 and "FT-scale1-1" not in planned
    parsed = train.parse_args(planned["FT-scale0.1-1"])
    assert (parsed.head_scale, parsed.lr, parsed.seed, parsed.method) == (0.1, 7e-4, 1, "ft")
    assert train.parse_args(planned["FT-1"]).lr == 7e-4 and train.parse_args(planned["LP-FT-0"]).lr == 2e-4
    few = reproduce.main_runs(reproduce.parse_args(["--scales", "1", "1.0000001"]), rates)
    assert not any("scale" in run for run in few) and runs.scales_of(few) == [1.0]
    assert runs.scales_of(planned) == [0.1, 0.5, 1, 2, 5, 10, 50, 100] and runs.scaled("FT", 1.0) == "FT"


def test_another_folder_of_the_same_name_is_not_the_same_data(tmp_path, monkeypatch):
    """The flags are the same words; the run says where it read."""
    for place in ("a", "b"):
        (tmp_path / place / "mine").mkdir(parents=True)
    args = reproduce.parse_args(["--data", "mine", "--out", str(tmp_path / "out")])
    flags, run = reproduce.common_flags(args, "LP", 1), tmp_path / "out" / "runs" / "LP-1"
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    (run / "config.json").write_text(json.dumps(configuration(train.parse_args(flags))))
    reproduce.refuse_other_flags(args, {"LP-1": flags})
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ValueError, match=f"made with --data {tmp_path}/a/mine.*choose another --out"):
        reproduce.refuse_other_flags(args, {"LP-1": flags})


def test_two_commands_do_not_write_to_one_folder(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert reproduce.main(["--out", str(tmp_path)]) == 2 and "holds something else" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    lock = lock_folder(tmp_path)
    assert reproduce.main(["--out", str(tmp_path)]) == 2
    assert "another process that is still running" in capsys.readouterr().err
    lock.release()
    assert reproduce.main(["--report", "--out", str(tmp_path)]) == 2 and "holds no plan.json" in capsys.readouterr().err


def test_an_interrupted_run_is_resumed_and_not_begun_again(tmp_path, monkeypatch):
    """A line of the list begins the run, goes on with one that is begun, and leaves one that is done; one thread."""
    args, run, python = reproduce.parse_args(["--out", str(tmp_path)]), tmp_path / "runs" / "one", tmp_path / "python"
    run.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $PYTHONPATH $*"\n')
    python.chmod(0o755)
    monkeypatch.setattr(reproduce.sys, "executable", str(python))
    monkeypatch.setattr(reproduce, "ROOT", Path("/x y"))

    def said(name, flags):
        line = reproduce.shell_line(args, name, flags)
        return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True,
                              env={"PYTHONPATH": "/mine", "PATH": os.environ["PATH"]}).stdout

    for file, expected in (("lock", f"1 /mine /x y/train.py --seed 1 --out {run}\n"),
                           ("config.json", f"1 /mine /x y/train.py --resume {run}\n"), ("result.json", "")):
        (run / file).write_text("{}")
        assert said("one", ["--seed", "1"]) == expected
    flags = ["--seed", "1", "--out", str(tmp_path / "e")]
    assert said("encoder-1", flags) == f" /x y:/mine -m lab.pretrain {' '.join(flags)}\n"
    make_encoder(tmp_path / "e")
    assert said("encoder-1", flags) == ""


def test_a_run_that_outlived_its_parent_is_refused_and_nothing_begun(tmp_path):
    """lab.reproduce was killed, train.py was not: a tuning run that is not done would be taken for a failed one."""
    args, run = reproduce.parse_args(["--out", str(tmp_path)]), tmp_path / "runs" / "two"
    run.mkdir(parents=True)
    lock = lock_folder(run)
    with pytest.raises(ValueError, match="two: another process that is still running uses it"):
        reproduce.run_all(args, {"one": [], "two": []}, "runs")
    assert [*(tmp_path / "runs").glob("*.log")] == []
    lock.release()


def test_what_another_process_has_made_meanwhile_is_not_made_again(tmp_path, monkeypatch):
    """Two commands that share encoders: the second encoder appears while the first is made."""
    (tmp_path / "runs").mkdir()
    started, args = [], reproduce.parse_args(["--jobs", "1", "--out", str(tmp_path)])

    def start(args, name, flags):
        started.append(name)
        for unit in ("1", "2"):
            make_encoder(tmp_path / unit)
        return ended(0)

    monkeypatch.setattr(reproduce, "start", start)
    commands = {f"encoder-{unit}": ["--seed", unit, "--out", str(tmp_path / unit)] for unit in ("1", "2")}
    assert reproduce.run_all(args, commands, "encoders") == {} and started == ["encoder-1"]


def test_the_last_error_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert runs.last_error(log) is None
    log.write_text("train.py: error: one\nsome progress\ntrain.py: error: two\nmore\n")
    assert runs.last_error(log) == "two"


def test_an_interruption_ends_the_run_that_is_going_and_begins_no_other(tmp_path, monkeypatch):
    """And waits for its end, so that the same command can go on at once."""
    (tmp_path / "runs").mkdir()
    code = "import os, signal, sys, time\n" \
           "signal.signal(signal.SIGTERM, lambda *some: (time.sleep(0.3), open('ended', 'w'), os._exit(130)))\n" \
           "open(sys.argv[1], 'w')\nfor _ in range(500):\n    time.sleep(0.02)"

    class Process(subprocess.Popen):
        is_alive, join = (lambda self: self.poll() is None), subprocess.Popen.wait
        exitcode = property(subprocess.Popen.poll)

    monkeypatch.setattr(reproduce, "start", lambda args, name, flags: Process(
        [sys.executable, "-c", code, name], cwd=tmp_path))

    def ctrl_c(seconds):
        if (tmp_path / "one").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.time, "sleep", ctrl_c)
    args = reproduce.parse_args(["--jobs", "1", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_all(args, {"one": [], "two": [], "three": []}, "runs")
    assert (tmp_path / "ended").exists() and not (tmp_path / "two").exists()


# ---------------------------------------------------------------------------- the whole command, its runs made up


def make_encoder(folder):
    """What lab.pretrain leaves, as far as lab.reproduce looks at it: the language is written last."""
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text('{"language": 1}')


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """start sets this for its processes; other tests are to have what they had."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def ended(status):
    return SimpleNamespace(is_alive=lambda: False, exitcode=status, terminate=lambda: None, join=lambda: None)


@pytest.fixture
def made_up_runs(monkeypatch):
    """start writes made-up results instead of training; ({name: flags} of what it was asked for, names that fail)."""
    asked, results, failing = {}, made_up(units=range(3)), set()

    def start(args, name, flags):
        asked[name] = flags
        if name in failing:
            (args.out / "runs" / f"{name}.log").write_text("train.py: error: the loss became infinite\n")
            return ended(1)
        if name.startswith("encoder-"):
            make_encoder(flags[-1])
            return ended(0)
        parsed, result = train.parse_args(flags), results.get(name, {})
        if name.startswith("tune"):  # the larger the rate the better
            result = {"metric": "accuracy", "accuracy": {}, "val_accuracy": parsed.lr}
        result = {"metric": "accuracy", "val_accuracy": 0.5, "accuracy": {"test": 0.5}} | result
        folder = args.out / "runs" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.json").write_text(json.dumps(configuration(parsed)))
        return ended(0)

    monkeypatch.setattr(reproduce, "start", start)
    monkeypatch.setattr(reproduce.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(reproduce, "check_data", lambda args: None)
    monkeypatch.setattr(figures, "make_all", lambda *some: ({}, []))
    return asked, failing


def interrupted(*some):
    raise KeyboardInterrupt


def test_the_whole_command(made_up_runs, tmp_path, capsys, monkeypatch):
    """Encoders, tuning, every other run at the chosen rate, the report; the second time nothing but the report."""
    asked, _ = made_up_runs
    out = tmp_path / "my folder"
    command = ["--languages", "3", "--epochs", "4", "--max-length", "32", "--scales", "0.1", "10", "--out", str(out)]
    assert reproduce.main(command) == 0
    assert len(asked) == 5 + 4 * 3 * 2 + 5 * 3 + 2 * 2 * 3
    ft, default = train.parse_args(asked["FT-2"]), train.parse_args(["--method", "ft"]).lr
    assert ft.lr == pytest.approx(3 * default) and (ft.epochs, ft.max_length, ft.ntk) == (4, 32, 100)
    assert train.parse_args(asked["LP-FT-scale0.1-2"]).lr == pytest.approx(3 * train.parse_args([]).lr)
    said = capsys.readouterr()
    assert "tuning: 100%" in said.err and "1. LP grows the head more than FT: holds" in said.out
    plan = json.loads((out / "plan.json").read_text())
    assert plan["command"].endswith(f"--out '{out}'") and len(plan["tuning"]) == 24  # to be pasted
    asked.clear()
    assert reproduce.main(command) == 0 and not asked
    assert reproduce.main([*command, "--report"]) == 0 and not asked
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "run_all", interrupted)
        assert reproduce.main(command) == 130 and "the same command goes on" in capsys.readouterr().err
    assert reproduce.main([*command[:3], "5", *command[4:]]) == 2  # refused, and the plan is still that of the runs
    assert "choose another --out" in capsys.readouterr().err
    assert json.loads((out / "plan.json").read_text()) == plan


def test_the_list_is_shell_lines_one_stage_after_the_other(made_up_runs, tmp_path, capsys):
    """Encoders, then tuning, then the runs. A line does nothing if its run is done, and goes on if it is begun."""
    command = ["--languages", "2", "--scales", "1", "--out", str(tmp_path / "x")]

    def listed():
        assert reproduce.main([*command, "--list"]) == 0
        return capsys.readouterr().out.splitlines()

    lines = listed()
    assert len(lines) == 4 and "-m lab.pretrain --seed 101" in lines[0]
    for unit in (101, 102, 0, 1):
        make_encoder(tmp_path / "encoders" / str(unit))
    assert len(listed()) == 24 and "--max-test 0" in listed()[-1]
    assert reproduce.main(command) == 0
    capsys.readouterr()
    assert listed() == []
    folder = tmp_path / "x" / "runs" / "FT-1"
    for removed, said in (("result.json", "--resume"), ("config.json", "--out")):
        (folder / removed).unlink(missing_ok=True)
        line, = listed()
        echo = line.replace(f"exec {sys.executable} {reproduce.ROOT}/train.py", "echo")
        shell = subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True)
        assert f"{said} {folder}" in shell.stdout
    (folder / "result.json").write_text("{}")
    assert subprocess.run(["sh", "-c", echo], capture_output=True, check=True).stdout == b""


def test_a_run_that_fails_is_named_and_the_others_go_on(made_up_runs, tmp_path, capsys):
    """In tuning its rate is no choice; elsewhere its unit is left out of the report, and the status is 1."""
    asked, failing = made_up_runs
    tuned = [name for name in reproduce.tuning_runs(reproduce.parse_args([])) if name.startswith("tune-FT=")]
    failing |= {tuned[-1], "LoRA-2"}
    command = ["--languages", "3", "--scales", "1", "--out", str(tmp_path / "x")]
    assert reproduce.main(command) == 1
    said = capsys.readouterr()
    assert f"{tuned[-1]} failed: the loss became infinite" in said.out
    assert said.err.splitlines()[-1].startswith("lab.reproduce: error: 2 runs failed")
    text = (tmp_path / "x" / "report.md").read_text()
    assert "Not finished, so left out: LoRA-2 (the loss became infinite)." in text and "a run failed" in text
    assert train.parse_args(asked["FT-1"]).lr == pytest.approx(train.parse_args(["--method", "ft"]).lr)
    assert json.loads((tmp_path / "x" / "tables.json").read_text())["units"] == [0, 1]
    failing.clear()
    asked.clear()
    assert reproduce.main(command) == 0 and [*asked] == ["LoRA-2"]  # the rate stays, or nothing would fit it
    failing |= {"LoRA-0", "LoRA-1"}
    assert reproduce.main(["--rates", "1", "--languages", "2", "--out", str(tmp_path / "y")]) == 1
    assert "no report" in capsys.readouterr().err


@pytest.mark.parametrize("file, content, said", [
    ("runs/FT-1/result.json", "", "FT-1/result.json: not a JSON file"),
    ("runs/FT-1/result.json", "[]", "FT-1/result.json: expected a JSON object"),
    ("runs/FT-1/result.json", "{}", "FT-1/result.json: not what train.py writes"),
    ("runs/LP-0/config.json", "{", "LP-0/config.json: not a JSON file"),
    ("runs/LP-0/result.json", '{"metric": "accuracy", "val_accuracy": 1, "accuracy": {"web": 1}}', "no test split"),
    ("plan.json", "{}", "plan.json: not what lab.reproduce writes"),
    ("plan.json", None, "holds no plan.json"),
])
def test_a_damaged_file_is_one_line_with_its_name(made_up_runs, tmp_path, capsys, file, content, said):
    assert reproduce.main(["--rates", "1", "--scales", "1", "--languages", "2", "--out", str(tmp_path / "x")]) == 0
    (tmp_path / "x" / file).unlink()
    if content is not None:
        (tmp_path / "x" / file).write_text(content)
    capsys.readouterr()
    assert reproduce.main(["--report", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_the_map_has_a_point_for_each_rate_method_and_language(made_up_runs, tmp_path, monkeypatch):
    """OOD is the mean of the other domains; LP has no rate; a run that is missing leaves its point out.

    The first measure of each picture is drawn for every number of epochs, the others for the first.
    """
    asked, failing = made_up_runs
    command = ["--languages", "2", "--tasks", "tiny", "--epochs", "10", "40", "--out",
               str(tmp_path / "map")]
    failing.add("tiny.FT=0.001x10-1")
    drawn = {}
    monkeypatch.setattr(lab_map, "save", lambda path, draw, *what: (
        drawn.update({path.name: [axis.get_ylabel() for axis in draw(*what).axes if axis.get_ylabel()]}),
        figures.save(path, draw, *what)))
    results, one = made_up(units=range(2)), reproduce.start

    def start(args, name, flags):
        process = one(args, name, flags)
        if name not in failing and not name.startswith("encoder-"):
            method, unit = name.split(".", 1)[1].rsplit("-", 1)
            method = method.split("=")[0]
            (args.out / "runs" / name / "result.json").write_text(json.dumps(results[f"{method}-{unit}"]))
        return process

    reproduce.start = start
    assert lab_map.main(command) == 1
    found = json.loads((tmp_path / "map" / "map.json").read_text())["epochs"]
    assert found["40"]["tiny"]["FT"]["rates"] == [1e-4, 3e-4, 1e-3, 3e-3]
    found = found["10"]["tiny"]
    assert found["FT"]["rates"] == [1e-4, 3e-4, 3e-3] and found["LP-FT"]["rates"] == [1e-4, 3e-4, 1e-3, 3e-3]
    assert found["LP"]["rates"] == [""] and len(found["LP"]["ood"][0]) == 2
    expected = [statistics.mean(results[f"LP-FT-{u}"]["accuracy"][s] for s in ("web", "news")) for u in (0, 1)]
    assert found["LP-FT"]["ood"][2] == pytest.approx(expected)
    for measure, *keys in (("id", "accuracy", "test"), ("diff", "features", "test", "diff"),
                           ("temperature", "temperature"), ("ece", "calibration", "test", "ece")):
        assert found["LP-FT"][measure][2] == [runs.look_up(results[f"LP-FT-{u}"], *keys) for u in (0, 1)]
    last = train.parse_args(asked["tiny.LP-LoRA=0.005x40-1"])
    assert (last.lr, last.epochs) == (5e-3, 40) and [*asked].count("tiny.LP-1") == 1
    assert drawn == {"map": ["OOD accuracy\n10 epochs", "OOD accuracy\n40 epochs", "ID accuracy\n10 epochs"],
                     "map-mechanism": ["Diff(F)\n10 epochs", "Diff(F)\n40 epochs", "temperature T\n10 epochs",
                                       "ECE\n10 epochs"]}
    for file in ("map.png", "map-mechanism.svg"):
        assert (tmp_path / "map" / file).stat().st_size > 5000
    failing.clear()
    asked.clear()
    assert lab_map.main(command) == 0 and [*asked] == ["tiny.FT=0.001x10-1"]


def test_the_map_takes_no_folder_of_something_else(made_up_runs, tmp_path, capsys):
    (tmp_path / "train.csv").write_text("text,label\n")
    assert lab_map.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab.map: error: --out") and "holds something else" in error
    with pytest.raises(SystemExit) as ended:
        lab_map.main(["--languages", "1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "lab.map: error: --languages is 1; expected 2 to 100\n"
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


def test_the_maps_rows_show_their_own_epochs_on_one_scale():
    """The scale is that of the values: with two languages a band is twelve times as wide as their difference."""
    def of_epochs(shift):
        curves = {"rates": [1e-4, 1e-3], "ood": [[0.5, 0.6 + shift], [0.7, 0.8]], "id": [[1.0, 0.9], [1.0, 0.9]]}
        lp = {"rates": [""], "ood": [[0.6, 0.6]], "id": [[0.9, 0.9]]}
        return {"tiny-30": {}, "tiny": {"LP": lp, "FT": curves}}

    figure = lab_map.draw({10: of_epochs(0), 40: of_epochs(0.3)}, lab_map.MEASURES["map"])
    axes = np.reshape(figure.axes, (3, 2))
    assert [axis.get_title() for axis in axes[0]] == ["30 labels", "60 labels"]
    thick = [[line for line in row[1].lines if line.get_label() == "FT"][0].get_ydata().tolist() for row in axes]
    assert np.array(thick) == pytest.approx(np.array([[0.55, 0.75], [0.7, 0.75], [0.95, 0.95]]))
    limits = [row[1].get_ylim() for row in axes]
    assert limits[0] == limits[1] == pytest.approx((0.48, 0.92)) and limits[2] == pytest.approx((0.895, 1.005))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LP", "FT"]  # the first panel is empty
    one = lab_map.draw({10: of_epochs(0)}, lab_map.MEASURES["map"])
    assert [axis.get_ylabel() for axis in one.axes] == ["OOD accuracy", "", "ID accuracy", ""]
    lab_map.draw({10: {"tiny": {}}}, lab_map.MEASURES["map"])  # where every run has failed
    no_t = {"rates": [1e-4], "diff": [[1, 2]], "temperature": [[None, None]], "ece": [[0.1, 0.2]]}
    lab_map.draw({10: {"tiny": {"FT": no_t}}}, lab_map.MEASURES["map-mechanism"])  # where no T could be fitted


def test_the_map_takes_ten_epochs_and_passes_on_the_number_of_processes(monkeypatch):
    seen = []
    monkeypatch.setattr(lab_map, "make_map", seen.append)
    assert lab_map.main(["--jobs", "3"]) == lab_map.main([]) == 0
    assert seen[0].jobs == 3 and seen[1].epochs == [10] and seen[1].tasks == ["tiny-30", "tiny", "tiny-120"]
