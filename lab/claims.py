"""The paper's seven claims, each decided by one number: its primary endpoint.

    judge(out, plan, results) -> [{claim, says, primary: {measure, mean, lower, upper, units, verdict}, parts,
    why}]

An endpoint is a number that each unit gives (a language with its encoder, texts and labels; on real data a
seed), mostly the paired difference of two methods. Its interval is Student's t. Where units share their test
texts and the endpoint is made of predictions, the chance of the texts is added, by bootstrap of the saved
logits. The verdict compares the endpoint with its bound. Holm's procedure over the seven keeps the chance
that any verdict is wrong at 5 %. Parts are further numbers, with intervals and without verdict.
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Callable
from zipfile import BadZipFile

import numpy as np
import torch
from scipy import stats

from lab.runs import METHODS, complete_units, look_up, scaled, scales_of
from lpft import METRICS, calibration_error

DRAWS = 2000  # of test texts, for the bootstrap


class NotMeasured(Exception):
    """Why a unit does not have a number."""


@dataclass
class Part:
    """A number of each unit; `bound` is what it has to be above."""

    measure: str
    value: Callable  # Unit -> number
    bound: float = 0.0
    predictions: Callable | None = None  # read_logits of a unit, {split: texts}, metric -> it, too


class Unit:
    """The results of one unit by run name; a number that it does not have raises NotMeasured."""

    def __init__(self, results, unit):
        self.results, self.unit, self.metric = results, unit, results[f"LP-{unit}"]["metric"]

    def number(self, name, *keys):
        """The number, or array of numbers, under `keys` in the result of a run."""
        value = look_up(self.results.get(f"{name}-{self.unit}"), *keys)
        if value is None:
            raise NotMeasured(f"{name} has no {'.'.join(keys)} in unit {self.unit}")
        return value

    def mean(self, name, group, *keys, ood=False):
        """The mean over the test split, or over the OOD splits."""
        group = self.metric if group == "score" else group
        splits = [split for split in self.results[f"LP-{self.unit}"][self.metric] if (split == "test") != ood]
        if not splits:
            raise NotMeasured("there is no OOD split" if ood else "there is no test split")
        return statistics.mean(self.number(name, group, split, *keys) for split in splits)

    def growth(self, name):
        return self.number(name, "head_norm") - self.number(name, "head_norm_initial")

    def rank_gain(self, name):
        if self.number(name, "ntk", "P", "rank") == len(self.number(name, "ntk", "P", "singular_values")):
            raise NotMeasured("P has full rank, which F cannot exceed")
        return self.number(name, "ntk", "F", "rank") - self.number(name, "ntk", "P", "rank")

    def regression_gain(self, name):
        return self.number(name, "ntk", "F", "test_accuracy") - self.number(name, "ntk", "P", "test_accuracy")

    def spectra(self, one, other):
        """Geometric mean of the smaller over the larger singular value of F, over those that both have."""
        a, b = (self.number(name, "ntk", "F", "singular_values") for name in (one, other))
        count = int(min(self.number(name, "ntk", "F", "rank") for name in (one, other)))
        if not count:
            raise NotMeasured("F is zero")
        return float(np.exp(-np.abs(np.log(a[:count] / b[:count])).mean()))

    def fall(self, name, ood):
        """How much Diff(F) falls per factor of ten on the starting head, by least squares."""
        factors = scales_of(self.results)
        if len(factors) < 2:
            raise NotMeasured("there are no runs from scaled heads")
        diffs = [self.mean(scaled(name, factor), "features", "diff", ood=ood) for factor in factors]
        return -float(np.polyfit(np.log10(factors), diffs, 1)[0])

    def gain(self, name, ood):
        """What temperature scaling takes off the ECE."""
        if reason := self.results.get(f"{name}-{self.unit}", {}).get("temperature_reason"):
            raise NotMeasured(f"T of {name} in unit {self.unit} is 1: {reason}")
        before, after = (self.mean(name, "calibration", key, ood=ood) for key in ("ece", "ece_scaled"))
        return before - after


PLACES = ("in distribution", False), ("out of distribution", True)  # the latter is `ood` below


def difference(label, one, other, *keys, place=None):
    """Of a number of two methods; or, with a place, of the means over its splits."""
    if place is None:
        return Part(f"{label}: {one} - {other}",
                    lambda unit: unit.number(one, *keys) - unit.number(other, *keys))
    return Part(f"{label} {place[0]}: {one} - {other}",
                lambda unit: unit.mean(one, *keys, ood=place[1]) - unit.mean(other, *keys, ood=place[1]))


def predicted(label, one, other, place, *keys):
    """The same of a number that is made of predictions: of other texts, it can be told from their logits."""
    def measure(arrays, texts, metric):
        def score(name, split):
            pair = [torch.from_numpy(arrays[name][f"{kind}_{split}"][texts[split]])
                    for kind in ("logits", "labels")]
            return METRICS[metric](*pair) if keys == ("score",) else calibration_error(*pair)[0]
        return statistics.mean(score(one, s) - score(other, s) for s in texts if (s == "test") != place[1])
    return replace(difference(label, one, other, *keys, place=place), predictions=measure)


def gain_by_T(other, place):
    return Part(f"fall of ECE by T {place[0]}: LP-FT - {other}",
                lambda unit: unit.gain("LP-FT", place[1]) - unit.gain(other, place[1]))


def falling(name, place):
    return Part(f"fall of Diff(F) per factor 10 on {name}'s head, {place[0]}",
                lambda unit: unit.fall(name, place[1]))


ID, OOD = PLACES
CLAIMS = [  # (claim, what the paper says, primary endpoint, further parts)
    ("LP grows the head more than FT", "The head norm grows far more in LP than in FT or LoRA.",
     Part("growth of ||V||: LP - FT", lambda unit: unit.growth("LP") - unit.growth("FT")),
     [Part("growth of ||V||: LP - LoRA", lambda unit: unit.growth("LP") - unit.growth("LoRA")),
      Part("growth of ||V||: LP - 2 × FT", lambda unit: unit.growth("LP") - 2 * unit.growth("FT"))]),
    ("LP-FT moves features less than FT", "Features change less in LP-FT than in FT.",
     difference("Diff(F)", "FT", "LP-FT", "features", "diff", place=ID),
     [difference("Diff(F)", "FT", "LP-FT", "features", "diff", place=OOD),
      *(difference("CS(F)", "LP-FT", "FT", "features", "cs", place=place) for place in PLACES),
      *(difference("FDR(F)", "FT", "LP-FT", "features", "fdr", place=place) for place in PLACES)]),
    ("LP-FT is better out of distribution than FT",
     "LP-FT matches or beats FT in distribution and beats it out of distribution.",
     predicted("score", "LP-FT", "FT", OOD, "score"),
     [predicted("score", "LP-FT", "FT", ID, "score"),
      *(predicted("score", name, "LP", ID, "score") for name in METHODS if name != "LP")]),
    ("The encoder's part of the first step is larger in LP-FT",
     "F has a higher rank and a better kernel regression than P, and a larger FT ratio in LP-FT.",
     difference("FT ratio", "LP-FT", "FT", "ntk", "ft_ratio"),
     [part for name in ("FT", "LP-FT") for part in (
         Part(f"rank: F - P, {name}", lambda unit, name=name: unit.rank_gain(name)),
         Part(f"test accuracy of regression: F - P, {name}",
              lambda unit, name=name: unit.regression_gain(name)))]),
    ("LoRA has nearly the same F as FT", "F under LoRA has nearly F's rank and spectrum under FT.",
     Part("singular values of F, LoRA and FT: smaller / larger",
          lambda unit: unit.spectra("FT", "LoRA"), 0.5),
     [Part("singular values of F, LP-LoRA and LP-FT: smaller / larger",
           lambda unit: unit.spectra("LP-FT", "LP-LoRA"), 0.5)]),
    ("A larger head makes features move less", "The longer the first head, the less features move.",
     falling("FT", ID), [falling("FT", OOD), falling("LP-FT", ID), falling("LP-FT", OOD)]),
    ("LP-FT is worse calibrated than FT, and a temperature mends it",
     "LP-FT has a higher ECE than FT and gains most from temperature scaling.",
     predicted("ECE", "LP-FT", "FT", ID, "calibration", "ece"),
     [predicted("ECE", "LP-FT", "FT", OOD, "calibration", "ece"),
      difference("T", "LP-FT", "FT", "temperature"),
      *(gain_by_T(other, place) for other in ("LP", "FT") for place in PLACES)]),
]


# ---------------------------------------------------------------------------- intervals and verdicts


def judge(out, plan, results):
    """The claims with numbers; see the module. NotMeasured numbers say why."""
    units = complete_units(results, plan["units"])
    logits = read_logits(out, units) if plan["unit"] == "seed" else None
    judged = [{"claim": claim, "says": says, "primary": measure(primary, results, units, logits),
               "parts": [measure(part, results, units, logits) for part in parts]}
              for claim, says, primary, parts in CLAIMS]
    measured = [claim["primary"] for claim in judged if "p" in claim["primary"]]
    for primary, rejected in zip(measured, holm([primary["p"] for primary in measured])):
        primary["verdict"] = "undecided" if not rejected else (
            "holds" if primary["mean"] > primary["bound"] else "does not hold")
    for claim in judged:
        claim["primary"].setdefault("verdict", "not measured")
        claim["why"] = explain(claim["primary"], claim["parts"])
    return judged


def measure(part, results, units, logits=None):
    """{measure, bound, mean, lower, upper, p, units, values}; without numbers, {measure, bound, why}."""
    measured = {"measure": part.measure, "bound": part.bound}
    try:
        values = [float(part.value(Unit(results, unit))) for unit in units]
    except NotMeasured as error:  # to leave out a unit where a number is not defined would choose among units
        return measured | {"why": str(error)}
    if all(value == part.bound for value in values):
        return measured | {"why": "every unit ties"}
    metric = results[f"LP-{units[0]}"]["metric"]
    of_texts = variance_of_texts(part, logits, metric) if logits and part.predictions else 0.0
    mean, lower, upper, p = paired_t(values, part.bound, of_texts)
    return measured | {"mean": mean, "lower": lower, "upper": upper, "p": p, "units": len(units),
                       "values": values}


def paired_t(values, bound=0.0, of_texts=0.0):
    """(mean, lower, upper, p): the 95 % interval of the mean, Student's t; p of the mean being `bound`.

    of_texts: the variance of the mean by the choice of test texts, where units share them. It is added to
    that by the units, with Welch and Satterthwaite's degrees of freedom for the sum.
    """
    n, mean, of_units = len(values), statistics.mean(values), statistics.variance(values) / len(values)
    total = of_units + of_texts
    if not total:
        return mean, mean, mean, float(mean == bound)
    freedom = total**2 / (of_units**2 / (n - 1) + of_texts**2 / (DRAWS - 1))
    error = math.sqrt(total)
    half, p = stats.t.ppf(0.975, freedom) * error, 2 * stats.t.sf(abs(mean - bound) / error, freedom)
    return mean, mean - half, mean + half, float(p)


def variance_of_texts(part, logits, metric):
    """Of a part's mean over units, by bootstrap: texts are drawn again, the same for every unit."""
    rng, redrawn = np.random.default_rng(0), []
    sizes = {key.removeprefix("labels_"): len(array) for key, array in logits[0]["LP"].items()
             if key.startswith("labels_") and key != "labels_val"}
    for _ in range(DRAWS):
        texts = {split: rng.integers(size, size=size) for split, size in sizes.items()}
        redrawn.append(statistics.mean(part.predictions(arrays, texts, metric) for arrays in logits))
    return statistics.variance(redrawn)


