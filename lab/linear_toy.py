"""Why fine-tuning distorts features, in the smallest model that shows it: Kumar et al.'s linear network.

    python -m lab.linear_toy             seconds; --out FILE for the figure (default: linear-toy.png)

The network is f(x) = v^T B x. The truth is v*^T B* x, and pre-training has found B_0, which is B* but for a
small error. Training inputs lie in a subspace S; OOD inputs are everywhere. The gradient by B is a sum of
v (error_i) x_i^T: B changes on S alone, and stays as it is off S (Cor. 4.3). FT from a random v has large
errors at first, and moves B a lot, but only on S; then features on S and off S no longer fit together, and v,
which fits S, is wrong off S. LP finds v first: errors are small, and B hardly moves.

The kernels here are P(x, x') = <B x, B x'> and F(x, x') = ||v||^2 <x, x'>. LoRA, B = B_0 + U A with U = 0 and
A (r, D) drawn from N(0, sigma^2), has the same P, and ||v||^2 <A x, A x'> for F: sigma^2 r F on average, and
the nearer to it the larger r is (Prop. 4.4).
"""

import matplotlib.pyplot as plt
import numpy as np

from lab.figures import COLOURS, STYLE
from plumbing.flags import Parser, exit_status, run_main

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


def fine_tune(x, y, v, B, steps=2000, lr=0.02):
    """Gradient descent on half the mean squared error by v and B; [(v, B)] along the way."""
    path = [(v, B)]
    for _ in range(steps):
        features = x @ B.T  # (N, H)
        errors = features @ v - y  # (N,)
        v, B = v - lr * features.T @ errors / len(x), B - lr * np.outer(v, errors @ x) / len(x)
        path.append((v, B))
    return path


def run(seed=0):
    """{method: (points, 4)}, every 50 steps: training loss, OOD loss, change of B on S, and off S."""
    x, y, x_ood, y_ood, B_0, S, random_head = problem(seed)
    head = np.linalg.lstsq(x @ B_0.T, y, rcond=None)[0]  # LP: least squares on frozen features
    paths = {"FT": fine_tune(x, y, random_head, B_0), "LP": [(head, B_0)] * 2001,
             "LP-FT": fine_tune(x, y, head, B_0)}
    off = np.eye(D) - S @ S.T
    return {name: np.array([[np.mean((x @ B.T @ v - y)**2), np.mean((x_ood @ B.T @ v - y_ood)**2),
                             np.linalg.norm((B - B_0) @ S), np.linalg.norm((B - B_0) @ off)]
                            for v, B in path[::50]]) for name, path in paths.items()}


def lora_kernel_error(r, sigma=0.1, seed=0):
    """||F_LoRA / (sigma^2 r) - F|| / ||F|| on the training inputs; ||v||^2 cancels."""
    x = problem(seed)[0]  # (N, D)
    F = x @ x.T  # (N, N)
    Ax = x @ np.random.default_rng(seed + 1).normal(0, sigma, (r, D)).T  # (N, r)
    return np.linalg.norm(Ax @ Ax.T / (sigma**2 * r) - F) / np.linalg.norm(F)


def draw(curves):
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.9))
    for i, title in enumerate(("training loss", "OOD loss", "change of B on S", "change of B off S")):
        for name, values in curves.items():
            axes[i].plot(range(0, 2001, 50), values[:, i], color=COLOURS[name], label=name)
        axes[i].set(title=title, xlabel="step", yscale="log" if i < 2 else "linear")
    axes[3].set_ylim(axes[2].get_ylim())
    axes[1].legend()
    return figure


def work(out, seeds=10):
    runs = [run(seed) for seed in range(seeds)]
    curves = {name: np.mean([of_seed[name] for of_seed in runs], 0) for name in runs[0]}
    with plt.rc_context(STYLE):
        draw(curves).savefig(out, dpi=150)
    print(f"{'mean of 10':10s}{'train loss':>12s}{'OOD loss':>12s}{'B on S':>12s}{'B off S':>12s}")
    for name, values in curves.items():
        print(f"{name:10s}" + "".join(f"{x:12.3g}" for x in values[-1]))
    print("F under LoRA, by its mean, differs from F by",
          ", ".join(f"{lora_kernel_error(r):.2f} at r = {r}" for r in (1, 8, 64, 512)), f"\nfigure: {out}")
    return curves


def main(argv=None):
    parser = Parser("lab.linear_toy", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="linear-toy.png", metavar="FILE", help="the figure")
    return exit_status("lab.linear_toy", lambda: work(parser.parse_args(argv).out))


if __name__ == "__main__":
    run_main(main)
