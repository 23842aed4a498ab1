"""Accuracy in and out of distribution against the learning rate: the picture of LP-FT.

    python -m lab.map                    eight languages, 30, 60, 120 labels; --languages 3 for less
    python -m lab.map --epochs 10 40     a second row: is FT at low rates only not trained out?

One line a method, thin for each language, thick for their mean with its 95 % interval; LP, which has no rate,
is a level. Written to --out: map.svg and .png (accuracy), map-mechanism.svg and .png (Diff(F), T and ECE),
map.json. T is drawn over the languages in which it could be fitted. Runs that are there are not made again.
"""

import statistics
from itertools import product
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
# the first of each picture is drawn for every number of epochs, the others for the first number
MEASURES = {"map": {"OOD accuracy": "ood", "ID accuracy": "id"},
            "map-mechanism": {"Diff(F)": "diff", "temperature T": "temperature", "ECE": "ece"}}


def rates_of(name):
    method, lora = METHODS[name]
    return RATES[lora] if method != "lp" else ("",)


def run_of(task, epochs, name, rate, unit):
    """The name of a run, with . for /; LP has neither rate nor epochs."""
    return f"{task}.{name}-{unit}" if name == "LP" else f"{task}.{name}={rate}x{epochs}-{unit}"


def map_runs(args):
    """{name: flags of train.py}."""
    runs = {}
    for task, epochs, name, unit in product(args.tasks, args.epochs, METHODS, args.units):
        for rate in rates_of(name):
            flags = reproduce.common_flags(args, name, unit)
            flags[flags.index("--data") + 1] = task
            flags += ["--lr", f"{rate:g}", "--epochs", str(epochs)] if rate else []
            runs[run_of(task, epochs, name, rate, unit)] = flags
    return runs


def measure(result, measure):
    """A number of a run; OOD is the mean over the other domains. T has none where it could not be fitted."""
    ood = [value for split, value in result["accuracy"].items() if split != "test"]
    return {"id": result["accuracy"]["test"], "ood": statistics.mean(ood),
            "diff": result["features"]["test"]["diff"], "ece": result["calibration"]["test"]["ece"],
            "temperature": result["temperature"]}[measure]  # None where it was not fitted


def collect(results, tasks, epochs, units):
    """{task: {method: {measure: [[number for each language] for each rate]}}}, of what every language has."""
    numbers = {task: {} for task in tasks}
    for task, name in product(tasks, METHODS):
        runs = {rate: [results.get(run_of(task, epochs, name, rate, unit)) for unit in units]
                for rate in rates_of(name)}
        runs = {rate: row for rate, row in runs.items() if None not in row}
        numbers[task][name] = {"rates": [*runs]} | {
            key: [[measure(result, key) for result in row] for row in runs.values()]
            for measures in MEASURES.values() for key in measures.values()}
    return numbers


def draw(numbers, measures):
    """Rows are measures, columns tasks; numbers is {epochs: what collect gives}."""
    (first, *rest), start = measures.items(), next(iter(numbers))  # start: the epochs of which all is drawn
    rows = [(*first, epochs) for epochs in numbers] + [(*measure, start) for measure in rest]
    figure, axes = plt.subplots(len(rows), len(numbers[start]), squeeze=False, sharex=True, sharey="row",
                                figsize=(7.1, 0.5 + 1.65 * len(rows)))
    for row, (title, key, epochs) in zip(axes, rows):
        for axis, (task, methods) in zip(row, numbers[epochs].items()):
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
        every = np.array([values for panels in numbers.values() for methods in panels.values()
                          for curves in methods.values() for values in curves[key]], float)
        if np.isfinite(every).any():  # one scale for a measure, by its values: few languages make bands wide
            low, high = np.nanmin(every), np.nanmax(every)
            margin = 0.05 * (high - low)
            row[0].set_ylim(*(low / 1.3, high * 1.3) if key == "temperature" else
                            (low - margin, high + margin))
        row[0].set_ylabel(title + f"\n{epochs} epochs" * (len(numbers) > 1))
    for axis, task in zip(axes[0], numbers[start]):
        axis.set_title(TASKS[task])
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_legend_handles_labels()[0]}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(METHODS))
    return figure


def make_map(args):
    reproduce.refuse_other_folder(args)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    runs = map_runs(args)
    reproduce.refuse_other_flags(args, runs)
    failed = reproduce.run_all(args, reproduce.encoders(args), "encoders, minutes each", 1)
    failed |= reproduce.run_all(args, runs, "runs")
    results = read_results(args.out, runs)
    numbers = {epochs: collect(results, args.tasks, epochs, args.units) for epochs in args.epochs}
    write_lines(args.out / "map.json", [{"languages": args.units, "epochs": numbers}])
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
    add("--epochs", type=int, nargs="+", default=[10], metavar="N", help="of the FT stage; each number after "
        "the first adds a row to each picture (default: 10)")
    add("--jobs", type=int, metavar="N", help="processes side by side (default: as lab.reproduce)")
    add("--out", type=Path, default=Path("reproduction/map"), help="folder (default: reproduction/map)")
    flags = parser.parse_args(argv)
    words = ["--languages", str(flags.languages), "--rates", "1", "--out", str(flags.out)]
    words += ["--jobs", str(flags.jobs)] if flags.jobs is not None else []
    args = reproduce.parse_args(words, "lab.map")
    args.tasks, args.epochs = flags.tasks, flags.epochs
    return exit_status("lab.map", lambda: make_map(args), lambda: "; the same command goes on")


if __name__ == "__main__":
    run_main(main)