def read_logits(out, units):
    """For each unit {method: the arrays of its logits.npz}; ValueError for a file that is cut."""
    def arrays(name, unit):
        path = out / "runs" / f"{name}-{unit}" / "logits.npz"
        try:
            return dict(np.load(path))
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path}: not the logits that train.py writes ({error})") from None
    return [{name: arrays(name, unit) for name in METHODS} for unit in units]


def holm(ps, level=0.05):
    """Which hypotheses Holm's procedure rejects: the chance that any is wrongly rejected is 5 % at most."""
    rejected = [False] * len(ps)
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if not ps[i] <= level / (len(ps) - rank):
            break
        rejected[i] = True
    return rejected


def explain(primary, parts):
    """Why this verdict, from the measurement; and where the further numbers lie."""
    if "mean" not in primary:
        return f"Not measured: {primary['why']}."
    bound, above = primary["bound"], primary["mean"] > primary["bound"]
    same = sum(value > bound if above else value < bound for value in primary["values"])
    clear = "" if primary["verdict"] != "undecided" else ", too few or too different to tell it from chance"
    sides = ["above" if part["lower"] > part["bound"] else
             "below" if part["upper"] < part["bound"] else "open" for part in parts if "mean" in part]
    counts = [f"{sides.count(side)} {side}" for side in ("above", "below", "open") if side in sides]
    return (f"In {same} of {primary['units']} units it is {'above' if above else 'below'} {bound:g}{clear}. "
            f"Further numbers: {', '.join(counts) or 'not measured'}.")
