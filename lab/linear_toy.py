"""Why fine-tuning distorts features, in two dimensions (Kumar et al.'s two-layer linear network).

    python -m lab.linear_toy             seconds; --out FILE for the figure (default: linear-toy.png)

The network is f(x) = v^T B x. The truth is f*(x) = v*^T B* x, and pre-training has found B_0, which is B* but
for a small error. Training inputs lie in a subspace S of the input space; OOD inputs are everywhere. The
gradient by B is a sum of v (error_i) x_i^T: B changes on S alone, and what lies orthogonal to S stays as it
is (Cor. 4.3). FT from a random v has large errors at first, and moves B a lot, but only on S: on S and off S
the features no longer fit together, and v, which fits S, is wrong off S. LP finds v first; then errors are
small, and B hardly moves.

In this model P is the same under LoRA and FT, and F under LoRA concentrates around sigma^2 r F_FT (Prop.
4.4).
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lab.figures import COLOURS, STYLE
from plumbing.flags import Parser, exit_status

D, H, K, N = 20, 5, 8, 40  # input width, feature width, dimension of S, training inputs


def problem(seed=0, error=0.05):
    """(x (N, D) in S, y (N,), OOD x, OOD y, B_0 (H, D), basis of S (D, K), a random v (H,))."""
    normal = np.random.default_rng(seed).standard_normal
    B_true = np.linalg.qr(normal((D, H)))[0].T  # orthonormal rows
    v_true = normal(H) / H**0.5
    S = np.linalg.qr(normal((D, K)))[0]
    x, x_ood = normal((N, K)) @ S.T, normal((1000, D))
    B_0 = np.linalg.qr((B_true + error * normal((H, D))).T)[0].T
    left, _, right = np.linalg.svd(B_true @ B_0.T)
    B_0 = left @ right @ B_0  # QR may turn it; this turns it back
    return x, x @ B_true.T @ v_true, x_ood, x_ood @ B_true.T @ v_true, B_0, S, normal(H)


def linear_probe(x, y, B):
    """The v of least squares on frozen features."""
    return np.linalg.lstsq(x @ B.T, y, rcond=None)[0]


def fine_tune(x, y, v, B, steps=2000, lr=0.02):
    """Gradient descent on half the mean squared error by v and B; [(v, B)] along the way."""
    path = [(v, B)]
    for _ in range(steps):
        features = x @ B.T  # (N, H)
        errors = features @ v - y  # (N,)
        v, B = v - lr * features.T @ errors / len(x), B - lr * np.outer(v, errors @ x) / len(x)
        path.append((v, B))
    return path


def measure(path, x, y, x_ood, y_ood, B_0, S):
    """For each point of a path: training loss, OOD loss, change of B on S, and orthogonal to S."""
    off = np.eye(D) - S @ S.T
    return np.array([[np.mean((x @ B.T @ v - y)**2), np.mean((x_ood @ B.T @ v - y_ood)**2),
                      np.linalg.norm((B - B_0) @ S), np.linalg.norm((B - B_0) @ off)] for v, B in path])


def run(seed=0):
    """{method: (points, 4)} of measure: FT from a random head, LP, LP-FT; every 50 steps."""
    x, y, x_ood, y_ood, B_0, S, random_head = problem(seed)
    head = linear_probe(x, y, B_0)
    paths = {"FT": fine_tune(x, y, random_head, B_0), "LP": [(head, B_0)] * 2001,
             "LP-FT": fine_tune(x, y, head, B_0)}
    return {name: measure(path[::50], x, y, x_ood, y_ood, B_0, S) for name, path in paths.items()}


def mean_of(seeds=10):
    """The mean of run over drawn problems."""
    runs = [run(seed) for seed in range(seeds)]
    return {name: np.mean([found[name] for found in runs], 0) for name in runs[0]}


def draw(found):
    titles = ("training loss", "OOD loss", "change of B on S", "change of B off S")
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.9))
    for axis, title, i in zip(axes, titles, range(4)):
        for name, values in found.items():
            axis.plot(range(0, 2001, 50), values[:, i].clip(1e-12), color=COLOURS[name], label=name)
        axis.set(title=title, xlabel="step", yscale="log" if i < 2 else "linear")
    axes[0].legend()
    return figure


def main(argv=None):
    parser = Parser("lab.linear_toy", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("linear-toy.png"))
    out = parser.parse_args(argv).out

    def work():
        found = mean_of()
        with plt.rc_context(STYLE):
            draw(found).savefig(out, dpi=150)
        print(f"{'mean of 10':10s}{'train loss':>12s}{'OOD loss':>12s}{'B on S':>12s}{'B off S':>12s}")
        for name, values in found.items():
            print(f"{name:10s}" + "".join(f"{x:12.3g}" for x in values[-1]))
        print(f"figure: {out}")

    return exit_status("lab.linear_toy", work)


if __name__ == "__main__":
    sys.exit(main())
