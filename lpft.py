"""Linear probing, fine-tuning, their composition LP-FT, and what is measured on the result.

    LP       fit_linear_probe on frozen features, then set_head
    FT       fine_tune from a random head
    LP-FT    LP, then fine_tune from its head
    LoRA     add_lora (model.py), then fine_tune;  LP-LoRA: LP, add_lora, fine_tune

Read in this order; `train.py` puts the parts together. Shapes: N samples, C classes, h feature width.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import evaluation_batches, training_batches
from plumbing import devices, newton

# ---------------------------------------------------------------------------- linear probing

INVERSE_L2_GRID = np.logspace(-4, 4, 10)  # scikit-learn's default grid of C


@dataclass
class LinearProbe:
    """The head that LP found: logits = features @ weight.T + bias."""

    weight: torch.Tensor  # V, (C, h), float64
    bias: torch.Tensor  # b, (C,), float64
    inverse_l2: float  # scikit-learn's C: the larger, the weaker the penalty
    scores: np.ndarray  # cross-validation score of each inverse_l2, summed over folds, (10,); or None
    path: list  # (||V||_F, training accuracy) at every step of the solver, from V = 0 (Fig. 1)


def fit_linear_probe(features, labels, num_classes, inverse_l2=None, scoring="accuracy", fold_of=None):
    """Multinomial logistic regression on features (N, h) and labels (N,), in float64 on the CPU.

    Minimises scikit-learn's objective, inverse_l2 * sum_i cross_entropy(V phi(x_i) + b, y_i) + 1/2 ||V||_F^2,
    for two classes without the 1/2, because there scikit-learn fits one vector w and penalises 1/2 ||w||^2,
    and with V = [-w/2, w/2] that is ||V||_F^2. b has no penalty. If `inverse_l2` is None, cross-validation
    picks it from INVERSE_L2_GRID by `scoring`, "accuracy" or "log-loss"; of several with the same best score,
    the smallest, as scikit-learn does. `fold_of` (N,): the fold of each sample (default: stratified_folds).

    ValueError for a class without samples, features that are not finite, and what stratified_folds refuses.
    """
    x, labels = features.detach().cpu().double(), labels.cpu()  # (N, h), (N,)
    present = labels.bincount(minlength=num_classes) > 0  # (C,)
    if not (torch.isfinite(x).all() and present.all()):  # an absent class's bias would fall without end
        raise ValueError("linear probing: " + ("the features hold NaN or infinity" if present.all() else
                         f"no sample of class {int(present.int().argmin())}; expected all {num_classes}"))
    # Centre and rotate to principal axes: ||V|| stays, b takes up the shift, and second derivatives become
    # nearly diagonal, which the solver (newton.py) relies on. N samples have N axes at most: the rest is 0.
    mean = x.mean(0)  # (h,)
    _, axes = torch.linalg.eigh((x - mean).T @ (x - mean))  # (h, h), by growing variance
    axes = axes[:, -min(len(x), x.shape[1]):]  # (h, k)
    z = torch.cat([(x - mean) @ axes, x.new_ones(len(x), 1)], dim=1)  # (N, k + 1), the bias last
    onehot = F.one_hot(labels, num_classes).double()  # (N, C)
    penalty = torch.full((z.shape[1],), 2.0 if num_classes == 2 else 1.0, dtype=torch.double)  # (k + 1,)
    penalty[-1] = 0.0
    objective, scores, path = partial(lp_objective, z=z, onehot=onehot, penalty=penalty), None, []
    if inverse_l2 is None:
        fold_of = stratified_folds(labels) if fold_of is None else fold_of
        scores = newton.cross_validate(objective, z, onehot, penalty, fold_of, INVERSE_L2_GRID, scoring)
        inverse_l2 = float(INVERSE_L2_GRID[scores.argmax()])

    def record(theta):  # the rotation leaves the norm as it is
        right = (newton.fold_logits(z, theta)[:, 0].argmax(1) == labels).double().mean()
        path.append((float(theta[0, :, :-1].norm()), float(right)))

    start = x.new_zeros(1, num_classes, z.shape[1])  # (1, C, k + 1): the solver takes many problems, here one
    theta = newton.minimise_logistic(objective, z, x.new_full((len(x), 1), inverse_l2), penalty, start, 1e-10,
                                     record)[0]  # (C, k + 1)
    theta -= theta.mean(0)  # softmax does not see the mean over classes; without it V has rank C - 1
    weight = theta[:, :-1] @ axes.T  # (C, h)
    return LinearProbe(weight, theta[:, -1] - weight @ mean, inverse_l2, scores, path)


def lp_objective(theta, inverse_l2, z, onehot, penalty):
    """What LP minimises, and its gradient with respect to theta = [V, b], (C, k + 1):

        sum_i inverse_l2_i * cross_entropy(theta z_i, y_i)  +  1/2 sum_j penalty_j * ||column j of theta||^2

    inverse_l2 (N,), scikit-learn's C, and 0 for a sample that is held out; z (N, k + 1), features with a 1
    behind each; onehot (N, C), labels; penalty (k + 1,), 0 for b. Returns (value (), gradient (C, k + 1)). It
    runs under torch.vmap, for all folds at once, so no float(), no .item(), no change of a tensor in place.
    """
    logits = z @ theta.T  # (N, C)
    losses = -(onehot * logits.log_softmax(1)).sum(1)  # (N,)
    errors = inverse_l2[:, None] * (logits.softmax(1) - onehot)  # (N, C), d value / d logits
    return inverse_l2 @ losses + 0.5 * (penalty * theta.square()).sum(), errors.T @ z + penalty * theta


def stratified_folds(labels, folds=5):
    """The fold (0 to folds - 1) that tests each sample, (N,) int64: unshuffled, as scikit-learn deals them.

    First, how many samples of each class a fold gets: sort the labels by class, classes by first appearance,
    and deal this list like cards, position j to fold j mod folds. Then, which ones: the first samples of a
    class, in the order of the data, go to fold 0, the next to fold 1, and so on. ValueError for a class with
    fewer samples than folds.
    """
    labels = labels.numpy()
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if counts.min() < folds:
        raise ValueError(f"{folds}-fold cross-validation needs {folds} training samples of each class, class "
                         f"{classes[counts.argmin()]} has {counts.min()}")
    classes = classes[first.argsort()]
    dealt = np.concatenate([labels[labels == c] for c in classes])  # (N,), sorted
    fold_of = np.empty(len(labels), dtype=int)
    for c in classes:
        fold_of[labels == c] = np.repeat(range(folds), [(dealt[f::folds] == c).sum() for f in range(folds)])
    return torch.from_numpy(fold_of)


def set_head(model, probe):
    """V and b of `probe` take the place of the classifier's random head, in its precision: here LP ends."""
    model.head.load_state_dict({"weight": probe.weight, "bias": probe.bias})


