"""Temperature scaling: one number that mends confidence and changes no prediction (paper Sec. 4.6)."""

import math

import torch
import torch.nn.functional as F

from assignments.graders import expect, points, require

MULTIPLIED = "multiplying the logits by T, where they are to be divided"
NOTHING = "fitting accuracy, or nothing: T stays 1"
LOG = "returning log T"
SQUARED = "dividing by T squared"
CONFIDENCE = "making mean confidence equal accuracy, where the loss is to be smallest"
BRIER = "minimising the squared error of the probabilities, not cross-entropy"
NOT_BELOW_1 = "not letting T fall below 1"
TOO_EARLY = "ending the search too early: T lies between 1, its start, and the minimum"
NO_MINIMUM = "searching where there is no minimum: T runs away to 0 or to infinity"
IN_PLACE = "changing the caller's logits in place"
NAN = "searching on NaN or infinity instead of raising ValueError"
TOLERANCE = 1e-4  # T is to be right to four digits
CALLED = "fit_temperature(logits (200, 3), labels (200,))"


def texts(rng, too_sure=2.0, count=200, classes=3):
    """Logits (N, C) that are `too_sure` times too large, and labels (N,) drawn from the right ones."""
    logits = 2 * torch.randn(count, classes, generator=rng)
    labels = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
    return too_sure * logits, labels


def bisection(slope):
    """T where slope(s), s = 1 / T, goes through 0 from below."""
    low, high = 0.0, 1.0
    while slope(high) < 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def best(logits, labels):
    """T by bisection on the slope of the loss, which is convex in 1 / T."""
    logits = logits.double()
    of_label = logits.gather(1, labels[:, None]).mean()
    return bisection(lambda s: float(((s * logits).softmax(1) * logits).sum(1).mean() - of_label))


def as_sure_as_right(logits, labels):
    """T at which mean confidence is accuracy: another idea of what calibration is."""
    logits = logits.double()
    accuracy = (logits.argmax(1) == labels).double().mean()
    return bisection(lambda s: float((s * logits).softmax(1).amax(1).mean() - accuracy))


def of_squared_error(logits, labels):
    """T with the smallest Brier score: the best of a grid of log T that narrows."""
    target = F.one_hot(labels, logits.shape[1]).double()
    middle, width = math.log(best(logits, labels)), 2.0
    while width > 1e-7:
        grid = torch.linspace(middle - width, middle + width, 21).tolist()
        errors = [float(((logits.double() / math.exp(t)).softmax(1) - target).square().sum()) for t in grid]
        middle = grid[errors.index(min(errors))]
        width /= 4
    return math.exp(middle)


def known(logits, labels):
    t = best(logits, labels)
    return {MULTIPLIED: 1 / t, NOTHING: 1.0, LOG: math.log(t), SQUARED: t**0.5,
            CONFIDENCE: as_sure_as_right(logits, labels), BRIER: of_squared_error(logits, labels)}


def unfinished(found, expected):
    """{TOO_EARLY: found} if it lies between 1 and what was expected."""
    between = isinstance(found, (int, float)) and min(1, expected) < found < max(1, expected)
    return {TOO_EARLY: found} if between else {}


@points(2)
def t_minimises_the_validation_loss(student, rng):
    "T minimises the mean over samples of cross_entropy(logits / T, labels)"
    logits, labels = texts(rng)
    expect(student.fit_temperature(logits, labels), best(logits, labels),
           f"{CALLED}, logits twice too large", known(logits, labels), TOLERANCE)


@points(1)
def a_case_that_paper_can_solve(student, rng):
    "Two classes, all margins m, a share q right: 1 / (1 + exp(-m / T)) = q, so T = m / log(q / (1 - q))"
    count = 20
    right = int(torch.randint(11, 20, (), generator=rng))
    margin = 3 + 3 * float(torch.rand((), generator=rng, dtype=torch.double))
    labels = torch.randint(2, (count,), generator=rng)
    sign = torch.where(torch.randperm(count, generator=rng) < right, 1.0, -1.0)
    logits = margin * sign[:, None] * F.one_hot(labels, 2)  # (N, 2): m or -m for the label
    expected = margin / math.log(right / (count - right))
    expect(student.fit_temperature(logits, labels), expected,
           f"fit_temperature(logits ({count}, 2), labels ({count},)), m = {margin:.4f}, q = {right}/{count}",
           known(logits, labels), TOLERANCE)


