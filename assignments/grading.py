"""Running the tests of a task on a student's file: here, in a process of its own, for Gradescope, as JUnit.

The task's functions come from the student's file, everything else from this project (tasks.splice). Results
are dicts {name, points, earned, message}; there is always one for each test, whatever happens.
"""

import ast
import importlib
import json
import linecache
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from xml.etree import ElementTree

from assignments.tasks import ROOT, TASKS, functions_of, span, splice

SECONDS = 120  # for a task


def tests_of(task):
    module = importlib.import_module(f"assignments.graders.{task}")
    tests = [test for test in vars(module).values() if callable(test) and hasattr(test, "points")]
    if not tests:
        raise RuntimeError(f"{task} has no tests")
    return tests


def nothing(task, why):
    return [{"name": test.__name__, "points": test.points, "earned": 0, "message": why}
            for test in tests_of(task)]


def run_tests(task, source, seed, report=lambda results: None, theirs=None):
    """The results for the source of a spliced file, in this process; `theirs` is the file as handed in."""
    import torch

    name, results = TASKS[task].file.removesuffix(".py"), []
    before, module = sys.modules.get(name), types.ModuleType(name)
    module.__file__ = str(ROOT / TASKS[task].file)
    sys.modules[name] = module  # where dataclasses look, and what its own tests import
    try:
        exec(compile(source, module.__file__, "exec"), module.__dict__)
        for number, test in enumerate(tests_of(task)):
            torch.manual_seed(seed)
            rng = torch.Generator().manual_seed(1000 * seed + number)
            message = failure(test, module, rng, task, source, theirs or source)
            rule = " ".join((test.__doc__ or "").split())
            results.append({"name": test.__name__, "points": test.points,
                            "earned": 0 if message else test.points,
                            "message": f"rule     {rule}\n{message}" if message else ""})
            report(results)
    finally:
        sys.modules.pop(name)
        if before:
            sys.modules[name] = before
    return results


def failure(test, module, rng, task, source, theirs):
    """What the student reads, or None."""
    from assignments.graders import Wrong

    try:
        test(module, rng)
    except Wrong as error:
        return str(error)
    except Exception as error:  # whatever a student's code does
        if isinstance(error, NotImplementedError) and "see assignments/" in str(error):
            return f"not written yet: {error}"
        what = " ".join(str(error).split())[:400]
        lines = [f"raised   {type(error).__name__}: {what}", *places(error, module, task, source, theirs)]
        return "\n".join(lines + getattr(error, "__notes__", []))


def places(error, module, task, source, theirs):
    """Where an error was raised: the last line of the task's functions, as handed in, and what that called.

    Where none of these was running, the line of the test that called, or used, what they had given before.
    """
    spliced, handed_in = functions_of(ast.parse(source)), functions_of(ast.parse(theirs))
    at = in_file = last = None
    theirs_runs = False
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, function = Path(frame.f_code.co_filename), frame.f_code.co_qualname.partition(".<locals>")[0]
        here = file == Path(module.__file__)  # the spliced source, which is nowhere on the disk
        text = (source.splitlines()[line - 1] if here else linecache.getline(str(file), line)).strip()
        if here and function in spliced and function in handed_in:
            line += span(handed_in[function])[0] - span(spliced[function])[0]
        last = f"line {line} of {file.name}, in {function}: {text}"
        theirs_runs = theirs_runs or here and function in TASKS[task].functions
        if here and function in TASKS[task].functions or file.parent.name == "graders" and not theirs_runs:
            at = last
        in_file = last if here else in_file
    inside = [text for text in dict.fromkeys((in_file, last)) if text not in (None, at)]
    return [f"at       {at}", *(f"inside   {text}" for text in inside),
            *["note     it comes of what your functions gave, or did, before"] * (not theirs_runs)]


def grade(task, folder, seed=0):
    """The results for the file of the task in `folder`, in a process with a time limit."""
    path = Path(folder) / TASKS[task].file
    if not path.is_file():
        return nothing(task, f"{path}: no such file")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "results.json"
        command = [sys.executable, "-m", "assignments.grading", task, path.resolve(), str(seed), out]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            why = f"the process ended with status {done.returncode}: {last[:300]}"
        except subprocess.TimeoutExpired:
            why = f"not finished after {SECONDS} seconds"
        results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    return results + nothing(task, why)[len(results):]


def write_gradescope(path, results):
    """results.json as Gradescope reads it: a score and an output for each test."""
    tests = [{"name": f"{task}: {r['name']}", "score": r["earned"], "max_score": r["points"],
              "output": r["message"], "status": "failed" if r["message"] else "passed"}
             for task, of in results.items() for r in of]
    content = {"score": sum(test["score"] for test in tests), "tests": tests}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_junit(path, results):
    """JUnit's XML, a suite for each task."""
    root = ElementTree.Element("testsuites")
    for task, of in results.items():
        failures = str(sum(bool(r["message"]) for r in of))
        suite = ElementTree.SubElement(root, "testsuite", name=task, tests=str(len(of)), failures=failures)
        for r in of:
            case = ElementTree.SubElement(suite, "testcase", classname=task, name=r["name"])
            if r["message"]:
                lines = r["message"].splitlines()
                last = [line for line in lines if not line.startswith(("at ", "inside ", "note "))][-1]
                ElementTree.SubElement(case, "failure", message=last).text = r["message"]
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def main(task, path, seed, out):
    """The process of `grade`: results are written after every test, so that a hang costs the rest alone."""
    theirs = Path(path).read_text(encoding="utf-8", errors="replace")
    source, wrong = splice(task, theirs)
    out = Path(out)

    def report(results):
        out.with_suffix(".tmp").write_text(json.dumps(results), encoding="utf-8")
        out.with_suffix(".tmp").replace(out)

    if wrong:
        report(nothing(task, wrong))
    else:
        import torch

        torch.set_num_threads(1)
        run_tests(task, source, int(seed), report, theirs)


if __name__ == "__main__":
    main(*sys.argv[1:])
