"""Tables, figures and verdicts of a folder of runs that lab.reproduce made.

    python -m lab.report reproduction/tiny-tiny

writes into the folder report.md, report.html (the same as one file with everything in it), tables.json (every
number, the key it has in the result.json files, and these files) and figures/. What is there is read in runs.py,
the paper's seven claims are judged in claims.py, figures drawn in figures.py.
"""

import base64
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

import markdown

from lab import figures
from lab.claims import judge, look_up, scale_names
from lab.runs import METHODS, by_rate, complete_seeds, last_error, read_plan, read_results, validation_scores
from plumbing.files import read_json, write_text
from plumbing.flags import Parser, exit_status

# ---------------------------------------------------------------------------- tables


def tables(metric, splits):
    """{title: [(row, keys into result.json)]}; the columns are the methods; a pair of keys is a difference.
    """
    def calibration(split):
        return [(f"{kind.upper()}{after}, {split}", ("calibration", split, key))
                for kind in ("ece", "mce") for after, key in (
                    ("", kind), (" with T", f"{kind}_scaled"), (" fall by T", (kind, f"{kind}_scaled")))]

    return {
        f"{metric.capitalize()}, in and out of distribution (Tables 8, 10, 16)": [
            (split, (metric, split)) for split in splits],
        "Features (Tables 1, 11, 12)": [(f"{label}, {split}", ("features", split, key)) for split in splits
                                        for label, key in (("CS(F)", "cs"), ("Diff(F)", "diff"), ("FDR(F)", "fdr"),
                                                           ("Norm(F)", "norm"))],
        "Head (Table 13)": [("Norm(C) at the start", ("head_norm_initial",)), ("Norm(C)", ("head_norm",)),
                            ("Diff(C)", ("head_diff",))],
        "Kernel at the start of the FT stage (Tables 2, 9)": [
            (f"{label}, {kernel}", ("ntk", kernel, key)) for kernel in ("P", "F", "Theta") for label, key in
            (("rank", "rank"), ("Frobenius norm", "frobenius"), ("regression, train accuracy", "train_accuracy"),
             ("regression, test accuracy", "test_accuracy"), ("the same per logit, train", "train_logit_accuracy"),
             ("the same per logit, test", "test_logit_accuracy"))
        ] + [("FT ratio", ("ntk", "ft_ratio"))],
        "Calibration (Tables 3, 14, 15)": [("T", ("temperature",)),
                                           *(row for split in splits for row in calibration(split))],
    }


def fill_table(rows, results, seeds):
    """{row: {column: {mean, std, values, runs, key}}} over seeds, by method and, for features, pre-trained.
    """
    table = {}
    for row, keys in rows:
        table[row] = {}
        columns = {name: (name, keys) for name in METHODS}
        if keys[0] == "features":
            columns = {"pre-trained": ("LP", ("features_pretrained", *keys[1:]))} | columns
        for column, (method, path) in columns.items():
            found = {run: number_at(results[run], path) for run in (f"{method}-seed{seed}" for seed in seeds)}
            if None not in found.values():
                key = ".".join(" - ".join(key) if isinstance(key, tuple) else key for key in path)
                table[row][column] = cell(found, key)
                unfit = sum(bool(results[run].get("temperature_reason")) for run in found)
                if unfit and keys == ("temperature",):
                    table[row][column]["note"] = f", {unfit} not fitted"
    return table


def scale_table(results, seeds, splits):
    """A table as fill_table makes: {method and factor: {Diff(F) by split, kept epoch: cell}}, where all seeds
    have it.
    """
    table, scales = {}, scale_names(results)
    columns = [(f"Diff(F), {split}", ("features", split, "diff")) for split in splits] + [("kept epoch", ("kept_epoch",))]
    for method in ("FT", "LP-FT") if len(scales) > 1 else ():
        for factor, names in scales.items():
            of_row = table[f"{method} × {factor:g}"] = {}  # stays empty where a seed lacks the run
            for column, keys in columns:
                found = {run: look_up(results.get(run), keys) for run in (f"{names[method]}-seed{s}" for s in seeds)}
                if None not in found.values():
                    of_row[column] = cell(found, ".".join(keys))
    return table


