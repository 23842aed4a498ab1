"""Linear probing, fine-tuning, their composition LP-FT, and what is measured on the result.

    LP       fit_linear_probe on frozen features, then set_head
    FT       fine_tune from a random head
    LP-FT    LP, then fine_tune from its head
    LoRA     add_lora (model.py), then fine_tune;  LP-LoRA: LP, add_lora, fine_tune

Read in this order: fit_linear_probe and the Newton solver under it, fine_tune, fit_temperature,
calibration_error, feature_statistics. `train.py` puts them together.

Shapes: N samples, C classes, h feature width, k principal axes, K folds solved side by side.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import evaluation_batches, training_batches

INVERSE_L2_GRID = np.logspace(-4, 4, 10)  # scikit-learn's default grid of C

# ---------------------------------------------------------------------------- linear probing


@dataclass
class LinearProbe:
    """The head that LP found: logits = features @ weight.T + bias."""

    weight: torch.Tensor  # V, (C, h), float64
    bias: torch.Tensor  # b, (C,), float64
    inverse_l2: float  # scikit-learn's C
    scores: np.ndarray  # cross-validation score of each strength on the grid, (10,); or None


def fit_linear_probe(features, labels, num_classes, inverse_l2=None, scoring="accuracy"):
    """Multinomial logistic regression on features (N, h) and labels (N,), in float64 on the CPU.

    Minimises scikit-learn's objective,

        inverse_l2 * sum_i cross_entropy(V phi(x_i) + b, y_i) + 1/2 ||V||_F^2,   b without penalty.

    For two classes scikit-learn fits one vector w, V = [-w/2, w/2], and penalises 1/2 ||w||^2,
    which is ||V||_F^2: twice the penalty. If `inverse_l2` is None, stratified 5-fold
    cross-validation picks it from INVERSE_L2_GRID by `scoring`, "accuracy" or "log-loss"; of equals
    the smallest, which is the strongest penalty. The probe is then fitted on all samples.

    Raises ValueError for a class with fewer samples than folds, or features that are not finite.
    """
    x, labels = features.detach().cpu().double(), labels.cpu()  # (N, h), (N,)
    if not torch.isfinite(x).all():
        raise ValueError("linear probing: the features hold NaN or infinity")
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
        scores = cross_validate(z, onehot, penalty, stratified_folds(labels), scoring)  # (10,)
        inverse_l2 = float(INVERSE_L2_GRID[scores.argmax()])
    start = torch.zeros(1, num_classes, z.shape[1], dtype=torch.double)
    everything = torch.ones(len(x), 1, dtype=torch.double)
    theta = minimise_logistic(z, onehot, everything, inverse_l2, penalty, start, 1e-10)[0]
    weight = theta[:, :-1] @ axes.T  # (C, h)
    bias = theta[:, -1] - weight @ mean  # (C,)
    return LinearProbe(weight, bias - bias.mean(), inverse_l2, scores)  # softmax ignores the mean


def stratified_folds(labels, folds=5):
    """The fold (0 to folds - 1) that tests each sample, (N,): unshuffled, as scikit-learn deals them.

    Classes are numbered by first appearance and the sorted labels dealt round robin: that says how
    many samples of a class each fold gets. It gets them in the order of the data.
    """
    labels = labels.numpy()
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if counts.min() < folds:
        raise ValueError(f"linear probing: class {classes[counts.argmin()]} has {counts.min()} training "
                         f"samples, {folds}-fold cross-validation needs {folds} of each class; add "
                         "samples or fix the strength with --lp-inverse-l2")
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


def minimise_logistic(z, onehot, weights, inverse_l2, penalty, theta, tolerance):
    """K weighted logistic regressions at once, by Newton's method with conjugate gradients.

    z (N, k + 1), onehot (N, C), weights (N, K), penalty (k + 1,), start theta (K, C, k + 1). Each
    problem is convex: minimise inverse_l2 * sum_i weights_i loss_i + 1/2 sum penalty * theta^2
    until its gradient norm is `tolerance` times that at theta = 0. RuntimeError if it is not.
    """
    strength = inverse_l2 * weights.unsqueeze(2)  # (N, K, 1)
    target = onehot.unsqueeze(1)  # (N, 1, C)

    def objective(theta):
        losses = -(fold_logits(z, theta).log_softmax(2) * target * strength).sum((0, 2))  # (K,)
        return losses + 0.5 * (penalty * theta.square()).sum((1, 2))

    def back(errors, inputs):  # of logits (N, K, C), to theta (K, C, k + 1)
        return ((strength * errors).flatten(1).T @ inputs).unflatten(0, theta.shape[:2])

    def gradient(theta):
        probs = fold_logits(z, theta).softmax(2)  # (N, K, C)
        return probs, back(probs - target, z) + penalty * theta  # (K, C, k + 1)

    goal = tolerance * gradient(torch.zeros_like(theta))[1].norm(dim=(1, 2))  # (K,)
    value, z_squared = objective(theta), z.square()
    for _ in range(100):
        probs, grad = gradient(theta)
        grad_norm = grad.norm(dim=(1, 2))  # (K,)
        if (grad_norm <= goal).all():
            return theta
        diagonal = back(probs * (1 - probs), z_squared) + penalty  # (K, C, k + 1)

        def hessian_times(direction):
            moved = fold_logits(z, direction)  # (N, K, C), the change of the logits
            moved = probs * (moved - (probs * moved).sum(2, keepdim=True))
            return back(moved, z) + penalty * direction

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
    raise RuntimeError(f"linear probing did not converge at inverse_l2 {inverse_l2:g}: gradient norm "
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


def set_head(model, probe):
    """Make V and b of `probe` the classifier's head, in place: where LP ends and LP-FT starts."""
    with torch.no_grad():
        model.head.weight.copy_(probe.weight)
        model.head.bias.copy_(probe.bias)