# ---------------------------------------------------------------------------- the FT stage


@torch.no_grad()
def predict(model, split, batch_size=64, desc=None):
    """(features (N, h), logits (N, C)) of a Split in its order: float32, on the CPU, no dropout."""
    device, was_training = devices.device_of(model), model.training
    model.eval()
    batches, parts = evaluation_batches(split.lengths, batch_size), []
    for indices in tqdm(batches, desc=desc, disable=desc is None, leave=False):
        batch, _ = devices.batch_of(split, indices, device)
        parts.append(model.features(**batch).float())
    model.train(was_training)
    features = torch.empty(len(split), model.head.in_features)
    features[np.concatenate(batches)] = torch.cat(parts).cpu()  # one copy: a GPU is waited for once
    return features, logits_of(model, features)


@torch.no_grad()
def logits_of(model, features):
    """V phi(x) + b, (N, C), from features (N, h) on the CPU."""
    return F.linear(features, model.head.weight.float().cpu(), model.head.bias.float().cpu())


def accuracy(logits, labels):
    """Share of samples whose largest logit is their label's."""
    return float((logits.argmax(1) == labels).double().mean())


def matthews(logits, labels):
    """Matthews correlation of predictions with labels, for any number of classes: 1 is perfect, 0 is chance.

    It is cov(x, y) / sqrt(cov(x, x) cov(y, y)) of one-hot predictions x and labels y, summed over classes.
    """
    x, y = (F.one_hot(i, logits.shape[1]).double() for i in (logits.argmax(1), labels))  # (N, C)
    x, y = x - x.mean(0), y - y.mean(0)
    spread = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / spread if spread else 0.0


METRICS = {"accuracy": accuracy, "matthews": matthews}


