"""Linear probing: a penalised logistic regression, its gradient, and the folds that choose its penalty."""

import math

import torch

from assignments.graders import GET_BY, expect, points, require

MEAN = "the mean over samples, where it is the sum"
BIAS = "a penalty on the bias as well"
NO_HALF = "a penalty without its 1/2"
SWAPPED = "inverse_l2 on the penalty, where it is on the losses"
NO_INVERSE_L2 = "leaving inverse_l2 out"
NO_PENALTY = "leaving the penalty out"
TWICE = "two classes penalised twice: penalty holds the 2 already"
SIGN = "onehot minus softmax, where it is softmax minus onehot"
HALF_GRADIENT = "the 1/2 of the penalty in its gradient as well, where a square's derivative takes it away"
UNWEIGHTED = "errors that are not multiplied by inverse_l2"
ROUNDED = "the logarithm of a probability that has rounded to 0"
ROUNDED_TIMES_0 = "the logarithm of a probability that has rounded to 0, times a 0 of onehot: NaN"
VMAP = "a tensor changed in place, or made a Python number, which torch.vmap cannot do"

BLOCKS = "not stratified: the data cut into equal blocks"
BY_POSITION = "not stratified: sample i in fold i mod folds"
RESTARTED = "the deal begun anew at fold 0 for each class"
BY_NUMBER = "classes by their number, not by first appearance"
IN_TURN = "samples of a class dealt in turn, where a fold tests a run of them in the order of the data"
IN_TURN_FROM_0 = "samples of a class dealt in turn, and each class from fold 0 on"


# ---------------------------------------------------------------------------- the objective


def problem(rng, classes=3, count=9, width=4):
    """(theta (C, k + 1), inverse_l2 (N,), z (N, k + 1), onehot (N, C), penalty (k + 1,)), two held out."""
    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.double)

    theta = normal(classes, width + 1)
    z = torch.cat([normal(count, width), torch.ones(count, 1).double()], dim=1)
    inverse_l2 = 0.5 + torch.rand(count, generator=rng, dtype=torch.double)
    inverse_l2[torch.randperm(count, generator=rng)[:2]] = 0.0
    onehot = torch.zeros(count, classes, dtype=torch.double)
    for i, label in enumerate(torch.randint(classes, (count,), generator=rng).tolist()):
        onehot[i, label] = 1.0
    return theta, inverse_l2, z, onehot, torch.tensor([1.0] * width + [0.0], dtype=torch.double)


def losses(theta, z, onehot):
    """The cross-entropy of each sample, one after the other."""
    found = []
    for x, y in zip(z, onehot):
        logits = torch.stack([(row * x).sum() for row in theta])
        found.append(logits.logsumexp(0) - logits[int(y.argmax())])
    return torch.stack(found)


def value_of(theta, inverse_l2, z, onehot, penalty):
    square = sum(penalty[j] * (theta[:, j] ** 2).sum() for j in range(len(penalty)))
    return (inverse_l2 * losses(theta, z, onehot)).sum() + square / 2


def gradient_of(*inputs, value=value_of):
    return torch.func.grad(value)(*inputs)


VALUES = {  # what known wrong solutions compute; their gradients follow
    MEAN: lambda t, s, z, y, p: (s * losses(t, z, y)).mean() + (p * t**2).sum() / 2,
    BIAS: lambda t, s, z, y, p: (s * losses(t, z, y)).sum() + (t**2).sum() / 2,
    TWICE: lambda t, s, z, y, p: (s * losses(t, z, y)).sum() + (p * t**2).sum() * (1 if len(t) == 2 else 0.5),
    NO_HALF: lambda t, s, z, y, p: (s * losses(t, z, y)).sum() + (p * t**2).sum(),
    SWAPPED: lambda t, s, z, y, p: losses(t, z, y).sum() + s.max() * (p * t**2).sum() / 2,
    NO_INVERSE_L2: lambda t, s, z, y, p: losses(t, z, y).sum() + (p * t**2).sum() / 2,
    NO_PENALTY: lambda t, s, z, y, p: (s * losses(t, z, y)).sum(),
}


def wrong_values(*inputs):
    return {name: value(*inputs) for name, value in VALUES.items()}


def wrong_gradients(*inputs):
    theta, inverse_l2, z, onehot, penalty = inputs
    shrink, right = penalty * theta, gradient_of(*inputs)
    gradients = {name: gradient_of(*inputs, value=value) for name, value in VALUES.items()}
    gradients[UNWEIGHTED] = gradients.pop(NO_INVERSE_L2)
    return gradients | {SIGN: 2 * shrink - right, HALF_GRADIENT: right - shrink / 2}


