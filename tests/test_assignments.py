"""The course: its tests know right from wrong, its cuts are clean, and every hand-in gets an answer."""

import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from assignments import __main__ as command
from assignments import check, graders, grading
from assignments.tasks import ROOT, TASKS, splice


@pytest.fixture(scope="module")
def open_a4(tmp_path_factory):
    """A student's folder in which a4 is open."""
    folder = tmp_path_factory.mktemp("course") / "mine"
    assert command.main(["cut", "a4", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_the_project_scores_all_the_cut_nothing_and_wrong_solutions_are_named(task):
    assert check.problems_of(task, most=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_wrong_solution_and_95_percent_of_mutants_are_caught(task):
    assert check.problems_of(task) == []
    count, alive = check.survivors_of(task)
    assert len(alive) <= 0.05 * count, alive


@pytest.mark.parametrize("place, by, tolerance", [((0, 0), 1.0, 1e-5), ((7, 5), 1e-3, 1e-5), ((5, 2), 1e-7, 1e-9),
                                                  ((3, 1), torch.nan, 1e-5)])
def test_a_message_shows_an_entry_that_differs(place, by, tolerance):
    """Wherever in a tensor the difference is, and however small: what is expected and found never look the same."""
    expected = torch.arange(48.0).double().view(8, 6) / 7 + 1
    found = expected.clone()
    found[place] += by
    with pytest.raises(graders.Wrong) as caught:
        graders.expect(found, expected, "f(x)", tolerance=tolerance)
    of_first, of_second = (line[9:] for line in str(caught.value).splitlines()[1:3])
    assert f"at {list(place)}, the first of 1 that differ" in of_first
    assert float(of_first.split()[0]) == pytest.approx(float(expected[place]), rel=1e-5)
    assert of_first.split(" at ")[0] != of_second.split(" at ")[0] and f"at {list(place)}, the first" in of_second


@pytest.mark.parametrize("found, expected", [
    (1 / 3, 1 / 3 + 1e-8), (torch.tensor(1 / 3).double(), 1 / 3), (3, 3 + 1e-10), ("x" * 300, "x" * 299 + "y"), (None, torch.zeros(2)),
    (torch.zeros(2, 8), torch.zeros(8, 2)), ((torch.zeros(2), 1), torch.zeros(2)), ([0.0], torch.zeros(1)), ("0", 0), (torch.nan, 0.0)])
def test_no_message_shows_the_same_twice(found, expected):
    with pytest.raises(graders.Wrong) as caught:
        graders.expect(found, expected, "f(x)", tolerance=1e-12)
    assert not check.same_twice([{"message": str(caught.value)}])
    assert check.same_twice([{"message": "called   f(x)\nexpected 0.5\nfound    '0.5'"}])


def test_an_open_task_earns_nothing_and_says_where_to_read(open_a4, capsys):
    assert command.main(["grade", "a4", str(open_a4)]) == 1
    said = capsys.readouterr().out
    assert "a4    0 of" in said and "not written yet: a4: fit_temperature is open; see assignments/a4.md" in said


def test_a_folder_that_is_not_there_is_one_line_and_no_grade(tmp_path, capsys):
    assert command.main(["grade", "all", str(tmp_path), str(tmp_path / "ada")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.endswith("ada: no such folder; expected one that holds model.py, lpft.py, ntk.py\n")


def test_a_file_beside_the_students_folders_is_passed_over(open_a4, tmp_path, capsys):
    (tmp_path / "roster.csv").write_text("ada\n")
    assert command.main(["grade", "a4", str(tmp_path / "roster.csv"), str(open_a4)]) == 1
    out, err = capsys.readouterr()
    assert "a4    0 of" in out and err.endswith("roster.csv: a file, not graded\n")


def test_a_copy_holds_the_project_alone_and_does_not_copy_itself(tmp_path, capsys):
    """Whatever else lies in the project's folder, other hand-ins too, stays there."""
    (ROOT / "hand-ins-of-a-test").mkdir()
    try:
        assert command.main(["cut", "a4", "--out", str(tmp_path / "copy")]) == 0
    finally:
        (ROOT / "hand-ins-of-a-test").rmdir()
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "README.md", "LICENSE", "requirements.txt", "requirements-dev.txt", "model.py", "lpft.py", "ntk.py", "train.py",
        "predict.py", "data", "plumbing", "lab", "assignments", "benchmarks"}
    assert command.main(["cut", "a4", "--out", str(ROOT / "lab" / "mine" / "copy")]) == 2
    assert "lies in a folder that is copied" in capsys.readouterr().err and not (ROOT / "lab" / "mine").exists()


def test_a_solved_task_earns_all_and_other_files_do_not_count(open_a4, tmp_path, capsys):
    """From the student's file come the functions of the task alone; whatever else is changed, is ignored."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    source = (ROOT / "lpft.py").read_text() + "\nraise SystemExit('this is not run')\n"
    (theirs / "lpft.py").write_text(source)
    (theirs / "model.py").write_text("nonsense(")
    table, results, junit = (tmp_path / name for name in ("points.csv", "results.json", "junit.xml"))
    assert command.main(["grade", "a4", str(theirs), "--seed", "7", "--gradescope", str(results), "--junit", str(junit)]) == 0
    assert "Then " in capsys.readouterr().out
    found = json.loads(results.read_text())
    assert found["score"] == sum(test["max_score"] for test in found["tests"]) > 0
    assert {test["status"] for test in found["tests"]} == {"passed"}
    suite, = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "0" and int(suite.get("tests")) == len(found["tests"])
    assert command.main(["grade", "a4", str(theirs), str(open_a4), "--csv", str(table)]) == 1
    rows = [*csv.DictReader(table.open())]
    assert [int(row["total"]) for row in rows] == [found["score"], 0]


@pytest.mark.parametrize("old, new, said", [
    ("    low, high = 0.0, 1.0\n", "    import sklearn\n    low, high = 0.0, 1.0\n", "imports sklearn; allowed:"),
    ("    low, high = 0.0, 1.0\n", "    low = open('x')\n", "uses open, which no solution needs"),
    ("    low, high = 0.0, 1.0\n", "    try:\n        low = 0\n    except ValueError:\n        pass\n", "errors are not to be hidden"),
    ("def fit_temperature(", "def fit_temperatur(", "no function fit_temperature"),
    ("def fit_temperature(", "def fit_temperature((", "is no Python: line"),
])
def test_what_cannot_be_graded_is_named(old, new, said):
    source = (ROOT / "lpft.py").read_text()
    assert old in source
    spliced, wrong = splice("a4", source.replace(old, new))
    assert spliced is None and said in wrong


def test_calling_the_fast_engine_is_not_the_definition():
    source = (ROOT / "ntk.py").read_text()
    start = source.index("    trained = {name: p.detach() for name, p in model.named_parameters()")
    cheat = source[:start] + "    return empirical_ntk(model, train_batches, test_batches)\n" + source[start:]
    assert "this is the project's fast engine" in splice("a6", cheat)[1]


def test_an_error_names_the_line_of_the_student_as_it_stands_in_their_file():
    """Also where a file of the project raises it, or the test that uses the result; the helper moves when spliced."""
    source = (ROOT / "ntk.py").read_text()
    first = "    R, r, (out, width) = sum(map(len, a)), g[0].shape[1], layer.weight.shape\n"
    helper = "def helper(kernel, J):\n    exact.add_gram(kernel, J)\n\n\n"
    theirs = source.replace(first, "    helper(kernel, torch.ones(9, 2))\n").replace("def linear_kernel", helper + "def linear_kernel")
    theirs = theirs.replace("def initial_deltas", "\n\ndef initial_deltas").replace("return torch.einsum(\"nrth", "return  # einsum(\"nrth")
    spliced, wrong = splice("a7", theirs)
    results = grading.run_tests("a7", spliced, 0, theirs=theirs)
    assert wrong is None and [r["earned"] for r in results[:4]] == [0, 0, 0, 0]
    lines, said = theirs.splitlines(), results[0]["message"].splitlines()
    for word, text, name in (("at     ", "helper(kernel, torch.ones(9, 2))", "linear_kernel"), ("inside ", "exact.add_gram(kernel, J)", "helper")):
        number = next(i for i, line in enumerate(lines, 1) if line.strip() == text)
        assert f"{word}  line {number} of ntk.py, in {name}: {text}" in said
    assert said[-1].startswith("inside   line ") and "of exact.py, in add_gram: kernel[start:" in said[-1]


def test_a_solution_that_never_ends_still_gets_a_result(open_a4, tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "SECONDS", 4)
    folder = tmp_path / "slow"
    folder.mkdir()
    source = (open_a4 / "lpft.py").read_text()
    (folder / "lpft.py").write_text(source.replace("    raise NotImplementedError(", "    while True:\n        pass\n    raise ("))
    results = grading.grade("a4", folder)
    assert len(results) == len(grading.tests_of("a4")) and all("not finished after 4 seconds" in r["message"] for r in results)


def test_the_cut_folder_stands_alone(open_a4):
    """No history, no solutions, no dead links; train.py says which task is open, and works once it is solved."""
    assert not any((open_a4 / name).exists() for name in (".git", "tests", "assignments/graders/variants"))
    assert not [*(open_a4 / "benchmarks").glob("*.py")]
    links = re.findall(r"\]\(([\w./-]+)[)#]", (open_a4 / "README.md").read_text(encoding="utf-8"))
    assert links[0] == "assignments/a4.md" and len(links) > 8 and all((open_a4 / link).exists() for link in links)
    run = [sys.executable, "train.py", "--method", "lp", "--out", "run"]
    done = subprocess.run(run, cwd=open_a4, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("train.py: error: a4: fit_temperature is open")
    solved = open_a4.with_name("solved")
    shutil.copytree(open_a4, solved)
    shutil.copy(ROOT / "lpft.py", solved)
    done = subprocess.run([*run[:-1], "other"], cwd=solved, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_gradescope_folder_has_what_the_harness_calls(tmp_path):
    assert command.main(["gradescope", "a4", "--out", str(tmp_path / "box")]) == 0
    run = (tmp_path / "box" / "run_autograder").read_text()
    assert "grade a4 /autograder/submission" in run and "/autograder/results/results.json" in run
    assert (tmp_path / "box" / "lpft" / "assignments" / "graders" / "a4.py").is_file()


def test_the_example_of_a7_gives_what_the_sheet_says(capsys):
    text = (ROOT / "assignments" / "a7.md").read_text(encoding="utf-8")
    start = text.index("    import ntk, torch")
    exec(textwrap.dedent(text[start:text.index("\n\n", start)]), {})
    assert "[[13., -1.],\n        [-1.,  2.]]" in capsys.readouterr().out and "The kernel is [[13, -1], [-1, 2]]" in text


def test_where_the_engine_fails_in_a7_the_kernels_above_are_named_first():
    wrong = importlib.import_module("assignments.graders.variants.a7").WRONG["the variance divided by h - 1, not by h"]
    message = check.results_of("a7", wrong)[-1]["message"].splitlines()
    assert message[1].startswith("first    one of your three layer kernels is wrong") and "Does the model" not in " ".join(message)


def test_each_sheet_says_what_to_do_and_where_to_look_next():
    for task in TASKS:
        text = Path(ROOT / "assignments" / f"{task}.md").read_text(encoding="utf-8")
        assert f"python -m assignments grade {task}" in text and "\nThen " in text and text.startswith(f"# {task} ")
        assert command.next_look(task).endswith(".") and "--" not in command.next_look(task).split("`python train.py")[0]
        assert all(name.split(".")[-1] in text for name in TASKS[task].functions)


def test_check_without_a_task_is_of_all(monkeypatch):
    seen = []
    monkeypatch.setattr("assignments.check.check", lambda tasks: seen.append(tasks) or 0)
    assert command.main(["check"]) == 0 and command.main(["check", "a4", "a4"]) == 0
    assert seen == [[*TASKS], ["a4"]]
