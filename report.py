"""Tables, figures and verdicts of a folder of runs that reproduce.py made.

    python report.py reproduction/tiny-tiny

writes into the folder report.md, report.html (one file with everything in it), tables.json (every number,
the key it has in the result.json files, and these files) and figures/. In order: the tables (tables,
fill_table), the paper's seven claims as paired differences over seeds (claims, judge), the report.
Figures are made by figures.py, which needs matplotlib and scikit-learn; without them the rest comes out.
"""

import argparse
import base64
import html
import json
import math
import statistics
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np

METHODS = {"LP": ("lp", False), "FT": ("ft", False), "LoRA": ("ft", True), "LP-FT": ("lpft", False),
           "LP-LoRA": ("lpft", True)}  # (train.py's --method, --lora)


def read_results(out):
    """{run: result.json} of the finished runs, and {tuning run: result.json}."""
    names = sorted(path.parent.name for path in (out / "runs").glob("*/flags.json"))
    results = {name: json.loads((out / "runs" / name / "result.json").read_text(encoding="utf-8"))
               for name in names if not name.endswith(".partial")}
    tuning = {name: result for name, result in results.items() if name.startswith("tune-")}
    return {name: result for name, result in results.items() if name not in tuning}, tuning


def complete_seeds(results, runs=tuple(METHODS)):
    """The seeds of which every one of `runs` is finished."""
    return [seed for seed in range(1, 1000) if all(f"{name}-seed{seed}" in results for name in runs)]


def scale_names(results):
    """{factor on the starting head: {method: run name without its seed}}, of the factors that were run; with 1."""
    factors = {run.split("-scale")[1].split("-seed")[0] for run in results if "-scale" in run} | {"1"}
    return {float(factor): {name: name if factor == "1" else f"{name}-scale{factor}" for name in ("FT", "LP-FT")}
            for factor in sorted(factors, key=float)}


def tuning_scores(tuning):
    """{method: {learning rate: [validation scores over the tuning seeds]}}."""
    scores = {}
    for run, result in tuning.items():  # tune-METHOD=RATE-seedS
        method, rate = run.removeprefix("tune-").split("-seed")[0].split("=")
        scores.setdefault(method, {}).setdefault(rate, []).append(result[f"val_{result['metric']}"])
    return scores


def choose_rates(tuning):
    """{method: learning rate} of the highest mean validation score; of equals the smallest."""
    return {method: max(of, key=lambda rate: (statistics.mean(of[rate]), -float(rate)))
            for method, of in tuning_scores(tuning).items()}


def tuning_table(tuning):
    """A table as fill_table makes: {method: {a third, once, three times the default rate: {mean, std, note}}}."""
    chosen, table = choose_rates(tuning), {}
    for method, by_rate in tuning_scores(tuning).items():
        rates = sorted(by_rate, key=float)
        table[method] = {column: {"mean": statistics.mean(by_rate[rate]), "std": statistics.stdev(by_rate[rate]),
                                  "note": f" at {rate}" + ", chosen" * (rate == chosen[method])}
                         for column, rate in zip(("a third of the default", "the default", "three times"), rates)}
    return table


# ---------------------------------------------------------------------------- tables


def tables(metric, splits):
    """{title: [(row, keys into result.json)]}; the columns are the methods; a pair of keys is a difference."""
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
        "Calibration (Tables 3, 14, 15)": [row for split in splits for row in calibration(split)],
    }


def look_up(result, keys):
    """The number under `keys`, or None where this method has none."""
    *path, last = keys
    for key in path:
        result = result.get(key) if isinstance(result, dict) else None
    found = [(result or {}).get(key) for key in (last if isinstance(last, tuple) else (last,))]
    return None if None in found else found[0] - found[1] if len(found) > 1 else found[0]


def fill_table(rows, results, seeds):
    """{row: {column: {mean, std, values, runs, key}}} over seeds, by method and, for features, pre-trained."""
    table = {}
    for row, keys in rows:
        table[row] = {}
        columns = {name: (name, keys) for name in METHODS}
        if keys[0] == "features":
            columns = {"pre-trained": ("LP", ("features_pretrained", *keys[1:]))} | columns
        for column, (method, path) in columns.items():
            found = {run: look_up(results[run], path) for run in (f"{method}-seed{seed}" for seed in seeds)}
            values = [value for value in found.values() if value is not None]
            if len(values) == len(found):
                table[row][column] = {
                    "mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                    "values": values, "runs": [f"runs/{run}/result.json" for run in found],
                    "key": ".".join(" - ".join(key) if isinstance(key, tuple) else key for key in path)}
    return table


