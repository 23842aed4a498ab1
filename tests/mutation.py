"""Do the tests notice a wrong line? Break the method's code in many small ways and look.

    python tests/mutation.py                    300 mutants of seed 0, two at a time: about an hour on 2 cores
    python tests/mutation.py --only lpft.py --sample 40 --seed 1

A mutant is the project with one statement removed, or one operator or constant changed, in a function that
computes what is reported. It is killed if a test of that file fails or hangs, and survives if all pass. Printed are
the survivors and the score, killed / (all - equivalent). A survivor that computes the same thing is equivalent:
it stands in EQUIVALENT, with the reason. (The well-kept tools remove no statements and draw no seeded samples.)
"""

import argparse
import ast
import os
import random
import resource
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_SECONDS = 200  # for the tests of one mutant; one that needs more hangs
# The functions that are broken ("*": all), and the tests that should notice, the quickest first.
TARGETS = {
    "model.py": (("*",), ("test_model.py", "test_protocol.py", "test_recompute.py", "test_export.py")),
    "lpft.py": (("*",), ("test_lpft.py", "test_protocol.py", "test_recompute.py",
                         "test_run_folder.py::test_the_best_epoch_so_far_survives_a_stop_in_a_later_one",
                         "test_run_folder.py::test_an_epoch_is_saved_before_anybody_hears_of_it",
                         "test_run_folder.py::test_fine_tuning_stopped_after_an_epoch_goes_on_bit_for_bit",
                         "test_run_folder.py::test_a_loss_that_is_not_finite_stops_the_run_with_the_best_weights_before")),
    "plumbing/newton.py": (("*",), ("test_lpft.py",)),
    "ntk.py": (("pretrain_kernel", "initial_deltas", "predicted_logit_change", "predicted_feature_change", "ft_ratio",
                "kernel_statistics", "kernel_regression"), ("test_ntk.py", "test_recompute.py")),
    "train.py": (("evaluate", "lp_stage"), ("test_recompute.py", "test_train.py")),
}
SWAPS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*", ast.FloorDiv: "*", ast.Mod: "*",
         ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
         ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.And: "or", ast.Or: "and", ast.BitOr: "&",
         ast.BitAnd: "|"}