def answer(student, *inputs):
    """(value, gradient) of the student; Wrong if there are not two tensors."""
    found = student.lp_objective(*inputs)
    two = isinstance(found, (tuple, list)) and len(found) == 2
    require(two, shapes(*inputs), "(value (), gradient (C, k + 1))", found)
    return found


def shapes(*inputs):
    names = ("theta", "inverse_l2", "z", "onehot", "penalty")
    return f"lp_objective({', '.join(f'{name} {tuple(x.shape)}' for name, x in zip(names, inputs))})"


@points(2)
def the_value_is_a_weighted_sum_of_losses_and_a_penalty(student, rng):
    """value = sum_i inverse_l2_i * cross_entropy(theta z_i, y_i) + 1/2 sum_j penalty_j * ||column j of
    theta||^2; penalty is 0 for the last column, b"""
    inputs = problem(rng)
    value, _ = answer(student, *inputs)
    expect(value, value_of(*inputs), shapes(*inputs) + "[0], the value", wrong_values(*inputs))


@points(2)
def the_gradient_is_that_of_the_value(student, rng):
    """d value / d theta = sum_i inverse_l2_i * (softmax(theta z_i) - onehot_i) z_i^T + penalty * theta: an
    error for each class, times the input, and the pull of the penalty towards 0"""
    inputs = problem(rng)
    _, gradient = answer(student, *inputs)
    expect(gradient, gradient_of(*inputs), shapes(*inputs) + "[1], the gradient", wrong_gradients(*inputs))


@points(1)
def each_column_has_the_penalty_that_is_given(student, rng):
    """penalty_j belongs to column j of theta and is used as it is given. For two classes it is 2 already:
    scikit-learn fits one vector w, V = [-w/2, w/2], and 1/2 ||w||^2 is ||V||^2"""
    for classes in (3, 2):
        *inputs, penalty = problem(rng, classes)
        inputs += [penalty * (1.5 + torch.rand(len(penalty), generator=rng))]
        value, gradient = answer(student, *inputs)
        called = f"{shapes(*inputs)}, columns of different penalty"
        expect(value, value_of(*inputs), called + ": [0]", wrong_values(*inputs))
        expect(gradient, gradient_of(*inputs), called + ": [1]", wrong_gradients(*inputs))


@points(1)
def a_held_out_sample_plays_no_part(student, rng):
    "A sample of inverse_l2 0 is held out: value and gradient are those of the other samples alone"
    theta, inverse_l2, z, onehot, penalty = inputs = problem(rng)
    used = inverse_l2 > 0
    alone = theta, inverse_l2[used], z[used], onehot[used], penalty
    value, gradient = answer(student, *inputs)
    called = shapes(*inputs) + ", two samples of inverse_l2 0"
    expect(value, value_of(*alone), called + ": [0]", wrong_values(*inputs))
    expect(gradient, gradient_of(*alone), called + ": [1]", wrong_gradients(*inputs))


@points(1)
def large_logits_do_not_overflow(student, rng):
    """log softmax(a)_y = a_y - log sum_c exp(a_c), without a probability in between: where that rounds to 0,
    its logarithm is infinite and the loss is not"""
    theta, *inputs = problem(rng)
    inputs = (1000 * theta, *inputs)
    value, gradient = answer(student, *inputs)
    called = shapes(*inputs) + ", logits of some thousands"
    expect(value, value_of(*inputs), called + ": [0]",
           {ROUNDED_TIMES_0: math.nan, ROUNDED: math.inf} | wrong_values(*inputs))
    expect(gradient, gradient_of(*inputs), called + ": [1]", wrong_gradients(*inputs))


@points(1)
def it_runs_for_all_folds_at_once(student, rng):
    """torch.vmap(lp_objective) computes the problems of all folds side by side, each with its theta and its
    inverse_l2, and leaves what it was given as it was. The solver calls it this way"""
    problems = [problem(rng) for _ in range(4)]
    _, _, z, onehot, penalty = problems[0]
    theta, inverse_l2 = torch.stack([p[0] for p in problems]), torch.stack([p[1] for p in problems], dim=1)
    before = [x.clone() for x in (theta, inverse_l2, z, onehot, penalty)]
    student.lp_objective(*problems[0])  # an error here is none of vmap
    called = "torch.vmap(lp_objective, (0, 1, None, None, None))(theta (4, 3, 5), inverse_l2 (9, 4), ...)"
    try:
        value, gradient = torch.vmap(student.lp_objective, in_dims=(0, 1, None, None, None))(*before)
    except RuntimeError as error:
        error.add_note(GET_BY + VMAP)
        raise
    each = [(theta[k], inverse_l2[:, k], z, onehot, penalty) for k in range(4)]
    expect(value, torch.stack([value_of(*inputs) for inputs in each]), called + "[0]",
           {name: torch.stack([value(*inputs) for inputs in each]) for name, value in VALUES.items()})
    expect(gradient, torch.stack([gradient_of(*inputs) for inputs in each]), called + "[1]")
    for x, was in zip(before, (theta, inverse_l2, z, onehot, penalty)):
        expect(x, was, "what was given to lp_objective, after the call")


