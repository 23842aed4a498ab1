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
SCALES = (0.1, 0.5, 1, 2, 5, 10, 50, 100)  # of the head, Fig. 3


def read_results(out):
    """{run: result.json} of the finished runs, and {tuning run: result.json}."""
    names = sorted(path.parent.name for path in (out / "runs").glob("*/flags.json"))
    results = {name: json.loads((out / "runs" / name / "result.json").read_text(encoding="utf-8")) for name in names}
    tuning = {name: result for name, result in results.items() if name.startswith("tune-")}
    return {name: result for name, result in results.items() if name not in tuning}, tuning


def choose_rates(tuning):
    """{method: learning rate} with the highest mean validation score over the tuning seeds."""
    scores = {}
    for run, result in tuning.items():  # tune-METHOD-RATE-seedS
        method, rate = run.removeprefix("tune-").split("-seed")[0].split("=")
        scores.setdefault(method, {}).setdefault(rate, []).append(result[f"val_{result['metric']}"])
    return {method: max(of, key=lambda rate: statistics.mean(of[rate])) for method, of in scores.items()}


# ---------------------------------------------------------------------------- tables


def tables(metric, splits):
    """{title: [(row, keys into result.json)]}; the columns are the methods."""
    def calibration(split):
        return [(f"{kind.upper()}{after}, {split}", ("calibration", split, kind + key))
                for kind in ("ece", "mce") for after, key in (("", ""), (" / T", "_scaled"))]

    return {
        f"{metric.capitalize()}, in and out of distribution (Tables 8, 10, 16)": [(split, (metric, split)) for split in splits],
        "Features (Tables 1, 11, 12)": [(f"{label}, {split}", ("features", split, key)) for split in splits
                                        for label, key in (("CS(F)", "cs"), ("Diff(F)", "diff"), ("FDR(F)", "fdr"),
                                                           ("Norm(F)", "norm"))],
        "Head (Table 13)": [("Norm(C) at the start", ("head_norm_initial",)), ("Norm(C)", ("head_norm",)),
                            ("Diff(C)", ("head_diff",))],
        "Kernel at the start of the FT stage (Tables 2, 9)": [
            (f"{label}, {kernel}", ("ntk", kernel, key)) for kernel in ("P", "F", "Theta") for label, key in
            (("rank", "rank"), ("Frobenius", "frobenius"), ("train", "train_accuracy"), ("test", "test_accuracy"),
             ("train / logit", "train_logit_accuracy"), ("test / logit", "test_logit_accuracy"))
        ] + [("FT ratio", ("ntk", "ft_ratio"))],
        "Calibration (Tables 3, 14, 15)": [row for split in splits for row in calibration(split)],
    }


def look_up(result, keys):
    """The number under `keys`, or None where this method has none."""
    for key in keys:
        result = result.get(key) if isinstance(result, dict) else None
    return result


