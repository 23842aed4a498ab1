"""The house: what lies where, how long it is, who imports whom. A change that breaks it is too long or misplaced."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ("model.py", "lpft.py", "ntk.py", "train.py")
TOP = {*CORE, "predict.py"}
MODULES = {path.relative_to(ROOT).as_posix(): path for folder in ("", "data", "plumbing", "lab", "assignments")
           for path in (ROOT / folder).glob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def lines(*names):
    return sum(len(MODULES[name].read_text(encoding="utf-8").splitlines()) for name in names)


def functions(name):
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]


def imports(name):
    """The project's own modules that a file imports, as "lpft", "data", "plumbing.files"."""
    found = set()
    for node in ast.walk(TREES[name]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in names:
            path = module.replace(".", "/")
            known = [k for k in (f"{path}.py", f"{path}/__init__.py", f"{path.rpartition('/')[0]}.py",
                                 f"{path.rpartition('/')[0]}/__init__.py") if k in MODULES]
            found.update(known[:1])
    return found - {name}


def test_five_files_lie_at_the_top():
    assert {name for name in MODULES if "/" not in name} == TOP


def test_the_core_is_read_in_an_afternoon():
    """model, lpft, ntk and train: at most 1,200 lines."""
    assert lines(*CORE) <= 1200


@pytest.mark.parametrize("name", CORE)
def test_a_function_of_the_core_fits_on_a_screen(name):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(name) if f.end_lineno - f.lineno >= 50}
    assert not long


def test_the_core_speaks_of_the_method_not_of_what_goes_wrong():
    """At most 20 raise, and one line of plumbing in each file of the method."""
    assert sum(isinstance(node, ast.Raise) for name in CORE for node in ast.walk(TREES[name])) <= 20
    for name in CORE:
        own = [node for node in TREES[name].body if isinstance(node, ast.ImportFrom) and node.module == "plumbing"
               or isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plumbing.")]
        assert len(own) <= 1, name


@pytest.mark.parametrize("name", MODULES)
def test_no_line_is_longer_than_110(name):
    long = [i for i, line in enumerate(MODULES[name].read_text(encoding="utf-8").splitlines(), 1) if len(line) > 110]
    assert not long


def test_model_py_imports_torch_alone():
    modules = {alias.name for node in ast.walk(TREES["model.py"]) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(TREES["model.py"]) if isinstance(node, ast.ImportFrom)}
    assert {m.split(".")[0] for m in modules} <= {"torch", "math", "copy", "dataclasses"}


def test_nothing_imports_the_lab_or_the_assignments_but_themselves():
    for name in MODULES:
        for imported in imports(name):
            above = imported.split("/")[0]
            assert above not in ("lab", "assignments") or name.split("/")[0] in ("lab", "assignments"), (name, imported)


def test_imports_go_down():
    """data and plumbing stand below the core (plumbing knows model's classes); train and predict stand on it."""
    for name in MODULES:
        place = name.split("/")[0]
        allowed = {"data": {"data"}, "plumbing": {"data", "plumbing", "model.py"}, "model.py": set(),
                   "lpft.py": {"data", "plumbing", "model.py"}, "ntk.py": {"data", "plumbing", "model.py", "lpft.py"},
                   "train.py": {"data", "plumbing", *CORE}, "predict.py": {"data", "plumbing", *CORE}}.get(place)
        if name == "data/download.py":  # a program: it has a command line
            allowed = {"data", "plumbing"}
        if allowed is not None:
            assert {i.split("/")[0] for i in imports(name)} <= allowed, name


def test_no_circle():
    graph = {name: imports(name) for name in MODULES}
    done = set()

    def visit(name, way):
        assert name not in way, [*way, name]
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, [*way, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def test_functions_that_no_python_file_uses_do_not_exist():
    folders = (".", "data", "plumbing", "lab", "assignments", "tests", "benchmarks")
    text = " ".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).glob("*.py"))
    for name in MODULES:
        for function in functions(name):
            assert function.name.startswith("__") or text.count(function.name) > 1, (name, function.name)


def test_a_course_is_short_beside_its_graders():
    """assignments/ without graders/, which hold the tests, and the right and wrong solutions that try them."""
    assert lines(*(name for name in MODULES if name.startswith("assignments/"))) <= 900
