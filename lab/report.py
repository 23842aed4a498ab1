"""Report, tables and verdicts of a folder of runs that lab.reproduce made.

    python -m lab.reproduce --report --out reproduction/tiny-tiny

writes into the folder report.md (page.md filled in), report.html (the same, all in one file), claims.json
(the seven claims, see claims.py), tables.json (every number, its key in the result.json files, and
these files) and figures/. What is there is read in runs.py, figures are drawn in figures.py.
"""

import base64
import os
import re
import statistics
from collections import Counter
from pathlib import Path

import jinja2
import markdown
from markdown.extensions.toc import slugify

from data.tiny import TASKS
from lab import figures
from lab.claims import judge
from lab.runs import (METHODS, complete_units, last_error, look_up, read_plan, read_results, scaled,
                      scales_of, tuning_scores)
from plumbing.files import read_json, write_json, write_lines, write_text

PAGE, STYLE = (Path(__file__).with_name(f"page.{kind}") for kind in ("md", "css"))


# ---------------------------------------------------------------------------- tables

HEAD = {"Norm(C) at the start": "head_norm_initial", "Norm(C)": "head_norm", "Diff(C)": "head_diff"}
FEATURES = {"CS(F)": "cs", "Diff(F)": "diff", "FDR(F)": "fdr", "Norm(F)": "norm"}
KERNEL = {"rank": "rank", "Frobenius norm": "frobenius", "regression, train": "train_accuracy",
          "regression, test": "test_accuracy", "per logit, train": "train_logit_accuracy",
          "per logit, test": "test_logit_accuracy"}
ERRORS = {"ECE": "ece", "ECE with T": "ece_scaled", "MCE": "mce", "MCE with T": "mce_scaled"}


def tables(metric, splits, factors):
    """{title: {row: {column: (run name without its unit, *keys into result.json)}}}."""
    def of_methods(*keys):
        return {name: (name, *keys) for name in METHODS}

    return {
        f"{metric.capitalize()} (Tables 8, 10, 16)": {split: of_methods(metric, split) for split in splits},
        "Features (Tables 1, 11, 12)": {
            f"{label}, {split}": {"pre-trained": ("LP", "features_pretrained", split, key)}
            | of_methods("features", split, key) for split in splits for label, key in FEATURES.items()},
        "Head (Table 13)": {label: of_methods(key) for label, key in HEAD.items()},
        "Kernel at the start of the FT stage (Tables 2, 9)": {
            f"{label}, {part}": of_methods("ntk", part, key)
            for part in ("P", "F", "Theta") for label, key in KERNEL.items()}
        | {"FT ratio": of_methods("ntk", "ft_ratio")},
        "Calibration (Tables 3, 14, 15)": {"T": of_methods("temperature")} | {
            f"{label}, {split}": of_methods("calibration", split, key)
            for split in splits for label, key in ERRORS.items()},
        "Diff(F) by factor on the starting head (Fig. 3, 10, 11)": {
            f"{name} × {factor:g}": {s: (scaled(name, factor), "features", s, "diff") for s in splits}
            for name in ("FT", "LP-FT") for factor in factors if len(factors) > 1},
    }


def fill(rows, results, units):
    """{row: {column: {mean, std, values, file, key}}} of what two units have; UNIT in file is each unit."""
    table = {}
    for row, columns in rows.items():
        for column, (name, *keys) in columns.items():
            values = [look_up(results.get(f"{name}-{unit}"), *keys) for unit in units]
            there = [value for value in values if value is not None]  # T, say, may not exist in every unit
            if len(there) > 1:
                table.setdefault(row, {})[column] = {
                    "mean": statistics.mean(there), "std": statistics.stdev(there), "values": values,
                    "file": f"runs/{name}-UNIT/result.json", "key": ".".join(keys)}
    return table


def number(x):
    """Three digits behind the point, fewer for large and whole numbers, one that counts for small ones."""
    if float(x).is_integer() or abs(x) >= 100:
        return f"{x:.0f}" if x else "0"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}" if abs(x) >= 0.001 else f"{x:.1g}"