def fine_tune(model, train, val, *, lr, batch_size, epochs=10, seed=0, metric="accuracy", on_epoch=None,
              state=None):
    """The FT stage (paper Sec. 5): train what requires a gradient, keep the best validation epoch.

    Adam, learning rate falling linearly to 0 without warm-up, gradient clipped to a norm of at most 1,
    dropout as the encoder's configuration has it. `train` and `val` are Splits; `seed` sets the
    batches and their order (data.training_batches); dropout uses torch's generator, which the caller seeds.
    Returns one dict an epoch, {epoch, loss, train_accuracy, val_accuracy, val_METRIC, lr, head_norm}, which
    `on_epoch` gets too. Epoch 0 is the start, measured without dropout; later loss and train_accuracy are
    means over the samples, with dropout. `lr` is that of the next step. The model is left in eval mode, with
    the weights of the first epoch after the start that has the highest val_METRIC.
    `state`, a RunState, keeps the last whole epoch; if it holds one, training goes on from there, to the same
    numbers. Raises NotFinite if loss, gradient or validation logits are infinite or NaN, at epoch 0 too.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0,  # without decay AdamW is Adam
                                  fused=devices.device_of(model).type in ("cuda", "cpu"))
    steps = epochs * math.ceil(len(train) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history, best = state.restore(model, optimizer, schedule) if state else ([], None)
    for epoch in range(len(history), epochs + 1):
        if epoch == 0:
            _, logits = predict(model, train)
            loss = F.cross_entropy(logits, train.labels).item()
            train_accuracy = accuracy(logits, train.labels)
        else:
            order = torch.Generator().manual_seed(seed * 1000 + epoch)
            batches = training_batches(train.lengths, batch_size, order)
            loss, train_accuracy = train_epoch(model, train, batches, optimizer, schedule)
        _, logits = predict(model, val)
        if not (math.isfinite(loss) and torch.isfinite(logits).all()):
            raise NotFinite(model, best, epoch, lr)
        record = {"epoch": epoch, "loss": loss, "train_accuracy": train_accuracy,
                  "val_accuracy": accuracy(logits, val.labels), "lr": schedule.get_last_lr()[0],
                  f"val_{metric}": METRICS[metric](logits, val.labels),
                  "head_norm": float(model.head.weight.detach().norm())}
        history.append(record)
        if epoch and record is best_epoch(history, metric):
            best = {name: p.detach().clone() for name, p in trained.items()}
        if state:
            state.save(model, optimizer, schedule, history, best)
        if on_epoch:
            on_epoch(record)
    model.load_state_dict(best, strict=False)  # frozen weights are unchanged, so they are not in it
    model.eval()
    return history


def best_epoch(history, metric):
    """Of fine_tune's dicts: the first epoch after the start that has the highest validation score."""
    return max(history[1:], key=lambda record: record[f"val_{metric}"])


def train_epoch(model, split, batches, optimizer, schedule):
    """One epoch: a step for each index array in `batches`; (mean loss, accuracy) over the samples of `split`.

    The model is in train mode: dropout is on. A step is: logits (n, C), the mean cross-entropy of the batch,
    its gradient, clipped to a norm of at most 1 over all trained parameters, a step of the optimizer, one of
    the schedule. Each batch is measured before its step. A gradient that is not finite makes the loss NaN.
    """
    device = devices.device_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    totals = torch.zeros(2, device=device)  # loss, right predictions; read once, as each read waits for a GPU
    model.train()
    for indices in tqdm(batches, desc="fine-tuning", unit="step", mininterval=1.0, leave=False):
        batch, labels = devices.batch_of(split, indices, device)  # labels (n,)
        optimizer.zero_grad()  # frees the old gradients, so that the forward pass can use their memory
        with devices.mixed_precision(device):
            logits = model(**batch)  # (n, C)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, max_norm=1.0)  # before clipping
        optimizer.step()
        schedule.step()
        totals[0] += loss.detach() * len(labels) + 0 * norm  # NaN also where only the gradient is not finite
        totals[1] += (logits.detach().argmax(1) == labels).sum()
    loss, right = totals.tolist()
    return loss / len(split), right / len(split)


class NotFinite(ValueError):
    """Something became infinite or NaN; the model gets its best weights back, if there was a good epoch."""

    def __init__(self, model, best, epoch, lr):
        self.kept = best is not None
        if self.kept:
            model.load_state_dict(best, strict=False)
        super().__init__(f"loss, gradient or logits became infinite or NaN in epoch {epoch}, at --lr {lr:g}; "
                         + ("try a smaller one" if epoch else "weights of the encoder or head are too large"))


