"""Accuracy in and out of distribution against the learning rate: the picture of LP-FT.

    python -m lab.map                    eight languages, 30, 60, 120 labels; --languages 3 for less

One line a method, thin for each language, thick for their mean with its 95 % interval; LP, which has no rate,
is a level. Written to --out: map.svg and .png (accuracy), map-mechanism.svg and .png (Diff(F), T and ECE),
map.json. T is drawn over the languages in which it could be fitted. Runs that are there are not made again.
"""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lab import reproduce
from lab.claims import paired_t
from lab.figures import COLOURS, save
from lab.runs import METHODS, read_results
from plumbing.files import write_lines
from plumbing.flags import Failed, Parser, exit_status, run_main

RATES = {False: (1e-4, 3e-4, 1e-3, 3e-3), True: (5e-4, 2e-3, 5e-3, 1e-2)}  # {LoRA: grid}
TASKS = {"tiny-30": "30 labels", "tiny": "60 labels", "tiny-120": "120 labels"}
MEASURES = {"map": {"OOD accuracy": "ood", "ID accuracy": "id"},
            "map-mechanism": {"Diff(F)": "diff", "temperature T": "temperature", "ECE": "ece"}}


def map_runs(args, tasks):
    """{name: flags of train.py}, named TASK/METHOD=RATE-LANGUAGE with . for /."""
    runs = {}
    for task in tasks:
        for name, (method, lora) in METHODS.items():
            for rate in RATES[lora] if method != "lp" else ("",):
                for unit in args.units:
                    flags = reproduce.common_flags(args, name, unit)
                    flags[flags.index("--data") + 1] = task
                    flags += ["--lr", f"{rate:g}"] if rate else []
                    runs[f"{task}.{name}={rate}-{unit}"] = flags
    return runs


def measure(result, measure):
    """A number of a run; OOD is the mean over the other domains. T has none where it could not be fitted."""
    ood = [value for split, value in result["accuracy"].items() if split != "test"]
    return {"id": result["accuracy"]["test"], "ood": statistics.mean(ood),
            "diff": result["features"]["test"]["diff"], "ece": result["calibration"]["test"]["ece"],
            "temperature": result["temperature"]}[measure]  # None where it was not fitted


def collect(results, tasks, units):
    """{task: {method: {measure: [[number for each language] for each rate]}}}, of what every language has."""
    numbers = {task: {} for task in tasks}
    for task in tasks:
        for name, (method, lora) in METHODS.items():
            runs = {rate: [results.get(f"{task}.{name}={rate}-{unit}") for unit in units]
                    for rate in (RATES[lora] if method != "lp" else ("",))}
            runs = {rate: row for rate, row in runs.items() if None not in row}
            numbers[task][name] = {"rates": [*runs]} | {
                key: [[measure(result, key) for result in row] for row in runs.values()]
                for measures in MEASURES.values() for key in measures.values()}
    return numbers


def draw(numbers, measures):
    """Rows are measures, columns tasks."""
    figure, axes = plt.subplots(len(measures), len(numbers), squeeze=False, sharex=True, sharey="row",
                                figsize=(0.5 + 2.2 * len(numbers), 2.4 * len(measures)))
    for row, (title, key) in zip(axes, measures.items()):
        for axis, (task, methods) in zip(row, numbers.items()):
            for name, curves in methods.items():
                colour, values = COLOURS[name], np.array(curves[key], float)  # (rates, languages), None: NaN
                if not len(values) or name == "LP" and key == "diff":
                    continue
                rates = curves["rates"] if name != "LP" else [min(RATES[False]), max(RATES[True])]
                values = values if name != "LP" else np.repeat(values, 2, 0)
                style = "--" if "LoRA" in name else ":" if name == "LP" else "-"
                axis.plot(rates, values, color=colour, linewidth=0.6, alpha=0.35, linestyle=style)
                fitted = [v[np.isfinite(v)].tolist() for v in values]
                intervals = [paired_t(v) if len(v) > 1 else [np.nan] * 4 for v in fitted]
                mean, lower, upper, _ = np.array(intervals).T
                axis.plot(rates, mean, color=colour, linewidth=2.5, linestyle=style, label=name)
                axis.fill_between(rates, lower, upper, color=colour, alpha=0.15, linewidth=0)
            axis.set(xscale="log", yscale="log" if key == "temperature" else "linear")
        row[0].set_ylabel(title)
    for axis, task in zip(axes[0], numbers):
        axis.set_title(TASKS[task])
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    figure.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    return figure


def make_map(args, tasks):
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    runs = map_runs(args, tasks)
    reproduce.refuse_other_flags(args, runs)
    failed = reproduce.run_all(args, reproduce.encoders(args), "encoders", 1)
    failed |= reproduce.run_all(args, runs, "runs")
    numbers = collect(read_results(args.out, runs), tasks, args.units)
    write_lines(args.out / "map.json", [{"languages": args.units, "tasks": numbers}])
    for file, measures in MEASURES.items():
        save(args.out / file, draw, numbers, measures)
    print(f"map: {args.out / 'map.png'}, {args.out / 'map-mechanism.png'}, {args.out / 'map.json'}")
    if failed:
        raise Failed(f"{len(failed)} runs failed, so points are missing; the same command tries them again")


def main(argv=None):
    parser = Parser("lab.map", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--languages", type=int, default=8, metavar="N", help="languages 0 to N - 1 (default: 8)")
    add("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="panels (default: all)")
    add("--epochs", type=int, metavar="N", help="of the FT stage (default: 10)")
    add("--jobs", type=int, metavar="N", help="processes side by side (default: as lab.reproduce)")
    add("--out", type=Path, default=Path("reproduction/map"), help="folder (default: reproduction/map)")
    flags = parser.parse_args(argv)
    words = ["--languages", str(flags.languages), "--rates", "1", "--out", str(flags.out)]
    for name in ("epochs", "jobs"):
        words += [f"--{name}", str(getattr(flags, name))] if getattr(flags, name) is not None else []
    args = reproduce.parse_args(words)
    return exit_status("lab.map", lambda: make_map(args, flags.tasks), lambda: "; the same command goes on")


if __name__ == "__main__":
    run_main(main)