def number(x):
    """Three digits behind the point, fewer for large and for whole numbers, two that count for small ones."""
    if float(x).is_integer() or abs(x) >= 100:
        return f"{x:.0f}"
    return f"{x:.3f}" if abs(x) >= 0.01 else f"{x:.2g}"


# ---------------------------------------------------------------------------- claims


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


def claims(metric, splits, scales):
    """[(claim, [(part, measure, margin)])]: the claim holds where measure(runs of one seed) is above margin.

    `scales` as scale_names makes them. A measure raises KeyError where there are no such runs.
    """
    ood = tuple(split for split in splits if split != "test")

    def mean(result, keys, over):  # of the numbers under `keys`, "*" being each split of `over`
        return statistics.mean(reduce(getitem, [split if key == "*" else key for key in keys], result)
                               for split in over)

    def difference(higher, lower, *keys, over=("test",)):  # of two methods
        return lambda of: mean(of[higher], keys, over) - mean(of[lower], keys, over)

    def growth(result):
        return result["head_norm"] - result["head_norm_initial"]

    def gain(result, over):  # of temperature scaling
        before, after = (mean(result, ("calibration", "*", key), over) for key in ("ece", "ece_scaled"))
        return before - after

    def kernel_difference(name, key):
        return lambda of: of[name]["ntk"]["F"][key] - of[name]["ntk"]["P"][key]

    def rank_ratio(one, other):
        def of_seed(of):
            ranks = [of[name]["ntk"]["F"]["rank"] for name in (one, other)]
            return min(ranks) / max(ranks)
        return of_seed

    def spectral_distance(one, other):  # over the singular values that both ranks count
        def of_seed(of):
            count = min(of[name]["ntk"]["F"]["rank"] for name in (one, other))
            a, b = (np.array(of[name]["ntk"]["F"]["singular_values"][:count]) for name in (one, other))
            return -float(np.abs(np.log10(a / b)).mean())
        return of_seed

    def fall(name):  # of Diff(F) per factor of ten of the head, by least squares
        def of_seed(of):
            if len(scales) < 2:
                raise KeyError("runs from scaled heads")
            diffs = [mean(of[runs[name]], ("features", "*", "diff"), ("test",)) for runs in scales.values()]
            return -float(np.polyfit(np.log10(list(scales)), diffs, 1)[0])
        return of_seed

    where = [("in distribution", ("test",)), ("out of distribution", ood)]
    pairs = (("FT", "LoRA"), ("LP-FT", "LP-LoRA"))
    return [
        ("The head norm grows far more (at least twice as much) in LP than in FT or LoRA", [
            (f"growth of the norm: LP - 2 x {other}",
             lambda of, other=other: growth(of["LP"]) - 2 * growth(of[other]), 0) for other in ("FT", "LoRA")]),
        ("Features move less in LP-FT than in FT", [
            (f"{label}, {place}", difference(*order, "features", "*", key, over=over), 0) for place, over in where
            for label, key, order in (("Diff(F): FT - LP-FT", "diff", ("FT", "LP-FT")),
                                      ("CS(F): LP-FT - FT", "cs", ("LP-FT", "FT")),
                                      ("FDR(F): FT - LP-FT", "fdr", ("FT", "LP-FT")))]),
        ("LP-FT matches or beats FT in distribution and beats it out of distribution; LP is weakest in "
         "distribution", [
            (f"{metric}: LP-FT - FT (one point less is a match)", difference("LP-FT", "FT", metric, "*"), -0.01),
            (f"{metric}, out of distribution: LP-FT - FT", difference("LP-FT", "FT", metric, "*", over=ood), 0),
            *[(f"{metric}: {name} - LP", difference(name, "LP", metric, "*"), 0) for name in METHODS if name != "LP"]]),
        ("F has a higher rank and a better kernel regression than P, and a larger FT ratio in LP-FT than in FT", [
            *[(f"{label}, {name}: F - P", kernel_difference(name, key), 0) for name in ("FT", "LP-FT")
              for label, key in (("rank", "rank"), ("test accuracy of regression", "test_accuracy"))],
            ("FT ratio: LP-FT - FT", lambda of: of["LP-FT"]["ntk"]["ft_ratio"] - of["FT"]["ntk"]["ft_ratio"], 0)]),
        ("F under LoRA has nearly the rank and the normalised spectrum of F under FT", [
            part for one, other in pairs for part in (
                (f"rank, {one} and {other}: smaller / larger", rank_ratio(one, other), 0.9),
                (f"spectrum, {one} and {other}: - mean |log10 ratio|", spectral_distance(one, other), -0.3))]),
        ("A larger starting head norm makes the feature change smaller", [
            (f"fall of Diff(F) per factor 10 of the head, {name}", fall(name), 0) for name in ("FT", "LP-FT")]),
        ("LP-FT is worse calibrated than FT and gains most from temperature scaling", [
            part for place, over in where for part in (
                (f"ECE, {place}: LP-FT - FT", difference("LP-FT", "FT", "calibration", "*", "ece", over=over), 0),
                *[(f"fall of ECE by T, {place}: LP-FT - {other}", lambda of, over=over, other=other: (
                    gain(of["LP-FT"], over) - gain(of[other], over)), 0)
                  for other in METHODS if other != "LP-FT"])]),
    ]