def tuning_table(tuning, plan):
    """A table as fill_table makes: {method: {rate 1, rate 2, ...: {mean, std, values, runs, key, note}}}."""
    table, metric = {}, next(iter(tuning.values()))["metric"]
    for method, rates in by_rate(plan["tuning"]).items():
        table[method], grid = {}, sorted(rates, key=float)
        for i, rate in enumerate(grid, 1):
            if found := validation_scores(tuning, rates[rate]):
                edge = ", at the edge of the grid" * (rate in (grid[0], grid[-1]))
                note = f" at {rate}" + f", chosen{edge}" * (rate == plan["rates"].get(method))
                note += ", a run failed" * (len(found) < len(rates[rate]))
                table[method][f"rate {i}"] = cell(found, f"val_{metric}") | {"note": note}
    return table


def number_at(result, keys):
    """The number under `keys`, or None; a pair as the last key is the difference of two."""
    *path, last = keys
    if not isinstance(last, tuple):
        return look_up(result, keys)
    one, other = (look_up(result, (*path, key)) for key in last)
    return None if None in (one, other) else one - other


def cell(found, key):
    """Mean and standard deviation of {run: number}, and where they come from."""
    values = [*found.values()]
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "values": values, "runs": [f"runs/{run}/result.json" for run in found], "key": key}


def number(x):
    """Three digits behind the point, fewer for large and for whole numbers, one that counts for very small
    ones.
    """
    if float(x).is_integer() or abs(x) >= 100:
        return f"{x:.0f}" if x else "0"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}" if abs(x) >= 0.001 else f"{x:.1g}"


# ---------------------------------------------------------------------------- the report


TUNING = "Tuning: validation score by learning rate"
READING = (
    "How to read it. V is the head's weight, phi the features (the encoder's output for the first token). "
    "CS(F) is the mean cosine similarity of the features of two texts, Diff(F) how far features moved from "
    "the pre-trained ones, FDR(F) Fisher's ratio of the spread between classes to that within, Norm(F) their "
    "mean length; Norm(C) and Diff(C) are ||V|| and how far V moved in the FT stage (in LP, from 0). Theta = "
    "P + F is the neural tangent kernel of N training samples and C classes, an NC x NC matrix: P the head's "
    "part, F the encoder's. Its rank counts singular values above 1.2e-7 NC times the largest, float32's "
    "rounding. FT ratio is the length of F's part of the first step over that of the whole step. Kernel "
    "regression is scored by class, and per logit: on each of the C yes-or-no decisions about a text. ECE "
    "and MCE are the mean and the largest gap between confidence and accuracy (claim 7 goes by ECE: MCE is "
    "the gap of one bin, often of few texts), T the temperature that logits are divided by. An empty cell: the method has no such number, or not in every seed. ± 0 over seeds: nothing in the run depends on the seed.")


