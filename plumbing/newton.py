"""The solver behind linear probing: Newton's method for many convex problems side by side, cross-validation.

Shapes: N samples, C classes, k principal axes, K problems (folds).
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


def fold_logits(z, theta):
    """z (N, k + 1) times every fold's theta (K, C, k + 1), as one matrix product: (N, K, C)."""
    return (z @ theta.flatten(0, 1).T).unflatten(1, theta.shape[:2])


def minimise_logistic(objective, z, inverse_l2, penalty, theta, tolerance, on_step=None):
    """K weighted logistic regressions at once, by Newton's method with conjugate gradients.

    `objective` is lpft.lp_objective of one problem: theta (C, k + 1), inverse_l2 (N,) -> value, gradient.
    Here are z (N, k + 1), inverse_l2 (N, K), penalty (k + 1,), start theta (K, C, k + 1). Each problem is
    convex: its value is minimised until its gradient norm is `tolerance` times that at theta = 0.
    ArithmeticError if it is not.
    """
    def centred(theta):  # softmax is blind to the mean of the bias over classes: what is there is rounding
        theta[:, :, -1] -= theta[:, :, -1].mean(1, keepdim=True)
        return theta

    def evaluate(theta):  # (K,), (K, C, k + 1)
        value, gradient = torch.vmap(objective, in_dims=(0, 1))(theta, inverse_l2)
        return value, centred(gradient)

    def back(errors, inputs):  # of logits (N, K, C), to theta (K, C, k + 1)
        return ((inverse_l2[:, :, None] * errors).flatten(1).T @ inputs).unflatten(0, theta.shape[:2])

    goal = tolerance * evaluate(torch.zeros_like(theta))[1].norm(dim=(1, 2))  # (K,)
    # where theta = 0 is the solution already, that is rounding alone: not below it
    goal = goal.maximum(1e-14 * inverse_l2.T @ z.norm(dim=1))
    (value, grad), z_squared = evaluate(theta), z.square()
    for _ in range(100):
        if on_step:
            on_step(theta)
        grad_norm = grad.norm(dim=(1, 2))  # (K,)
        if (grad_norm <= goal).all():
            return theta
        probs = fold_logits(z, theta).softmax(2)  # (N, K, C)
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
            new_value, new_grad = evaluate(candidate)
            # near the solution the gain drowns in the rounding of the objective: allow for that
            too_far = new_value > value + 1e-4 * size * slope + 1e-14 * value.abs()
            if not too_far.any():
                break
            size = torch.where(too_far, size / 2, size)
        theta, value, grad = candidate, new_value, new_grad
    raise ArithmeticError(f"linear probing did not converge at inverse_l2 {float(inverse_l2.max()):g}: "
                          f"gradient norm {float(grad_norm.max()):.2e}, goal {float(goal.min()):.2e}")


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


def cross_validate(objective, z, onehot, penalty, fold_of, grid, scoring):
    """Score of each inverse_l2 of `grid`, "accuracy" or "log-loss", summed over the folds, (len(grid),).

    `fold_of` (N,) is the fold that holds a sample out; the other arguments are those of minimise_logistic.
    """
    held_out = F.one_hot(fold_of).double()  # (N, K)
    theta, scores = z.new_zeros(held_out.shape[1], onehot.shape[1], z.shape[1]), []  # (K, C, k + 1)
    for inverse_l2 in tqdm(grid, desc="LP cross-validation", leave=False):
        # each solution starts the search for the next, weaker penalty
        theta = minimise_logistic(objective, z, inverse_l2 * (1 - held_out), penalty, theta, 1e-6)
        logits = fold_logits(z, theta)  # (N, K, C)
        score = {"accuracy": (logits.argmax(2) == onehot.argmax(1, keepdim=True)).double(),
                 "log-loss": (logits.log_softmax(2) * onehot[:, None]).sum(2)}[scoring]  # (N, K)
        scores.append(((score * held_out).sum(0) / held_out.sum(0)).numpy())  # (K,)
    return np.array(scores).sum(1)
