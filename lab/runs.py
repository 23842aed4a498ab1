"""What a folder of lab.reproduce holds: its plan, the results of its runs, the learning rates they choose."""

import statistics

from lab.claims import look_up
from plumbing.files import read_json

METHODS = {"LP": ("lp", False), "FT": ("ft", False), "LoRA": ("ft", True), "LP-FT": ("lpft", False),
           "LP-LoRA": ("lpft", True)}  # (train.py's --method, --lora)
PLAN = "plan.json"  # of lab.reproduce: {command, seeds, rates: {method: rate}, tuning and runs: {name: flags}}


def read_plan(out):
    if not (out / PLAN).is_file():
        raise ValueError(f"{out}: holds no {PLAN}; expected the --out of lab.reproduce, its tuning runs finished")
    plan = read_json(out / PLAN)
    types = {"command": str, "seeds": int, "rates": dict, "tuning": dict, "runs": dict}
    if not all(isinstance(plan.get(key), kind) for key, kind in types.items()):
        raise ValueError(f"{out / PLAN}: not what lab.reproduce writes")
    return plan


def read_results(out, runs):
    """{run: result.json} of those of `runs` that are finished."""
    found = {}
    for name in runs:
        path = out / "runs" / name / "result.json"
        if path.is_file():
            found[name] = read_json(path)
            metric, seed = found[name].get("metric"), found[name].get("seed")
            if seed is not None and not name.endswith(f"-seed{seed}"):
                raise ValueError(f"{path}: is of seed {seed}; expected that in the name of its folder")
            if not isinstance(found[name].get(metric), dict) or look_up(found[name], (f"val_{metric}",)) is None:
                raise ValueError(f"{path}: not what train.py writes; expected a metric and its scores")
    return found


def last_error(log):
    """The last error that train.py wrote to a file, or None."""
    said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    said = [line.removeprefix("train.py: error: ") for line in said if line.startswith("train.py: error: ")]
    return said[-1] if said else None


def complete_seeds(results, most, runs=tuple(METHODS)):
    """The seeds from 1 to `most` of which every one of `runs` is finished; ValueError if they are not two."""
    seeds = [seed for seed in range(1, most + 1) if all(f"{name}-seed{seed}" in results for name in runs)]
    if len(seeds) < 2:
        raise ValueError(f"{len(seeds)} of {most} seeds have a finished run of each of {', '.join(runs)}; "
                         "expected two or more")
    return seeds


def by_rate(runs):
    """{method: {learning rate: [names]}} of the names of tuning runs, tune-METHOD=RATE-seedS."""
    found = {}
    for run in runs:
        method, rate = run.removeprefix("tune-").split("-seed")[0].split("=")
        found.setdefault(method, {}).setdefault(rate, []).append(run)
    return found


def validation_scores(tuning, runs):
    """{run: validation score} of those of `runs` that are finished."""
    return {run: tuning[run][f"val_{tuning[run]['metric']}"] for run in runs if run in tuning}


def choose_rates(tuning, planned):
    """{method: learning rate} of the highest mean validation score; of equals the smallest.

    Of the `planned` runs' rates those count of which every run is finished; ValueError if a method has none.
    """
    chosen = {}
    for method, rates in by_rate(planned).items():
        means = {rate: statistics.mean(validation_scores(tuning, runs).values()) for rate, runs in rates.items()
                 if all(run in tuning for run in runs)}
        if not means:
            raise ValueError(f"no learning rate of {method} has all its tuning runs finished")
        chosen[method] = max(means, key=lambda rate: (means[rate], -float(rate)))
    return chosen
