"""The paper's seven claims, each judged by paired differences over seeds.

    judge(results, seeds) -> [{claim, verdict, parts}]

A claim has parts. A part is a number that each seed gives, mostly a difference between two methods of that
seed, and a margin that the number has to exceed. Over seeds the numbers have a mean and its 95 % interval
(Student's t): the part holds if the interval is above the margin, does not hold if it is below, and is
undecided if the margin is inside. A claim holds if every part does and does not hold if one does not.

Two rules keep chance out that seeds do not see. Scores that differ from the margin by fewer than 6 test
samples decide nothing, whatever the seeds say: of 5 samples that all go one way the sign test (McNemar's)
still says p = 0.06. And where the kernel P has full rank no rank can be above it, so that is not measured.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Callable

import numpy as np

LEAST_SAMPLES = 6  # 2 x 0.5^6 = 0.03


class NotMeasured(Exception):
    """Why the runs of a seed do not have a number."""


class NoRun(NotMeasured):
    """The run is not there; another seed may have it."""


@dataclass
class Part:
    """One number of a claim: it has to be above the margin."""

    name: str
    measure: Callable  # Runs of one seed -> the number
    margin: float = 0.0
    samples: Callable | None = None  # Runs of one seed -> test samples behind it, if it is a score


class Runs:
    """The results of one seed by run name; remembers what was asked for."""

    def __init__(self, results, seed):
        self.results, self.seed, self.used = results, seed, {}

    def number(self, name, *keys):
        """The number under `keys` in the result of a run, or NotMeasured."""
        run = f"{name}-seed{self.seed}"
        if run not in self.results:
            raise NoRun(f"no run {run}")
        self.used[f"runs/{run}/result.json", ".".join(keys)] = True
        found = look_up(self.results[run], keys)
        if found is None:
            raise NotMeasured(f"no {'.'.join(keys)} in {run}")
        return found

    def mean(self, name, group, splits, *keys):
        """The mean over splits of the numbers under (group, split, *keys)."""
        if not splits:
            raise NotMeasured("no such split")
        return statistics.mean(self.number(name, group, split, *keys) for split in splits)


def look_up(result, keys):
    """The number under `keys` in nested dicts; None if there is none or it is not finite."""
    for key in keys:
        result = result.get(key) if isinstance(result, dict) else None
    number = isinstance(result, (int, float)) and not isinstance(result, bool) and math.isfinite(result)
    return result if number else None


def scale_names(results):
    """{factor on the starting head: {method: run name without its seed}}, of the factors that were run; with 1."""
    factors = {run.split("-scale")[1].split("-seed")[0] for run in results if "-scale" in run} | {"1"}
    return {float(factor): {name: name if factor == "1" else f"{name}-scale{factor}" for name in ("FT", "LP-FT")}
            for factor in sorted(factors, key=float)}


# ---------------------------------------------------------------------------- the claims


def claims(metric, splits, scales):
    """[(claim, [Part])]; `scales` as scale_names makes them."""
    test = [split for split in splits if split == "test"]
    ood = [split for split in splits if split != "test"]
    places = [("in distribution", test)] + [("out of distribution", ood)] * bool(ood)
    return [
        ("The head norm grows far more (at least twice as much) in LP than in FT or LoRA",
         [Part(f"growth of the norm: LP - 2 x {other}", lambda of, other=other: growth(of, "LP") - 2 * growth(of, other))
          for other in ("FT", "LoRA")]),
        ("Features move less in LP-FT than in FT", [
            part for place, of_place in places for part in (
                Part(f"Diff(F): FT - LP-FT, {place}", difference("FT", "LP-FT", "features", of_place, "diff")),
                Part(f"CS(F): LP-FT - FT, {place}", difference("LP-FT", "FT", "features", of_place, "cs")),
                Part(f"FDR(F): FT - LP-FT, {place}", difference("FT", "LP-FT", "features", of_place, "fdr")))]),
        ("LP-FT matches or beats FT in distribution and beats it out of distribution; LP is weakest in distribution", [
            score("LP-FT", "FT", metric, test, " (one point less is a match)", margin=-0.01),
            score("LP-FT", "FT", metric, ood, ", out of distribution"),
            *[score(name, "LP", metric, test) for name in ("FT", "LoRA", "LP-FT", "LP-LoRA")]]),
        ("F has a higher rank and a better kernel regression than P, and a larger FT ratio in LP-FT than in FT", [
            *[part for name in ("FT", "LP-FT") for part in kernel_parts(name)],
            Part("FT ratio: LP-FT - FT",
                 lambda of: of.number("LP-FT", "ntk", "ft_ratio") - of.number("FT", "ntk", "ft_ratio"))]),
        ("F under LoRA has nearly the rank and the normalised spectrum of F under FT",
         [part for pair in (("FT", "LoRA"), ("LP-FT", "LP-LoRA")) for part in likeness_parts(*pair)]),
        ("A larger starting head norm makes the feature change smaller",
         [part for place, of_place in places for name in ("FT", "LP-FT")
          for part in scale_parts(name, place, of_place, scales)]),
        ("LP-FT is worse calibrated (has a higher ECE) than FT and gains most from temperature scaling", [
            part for place, of_place in places for part in (
                Part(f"ECE: LP-FT - FT, {place}", difference("LP-FT", "FT", "calibration", of_place, "ece")),
                *[Part(f"fall of ECE by T: LP-FT - {other}, {place}", lambda of, of_place=of_place, other=other: (
                    gain(of, "LP-FT", of_place) - gain(of, other, of_place)))
                  for other in ("LP", "FT", "LoRA", "LP-LoRA")])]),
    ]


def difference(one, other, group, splits, *keys):
    return lambda of: of.mean(one, group, splits, *keys) - of.mean(other, group, splits, *keys)


def score(one, other, metric, splits, note="", margin=0.0):
    """A difference of test scores, with the number of samples that it is measured on."""
    return Part(f"{metric}: {one} - {other}{note}", difference(one, other, metric, splits), margin,
                lambda of: sum(of.number(one, "samples", split) for split in splits))


def growth(of, name):
    return of.number(name, "head_norm") - of.number(name, "head_norm_initial")


def gain(of, name, splits):
    """What temperature scaling takes off the ECE."""
    return of.mean(name, "calibration", splits, "ece") - of.mean(name, "calibration", splits, "ece_scaled")


def kernel_parts(name):
    """F against P where the FT stage of a method starts."""
    def rank(of):
        if of.number(name, "ntk", "P", "rank") == len(of.results[f"{name}-seed{of.seed}"]["ntk"]["P"]["singular_values"]):
            raise NotMeasured("P has full rank, N C, and nothing can be above it")
        return of.number(name, "ntk", "F", "rank") - of.number(name, "ntk", "P", "rank")

    def regression(of):
        return of.number(name, "ntk", "F", "test_accuracy") - of.number(name, "ntk", "P", "test_accuracy")

    return [Part(f"rank: F - P, {name}", rank),
            Part(f"test accuracy of regression: F - P, {name}", regression,
                 samples=lambda of: of.number(name, "ntk", "test_samples"))]


def likeness_parts(one, other):
    """How alike F is for two methods: 1 is equal."""
    def ranks(of):
        return sorted(of.number(name, "ntk", "F", "rank") for name in (one, other))

    def rank_ratio(of):
        smaller, larger = ranks(of)
        if not smaller:
            raise NotMeasured("F is zero")
        return smaller / larger

    def spectrum_ratio(of):  # over the singular values that both ranks count
        count = ranks(of)[0]
        if not count:
            raise NotMeasured("F is zero")
        a, b = (np.array(of.results[f"{name}-seed{of.seed}"]["ntk"]["F"]["singular_values"][:count])
                for name in (one, other))
        return float(np.exp(-np.abs(np.log(a / b)).mean()))

    return [Part(f"rank, {one} and {other}: smaller / larger", rank_ratio, 0.9),
            Part(f"singular values, {one} and {other}: geometric mean of smaller / larger", spectrum_ratio, 0.5)]


def scale_parts(name, place, splits, scales):
    """How Diff(F) falls with the head: over all factors, and where the head is only made larger."""
    def fall(least):  # per factor of ten, by least squares
        def measure(of):
            factors = [factor for factor in scales if factor >= least]
            if len(factors) < 2:
                raise NotMeasured("no runs from scaled heads")
            diffs = [of.mean(scales[factor][name], "features", splits, "diff") for factor in factors]
            return -float(np.polyfit(np.log10(factors), diffs, 1)[0])
        return measure

    return [Part(f"fall of Diff(F) per factor 10 of the head, {name}, {place}", fall(0)),
            Part(f"fall of Diff(F) per factor 10 from 1 up, {name}, {place}", fall(1))]


# ---------------------------------------------------------------------------- the verdicts


def judge(results, seeds):
    """[{claim, verdict, parts: [{part, margin, verdict, mean, lower, upper, values, seeds, sources}]}].

    results {run: what result.json holds}. A part uses the seeds that have its runs; with fewer than two, or where
    a number is not defined, it is "not measured", and `why` says so. sources are [file, key] pairs.
    """
    first = results[f"LP-seed{seeds[0]}"]
    judged = []
    for claim, parts in claims(first["metric"], list(first[first["metric"]]), scale_names(results)):
        found = [judge_part(part, results, seeds) for part in parts]
        verdicts = {part["verdict"] for part in found}
        whole = "undecided"
        if "does not hold" in verdicts:
            whole = "does not hold"
        elif len(verdicts) == 1:
            whole, = verdicts
        judged.append({"claim": claim, "verdict": whole, "parts": found})
    return judged


def judge_part(part, results, seeds):
    judged = {"part": part.name, "margin": part.margin}
    values, used, samples, why = {}, {}, [], None
    for seed in seeds:
        runs = Runs(results, seed)
        try:
            values[seed] = float(part.measure(runs))
            samples += [part.samples(runs)] if part.samples else []
        except NoRun as error:
            why = str(error)
        except NotMeasured as error:
            return judged | {"verdict": "not measured", "why": str(error)}
        else:
            used |= runs.used
    if len(values) < 2:
        return judged | {"verdict": "not measured", "why": why}
    mean, lower, upper = confidence_interval(list(values.values()))
    verdict = "holds" if lower > part.margin else "does not hold" if upper <= part.margin else "undecided"
    if samples and abs(mean - part.margin) * min(samples) < LEAST_SAMPLES - 1e-9:
        verdict = "undecided"
    return judged | {"verdict": verdict, "mean": mean, "lower": lower, "upper": upper, "values": [*values.values()],
                     "seeds": [*values], "sources": [list(source) for source in used]}


def confidence_interval(values):
    """(mean, lower, upper) of the 95 % interval of the mean by Student's t; inf for a single value."""
    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return mean, -math.inf, math.inf
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def t_quantile(degrees):
    """The t with P(|T| < t) = 0.95, by integrating Student's density and halving an interval."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        x = np.linspace(0, middle, 4001)
        inside = 2 * scale * np.trapezoid((1 + x**2 / degrees) ** (-(degrees + 1) / 2), x)
        low, high = (middle, high) if inside < 0.95 else (low, middle)
    return middle
