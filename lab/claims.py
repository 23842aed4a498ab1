"""The paper's seven claims, each judged by paired differences over seeds.

    judge(results, seeds) -> [{claim, verdict, parts}]

A claim has parts. A part is a number that each seed gives, mostly a difference between two methods of that
seed, and a margin that the number has to exceed. Over seeds the numbers have a mean and its 95 % interval
(Student's t): the part holds if the interval is above the margin, does not hold if it is below, and is
undecided if the margin is inside. A claim holds if every part does and does not hold if one does not.

The twice of claim 1 and bounds other than 0 are this project's reading of the paper's words: "far more" is
twice, "matches" is at most one point less, "nearly" is nine tenths of a rank and half of a singular value.

All runs share their test samples, whose chance seeds do not see. So a score that is closer to its bound than
6 samples, or whose samples, added over splits, lie on the other side of it, is undecided, whatever the seeds
say. 6 is the least: of 5 that all go one way the sign test (McNemar's) still says p = 0.06; where runs
disagree on many samples it takes more. Other numbers have no such guard.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Callable

import numpy as np
from scipy import stats

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
    samples: Callable | None = None  # Runs of one seed -> how many shared test samples a score is above the margin


class Runs:
    """The results of one seed by run name; remembers what was asked for."""

    def __init__(self, results, seed):
        self.results, self.seed, self.used = results, seed, []

    def number(self, name, *keys):
        """The number, or the array of numbers, under `keys` in the result of a run; NotMeasured if it is not
        there.
        """
        run = f"{name}-seed{self.seed}"
        if run not in self.results:
            raise NoRun(f"no run {run}")
        source = [f"runs/{run}/result.json", ".".join(keys)]
        self.used += [source] * (source not in self.used)
        found = look_up(self.results[run], keys)
        if found is None:
            raise NotMeasured(f"no {'.'.join(keys)} in {run}")
        return found

    def needs_temperature(self, name):
        """NotMeasured where T of the run is 1 because none could be fitted."""
        run = f"{name}-seed{self.seed}"
        if reason := self.results.get(run, {}).get("temperature_reason"):
            raise NotMeasured(f"T of {run} is 1: {reason}")

    def mean(self, name, group, splits, *keys):
        """The mean over splits of the numbers under (group, split, *keys)."""
        if not splits:
            raise NotMeasured("no such split")
        return statistics.mean(self.number(name, group, split, *keys) for split in splits)


def look_up(result, keys):
    """The number under `keys` in nested dicts, or the list of numbers as an array; None if it is not that or
    not finite.
    """
    for key in keys:
        result = result.get(key) if isinstance(result, dict) else None
    if isinstance(result, list):
        numbers = result and all(isinstance(x, (int, float)) and math.isfinite(x) for x in result)
        return np.array(result) if numbers else None
    number = isinstance(result, (int, float)) and not isinstance(result, bool) and math.isfinite(result)
    return result if number else None


def scale_names(results):
    """{factor on the starting head: {method: run name without its seed}}, of the factors that were run; with
    1.
    """
    factors = {run.split("-scale")[1].split("-seed")[0] for run in results if "-scale" in run} | {"1"}
    return {float(factor): {name: name if factor == "1" else f"{name}-scale{factor}" for name in ("FT", "LP-FT")}
            for factor in sorted(factors, key=float)}


# ---------------------------------------------------------------------------- the claims


def claims(metric, splits, scales):
    """[(claim, [Part])]; `scales` as scale_names makes them."""
    test, ood = ([split for split in splits if (split == "test") == wanted] for wanted in (True, False))
    places = {"in distribution": test} | ({"out of distribution": ood} if ood else {})
    return [
        ("The head norm grows far more (at least twice as much) in LP than in FT or LoRA", head_norm_parts()),
        ("Features move less in LP-FT than in FT", feature_parts(places)),
        ("LP-FT matches or beats FT in distribution and beats it out of distribution; LP is weakest in distribution",
         [score("LP-FT", "FT", metric, test, " (one point less is a match)", margin=-0.01),
          score("LP-FT", "FT", metric, ood, ", out of distribution"),
          *(score(name, "LP", metric, test) for name in ("FT", "LoRA", "LP-FT", "LP-LoRA"))]),
        ("F has a higher rank and a better kernel regression than P, and a larger FT ratio in LP-FT than in FT",
         kernel_parts("FT") + kernel_parts("LP-FT")
         + [Part("FT ratio: LP-FT - FT", difference("LP-FT", "FT", "ntk", "ft_ratio"))]),
        ("F under LoRA has nearly the rank and the normalised spectrum of F under FT",
         likeness_parts("FT", "LoRA") + likeness_parts("LP-FT", "LP-LoRA")),
        ("A larger starting head norm makes the feature change smaller", scale_parts(places, scales)),
        ("LP-FT is worse calibrated (has a higher ECE) than FT and gains most from temperature scaling",
         calibration_parts(places)),
    ]


def difference(one, other, *keys):
    """The measure: a number of one method minus that of another."""
    return lambda of: of.number(one, *keys) - of.number(other, *keys)


def mean_difference(one, other, group, splits, *keys):
    """The same for the mean over splits."""
    return lambda of: of.mean(one, group, splits, *keys) - of.mean(other, group, splits, *keys)


def head_norm_parts():
    def growth(of, name):
        return of.number(name, "head_norm") - of.number(name, "head_norm_initial")

    def twice(other):
        return lambda of: growth(of, "LP") - 2 * growth(of, other)

    return [Part(f"growth of the norm: LP - 2 x {other}", twice(other)) for other in ("FT", "LoRA")]


def feature_parts(places):
    parts = []
    for place, splits in places.items():
        for label, key, one, other in (("Diff(F): FT - LP-FT", "diff", "FT", "LP-FT"),
                                       ("CS(F): LP-FT - FT", "cs", "LP-FT", "FT"),
                                       ("FDR(F): FT - LP-FT", "fdr", "FT", "LP-FT")):
            parts.append(Part(f"{label}, {place}", mean_difference(one, other, "features", splits, key)))
    return parts


def score(one, other, metric, splits, note="", margin=0.0):
    """A difference of test scores; the samples are counted by accuracy, whatever the metric."""
    def samples(of):
        return sum(of.number(one, "samples", split) * (of.number(one, "accuracy", split)
                                                       - of.number(other, "accuracy", split) - margin)
                   for split in splits)

    return Part(f"{metric}: {one} - {other}{note}", mean_difference(one, other, metric, splits), margin, samples)


def kernel_parts(name):
    """F against P where the FT stage of a method starts."""
    def rank(of):
        rank_p, rank_f = (of.number(name, "ntk", kernel, "rank") for kernel in "PF")
        if rank_p == len(of.number(name, "ntk", "P", "singular_values")):  # more features than samples allow it
            raise NotMeasured("P has full rank, N C, which F cannot exceed")
        return rank_f - rank_p

    def regression(of):
        return of.number(name, "ntk", "F", "test_accuracy") - of.number(name, "ntk", "P", "test_accuracy")

    def samples(of):  # None: of a part of test each seed draws its own, whose chance the seeds do see
        drawn = of.number(name, "ntk", "test_samples")
        return drawn * regression(of) if drawn == of.number(name, "samples", "test") else None

    return [Part(f"rank: F - P, {name}", rank),
            Part(f"test accuracy of regression: F - P, {name}", regression, samples=samples)]


def likeness_parts(one, other):
    """How alike F is for two methods: 1 is equal."""
    def ranks(of):
        smaller, larger = sorted(of.number(name, "ntk", "F", "rank") for name in (one, other))
        if not smaller:
            raise NotMeasured("F is zero")
        return smaller, larger

    def rank_ratio(of):
        smaller, larger = ranks(of)
        return smaller / larger

    def spectrum_ratio(of):  # over the singular values that both ranks count
        count = ranks(of)[0]
        a, b = (of.number(name, "ntk", "F", "singular_values")[:count] for name in (one, other))
        return float(np.exp(-np.abs(np.log(a / b)).mean()))

    return [Part(f"rank, {one} and {other}: smaller / larger", rank_ratio, 0.9),
            Part(f"singular values, {one} and {other}: geometric mean of smaller / larger", spectrum_ratio, 0.5)]


def scale_parts(places, scales):
    """How Diff(F) falls with the head: over all factors, and where the head is only made larger."""
    def fall(name, splits, factors):  # per factor of ten, by least squares
        def measure(of):
            if len(factors) < 2:
                raise NotMeasured("no runs from scaled heads")
            diffs = [of.mean(scales[factor][name], "features", splits, "diff") for factor in factors]
            return -float(np.polyfit(np.log10(factors), diffs, 1)[0])
        return measure

    ranges = [[*scales], [factor for factor in scales if factor >= 1]]
    if len(ranges[1]) in (1, len(ranges[0])):  # no larger head, or no smaller one
        ranges.pop()
    return [Part("fall of Diff(F) per factor 10 of the head, "
                 + f"{factors[0]:g} to {factors[-1]:g}, " * (len(factors) > 1) + f"{name}, {place}",
                 fall(name, splits, factors))
            for place, splits in places.items() for name in ("FT", "LP-FT") for factors in ranges]


def calibration_parts(places):
    def gain(of, name, splits):  # what temperature scaling takes off the ECE
        of.needs_temperature(name)
        return of.mean(name, "calibration", splits, "ece") - of.mean(name, "calibration", splits, "ece_scaled")

    def gain_difference(other, splits):
        return lambda of: gain(of, "LP-FT", splits) - gain(of, other, splits)

    parts = []
    for place, splits in places.items():
        parts.append(Part(f"ECE: LP-FT - FT, {place}", mean_difference("LP-FT", "FT", "calibration", splits, "ece")))
        parts += [Part(f"fall of ECE by T: LP-FT - {other}, {place}", gain_difference(other, splits))
                  for other in ("LP", "FT", "LoRA", "LP-LoRA")]
    return parts


# ---------------------------------------------------------------------------- the verdicts


def judge(results, seeds):
    """[{claim, verdict, parts: [{part, margin, verdict, mean, lower, upper, values, seeds, sources}]}].

    results {run: what result.json holds}. A part uses the seeds that have its runs; with fewer than two, or
    where a number is not defined, it is "not measured", and `why` says so, as it does where the shared test
    samples leave a part undecided that its interval would decide. sources are [file, key] pairs. A claim
    holds where every part does, does not hold where one does not, and is undecided in between.
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
    values, samples, sources, why = {}, [], [], None
    for seed in seeds:
        runs = Runs(results, seed)
        try:
            values[seed] = float(part.measure(runs))
            samples += [part.samples(runs)] if part.samples else []
            sources += runs.used
        except NoRun as error:  # the other seeds are judged
            why = str(error)
        except NotMeasured as error:  # leaving out a seed where a number is not defined would choose among seeds
            return judged | {"verdict": "not measured", "why": str(error)}
    if len(values) < 2:
        return judged | {"verdict": "not measured", "why": why}
    mean, lower, upper = confidence_interval([*values.values()])
    verdict = "holds" if lower > part.margin else "does not hold" if upper <= part.margin else "undecided"
    if verdict != "undecided" and samples and None not in samples:
        above = statistics.mean(samples)
        if abs(above) < LEAST_SAMPLES - 1e-9:
            judged["why"] = f"fewer than {LEAST_SAMPLES} test samples from the bound"
        elif (above > 0) != (mean > part.margin):
            judged["why"] = "the test samples, added over splits, are on the other side of the bound"
        verdict = "undecided" if "why" in judged else verdict
    return judged | {"verdict": verdict, "mean": mean, "lower": lower, "upper": upper, "values": [*values.values()],
                     "seeds": [*values], "sources": sources}


def confidence_interval(values):
    """(mean, lower, upper) of the 95 % interval of the mean of two or more numbers, by Student's t."""
    n, mean = len(values), statistics.mean(values)
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half
