"""The tasks, and the knife: functions are found, emptied and replaced by syntax tree, without marks."""

import ast
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Task:
    """Some functions of one file. `forbidden` names what a solution may not call, and why."""

    title: str
    file: str
    functions: tuple  # "function" or "Class.method"
    minutes: int  # to write it, for a student who has read the sheet
    forbidden: dict


ENGINE = dict.fromkeys(("empirical_ntk", "walk_blocks", "block_inputs", "run_block", "pretrain_kernel",
                        "split_head", "linear_kernel", "layernorm_jacobian", "embedding_kernel", "exact"),
                       "this is the project's fast engine; the task is the definition")
BY_HAND = dict.fromkeys(("autograd", "backward", "jacrev", "jacfwd", "vjp", "jvp", "grad", "functional_call",
                         "ntk_by_jacobian", "empirical_ntk"), "the task is to write the derivative down")
TASKS = {
    "a1": Task("attention", "model.py", ("SelfAttention.forward", "SelfAttention.split_heads"), 60, {}),
    "a2": Task("LoRA", "model.py", ("LoRALinear.__init__", "LoRALinear.forward", "LoRALinear.merged"), 45,
               {}),
    "a3": Task("linear probing", "lpft.py", ("lp_objective", "stratified_folds"), 60,
               BY_HAND | {"fit_linear_probe": "it calls what you are to write"}),
    "a4": Task("temperature scaling", "lpft.py", ("fit_temperature",), 45, {}),
    "a5": Task("calibration and features", "lpft.py", ("calibration_error", "feature_statistics"), 60, {}),
    "a6": Task("the neural tangent kernel", "ntk.py",
               ("ntk_by_jacobian", "initial_deltas", "predicted_logit_change", "ft_ratio"), 90, ENGINE),
    "a7": Task("the kernel of one layer", "ntk.py",
               ("linear_kernel", "layernorm_jacobian", "embedding_kernel"), 90, BY_HAND),
    "a8": Task("fine-tuning from the probe's head", "lpft.py", ("set_head", "best_epoch", "train_epoch"), 60,
               {}),
}
SAFE_IMPORTS = {"torch", "math", "numpy", "itertools", "functools", "collections"}
UNSAFE = {"open", "eval", "exec", "compile", "globals", "locals", "getattr", "setattr", "breakpoint", "input",
          "inspect", "sys", "os", "gc", "importlib", "builtins", "subprocess", "pathlib", "Path",
          "assignments", "graders", "modules", "load", "__import__", "__dict__", "__builtins__",
          "__globals__", "__code__",
          "__subclasses__"}


def functions_of(tree):
    """{qualified name: node} of the functions and methods at the top of a module."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def span(node):
    """First and last line of a function, decorators included, from 0."""
    return min(n.lineno for n in (node, *node.decorator_list)) - 1, node.end_lineno


def replace(source, new):
    """`source` with the lines of some functions replaced, {qualified name: text}."""
    lines, nodes = source.splitlines(keepends=True), functions_of(ast.parse(source))
    for name in sorted(new, key=lambda name: -span(nodes[name])[0]):  # from the bottom up
        start, stop = span(nodes[name])
        lines[start:stop] = [new[name].rstrip("\n") + "\n"]
    return "".join(lines)


def text_of(source, name):
    """The lines of one function; KeyError if the file has none of this name."""
    start, stop = span(functions_of(ast.parse(source))[name])
    return "".join(source.splitlines(keepends=True)[start:stop])


def emptied(source, name, task):
    """One function with its signature and docstring, and the body that says where to read."""
    node, lines = functions_of(ast.parse(source))[name], source.splitlines(keepends=True)
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    why = f"{task}: {name} is open; see assignments/{task}.md"
    body = f'{" " * (node.col_offset + 4)}raise NotImplementedError("{why}")'
    start = first.end_lineno if ast.get_docstring(node) and len(node.body) == 1 else first.lineno - 1
    return "".join(lines[span(node)[0]:start]) + body + "\n"


def copy_project(out):
    """What runs and grades, without history, tests, benchmarks and variants; ValueError for a wrong `out`."""
    if out.exists():
        raise ValueError(f"--out {out}: is there already; expected a new folder")
    folders = [ROOT / name for name in ("assignments", "data", "lab", "plumbing")]
    if any(folder in out.resolve().parents for folder in folders):
        raise ValueError(f"--out {out}: lies in a folder that is copied; expected one elsewhere")
    out.mkdir(parents=True)
    for pattern in ("*.py", "requirements*.txt", "README.md", "LICENSE"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, out)
    for folder in folders:
        shutil.copytree(folder, out / folder.name, ignore=shutil.ignore_patterns(
            ".*", "__pycache__", "variants", "check.py", "INSTRUCTORS.md"))
    (out / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "README.md", out / "benchmarks")


def cut(names, out):
    """A copy of the project in which these tasks are open; ValueError if `out` is there."""
    copy_project(out)
    sheets = ", ".join(f"[{name}](assignments/{name}.md)" for name in names)
    readme = (out / "README.md").read_text(encoding="utf-8")
    said = f"> In this copy functions are open, for you to write: {sheets}. It has no tests and benchmarks."
    (out / "README.md").write_text(f"{said}\n\n{readme}", encoding="utf-8")
    for name in names:
        path = out / TASKS[name].file
        source = path.read_text(encoding="utf-8")
        cut_out = {f: emptied(source, f, name) for f in TASKS[name].functions}
        path.write_text(replace(source, cut_out), encoding="utf-8")


def splice(name, theirs):
    """(source of the pristine file with the task's functions of `theirs`, None), or (None, what is wrong).

    Of the student's file come the task's functions, new functions beside them, and nothing else.
    """
    task = TASKS[name]
    source = (ROOT / task.file).read_text(encoding="utf-8")
    try:
        tree = ast.parse(theirs)
    except (SyntaxError, ValueError) as error:
        return None, f"{task.file} is no Python: line {getattr(error, 'lineno', 0)}, {error.args[0]}"
    nodes, own = functions_of(tree), functions_of(ast.parse(source))
    missing = [f for f in task.functions if f not in nodes]
    if missing:
        return None, f"{task.file} has no function {missing[0]}; it has to stay where it was"
    helpers = [f for f in nodes if f not in own and "." not in f]
    for f in (*task.functions, *helpers):
        for node in ast.walk(nodes[f]):
            if wrong := suspicious(node, task):
                return None, f"{task.file}, line {getattr(node, 'lineno', nodes[f].lineno)}, {f}: {wrong}"
    text = replace(source, {f: text_of(theirs, f) for f in task.functions})
    return text + "".join("\n\n" + text_of(theirs, f) for f in helpers), None


def suspicious(node, task):
    """Why a piece of a solution cannot be graded, or None."""
    if isinstance(node, (ast.Try, ast.Global, ast.Nonlocal)):
        return f"no {type(node).__name__.lower()} is needed here, and errors are not to be hidden"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names]
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        outside = [module for module in modules if module.split(".")[0] not in SAFE_IMPORTS]
        outside += [name for name in names if name in task.forbidden]
        return f"imports {outside[0]}; allowed: {', '.join(sorted(SAFE_IMPORTS))}" if outside else None
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    if name in UNSAFE and not (isinstance(node, ast.Attribute) and name == "eval"):  # model.eval()
        return f"uses {name}, which no solution needs"
    variable = isinstance(node, ast.Name) and name == "grad"
    if name in task.forbidden and name not in task.functions and not variable:
        return f"uses {name}: {task.forbidden[name]}"
    return None