# {(file, function, line of code as it is, what stands there instead): why nothing that is reported changes}
EQUIVALENT = {
    ('plumbing/newton.py', 'minimise_logistic', 'if (grad_norm <= goal).all():', '<'):
        'never exactly equal',
    ('lpft.py', 'fit_linear_probe', '_, axes = torch.linalg.eigh((x - mean).T @ (x - mean))  # (h, h), by growing variance', '+'):
        'x - mean sums to zero, so adding the mean twice to the other factor changes nothing',
    ('plumbing/newton.py', 'minimise_logistic', 'for _ in range(40):  # halve the steps that do not lower their objective enough (Armijo)', '41'):
        '2^-40 of a step is none',
    ('lpft.py', 'predict', 'def predict(model, split, batch_size=64, desc=None):', '65'):
        'how many at once, no number',
    ('plumbing/newton.py', 'minimise_logistic', 'for _ in range(100):', '101'):
        'it converges in 20',
    ('plumbing/newton.py', 'minimise_logistic', 'diagonal = back(probs * (1 - probs), z_squared) + penalty  # (K, C, k + 1)', '+'):
        'a worse preconditioner, to the same solution',
    ('model.py', 'LoRALinear.__init__', 'nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))', 'pass'):
        'nn.Linear has drawn it from the same distribution',
    ('plumbing/newton.py', 'minimise_logistic', 'diagonal = back(probs * (1 - probs), z_squared) + penalty  # (K, C, k + 1)', '/'):
        'a worse preconditioner, to the same solution',
    ('plumbing/newton.py', 'minimise_logistic', 'precision = grad_norm * (grad_norm * tolerance / goal).sqrt().clamp(max=0.1)  # (K,)', '*'):
        'how exact a step is, not where the search ends',
    ('plumbing/newton.py', 'minimise_logistic', 'if not too_far.any():', 'pass'):
        'nothing is halved in the rounds that follow',
    ('plumbing/newton.py', 'conjugate_gradients', 'for _ in range(1000):', '1001'):
        'it ends long before',
    ('lpft.py', 'fit_temperature', 'low, high = 0.0, 1.0', '2.0'):
        'where the search begins, not where it ends',
    ('lpft.py', 'fit_temperature', 'low, high = high, 2 * high', '3'):
        'how fast the bracket grows',
    ('lpft.py', 'fit_temperature', 'while slope(high) < 0:', '<='):
        'never exactly 0',
    ('lpft.py', 'fit_temperature', 'while high - low > 1e-12 * high:  # bisection', '>='):
        'never exactly equal',
    ('lpft.py', 'fit_temperature', 'low, high = (middle, high) if slope(middle) < 0 else (low, middle)', '<='):
        'never exactly 0',
    ('lpft.py', 'fine_tune', 'fused=devices.device_of(model).type in ("cuda", "cpu"))', 'not in'):
        'the same Adam, by other code: slower',
    ('train.py', 'lp_stage', 'if args.lp_scoring == "accuracy" and record["train_accuracy"] > record["val_accuracy"] + 0.2:', '>='):
        'never exactly equal',
    ('plumbing/newton.py', 'conjugate_gradients', 'if (residual.norm(dim=(1, 2)) <= precision).all():', '<'):
        'never exactly equal',
    ('plumbing/newton.py', 'minimise_logistic', 'size = torch.where(too_far, size / 2, size)', '3'):
        'a third is short enough, too',
    ('plumbing/newton.py', 'minimise_logistic', 'precision = grad_norm * (grad_norm * tolerance / goal).sqrt().clamp(max=0.1)  # (K,)', '/'):
        'how exact a step is, not where the search ends',
    ('ntk.py', 'kernel_regression', 'scale = float(rows.diagonal().mean()) or 1.0  # 0: F of a head V = 0', '2.0'):
        'what is divided by it is 0 everywhere',
    ('lpft.py', 'fit_linear_probe', 'axes = axes[:, -min(len(x), x.shape[1]):]  # (h, k)', 'pass'):
        'axes without data stay at zero: slower',
    ('lpft.py', 'feature_statistics', 'return {"cs": float(pair_sum / (n * (n - 1))) if (n := len(features)) > 1 else math.nan,', '>='):
        '0 / 0 is NaN, too',
    ('train.py', 'evaluate', 'def evaluate(model, task, features_0, frozen=False):', 'True'):
        'always given',
    ('plumbing/newton.py', 'minimise_logistic.centred', 'theta[:, :, -1] -= theta[:, :, -1].mean(1, keepdim=True)', '2'):
        'what is subtracted is rounding',
    ('lpft.py', 'stratified_folds', 'labels = labels.numpy()', 'pass'):
        'numpy takes the tensor as it is',
    ('ntk.py', 'kernel_regression', 'result[f"{name}_logit_accuracy"] = float(((score > 0) == (target == 1)).double().mean())', '>='):
        'never exactly 0',
}