def fill_table(rows, results):
    """{row: {column: {mean, std, values, runs, key}}} over seeds, by method and, for features, pre-trained."""
    table = {}
    for row, keys in rows:
        table[row] = {}
        columns = {name: (name, keys) for name in METHODS}
        if keys[0] == "features":
            columns = {"pre-trained": ("LP", ("features_pretrained", *keys[1:]))} | columns
        for column, (method, path) in columns.items():
            found = {run: look_up(result, path) for run, result in results.items() if run.startswith(f"{method}-seed")}
            values = [value for value in found.values() if value is not None]
            if values:
                table[row][column] = {
                    "mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                    "values": values, "runs": [f"runs/{run}/result.json" for run in found], "key": ".".join(path)}
    return table


def number(x):
    return f"{x:.3f}" if abs(x) < 100 else f"{x:.0f}"


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


def claims(metric, splits):
    """[(claim, [(part, function of the results of one seed by run name: positive where the claim holds)])]."""
    ood = [split for split in splits if split != "test"]

    def mean(result, keys, over):  # of the numbers under `keys`, "*" being each split of `over`
        return statistics.mean(reduce(getitem, [split if key == "*" else key for key in keys], result)
                               for split in over)

    def difference(higher, lower, *keys, over=("test",)):  # of two methods
        return lambda of: mean(of[higher], keys, over) - mean(of[lower], keys, over)

    def growth(result):
        return result["head_norm"] - result["head_norm_initial"]

    def gain(result, over):  # of temperature scaling
        return mean(result, ("calibration", "*", "ece"), over) - mean(result, ("calibration", "*", "ece_scaled"), over)

    def slope(name):  # of Diff(F) over log10 of the head scale
        def of_seed(of):
            points = {scale: of[name if scale == 1 else f"{name}-scale{scale}"] for scale in SCALES}
            diffs = [mean(result, ("features", "*", "diff"), ("test",)) for result in points.values()]
            return -float(np.polyfit(np.log10(list(points)), diffs, 1)[0])
        return of_seed

    def spectra(of):  # mean distance of the normalised singular values of F under LoRA and FT
        a, b = (np.array(of[name]["ntk"]["F"]["singular_values"]) for name in ("FT", "LoRA"))
        return 0.05 - float(np.abs(a - b).mean())

    both = [("in distribution", ("test",))] + ([("out of distribution", tuple(ood))] if ood else [])
    features = [(f"{label}, {where}", difference(*order, "features", "*", key, over=over)) for where, over in both
                for label, key, order in (("Diff(F): FT - LP-FT", "diff", ("FT", "LP-FT")),
                                          ("CS(F): LP-FT - FT", "cs", ("LP-FT", "FT")),
                                          ("FDR(F): FT - LP-FT", "fdr", ("FT", "LP-FT")))]
    out = [(f"{metric}, out of distribution: LP-FT - FT", difference("LP-FT", "FT", metric, "*", over=tuple(ood)))]
    return [
        ("The head norm grows far more in LP than in FT or LoRA", [
            (f"growth of Norm(C): LP - {other}", lambda of, other=other: growth(of["LP"]) - growth(of[other]))
            for other in ("FT", "LoRA")]),
        ("Features move less in LP-FT than in FT", features),
        ("LP-FT matches or beats FT in distribution and beats it out of distribution; LP is weakest in distribution", [
            (f"{metric}: LP-FT - FT + 0.01 (one point is a match)",
             lambda of: difference("LP-FT", "FT", metric, "*")(of) + 0.01),
            *out * bool(ood),
            (f"{metric}: lowest of the others - LP",
             lambda of: min(difference(name, "LP", metric, "*")(of) for name in METHODS if name != "LP"))]),
        ("F has a higher rank and a better kernel regression than P, and a larger FT ratio in LP-FT than in FT", [
            ("rank in LP-FT: F - P", lambda of: of["LP-FT"]["ntk"]["F"]["rank"] - of["LP-FT"]["ntk"]["P"]["rank"]),
            ("test accuracy of kernel regression in LP-FT: F - P", lambda of: (
                of["LP-FT"]["ntk"]["F"]["test_accuracy"] - of["LP-FT"]["ntk"]["P"]["test_accuracy"])),
            ("FT ratio: LP-FT - FT", lambda of: of["LP-FT"]["ntk"]["ft_ratio"] - of["FT"]["ntk"]["ft_ratio"])]),
        ("F under LoRA has nearly the rank and the normalised spectrum of F under FT", [
            ("0.1 - |1 - rank under LoRA / rank under FT|", lambda of: 0.1 - abs(
                1 - of["LoRA"]["ntk"]["F"]["rank"] / of["FT"]["ntk"]["F"]["rank"])),
            ("0.05 - mean distance of the singular values", spectra)]),
        ("A larger starting head norm makes the feature change smaller", [
            (f"fall of Diff(F) per factor 10 of the head, {name}", slope(name)) for name in ("FT", "LP-FT")]),
        ("LP-FT is worse calibrated than FT and gains most from temperature scaling", [
            part for where, over in both for part in (
                (f"ECE, {where}: LP-FT - FT", difference("LP-FT", "FT", "calibration", "*", "ece", over=over)),
                (f"fall of ECE by temperature scaling, {where}: LP-FT - FT",
                 lambda of, over=over: gain(of["LP-FT"], over) - gain(of["FT"], over)))]),
    ]


def judge(metric, splits, results, seeds):
    """[{claim, verdict, parts: [{part, mean, lower, upper, values, verdict}]}]; parts without runs are left out."""
    judged = []
    for claim, parts in claims(metric, splits):
        found = []
        for part, measure in parts:
            by_seed = [{run.removesuffix(f"-seed{seed}"): result for run, result in results.items()
                        if run.endswith(f"-seed{seed}")} for seed in seeds]
            try:
                values = [float(measure(of)) for of in by_seed]
            except KeyError:  # runs that were left out: --no-scales
                continue
            mean, lower, upper = confidence_interval(values)
            verdict = "holds" if lower > 0 else "does not hold" if upper < 0 else "undecided"
            found.append({"part": part, "mean": mean, "lower": lower, "upper": upper, "values": values,
                          "verdict": verdict})
        verdicts = {part["verdict"] for part in found}
        whole = next((v for v in ("does not hold", "undecided") if v in verdicts), "holds") if found else "not measured"
        judged.append({"claim": claim, "verdict": whole, "parts": found})
    return judged


# ---------------------------------------------------------------------------- the report


def write_report(out, command):
    """report.md, report.html and tables.json of the finished runs; prints the verdicts."""
    results, tuning = read_results(out)
    seeds = [seed for seed in range(1, 1000) if all(f"{name}-seed{seed}" in results for name in METHODS)]
    if len(seeds) < 2:
        raise ValueError(f"{out}: {len(seeds)} seeds have a finished run of every method; expected two or more")
    first = results[f"LP-seed{seeds[0]}"]
    metric, splits = first["metric"], list(first["accuracy"])
    filled = {title: fill_table(rows, results) for title, rows in tables(metric, splits).items()}
    judged, rates = judge(metric, splits, results, seeds), choose_rates(tuning)
    content = {"tables": filled, "claims": judged, "learning_rates": rates}
    (out / "tables.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    title = f"{first['data']} with {Path(first['model']).name}, {len(seeds)} seeds"
    intro = [f"Made by `{command}`. Mean ± standard deviation over seeds; intervals are 95 % of the mean paired "
             "difference over seeds (Student's t). Every number and the files behind it: `tables.json`."]
    if rates:
        intro.append("Learning rates, by the mean validation score over tuning seeds of their own: "
                     + ", ".join(f"{name} {rate}" for name, rate in rates.items()) + ".")
    figures = make_figures(out, results, seeds)
    (out / "report.md").write_text(as_markdown(title, intro, judged, filled, figures), encoding="utf-8")
    (out / "report.html").write_text(as_html(title, intro, judged, filled, figures, out), encoding="utf-8")
    for number_of, claim in enumerate(judged, 1):
        print(f"{number_of}. {claim['claim']}: {claim['verdict']}")
    print(f"report: {out / 'report.html'}, {out / 'report.md'}")


def make_figures(out, results, seeds):
    """{title: file name without suffix, under figures/}; nothing, and a line, where packages are missing."""
    try:
        import figures
    except ImportError as error:
        print(f"no figures: {error}; pip install -r requirements-dev.txt")
        return {}
    return figures.make_all(out, results, seeds)


def claim_rows(judged):
    """(cells, whether it heads a claim) of the table of claims."""
    for number_of, claim in enumerate(judged, 1):
        yield [f"{number_of}. {claim['claim']}", "", "", claim["verdict"]], True
        for part in claim["parts"]:
            interval = f"{number(part['lower'])} to {number(part['upper'])}"
            yield [part["part"], number(part["mean"]), interval, part["verdict"]], False


def table_rows(table):
    """(column names, [[row name, cell, ...]])."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    return columns, [[row] + [f"{number(cells[column]['mean'])} ± {number(cells[column]['std'])}"
                              if column in cells else "" for column in columns] for row, cells in table.items()]


def as_markdown(title, intro, judged, filled, figures):
    lines = [f"# {title}", "", "\n\n".join(intro), "", "## The seven claims", "",
             "| measured | mean | 95 % interval | verdict |", "|---|---|---|---|"]
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
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: clamp(9px, 2.3vw, 14px); }
td, th { padding: .25em .3em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; hyphens: auto; }
th:first-child, td:first-child { width: 22%; } .claims td:first-child { width: 46%; }
.head td { font-weight: 600; border-top: 2px solid #999; } small { color: #666; white-space: nowrap; }
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
            row(["measured", "mean", "95 % interval", "verdict"], "th")]
    for cells, heads in claim_rows(judged):
        verdict = f"<span class='{cells[-1].split()[0]}'>{cells[-1]}</span>"
        if heads:
            body.append(f"<tr class=head><td colspan=3>{html.escape(cells[0])}<td>{verdict}</tr>")
        else:
            body.append(row([*map(html.escape, cells[:-1]), verdict]))
    body.append("</table>")
    for name, table in filled.items():
        columns, rows = table_rows(table)
        body += [f"<h2>{html.escape(name)}</h2><table>", row(["", *columns], "th")]
        for first, *cells in rows:
            body.append(row([html.escape(first)] + [cell.replace(" ± ", "<br><small>± ") + "</small>" * bool(cell)
                                                    for cell in cells]))
        body.append("</table>")
    for name, file in figures.items():
        data = base64.b64encode((out / "figures" / f"{file}.svg").read_bytes()).decode()
        body.append(f"<h2>{html.escape(name)}</h2><img alt='{html.escape(name)}' src='data:image/svg+xml;base64,{data}'>")
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><body>" + "\n".join(body) + "\n</body></html>\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables, figures and verdicts of a folder that reproduce.py made.")
    parser.add_argument("folder", type=Path, help="the --out of reproduce.py")
    args = parser.parse_args(argv)
    try:
        write_report(args.folder, f"python report.py {args.folder}")
        return 0
    except (ValueError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
