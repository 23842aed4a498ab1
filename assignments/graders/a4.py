"""Temperature scaling: one number that mends confidence and changes no prediction (paper Sec. 4.6)."""

import math

import torch
import torch.nn.functional as F

from assignments.graders import expect, points, require

TOO_SURE = "multiplying the logits by T, where they are to be divided"


def texts(rng, count=200, classes=3, too_sure=2.0):
    """Logits (N, C) that are `too_sure` times too large, and labels (N,) drawn from the right ones."""
    logits = 2 * torch.randn(count, classes, generator=rng)
    labels = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
    return too_sure * logits, labels


def best(logits, labels):
    """T by bisection on the slope of the loss, which is convex in 1 / T."""
    logits = logits.double()

    def slope(b):  # d loss / d b, b = 1 / T
        return float(((b * logits).softmax(1) * logits).sum(1).mean() - logits.gather(1, labels[:, None]).mean())

    low, high = 1e-9, 1.0
    while slope(high) < 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def known(logits, labels):
    t = best(logits, labels)
    return {TOO_SURE: 1 / t, "fitting accuracy, or nothing: T stays 1": 1.0, "returning log T": math.log(t),
            "dividing by T squared": t**0.5}


@points(3)
def t_minimises_the_validation_loss(student, rng):
    "T minimises the mean over samples of cross_entropy(logits / T, labels)"
    logits, labels = texts(rng)
    expect(student.fit_temperature(logits, labels), best(logits, labels),
           "fit_temperature(logits (200, 3), labels (200,)), logits twice too large", known(logits, labels))


@points(2)
def t_is_below_1_where_the_classifier_is_too_unsure(student, rng):
    "T < 1 where confidence is below accuracy: then dividing by T makes the probabilities sharper"
    logits, labels = texts(rng, too_sure=0.1)
    expect(student.fit_temperature(logits, labels), best(logits, labels),
           "fit_temperature(logits (200, 3), labels (200,)), logits ten times too small", known(logits, labels)
           | {"not letting T fall below 1": 1.0})


@points(2)
def every_scale_of_logits_is_as_easy(student, rng):
    "T of s * logits is s times T of logits, for any s > 0, however large"
    logits, labels = texts(rng)
    for scale in (1e3, 1e-3):
        expect(student.fit_temperature(scale * logits, labels), scale * best(logits, labels),
               f"fit_temperature({scale:g} * logits (200, 3), labels (200,))",
               known(scale * logits, labels) | {"a search that is not done: T stays near its start": 1.0})


@points(2)
def t_is_1_where_no_t_is_best(student, rng):
    "Where every sample is right the loss falls all the way to T = 0: there is no best T, and T is 1"
    labels = torch.arange(30) % 3
    logits = 4.0 * F.one_hot(labels, 3) + torch.rand(30, 3, generator=rng)
    found = student.fit_temperature(logits, labels)
    expect(found, 1.0, "fit_temperature(logits (30, 3), labels (30,)), every sample right")


@points(1)
def logits_stay_as_they_are(student, rng):
    "The result is a Python float, and the logits that were given are not changed"
    logits, labels = texts(rng)
    before = logits.clone()
    found = student.fit_temperature(logits, labels)
    expect(found, best(before, labels), "fit_temperature(logits (200, 3), labels (200,))", tolerance=1e-3)
    require(type(found) is float, "type(fit_temperature(logits (200, 3), labels (200,)))", "float", type(found).__name__)
    expect(logits, before, "logits after fit_temperature(logits, labels)")
    for bad in (math.inf, math.nan):
        try:
            student.fit_temperature(torch.tensor([[bad, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        except ValueError:
            continue
        require(False, f"fit_temperature(logits with {bad})", "ValueError", "no error")