@points(1)
def t_is_below_1_where_the_classifier_is_too_unsure(student, rng):
    "T < 1 where the logits are too small: dividing by T then makes the probabilities sharper"
    logits, labels = texts(rng, too_sure=0.1)
    expect(student.fit_temperature(logits, labels), best(logits, labels),
           f"{CALLED}, logits ten times too small", {NOT_BELOW_1: 1.0} | known(logits, labels), TOLERANCE)


@points(2)
def every_scale_of_logits_is_as_easy(student, rng):
    "T of s * logits is s times T of logits, for any s > 0, however large or small"
    logits, labels = texts(rng)
    for scale in (1e3, 1e-3):
        found, expected = student.fit_temperature(scale * logits, labels), scale * best(logits, labels)
        expect(found, expected, f"fit_temperature({scale:g} * logits (200, 3), labels (200,))",
               known(scale * logits, labels) | unfinished(found, expected), TOLERANCE)


@points(1)
def what_all_logits_of_a_sample_share_does_not_count(student, rng):
    "softmax(logits + s) = softmax(logits) for a number s a sample, so T stays the same"
    logits, labels = texts(rng)
    logits = logits.double()
    shift = 1e4 * (1 + torch.rand(len(logits), 1, generator=rng, dtype=torch.double))  # (N, 1)
    found, expected = student.fit_temperature(logits + shift, labels), best(logits, labels)
    expect(found, expected, "fit_temperature(logits (200, 3) + s (200, 1), labels (200,)), s from 1e4 to 2e4",
           known(logits, labels) | unfinished(found, expected), TOLERANCE)


@points(1)
def after_dividing_by_t_nothing_is_left_to_fit(student, rng):
    "T of logits / T is 1"
    for _ in range(8):
        logits, labels = texts(rng, too_sure=0.5 + 4 * float(torch.rand((), generator=rng)))
        t = best(logits, labels)
        found = student.fit_temperature(logits, labels)
        expect(found, t, CALLED, {NOTHING: 1.0, MULTIPLIED: 1 / t}, TOLERANCE)
        expect(student.fit_temperature(logits.double() / t, labels), 1.0,
               f"fit_temperature(logits / {t:.4f} (200, 3), labels (200,))", tolerance=TOLERANCE)


@points(1)
def t_is_1_where_no_t_is_best(student, rng):
    """T is 1 where the loss has no minimum: all samples are right, and it falls all the way to T = 0; or the
    label's logit is on average below the others, and it falls all the way to T = infinity"""
    logits, labels = texts(rng)
    found = student.fit_temperature(logits, labels)
    expect(found, best(logits, labels), CALLED, known(logits, labels), TOLERANCE)
    for labels, what in ((logits.argmax(1), "every sample right"),
                         (logits.argmin(1), "every label the smallest logit")):
        found = student.fit_temperature(logits, labels)
        expect(found, 1.0, f"{CALLED}, {what}", {NO_MINIMUM: found}, TOLERANCE)


@points(1)
def nothing_else_happens(student, rng):
    "The result is a Python float, the logits are not changed, NaN or infinity among them is a ValueError"
    logits, labels = texts(rng)
    logits = logits.double().requires_grad_()  # as a model's logits are: part of a graph
    before = logits.detach().clone()
    found = student.fit_temperature(logits, labels)
    expect(logits, before, f"the logits after {CALLED}", {IN_PLACE: logits}, TOLERANCE)
    expect(found, best(before, labels), CALLED, known(before, labels), TOLERANCE)
    require(type(found) is float, f"type({CALLED})", "float", type(found).__name__)
    for bad in (math.inf, math.nan):
        logits = before.clone()
        logits[3, 1] = bad
        try:
            found = student.fit_temperature(logits, labels)
        except ValueError:
            continue
        require(False, f"{CALLED}, one logit is {bad}", "ValueError", f"{found!r}; {NAN}")