def mutants_of(file):
    """[(file, function, line number, line, start, stop, text)]: text replaces the bytes start to stop of the file."""
    source = (ROOT / file).read_bytes()
    lines = source.split(b"\n")
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line) + 1)
    wanted, found = TARGETS[file][0], []

    def add(function, node, text, start=None, stop=None):
        start = offsets[node.lineno - 1] + node.col_offset if start is None else start
        stop = offsets[node.end_lineno - 1] + node.end_col_offset if stop is None else stop
        found.append((file, function, node.lineno, lines[node.lineno - 1].decode().strip(), start, stop, text))

    def between(function, left, right, node, new):  # the operator stands between two operands
        start = offsets[left.end_lineno - 1] + left.end_col_offset
        stop = offsets[right.lineno - 1] + right.col_offset
        old = {"is not": b"is not", "not in": b"not in"}.get(new)
        gap = source[start:stop]
        for token in sorted((b"is not", b"not in", b"**", b"//", b"<=", b">=", b"==", b"!=", b"and", b"or", b"is", b"in",
                             b"<", b">", b"+", b"-", b"*", b"/", b"%", b"|", b"&"), key=len, reverse=True):
            if token in gap and token != old:
                at = start + gap.index(token)
                add(function, left, new, at, at + len(token))
                found[-1] = (*found[-1][:2], node.lineno, lines[node.lineno - 1].decode().strip(), *found[-1][4:])
                return

    def visit(node, function):
        if isinstance(node, ast.Raise) or isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print", "tqdm.write", "tqdm", "ValueError"):
            return  # messages have tests of their own
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.If, ast.For, ast.With, ast.Return, ast.Break,
                             ast.Continue)) and not isinstance(getattr(node, "value", None), (ast.Constant, ast.JoinedStr)):
            if not (isinstance(node, ast.Expr) and ast.unparse(node).startswith(("print(", "tqdm.write("))):
                add(function, node, "pass")
        if isinstance(node, ast.Constant) and not isinstance(node.value, (str, bytes, type(None), type(...))):
            value = node.value
            add(function, node, str(not value) if isinstance(value, bool) else repr(value + 1))
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            between(function, node.left, node.right, node, SWAPS[type(node.op)])
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            between(function, node.left, node.comparators[0], node, SWAPS[type(node.ops[0])])
        if isinstance(node, ast.BoolOp):
            between(function, node.values[0], node.values[1], node, SWAPS[type(node.op)])
        body = node.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
        children = ast.iter_child_nodes(node) if body is None else body
        if isinstance(node, ast.FunctionDef):
            children = [*node.args.defaults, *filter(None, node.args.kw_defaults), *body]
        for child in children:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            name = function
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{function}.{child.name}".lstrip(".")
                if function == "" and "*" not in wanted and child.name not in wanted:
                    continue
            elif isinstance(child, (ast.JoinedStr, ast.AnnAssign)) or function == "" and isinstance(child, ast.stmt):
                continue  # messages; constants and imports at the top have no function
            visit(child, name)

    visit(ast.parse(source), "")
    return found


def broken(mutant):
    """The mutant's file; of (file,) alone, as it is."""
    source = (ROOT / mutant[0]).read_bytes()
    if len(mutant) == 1:
        return source
    return source[:mutant[4]] + mutant[6].encode() + source[mutant[5]:]


def run_tests(mutant, folder):
    """In a copy of the project: True if a test noticed. Forks, so that torch and the peers are imported once."""
    file = folder / mutant[0]
    file.write_bytes(broken(mutant))
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        import pytest

        tests = [str(folder / "tests" / name) for name in TARGETS[mutant[0]][1]]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    finally:
        shutil.copy(ROOT / mutant[0], file)


def key(mutant):
    return mutant[0], mutant[1], mutant[3], mutant[6]


def score(sample, workers=2):
    """(number killed, [survivors that are not equivalent], number equivalent) of a list of mutants."""
    import numpy, peft, pytest, scipy, sklearn.linear_model, sklearn.model_selection, torch, transformers  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(i) for i in range(workers)]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "docs", "__pycache__"))

        for file in sorted({mutant[0] for mutant in sample}):
            if run_tests((file,), folders[0]):
                raise RuntimeError(f"the tests of {file} fail as it is; mend that first")

        def work(item):
            number, mutant = item
            folder = folders.pop()
            killed = run_tests(mutant, folder)
            folders.append(folder)
            print(f"{number:4d} {'killed  ' if killed else 'SURVIVED'} {mutant[0]}:{mutant[2]} {mutant[1]}: "
                  f"{mutant[3][:70]!r} with {mutant[6]!r}", flush=True)
            return killed

        with ThreadPoolExecutor(workers) as pool:
            killed = list(pool.map(work, enumerate(sample, 1)))
    alive = [mutant for mutant, dead in zip(sample, killed) if not dead]
    survivors = [mutant for mutant in alive if key(mutant) not in EQUIVALENT]
    return sum(killed), survivors, len(alive) - len(survivors)


def draw(count, seed, only=None):
    """`count` mutants of all of TARGETS, drawn with `seed`."""
    everything = [mutant for file in only or TARGETS for mutant in mutants_of(file)]
    return random.Random(seed).sample(everything, min(count, len(everything)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TARGETS)
    args = parser.parse_args()
    killed, survivors, equivalent = score(draw(args.sample, args.seed, args.only))
    print(f"\nkilled {killed}, equivalent {equivalent}, survivors {len(survivors)}: "
          f"score {100 * killed / (killed + len(survivors)):.1f} %")
    for file, function, line, text, _, _, new in survivors:
        print(f"  {file}:{line} {function}: {text!r} with {new!r}")


if __name__ == "__main__":
    main()