def judge(metric, splits, results, seeds):
    """[{claim, verdict, parts: [{part, margin, mean, lower, upper, values, seeds, verdict}]}]."""
    judged = []
    for claim, parts in claims(metric, splits, scale_names(results)):
        found = []
        for part, measure, margin in parts:
            by_seed = [{run.removesuffix(f"-seed{seed}"): result for run, result in results.items()
                        if run.endswith(f"-seed{seed}")} for seed in seeds]
            found.append({"part": part, "margin": margin, "verdict": "not measured"})
            try:
                values = [float(measure(of)) for of in by_seed]
            except (KeyError, TypeError, statistics.StatisticsError):  # no such runs, null, no such split
                continue
            mean, lower, upper = confidence_interval(values)
            verdict = "holds" if lower > margin else "does not hold" if upper <= margin else "undecided"
            found[-1] |= {"mean": mean, "lower": lower, "upper": upper, "values": values, "seeds": seeds,
                          "verdict": verdict}
        verdicts = {part["verdict"] for part in found}
        whole = verdicts.pop() if len(verdicts) == 1 else "undecided"
        judged.append({"claim": claim, "verdict": "does not hold" if "does not hold" in verdicts else whole,
                       "parts": found})
    return judged


# ---------------------------------------------------------------------------- the report