def grid(head, rows):
    """A table in Markdown."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_grid(table):
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    rows = [[row] + [spread(cells[c]) if c in cells else "" for c in columns] for row, cells in table.items()]
    return grid(["", *columns], rows)


def spread(cell):
    """Mean ± standard deviation, and over how many units where it is not all of them."""
    count = len(cell["values"]) - cell["values"].count(None)
    few = f" ({count} units)" * (count < len(cell["values"]))
    return f"{number(cell['mean'])} ± {number(cell['std'])}{few}"


# ---------------------------------------------------------------------------- the report


def interval(part):
    if "mean" not in part:
        return part["why"]
    return f"{number(part['mean'])} ({number(part['lower'])} to {number(part['upper'])})"


def tuning_grid(results, plan):
    """Mean validation score by learning rate; the chosen one is bold."""
    rows = []
    for method, means in tuning_scores(results, plan["tuning"]).items():
        cells = {rate: f"{rate}: a run failed" if means[rate] is None else f"{means[rate]:.3f} at {rate}"
                 for rate in sorted(means, key=float)}
        cells[plan["rates"][method]] = f"**{cells[plan['rates'][method]]}**"
        rows.append([method, *cells.values()])
    return grid(["", *(f"rate {i}" for i in range(1, max(map(len, rows))))], rows)


def commands(plan):
    """One command of train.py for each kind of run; $unit stands for the units."""
    rows, unit = [], str(plan["units"][-1])
    for name, flags in plan["runs"].items():
        if name.endswith(f"-{unit}"):
            words = [word.replace(f"encoders/{unit}", "encoders/$unit") for word in flags]
            words = ["$unit" if before in ("--seed", "--language") else word
                     for before, word in zip(["", *words], words)]
            rows.append([name[:-len(unit) - 1], f"`OMP_NUM_THREADS=1 python train.py {' '.join(words)}`"])
    return grid(["runs", "command"], rows)


def write_report(out):
    """The files of the module; prints the verdicts."""
    plan = read_plan(out)
    results, tuning = (read_results(out, plan[key]) for key in ("runs", "tuning"))
    units = complete_units(results, plan["units"])
    first = results[f"LP-{units[0]}"]
    metric, splits = first["metric"], list(first[first["metric"]])
    if "test" not in splits:
        raise ValueError(f"{out}: its runs have no test split, which tables and claims are about")
    judged = judge(out, plan, results)
    filled = {title: table for title, rows in tables(metric, splits, scales_of(results)).items()
              if (table := fill(rows, results, units))}
    drawn, problems = figures.make_all(out, results, units)
    write_json(out / "claims.json", judged)
    write_lines(out / "tables.json", [{"units": units, "tables": filled}])
    with_map = first.get("data") in TASKS and (out.parent / "map" / "map.svg").is_file()  # of lab.map
    text = as_markdown(out, plan, results, units, judged=judged, tables=filled, with_map=with_map,
                       drawn=drawn, problems=problems, tuning=tuning)
    write_text(out / "report.md", text)
    write_text(out / "report.html", as_html(text, out))
    for i, claim in enumerate(judged, 1):
        print(f"{i}. {claim['claim']}: {claim['primary']['verdict']}")
    print("\n".join([*(f"not drawn: {problem}" for problem in problems),
                     f"report: {out / 'report.html'}, {out / 'report.md'}"]))


def as_markdown(out, plan, results, units, **more):
    """page.md, filled in."""
    page = jinja2.Template(PAGE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True,
                           keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    first = results[f"LP-{units[0]}"]
    text = page.render(more | {
        "TASKS": TASKS, "commands": commands(plan), "interval": interval,
        "table_grid": table_grid, "tuning_grid": tuning_grid,
        "plan": plan, "units": units, "results": results, "data": Path(str(first.get("data"))).name,
        "model": Path(str(first.get("model"))).name, "samples": first.get("samples", {}),
        "used": {name: read_json(out / "runs" / f"{name}-{units[0]}" / "config.json") for name in METHODS},
        "missing": {name: last_error(out / "runs" / f"{name}.log") or "not finished"
                    for name in plan["runs"] if name not in results},
        "unfit": Counter(filter(None, (result.get("temperature_reason") for result in results.values())))})
    titles = re.findall("^## (.*)$", text, re.MULTILINE)
    return text.replace("CONTENTS", " · ".join(f"[{title}](#{slugify(title, '-')})" for title in titles), 1)


def as_html(text, out):
    """The Markdown as one file without references: figures are inside as base64, tables fold on a phone."""
    def inside(match):
        path = os.path.normpath(out / f"{match[1]}.svg")  # beside `out` by name, even where that is a link
        data = base64.b64encode(Path(path).read_bytes()).decode()
        return f'src="data:image/svg+xml;base64,{data}"'

    body = markdown.markdown(text, extensions=["tables", "toc"])
    body = re.sub(r'src="((?:figures|\.\./map)/[\w-]+)\.png"', inside, body)
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=width=device-width>"
            f"<title>LP-FT: seven claims, measured</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
            f"<body>{body}</body></html>\n")