# ---------------------------------------------------------------------------- the FT stage


def device_of(model):
    return next(model.parameters()).device


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def mixed_precision(device):
    """bfloat16 matrix products on CUDA, around float32 weights; plain float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def predict(model, split, batch_size=64, desc=None):
    """(features (N, h), logits (N, C)) of a Split in its order: float32, on the CPU, no dropout."""
    device, was_training = device_of(model), model.training
    model.eval()
    features = torch.empty(len(split), model.head.in_features)
    batches = evaluation_batches(split.lengths, batch_size)
    for indices in tqdm(batches, desc=desc, disable=desc is None, leave=False):
        batch, _ = split.batch(indices)
        features[indices] = model.features(**to_device(batch, device)).float().cpu()
    model.train(was_training)
    head = model.head
    return features, F.linear(features, head.weight.float().cpu(), head.bias.float().cpu())


def accuracy(logits, labels):
    """Share of samples whose largest logit is their label's."""
    return float((logits.argmax(1) == labels).double().mean())


def fine_tune(model, train, val, *, lr, batch_size, epochs=10, seed=0, on_epoch=None):
    """The FT stage (paper Sec. 5): train what requires a gradient, keep the best validation epoch.

    Adam, learning rate falling linearly to 0 without warm-up, gradient norm clipped at 1, dropout
    as the encoder's configuration has it. `train` and `val` are Splits. After each epoch `on_epoch`
    is called with a dict {epoch, loss, train_accuracy, val_accuracy, head_norm, lr}; epoch 0 is the
    start. Returns the list of these dicts; the model is left in eval mode with the weights of the
    first epoch (1 or later) of the highest validation accuracy. Training loss and accuracy are
    running means over the epoch, with dropout on. Raises ValueError if the loss is not finite.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # weight decay 0 makes AdamW plain Adam
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0,
                                  fused=device_of(model).type in ("cuda", "cpu"))
    steps = epochs * math.ceil(len(train) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history, best_score, best_weights = [], -1.0, None
    with tqdm(total=steps, desc="fine-tuning", unit="step", mininterval=1.0) as bar:
        for epoch in range(epochs + 1):
            if epoch == 0:  # the start, measured without dropout
                _, logits = predict(model, train)
                loss = float(F.cross_entropy(logits, train.labels))
                train_accuracy = accuracy(logits, train.labels)
            else:
                generator = torch.Generator().manual_seed(seed * 1000 + epoch)
                batches = training_batches(train.lengths, batch_size, generator)
                loss, train_accuracy = train_epoch(model, train, batches, optimizer, schedule, bar)
                if not math.isfinite(loss):
                    raise ValueError(f"the training loss became {loss} in epoch {epoch} at --lr "
                                     f"{lr:g}; try a smaller one")
            val_accuracy = accuracy(predict(model, val)[1], val.labels)
            history.append({"epoch": epoch, "loss": loss, "train_accuracy": train_accuracy,
                            "val_accuracy": val_accuracy, "lr": schedule.get_last_lr()[0],
                            "head_norm": float(model.head.weight.detach().norm())})
            if on_epoch:
                on_epoch(history[-1])
            if epoch and val_accuracy > best_score:
                best_score = val_accuracy
                best_weights = {name: p.detach().clone() for name, p in trained.items()}
    model.load_state_dict(best_weights, strict=False)  # what is not trained has not moved
    model.eval()
    return history


def train_epoch(model, train, batches, optimizer, schedule, bar):
    """One step per index array in `batches`; returns the running (mean loss, accuracy)."""
    device = device_of(model)
    total_loss, correct = torch.zeros(2, device=device)  # stay there: reading would stall a GPU
    model.train()
    for indices in batches:
        batch, labels = train.batch(indices)
        batch, labels = to_device(batch, device), labels.to(device, non_blocking=True)
        with mixed_precision(device):
            logits = model(**batch)  # (N, C)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), max_norm=1.0)
        optimizer.step()
        schedule.step()
        total_loss += loss.detach() * len(indices)
        correct += (logits.detach().argmax(1) == labels).sum()
        bar.update()
    return float(total_loss) / len(train), float(correct) / len(train)


# ---------------------------------------------------------------------------- calibration


def fit_temperature(logits, labels):
    """The temperature T > 0 that minimises the mean cross-entropy of logits / T (paper Sec. 4.6).

    logits (N, C), labels (N,). Dividing by T is dividing V and b by T: no prediction changes. The
    search is over log T with a strong-Wolfe line search, and the result is checked: its slope
    d loss / d log T is below 1e-6, and its loss is not above that of T = 1. Where
    every label has the largest logit, the loss falls all the way to T = 0 and has no minimum; the
    search then ends at a small T at which the loss is flat. RuntimeError if it did not converge.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()  # (N, C), (N,)
    # Search from logits of unit spread: then every scale of logits is equally easy.
    scale = float((logits - logits.mean(1, keepdim=True)).square().mean().sqrt())
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"temperature scaling: the logits have spread {scale}")
    unit = logits / scale
    log_t = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(unit / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    temperature, slope = scale * math.exp(log_t.item()), log_t.grad.item()
    if not abs(slope) < 1e-6:
        raise RuntimeError(f"temperature scaling did not converge: slope {slope:.1e} at T = "
                           f"{temperature:.4g}")
    worse = F.cross_entropy(logits / temperature, labels) > F.cross_entropy(logits, labels)
    return 1.0 if worse else temperature


def calibration_error(logits, labels, bins=15):
    """(ECE, MCE) of softmax(logits), both between 0 and 1 (paper Table 3).

    Samples are sorted into equal bins by confidence, the largest probability; bin m is
    ((m - 1) / bins, m / bins]. ECE is the mean over samples, MCE the maximum over bins, of
    |accuracy - confidence| in the bin.
    """
    probs = logits.detach().cpu().double().softmax(1)  # (N, C)
    confidence, prediction = probs.max(1)  # (N,), (N,)
    correct = (prediction == labels.cpu()).double()
    inner_edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)[1:-1]  # (bins - 1,)
    bin_of = torch.bucketize(confidence, inner_edges)  # (N,): right=False closes bins above
    count = torch.bincount(bin_of, minlength=bins)
    gap = torch.bincount(bin_of, weights=correct - confidence, minlength=bins).abs()  # summed
    return float(gap.sum() / len(correct)), float((gap / count.clamp(min=1)).max())


