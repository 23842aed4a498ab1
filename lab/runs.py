"""What a folder of lab.reproduce holds: its plan, the results of its runs, the learning rates they choose.

A run is named METHOD-UNIT, a tuning run tune-METHOD=RATE-UNIT, one from a scaled head METHOD-scaleS-UNIT.
Units are what is drawn anew to see chance: on the embedded tasks the language (its encoder, texts and
labels), else the seed.
"""

import math
import statistics

import numpy as np

from plumbing.files import read_json

METHODS = {"LP": ("lp", False), "FT": ("ft", False), "LoRA": ("ft", True), "LP-FT": ("lpft", False),
           "LP-LoRA": ("lpft", True)}  # (train.py's --method, --lora)
PLAN = "plan.json"  # {command, units, unit, rates: {method: rate}, tuning and runs: {name: train.py's flags}}


def read_plan(out):
    if not (out / PLAN).is_file():
        raise ValueError(f"{out}: holds no {PLAN}; expected the --out of lab.reproduce, its tuning finished")
    plan = read_json(out / PLAN)
    types = {"command": str, "units": list, "unit": str, "rates": dict, "tuning": dict, "runs": dict}
    if not all(isinstance(plan.get(key), kind) for key, kind in types.items()):
        raise ValueError(f"{out / PLAN}: not what lab.reproduce writes")
    return plan


def read_results(out, runs):
    """{run: result.json} of those of `runs` that are finished."""
    results = {}
    for name in runs:
        path = out / "runs" / name / "result.json"
        if path.is_file():
            result = results[name] = read_json(path)
            metric = str(result.get("metric"))
            if not isinstance(result.get(metric), dict) or look_up(result, f"val_{metric}") is None:
                raise ValueError(f"{path}: not what train.py writes; expected a metric and its scores")
            if result.get("temperature_reason"):  # T = 1 stands for none
                result["temperature"] = None
    return results


def look_up(result, *keys):
    """The number under `keys` in nested dicts, or the list as an array; None if it is not finite."""
    for key in keys:
        result = result.get(key) if isinstance(result, dict) else None
    if isinstance(result, list):
        numbers = result and all(isinstance(x, (int, float)) and math.isfinite(x) for x in result)
        return np.array(result) if numbers else None
    number = isinstance(result, (int, float)) and not isinstance(result, bool) and math.isfinite(result)
    return result if number else None


def last_error(log):
    """The last error that train.py wrote to a file, or None."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.split(": error: ", 1)[1] for line in lines if ": error: " in line]
    return errors[-1] if errors else None


def complete_units(results, units):
    """Those of the units in which every method is finished; ValueError if they are not two."""
    complete = [unit for unit in units if all(f"{name}-{unit}" in results for name in METHODS)]
    if len(complete) < 2:
        raise ValueError(f"{len(complete)} of {len(units)} units have a finished run of every method; "
                         "expected two or more")
    return complete


def scales_of(results):
    """The factors on the starting head of which there are runs, rising; 1 is that of the main runs."""
    factors = [run.split("-scale")[1].rsplit("-", 1)[0] for run in results if "-scale" in run]
    return sorted({1.0, *map(float, factors)})


def scaled(name, factor):
    """The name, without its unit, of the runs of a method from a scaled head."""
    return name if factor == 1 else f"{name}-scale{factor:g}"


def tuning_scores(results, tuning):
    """{method: {rate: mean validation score, None if a run is not finished}} of the names of tuning runs."""
    scores = {}
    for run in tuning:
        method, rate = run.removeprefix("tune-").rsplit("-", 1)[0].split("=")
        score = results[run][f"val_{results[run]['metric']}"] if run in results else None
        scores.setdefault(method, {}).setdefault(rate, []).append(score)
    return {method: {rate: None if None in of_units else statistics.mean(of_units)
                     for rate, of_units in rates.items()} for method, rates in scores.items()}


def choose_rates(results, tuning):
    """{method: rate of the highest mean validation score}; of equals the smallest. No test split is read."""
    chosen = {}
    for method, means in tuning_scores(results, tuning).items():
        finished = [rate for rate in means if means[rate] is not None]
        if not finished:
            raise ValueError(f"no learning rate of {method} has all its tuning runs finished")
        chosen[method] = max(finished, key=lambda rate: (means[rate], -float(rate)))
    return chosen