# ---------------------------------------------------------------------------- calibration


def why_no_temperature(logits, labels):
    """Why no temperature T > 0 minimises the mean cross-entropy of logits / T, or None if one does.

    The loss is convex in s = 1 / T. At s = 0 its slope is the mean of (mean logit - logit of the label); as s
    grows it rises to the mean of (largest logit - logit of the label). There is a minimum only if the first
    is negative and the second positive. logits (N, C), labels (N,).
    """
    logits = logits.detach().cpu().double()  # (N, C)
    of_label = logits.gather(1, labels.cpu().unsqueeze(1)).squeeze(1)  # (N,)
    if (of_label - logits.mean(1)).mean() <= 1e-12 * logits.abs().mean():  # 0, up to rounding
        return ("validation is no better than chance: on average a label's logit is not above the mean, "
                "so the loss falls all the way to T = infinity")
    if (of_label == logits.amax(1)).all():
        return "every validation sample is right or tied, so the loss falls all the way to T = 0"


def fit_temperature(logits, labels):
    """The temperature T > 0 that minimises the mean cross-entropy of logits / T (paper Sec. 4.6).

    logits (N, C), labels (N,). Dividing by T is dividing V and b by T: no prediction changes. The loss is
    convex in s = 1 / T: its slope rises with s, and is 0 where T is best. T is 1 if no T is best
    (why_no_temperature). ValueError for logits that are infinite or NaN.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()  # (N, C), (N,)
    if not torch.isfinite(logits).all():
        raise ValueError("temperature scaling: the logits hold NaN or infinity")
    if why_no_temperature(logits, labels):
        return 1.0
    logits = logits - logits.gather(1, labels.unsqueeze(1))  # (N, C): 0 for the label, the same softmax

    def slope(s):  # mean_i sum_c softmax(s logits)_ic logits_ic
        return ((s * logits).softmax(1) * logits).sum(1).mean()

    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:  # bisection
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high


def calibration_error(logits, labels, bins=15):
    """(ECE, MCE) of softmax(logits), floats between 0 and 1 (paper Table 3).

    Confidence is the largest probability; bin m holds ((m - 1) / bins, m / bins]. The gap of a bin is |its
    accuracy - its mean confidence|. ECE is the mean gap, weighted by samples; MCE is the largest.
    """
    confidence, prediction = logits.detach().cpu().double().softmax(1).max(1)  # (N,), (N,)
    correct = (prediction == labels.cpu()).double()
    inner_edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)[1:-1]  # (bins - 1,)
    bin_of = torch.bucketize(confidence, inner_edges)  # (N,): a bin has its upper edge
    count = torch.bincount(bin_of, minlength=bins)
    gap = torch.bincount(bin_of, weights=correct - confidence, minlength=bins).abs()  # summed
    return float(gap.sum() / len(correct)), float((gap / count.clamp(min=1)).max())


# ---------------------------------------------------------------------------- features


def feature_statistics(features, features_0, labels):
    """Table 1's statistics of features (N, h), in this order; features_0 (N, h): the pre-trained encoder's.

    cs    mean cosine similarity over all pairs of different samples
    diff  mean ||phi(x) - phi_0(x)||
    fdr   trace(S_between) / trace(S_within) = sum_c n_c ||mean_c - mean||^2 / sum_i ||x_i - mean_{y_i}||^2
    norm  mean ||phi(x)||

    labels (N,). Undefined values (one sample, no spread within the classes) are NaN or infinite.
    """
    features, features_0, labels = features.cpu().double(), features_0.cpu().double(), labels.cpu()
    unit = F.normalize(features, dim=1)  # (N, h)
    # sum over pairs i != j of <u_i, u_j> = ||sum_i u_i||^2 - sum_i ||u_i||^2
    pair_sum = unit.sum(0).square().sum() - unit.square().sum()
    onehot = F.one_hot(labels).double()  # (N, C)
    count = onehot.sum(0)  # (C,)
    means = onehot.T @ features / count.clamp(min=1).unsqueeze(1)  # (C, h)
    between = (count * (means - features.mean(0)).square().sum(1)).sum()
    within = (features - means[labels]).square().sum()
    return {"cs": float(pair_sum / (n * (n - 1))) if (n := len(features)) > 1 else math.nan,
            "diff": float((features - features_0).norm(dim=1).mean()), "fdr": float(between / within),
            "norm": float(features.norm(dim=1).mean())}