# ---------------------------------------------------------------------------- features


def feature_statistics(features, features_0, labels):
    """Table 1's statistics of features (N, h), against those of the pre-trained encoder (N, h).

    cs    mean cosine similarity over all pairs of different samples
    diff  mean ||phi(x) - phi_0(x)||
    fdr   Fisher's discriminant ratio, trace(S_between) / trace(S_within)
    norm  mean ||phi(x)||

    labels (N,). Undefined values (one sample, no spread within the classes) are NaN or infinite.
    """
    features, features_0, labels = features.double(), features_0.double(), labels.cpu()
    n = len(features)
    unit = F.normalize(features, dim=1)  # (N, h)
    # sum over pairs i != j of <u_i, u_j> = ||sum_i u_i||^2 - sum_i ||u_i||^2
    pair_sum = unit.sum(0).square().sum() - unit.square().sum()
    onehot = F.one_hot(labels).double()  # (N, C)
    count = onehot.sum(0)  # (C,)
    means = onehot.T @ features / count.clamp(min=1).unsqueeze(1)  # (C, h)
    between = (count * (means - features.mean(0)).square().sum(1)).sum()
    within = (features - means[labels]).square().sum()
    return {"cs": float(pair_sum / (n * (n - 1))) if n > 1 else math.nan,
            "diff": float((features - features_0).norm(dim=1).mean()),
            "fdr": float(between / within),
            "norm": float(features.norm(dim=1).mean())}