def write_report(out):
    """report.md, report.html and tables.json of the finished runs; prints the verdicts."""
    plan = read_plan(out)
    results, tuning = (read_results(out, plan[key]) for key in ("runs", "tuning"))
    missing = [name for name in plan["runs"] if name not in results]
    try:
        seeds = complete_seeds(results, plan["seeds"])
    except ValueError as error:
        raise ValueError(f"{out}: {error}") from None
    first = results[f"LP-seed{seeds[0]}"]
    metric, splits = first["metric"], list(first[first["metric"]])
    if "test" not in splits:
        raise ValueError(f"{out}: its runs have no test split, which tables and claims are about")
    filled = {title: fill_table(rows, results, seeds) for title, rows in tables(metric, splits).items()}
    filled |= {"Diff(F) and kept epoch by factor on the starting head (Fig. 3, 10, 11)": scale_table(results, seeds, splits)}
    if tuning:
        filled |= {TUNING: tuning_table(tuning, plan)}
    filled = {title: table for title, table in filled.items() if any(table.values())}
    judged = judge(results, seeds)
    content = {"seeds": seeds, "claims": judged, "tables": filled}
    write_text(out / "tables.json", json.dumps(content, indent=1) + "\n")
    name = Path(str(first.get("model"))).name
    title = f"{Path(str(first.get('data'))).name} with {name}, {len(seeds)} seeds"
    intro = introduction(out, plan, tuning, first, seeds)
    if kernel := look_up(results[f"FT-seed{seeds[0]}"], ("ntk", "train_samples")):
        intro[0] += f" The kernel is of {kernel} training samples, N."
    commands = command_rows(plan["runs"], judged)
    drawn, problems = figures.make_all(out, results, plan["seeds"])
    if missing:
        whys = ((name, last_error(out / "runs" / f"{name}.log")) for name in missing)
        intro.append("Not finished: " + "; ".join(f"{name} ({why})" if why else name for name, why in whys)
                     + ". A seed that lacks a run is left out, of every table or of the scaled heads: where "
                     "training fails, what is said here is of the seeds in which it does not.")
    unfit = {}  # {why T is 1: runs}
    for run, result in results.items():
        if result.get("temperature_reason") and "-scale" not in run:
            unfit.setdefault(str(result["temperature_reason"]), []).append(run)
    intro += [f"T is 1, not fitted, in {', '.join(runs)}: {why}." for why, runs in unfit.items()]
    intro += [f"Not drawn: {problem}." for problem in problems]
    text = as_markdown(title, intro, judged, filled, drawn, commands)
    write_text(out / "report.md", text)
    write_text(out / "report.html", as_html(title, text, out))
    for i, claim in enumerate(judged, 1):
        print(f"{i}. {claim['claim']}: {claim['verdict']}")
    for problem in problems:
        print(f"not drawn: {problem}")
    print(f"report: {out / 'report.html'}, {out / 'report.md'}")


def introduction(out, plan, tuning, first, seeds):
    """The paragraphs above the tables."""
    used, rates = [], by_rate(plan["tuning"])  # used: what the runs' own configuration says
    edges = [name for name in rates if plan["rates"].get(name) in (min(rates[name], key=float), max(rates[name], key=float))]
    for name in METHODS:
        config = read_json(out / "runs" / f"{name}-seed{seeds[0]}" / "config.json")
        if "lr" in config:
            used.append(f"{name} {config['lr']:g} ({config.get('batch_size')}, {config.get('epochs')})")
    samples = ", ".join(f"{split} {count}" for split, count in first.get("samples", {}).items())
    return [
        f"Made by `{plan['command']}`. Samples: {samples}.",
        "Mean ± standard deviation over seeds; intervals are the 95 % intervals of a mean over seeds "
        "(Student's t), mostly of a paired difference. Seeds vary head, LoRA, dropout, order and the samples "
        "of the kernel, and with --max-train the training samples: an interval says nothing about other "
        "data, another encoder or other learning rates.",
        "A part of a claim holds where its interval is above the bound, does not hold where none of it is, "
        "and is undecided else. A claim holds where all its parts do, does not hold where one does not, and "
        "is undecided else. Bounds other than 0 and the twice of claim 1 are this project's reading of the paper's \"far\", \"matches\" "
        "and \"nearly\". All runs share the test samples: a score that is fewer than 6 of them from its "
        "bound, or on the other side of it once they are added over splits, is undecided whatever the seeds "
        "say. Every interval is 95 % by itself, not all of them together: of ten parts whose true values lie "
        "exactly at their bounds, one or more would not hold by luck alone in about one claim of five.",
        "Every number, with the files and the key behind it: `tables.json`.",
        f"Learning rate (batch size, epochs): {', '.join(used)}. " + (
            f"Rates were chosen by the mean validation score over two tuning seeds of their own, in the table \"{TUNING}\""
            + (f"; at the edge of their grid, so that a rate beyond may be better: {', '.join(edges)}. " if edges else ". ")
            if tuning else "Rates were tuned, by runs that are no longer there. " if plan["tuning"]
            else "They are train.py's own, not tuned here. ")
        + "The commands behind the claims are at the end.", READING]


