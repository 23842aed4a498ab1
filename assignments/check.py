"""Prove the course: what is right gets all points, what is cut none, what is wrong is caught and named.

For each task: the project scores all points; the cut scores 0 in it and all in the others; differently
written right solutions score all; each known wrong solution is caught, and named; solutions that are empty,
constant, hide errors or call what they are to replace score 0; of automatic mutants (tests/mutation.py) 95 %
are caught, the rest listed as equivalent with a reason.
"""

import ast
import importlib
import importlib.util
import signal
import textwrap
from contextlib import contextmanager

from tqdm import tqdm

from assignments.grading import run_tests, tests_of
from assignments.tasks import ROOT, TASKS, emptied, functions_of, replace, splice


def pristine(task):
    return (ROOT / TASKS[task].file).read_text(encoding="utf-8")


def total(task):
    return sum(test.points for test in tests_of(task))


def earned(results):
    return sum(result["earned"] for result in results)


@contextmanager
def seconds(limit):
    """TimeoutError in what takes longer, then every second: a mutant may never end, in each of its tests."""
    def stop(*_):
        raise TimeoutError(f"longer than {limit} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def results_of(task, functions, seed=0):
    """The results of a solution, {qualified name: text of the function}, as `grade` has them."""
    source = pristine(task)
    nodes = functions_of(ast.parse(source))
    new = {name: textwrap.indent(textwrap.dedent(text).strip("\n"), " " * nodes[name].col_offset)
           for name, text in functions.items()}
    spliced, wrong = splice(task, replace(source, new))
    if wrong:
        return [{"earned": 0, "message": wrong}]
    with seconds(60):
        return run_tests(task, spliced, seed)


def same_twice(results):
    """The messages in which "expected" and "found" show the same, of which a student learns nothing."""
    def texts(message):
        return [line[9:].strip(" '\"") for word in ("expected ", "found    ") for line in message.splitlines()
                if line.startswith(word)]

    return [r["message"] for r in results if len(texts(r["message"])) > len({*texts(r["message"])})]


def constant(source, name, body):
    """A function with another body."""
    return emptied(source, name, "x").rsplit("raise NotImplementedError", 1)[0] + body + "\n"


def problems_of(task, most=None):
    """What is wrong with the tests: a list of sentences; with `most`, a quick look."""
    variants = importlib.import_module(f"assignments.graders.variants.{task}")
    found, source = [], pristine(task)

    def demand(right, sentence):
        if not right:
            found.append(f"{task}: {sentence}")

    for seed in (0,) if most else (0, 7):
        results = results_of(task, {}, seed)
        demand(earned(results) == total(task), f"the project loses points with seed {seed}: "
               + "; ".join(r["message"] for r in results if r["message"]))
    for other in (task,) if most else TASKS:
        if TASKS[other].file == TASKS[task].file:
            cut = {name: emptied(source, name, task) for name in TASKS[task].functions}
            with seconds(60):
                points = earned(run_tests(other, replace(source, cut), 0))
            demand(points == (0 if other == task else total(other)), f"its cut earns {points} in {other}")
    for name, functions in [*variants.RIGHT.items()][:most]:
        results = results_of(task, functions)
        demand(earned(results) == total(task), f"the right solution '{name}' loses points: "
               + "; ".join(r["message"] for r in results if r["message"]))
    demand(len(variants.RIGHT) >= 2, "fewer than two right solutions")
    demand(len(variants.WRONG) >= 5, "fewer than five known wrong solutions")
    for name, functions in [*variants.WRONG.items()][:most]:
        results = results_of(task, functions)
        demand(earned(results) < total(task), f"the wrong solution '{name}' gets all points")
        demand(any(name in r["message"] for r in results), f"the wrong solution '{name}' is not named: "
               + "; ".join(r["message"] for r in results if r["message"])[:300])
        demand(not same_twice(results), f"expected and found look the same: {same_twice(results)[:1]}")
    hiding = "try:\n            return 1.0\n        except:\n            pass"
    for what, body in (("empty", "pass"), ("hides errors", hiding), ("None", "return None"),
                       ("zero", "return 0.0"), ("one", "return 1.0"))[:2 if most else None]:
        functions = {name: constant(source, name, body) for name in TASKS[task].functions}
        results = results_of(task, functions)
        demand(earned(results) == 0, f"a solution that is '{what}' earns {earned(results)}")
        demand(not same_twice(results), f"expected and found look the same: {same_twice(results)[:1]}")
    return found


def survivors_of(task):
    """(number of mutants, [those that get all points and are not listed as equivalent])."""
    spec = importlib.util.spec_from_file_location("mutation", ROOT / "tests" / "mutation.py")
    mutation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutation)
    file, functions = TASKS[task].file, TASKS[task].functions
    mutation.TARGETS = {file: (("*",), ())}
    equivalent = importlib.import_module(f"assignments.graders.variants.{task}").EQUIVALENT
    own = tuple(f"{name}." for name in functions)
    mutants = [m for m in mutation.mutants_of(file) if f"{m[1]}.".startswith(own)
               and (m[3], m[6]) not in equivalent]
    alive = []
    for mutant in tqdm(mutants, desc=task, leave=False):
        try:
            with seconds(30):
                results = run_tests(task, mutation.broken(mutant).decode(), 0)
        except (TimeoutError, SyntaxError):
            continue
        if earned(results) == total(task) or same_twice(results):
            alive.append(f"{task}: line {mutant[2]}, {mutant[3]!r} with {mutant[6]!r}")
    return len(mutants), alive


def check(tasks):
    """Print what is wrong; status 1 if anything is."""
    failed = False
    for task in tasks:
        found = problems_of(task)
        count, alive = survivors_of(task)
        caught = 100 * (count - len(alive)) / count
        said = f"{count - len(alive)} of {count} mutants caught ({caught:.0f} %), {len(found)} problems"
        print("\n".join([*found, *alive, f"{task}  {said}"]))
        failed = failed or bool(found) or caught < 95
    return int(failed)