# ---------------------------------------------------------------------------- the folds


def shuffled(rng, first, counts):
    """Labels (N,) in random order, counts[c] of class c; `first` says in which order classes appear first."""
    rest = torch.tensor([c for c, count in enumerate(counts) for _ in range(count - 1)])
    return torch.cat([torch.tensor(first), rest[torch.randperm(len(rest), generator=rng)]])


def deal(labels, folds, order=None, restart=False, in_turn=False):
    """The rule, word by word: a list of all labels, by class; position j counts for fold j mod folds."""
    labels = labels.tolist()
    order = order or list(dict.fromkeys(labels))
    listed = [label for c in order for label in labels if label == c]
    fold_of = torch.zeros(len(labels), dtype=torch.long)
    for c in order:
        start = 0 if restart else listed.index(c)
        numbers = [(start + place) % folds for place in range(labels.count(c))]
        members = [i for i, label in enumerate(labels) if label == c]
        for i, number in zip(members, numbers if in_turn else sorted(numbers)):
            fold_of[i] = number
    return fold_of


def known(labels, folds):
    n = len(labels)
    return {BLOCKS: torch.arange(n) * folds // n, BY_POSITION: torch.arange(n) % folds,
            RESTARTED: deal(labels, folds, restart=True),
            BY_NUMBER: deal(labels, folds, order=sorted(set(labels.tolist()))),
            IN_TURN: deal(labels, folds, in_turn=True),
            IN_TURN_FROM_0: deal(labels, folds, in_turn=True, restart=True)}


def check_folds(student, labels, folds, called):
    found = student.stratified_folds(labels) if folds == 5 else student.stratified_folds(labels, folds)
    shaped = isinstance(found, torch.Tensor) and found.shape == labels.shape
    require(shaped, called, f"a tensor ({len(labels)},)", found)
    expect(found, deal(labels, folds), called, known(labels, folds))
    require(found.dtype == torch.int64, f"{called}.dtype", "torch.int64", found.dtype)


def table(fold_of, labels, folds):
    """How many samples of each class a fold tests, (folds, C)."""
    return torch.tensor([[int(((fold_of == f) & (labels == c)).sum()) for c in range(int(labels.max()) + 1)]
                         for f in range(folds)])


@points(1)
def each_fold_has_its_share_of_each_class(student, rng):
    """A fold tests as many samples of a class as positions of that class in the sorted list are f mod folds:
    the shares of two folds differ by 1 at most, in a class and in all"""
    labels = shuffled(rng, [0, 1, 2], (11, 7, 18))
    found = student.stratified_folds(labels)
    called = "stratified_folds(labels (36,)): samples of each class (column) in each fold (row)"
    require(isinstance(found, torch.Tensor) and found.shape == labels.shape, called, "a tensor (36,)", found)
    expect(table(found, labels, 5), table(deal(labels, 5), labels, 5), called,
           {name: table(wrong, labels, 5) for name, wrong in known(labels, 5).items()})


@points(1)
def a_fold_tests_its_samples_in_the_order_of_the_data(student, rng):
    """The first samples of a class are tested by the lowest fold that has some of it, the next by the next
    fold: nothing is shuffled"""
    labels = shuffled(rng, [0, 1], (5, 4))
    check_folds(student, labels, 3, f"stratified_folds(labels {labels.tolist()}, folds=3)")
    check_folds(student, shuffled(rng, [0, 1, 2], (12, 21, 7)), 5, "stratified_folds(labels (40,))")


@points(1)
def classes_come_by_first_appearance(student, rng):
    """The list begins with the class of the first sample, whatever its number; then comes the next that
    appears"""
    check_folds(student, shuffled(rng, [2, 0, 1], (6, 8, 7)), 5,
                "stratified_folds(labels (21,)), classes first seen in the order 2, 0, 1")


@points(1)
def a_class_smaller_than_the_folds_is_refused(student, rng):
    "Each fold needs a sample of each class: as many samples as folds are enough, one fewer is a ValueError"
    labels = shuffled(rng, [1, 0], (9, 5))
    check_folds(student, labels, 5, "stratified_folds(labels (14,)), 5 samples of class 1")
    check_folds(student, labels, 4, "stratified_folds(labels (14,), folds=4), 5 samples of class 1")
    for bad, folds in ((labels, 6), (labels[labels.cumsum(0) < 5], 5)):
        try:
            found = student.stratified_folds(bad, folds)
        except ValueError:
            continue
        called = f"stratified_folds(labels ({len(bad)},), folds={folds}), {int(bad.sum())} samples of class 1"
        require(False, called, "ValueError", found)