def write_report(out):
    """report.md, report.html and tables.json of the finished runs; prints the verdicts."""
    results, tuning = read_results(out)
    seeds = complete_seeds(results)
    if len(seeds) < 2:
        raise ValueError(f"{out}: {len(seeds)} seeds have a finished run of every method; expected two or more")
    first = results[f"LP-seed{seeds[0]}"]
    metric, splits = first["metric"], list(first["accuracy"])
    if "test" not in splits:
        raise ValueError(f"{out}: its runs have no test split, which tables and claims are about")
    filled = {title: fill_table(rows, results, seeds) for title, rows in tables(metric, splits).items()}
    judged, command = judge(metric, splits, results, seeds), out / "command.txt"
    used = {}  # what the runs' own configuration says
    for name in METHODS:
        config = json.loads((out / "runs" / f"{name}-seed{seeds[0]}" / "config.json").read_text(encoding="utf-8"))
        if "lr" in config:
            used[name] = f"{config['lr']:g} ({config['batch_size']}, {config['epochs']})"
    if tuning:
        filled |= {"Tuning: validation score by learning rate": tuning_table(tuning)}
    content = {"seeds": seeds, "claims": judged, "tables": filled, "tuning": tuning_scores(tuning)}
    (out / "tables.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    title = f"{first['data']} with {Path(first['model']).name}, {len(seeds)} seeds"
    intro = [
        f"Made by `{command.read_text(encoding='utf-8').strip()}`." if command.is_file() else "",
        "Mean ± standard deviation over seeds; intervals are 95 % of the mean paired difference over seeds "
        "(Student's t). Seeds vary head, dropout, order and the samples of the kernel, and with --max-train the "
        "training samples: an interval says nothing about other data or another encoder. Every number and the files behind "
        "it: `tables.json`.",
        "Learning rate (batch size, epochs): " + ", ".join(f"{name} {rate}" for name, rate in used.items()) + ". "
        + ("Rates were chosen by the mean validation score over tuning seeds of their own, in the last table. "
           if tuning else "") + "Behind each number and verdict are runs of train.py, each with the flags in "
        "`runs/NAME/flags.json`."]
    figures = make_figures(out, results, seeds)
    (out / "report.md").write_text(as_markdown(title, intro, judged, filled, figures), encoding="utf-8")
    (out / "report.html").write_text(as_html(title, intro, judged, filled, figures, out), encoding="utf-8")
    for number_of, claim in enumerate(judged, 1):
        print(f"{number_of}. {claim['claim']}: {claim['verdict']}")
    print(f"report: {out / 'report.html'}, {out / 'report.md'}")


def make_figures(out, results, seeds):
    """{title: file name without suffix, under figures/}; nothing, and a line, where they cannot be made."""
    try:
        import figures
    except ImportError as error:
        print(f"no figures: {error}; pip install -r requirements-dev.txt")
        return {}
    try:
        return figures.make_all(out, results, seeds)
    except (ValueError, OSError) as error:  # data that have moved
        print(f"no figures: {error}")
        return {}


def claim_rows(judged):
    """(cells, whether it heads a claim) of the table of claims."""
    for number_of, claim in enumerate(judged, 1):
        yield [f"{number_of}. {claim['claim']}", "", "", "", claim["verdict"]], True
        for part in claim["parts"]:
            numbers = ["", ""]
            if "mean" in part:
                numbers = [number(part["mean"]), f"{number(part['lower'])} to {number(part['upper'])}"]
            yield [part["part"], *numbers, f"> {part['margin']:g}", part["verdict"]], False


def table_rows(table):
    """(column names, [[row name, cell, ...]])."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    return columns, [[row] + [f"{number(cells[column]['mean'])} ± {number(cells[column]['std'])}"
                              + cells[column].get("note", "") if column in cells else "" for column in columns]
                     for row, cells in table.items()]


def as_markdown(title, intro, judged, filled, figures):
    lines = [f"# {title}", "", "\n\n".join(intro), "", "## The seven claims", "",
             "| measured | mean | 95 % interval | claimed | verdict |", "|---|---|---|---|---|"]
    for cells, heads in claim_rows(judged):
        cells = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(f"**{cell}**" if heads and cell else cell for cell in cells) + " |")
    for name, table in filled.items():
        columns, rows = table_rows(table)
        lines += ["", f"## {name}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    for name, file in figures.items():
        lines += ["", f"## {name}", "", f"![{name}](figures/{file}.png)"]
    return "\n".join(lines) + "\n"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1em; max-width: 1100px; color: #222; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: clamp(10px, 2.6vw, 14px); }
td, th { box-sizing: border-box; padding: .25em .3em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; hyphens: auto; }
th:first-child { width: 24%; } .claims th:nth-child(1) { width: 32%; }
.claims th:nth-child(2) { width: 13%; } .claims th:nth-child(4) { width: 15%; } .claims th:nth-child(5) { width: 21%; }
.head td { font-weight: 600; border-top: 2px solid #999; } small { color: #666; }
code { overflow-wrap: anywhere; } img { width: 100%; height: auto; }
.holds { color: #00664b; } .does { color: #a33f00; } .undecided, .not { color: #555; }
"""


def as_html(title, intro, judged, filled, figures, out):
    """One file without references: figures are inside as base64, tables fold to the width of a phone."""
    def code(text):  # `x` in the texts above
        parts = html.escape(text).split("`")
        return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))

    def row(cells, tag="td"):
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{code(text)}</p>" for text in intro),
            "<h2>The seven claims</h2><table class=claims>",
            row(["measured", "mean", "95 % interval", "claimed", "verdict"], "th")]
    for cells, heads in claim_rows(judged):
        verdict = f"<span class='{cells[-1].split()[0]}'>{cells[-1]}</span>"
        if heads:
            body.append(f"<tr class=head><td colspan=4>{html.escape(cells[0])}<td>{verdict}</tr>")
        else:
            body.append(row([*map(html.escape, cells[:-1]), verdict]))
    body.append("</table>")
    for name, table in filled.items():
        columns, rows = table_rows(table)
        body += [f"<h2>{html.escape(name)}</h2><table>", row(["", *columns], "th")]
        for first, *cells in rows:
            body.append(row([html.escape(first)] + [cell.replace(" ± ", "<br><small>±&nbsp;") + "</small>" * bool(cell)
                                                    for cell in cells]))
        body.append("</table>")
    for name, file in figures.items():
        data = base64.b64encode((out / "figures" / f"{file}.svg").read_bytes()).decode()
        name = html.escape(name)
        body.append(f"<h2>{name}</h2><img alt='{name}' src='data:image/svg+xml;base64,{data}'>")
    head = (f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
            f"<style>{STYLE}</style>")
    return f"<!doctype html><html lang=en>{head}<body>" + "\n".join(body) + "\n</body></html>\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables, figures and verdicts of a folder that reproduce.py made.")
    parser.add_argument("folder", type=Path, help="the --out of reproduce.py")
    args = parser.parse_args(argv)
    try:
        write_report(args.folder)
        return 0
    except (ValueError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