def command_rows(runs, judged):
    """[[runs, claims, command]] of train.py, one for each kind of run behind the claims; $seed stands for the
    seeds.
    """
    behind = {}  # {name without its seed: ({numbers of claims}, one run)}
    for i, claim in enumerate(judged, 1):
        for part in claim["parts"]:
            for path, _ in part.get("sources", ()):
                run = path.split("/")[1]
                behind.setdefault(run.rsplit("-seed", 1)[0], ({}, run))[0][i] = True
    rows = []
    for name, (numbers, run) in behind.items():
        words = [shlex.quote(flag) for flag in runs[run]]
        words = ["$seed" if before == "--seed" else word for before, word in zip(["", *words], words)]
        rows.append([name, ", ".join(map(str, numbers)), " ".join(["OMP_NUM_THREADS=1 python train.py", *words])])
    return rows


def claim_rows(judged):
    """(cells, whether it heads a claim) of the table of claims."""
    most = max(len(part.get("seeds", ())) for claim in judged for part in claim["parts"])
    for i, claim in enumerate(judged, 1):
        yield [f"{i}. {claim['claim']}", "", "", "", claim["verdict"]], True
        for part in claim["parts"]:
            numbers, why = ["", ""], f": {part['why']}" if "why" in part else ""
            if "mean" in part:
                numbers = [number(part["mean"]), f"{number(part['lower'])} to {number(part['upper'])}"]
                why += f" ({len(part['seeds'])} seeds)" * (len(part["seeds"]) < most)
            yield [part["part"], *numbers, f"> {part['margin']:g}", part["verdict"] + why], False


def table_rows(table):
    """(column names, [[row name, cell, ...]])."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    return columns, [[row] + [as_text(cells[column]) if column in cells else "" for column in columns]
                     for row, cells in table.items()]


def as_text(cell):
    std = "" if cell["std"] is None else f" ± {number(cell['std'])}"
    return number(cell["mean"]) + std + cell.get("note", "")


def as_markdown(title, intro, judged, filled, drawn, commands):
    lines = [f"# {title}", "", "\n\n".join(intro), "", "## The seven claims", "",
             "| measured | mean | 95 % interval | bound | verdict |", "|---|---|---|---|---|"]
    for cells, heads in claim_rows(judged):
        cells = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(f"**{cell}**" if heads and cell else cell for cell in cells) + " |")
    for name, table in filled.items():
        columns, rows = table_rows(table)
        lines += ["", f"## {name}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    for name, file in drawn.items():
        lines += ["", f"## {name}", "", f"![{name}](figures/{file}.png)"]
    lines += ["", "## The commands behind the claims", "", "| runs | claims | command |", "|---|---|---|"]
    lines += [f"| {name} | {claims} | `{command}` |" for name, claims, command in commands]
    return "\n".join(lines) + "\n"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1em; max-width: 1100px; color: #222; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: clamp(11px, 2.9vw, 14px); }
td, th { box-sizing: border-box; padding: .25em .3em; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; hyphens: auto; }
th { font-size: .85em; letter-spacing: -.02em; } th:first-child { width: 24%; }
code { overflow-wrap: anywhere; } img { width: 100%; height: auto; }
"""


def as_html(title, text, out):
    """The Markdown as one file without references: figures are inside as base64, tables fold on a phone."""
    def inside(match):
        data = base64.b64encode((out / f"{match[1]}.svg").read_bytes()).decode()
        return f'src="data:image/svg+xml;base64,{data}"'

    body = re.sub(r'src="(figures/[\w-]+)\.png"', inside, markdown.markdown(text, extensions=["tables"]))
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{title}</title><style>{STYLE}</style><body>{body}</body></html>\n")


def main(argv=None):
    parser = Parser("lab.report", description="Tables, figures and verdicts of a folder that lab.reproduce made.")
    parser.add_argument("folder", type=Path, help="the --out of lab.reproduce")
    args = parser.parse_args(argv)
    return exit_status("lab.report", lambda: write_report(args.folder))


if __name__ == "__main__":
    sys.exit(main())
