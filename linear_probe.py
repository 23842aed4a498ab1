"""L2-regularised logistic regression: the head that linear probing fits, scikit-learn's objective.

Used twice: on features it is LP (`lpft.py`), on rows of a kernel it is kernel regression
(`ntk.py`). Read in this order: fit_linear_probe, stratified_folds, cross_validate, and then the
solver, minimise_logistic: Newton's method for a convex problem, all folds side by side.

Shapes: N samples, C classes, h feature width, k principal axes, K folds.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

INVERSE_L2_GRID = np.logspace(-4, 4, 10)  # scikit-learn's default grid of C


@dataclass
class LinearProbe:
    """The head that LP found: logits = features @ weight.T + bias."""

    weight: torch.Tensor  # V, (C, h), float64
    bias: torch.Tensor  # b, (C,), float64
    inverse_l2: float  # scikit-learn's C
    scores: np.ndarray  # cross-validation score of each strength on the grid, summed over folds, (10,); or None
    path: list  # (||V||_F, training accuracy) at every step of the solver, from V = 0 (Fig. 1)


def fit_linear_probe(features, labels, num_classes, inverse_l2=None, scoring="accuracy", fold_of=None):
    """Multinomial logistic regression on features (N, h) and labels (N,), in float64 on the CPU.

    Minimises scikit-learn's objective,

        inverse_l2 * sum_i cross_entropy(V phi(x_i) + b, y_i) + 1/2 ||V||_F^2,   b without penalty.

    For two classes scikit-learn fits one vector w, V = [-w/2, w/2], and penalises 1/2 ||w||^2,
    which is ||V||_F^2: twice the penalty. If `inverse_l2` is None, cross-validation over the folds of
    `fold_of` (each sample's number, (N,); default: stratified_folds(labels)) picks it from
    INVERSE_L2_GRID by `scoring`, "accuracy" or "log-loss": the smallest of those with the highest sum
    over folds, as scikit-learn does, where sums that differ by rounding alone count as different. The
    probe is then fitted on all samples.

    Raises ValueError for a class with fewer samples than folds or none, or features that are not finite.
    """
    if inverse_l2 is None and scoring not in ("accuracy", "log-loss"):
        raise ValueError(f"linear probing: scoring is {scoring!r}; expected accuracy or log-loss")
    x, labels = features.detach().cpu().double(), labels.cpu()  # (N, h), (N,)
    if not torch.isfinite(x).all():
        raise ValueError("linear probing: the features hold NaN or infinity")
    missing = (labels.bincount(minlength=num_classes) == 0).nonzero().flatten().tolist()
    if missing:  # its bias would go to minus infinity
        raise ValueError(f"linear probing: no sample of class {missing[0]}; expected some of all {num_classes}")
    # Rotate to principal axes. The penalty does not notice, and the Hessian is then nearly
    # diagonal, which is what the solver's preconditioner asks for. Axes without data stay at zero.
    mean = x.mean(0)  # (h,)
    _, axes = torch.linalg.eigh((x - mean).T @ (x - mean))  # (h, h), by growing variance
    axes = axes[:, -min(len(x), x.shape[1]):]  # (h, k)
    z = torch.cat([(x - mean) @ axes, x.new_ones(len(x), 1)], dim=1)  # (N, k + 1), the bias last
    onehot = F.one_hot(labels, num_classes).double()  # (N, C)
    penalty = torch.full((z.shape[1],), 2.0 if num_classes == 2 else 1.0, dtype=torch.double)
    penalty[-1] = 0.0  # (k + 1,)

    scores = None
    if inverse_l2 is None:
        fold_of = stratified_folds(labels) if fold_of is None else fold_of
        scores = cross_validate(z, onehot, penalty, fold_of, scoring)  # (10,)
        inverse_l2 = float(INVERSE_L2_GRID[scores.argmax()])
    start = torch.zeros(1, num_classes, z.shape[1], dtype=torch.double)
    everything = torch.ones(len(x), 1, dtype=torch.double)
    path = []

    def record(theta):  # the rotation leaves the norm as it is
        right = (fold_logits(z, theta)[:, 0].argmax(1) == labels).double().mean()
        path.append((float(theta[0, :, :-1].norm()), float(right)))

    theta = minimise_logistic(z, onehot, everything, inverse_l2, penalty, start, 1e-10, record)[0]
    theta -= theta.mean(0)  # softmax ignores the mean over classes, and the penalty wants it zero: V has rank C - 1
    weight = theta[:, :-1] @ axes.T  # (C, h)
    bias = theta[:, -1] - weight @ mean  # (C,)
    return LinearProbe(weight, bias, inverse_l2, scores, path)


def stratified_folds(labels, folds=5):
    """The fold (0 to folds - 1) that tests each sample, (N,): unshuffled, as scikit-learn deals them.

    Classes are numbered by first appearance and the sorted labels dealt round robin: that says how
    many samples of a class each fold gets. It gets them in the order of the data.
    """
    labels = labels.numpy()
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if counts.min() < folds:
        raise ValueError(f"{folds}-fold cross-validation needs {folds} training samples of each class, class "
                         f"{classes[counts.argmin()]} has {counts.min()}; take more samples, or fix LP's "
                         "strength with --lp-inverse-l2")
    classes = classes[first.argsort()]
    dealt = np.concatenate([labels[labels == c] for c in classes])  # (N,), sorted
    fold_of = np.empty(len(labels), dtype=int)
    for c in classes:
        per_fold = [(dealt[fold::folds] == c).sum() for fold in range(folds)]
        fold_of[labels == c] = np.repeat(np.arange(folds), per_fold)
    return torch.from_numpy(fold_of)


def cross_validate(z, onehot, penalty, fold_of, scoring):
    """Score of each strength of INVERSE_L2_GRID, summed over the folds' held-out parts, (10,)."""
    folds = int(fold_of.max()) + 1
    held_out = F.one_hot(fold_of, folds).double()  # (N, K)
    theta = torch.zeros(folds, onehot.shape[1], z.shape[1], dtype=torch.double)  # (K, C, k + 1)
    scores = []
    for inverse_l2 in tqdm(INVERSE_L2_GRID, desc="LP cross-validation", leave=False):
        # each solution starts the search for the next, weaker penalty
        theta = minimise_logistic(z, onehot, 1 - held_out, inverse_l2, penalty, theta, 1e-6)
        logits = fold_logits(z, theta)  # (N, K, C)
        if scoring == "accuracy":
            score = (logits.argmax(2) == onehot.argmax(1, keepdim=True)).double()  # (N, K)
        else:
            score = (logits.log_softmax(2) * onehot[:, None]).sum(2)  # (N, K)
        scores.append(((score * held_out).sum(0) / held_out.sum(0)).numpy())  # (K,)
    return np.array(scores).sum(1)


def fold_logits(z, theta):
    """z (N, k + 1) times every fold's theta (K, C, k + 1), as one matrix product: (N, K, C)."""
    return (z @ theta.flatten(0, 1).T).unflatten(1, theta.shape[:2])


def minimise_logistic(z, onehot, weights, inverse_l2, penalty, theta, tolerance, on_step=None):
    """K weighted logistic regressions at once, by Newton's method with conjugate gradients.

    z (N, k + 1), onehot (N, C), weights (N, K), penalty (k + 1,), start theta (K, C, k + 1). Each
    problem is convex: minimise inverse_l2 * sum_i weights_i loss_i + 1/2 sum penalty * theta^2
    until its gradient norm is `tolerance` times that at theta = 0. ArithmeticError if it is not.
    """
    strength = inverse_l2 * weights.unsqueeze(2)  # (N, K, 1)
    target = onehot.unsqueeze(1)  # (N, 1, C)

    def objective(theta):
        losses = -(fold_logits(z, theta).log_softmax(2) * target * strength).sum((0, 2))  # (K,)
        return losses + 0.5 * (penalty * theta.square()).sum((1, 2))

    def back(errors, inputs):  # of logits (N, K, C), to theta (K, C, k + 1)
        return ((strength * errors).flatten(1).T @ inputs).unflatten(0, theta.shape[:2])

    def centred(theta):  # softmax is blind to the mean of the bias over classes: what is there is rounding
        theta[:, :, -1] -= theta[:, :, -1].mean(1, keepdim=True)
        return theta

    def gradient(theta):
        probs = fold_logits(z, theta).softmax(2)  # (N, K, C)
        return probs, centred(back(probs - target, z) + penalty * theta)  # (K, C, k + 1)

    goal = tolerance * gradient(torch.zeros_like(theta))[1].norm(dim=(1, 2))  # (K,)
    # where theta = 0 is the solution already, that is rounding alone: not below it
    goal = goal.maximum(1e-14 * strength[:, :, 0].T @ z.norm(dim=1))
    value, z_squared = objective(theta), z.square()
    for _ in range(100):
        if on_step:
            on_step(theta)
        probs, grad = gradient(theta)
        grad_norm = grad.norm(dim=(1, 2))  # (K,)
        if (grad_norm <= goal).all():
            return theta
        diagonal = back(probs * (1 - probs), z_squared) + penalty  # (K, C, k + 1)

        def hessian_times(direction):
            moved = fold_logits(z, direction)  # (N, K, C), the change of the logits
            moved = probs * (moved - (probs * moved).sum(2, keepdim=True))
            return centred(back(moved, z) + penalty * direction)

        # The closer to the solution, the more exact the step: that makes convergence superlinear.
        precision = grad_norm * (grad_norm * tolerance / goal).sqrt().clamp(max=0.1)  # (K,)
        step = conjugate_gradients(hessian_times, -grad, diagonal, precision.maximum(0.1 * goal))
        slope, size = (grad * step).sum((1, 2)), torch.ones_like(value)  # (K,)
        for _ in range(40):  # halve the steps that do not lower their objective enough (Armijo)
            candidate = theta + size[:, None, None] * step
            new_value = objective(candidate)
            # near the solution the gain drowns in the rounding of the objective: allow for that
            too_far = new_value > value + 1e-4 * size * slope + 1e-14 * value.abs()
            if not too_far.any():
                break
            size = torch.where(too_far, size / 2, size)
        theta, value = candidate, new_value
    raise ArithmeticError(f"linear probing did not converge at inverse_l2 {inverse_l2:g}: gradient norm "
                          f"{float(grad_norm.max()):.2e}, goal {float(goal.min()):.2e}")


def conjugate_gradients(matrix_times, right, diagonal, precision):
    """Solve K systems matrix x = right (K, C, k + 1), to residual norms `precision` (K,)."""
    x, residual = torch.zeros_like(right), right
    scaled = residual / diagonal
    direction, rho = scaled, (residual * scaled).sum((1, 2), keepdim=True)  # (K, 1, 1)
    for _ in range(1000):
        image = matrix_times(direction)
        length = rho / (direction * image).sum((1, 2), keepdim=True).clamp(min=1e-300)
        x, residual = x + length * direction, residual - length * image
        if (residual.norm(dim=(1, 2)) <= precision).all():
            break
        scaled = residual / diagonal
        rho, previous = (residual * scaled).sum((1, 2), keepdim=True), rho
        direction = scaled + rho / previous.clamp(min=1e-300) * direction
    return x
