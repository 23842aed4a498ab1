"""The paper's figures from a folder of runs that lab.reproduce made, as .svg and .png.

Each function draws one; `make_all` draws what can be drawn and says why the rest cannot. Colours are Okabe
and Ito's, which colour-blind readers tell apart, one to a method throughout.
"""

import json
import statistics
from zipfile import BadZipFile

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from lab.runs import METHODS, scaled, scales_of
from plumbing.files import read_json

COLOURS = {"LP": "#E69F00", "FT": "#0072B2", "LoRA": "#56B4E9", "LP-FT": "#D55E00", "LP-LoRA": "#CC79A7"}
TRAINED = [name for name in METHODS if name != "LP"]  # those with an FT stage
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.3, "legend.frameon": False, "figure.constrained_layout.use": True,
         "lines.linewidth": 2, "svg.hashsalt": "lpft"}


def panels(count, height=3.1):
    """A figure of `count` axes, two side by side: wide enough to be read on a phone."""
    rows = -(-count // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(6.8, height * rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def of_units(results, name, units):
    return [results[f"{name}-{unit}"] for unit in units]


def metrics(out, name, unit):
    """Records of a run's metrics.jsonl."""
    text = (out / "runs" / f"{name}-{unit}" / "metrics.jsonl").read_text(encoding="utf-8")
    return [*map(json.loads, text.splitlines())]


def head_norms(out, results, units):
    """Fig. 1, 4: head norm along LP, beside training accuracy, and along the FT stage."""
    figure, (lp, ft) = panels(2)
    norms, accuracies = zip(*metrics(out, "LP", units[0])[0]["path"])
    line, = lp.plot(norms, color=COLOURS["LP"])
    right = lp.twinx()  # accuracy has its own scale
    dots, = right.plot(accuracies, color="#222222", linestyle=":")
    right.set(ylabel="training accuracy", ylim=(0, 1.02))
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    lp.set(xlabel="step of the solver", ylabel="head norm", title=f"LP from V = 0, unit {units[0]}")
    lp.set_ylim(0)
    lp.legend([line, dots], ["head norm", "accuracy"], fontsize=9, loc="lower right")
    for name in TRAINED:
        curves = [[r["head_norm"] for r in metrics(out, name, unit) if r["stage"] == "ft"] for unit in units]
        ft.plot(np.mean(curves, 0), "--" if "LoRA" in name else "-", color=COLOURS[name], label=name)
    ft.xaxis.set_major_locator(MaxNLocator(integer=True))
    ft.set(xlabel="epoch", ylabel="head norm", title="FT stage, mean of units", ylim=(0, None))
    ft.set_ylim(0, 1.4 * ft.get_ylim()[1])  # room for the legend
    ft.legend(fontsize=9, ncols=2, loc="upper center")
    return figure


def spectra(out, results, units):
    """Fig. 2, 7: singular values of P and F over the largest, mean over units."""
    figure, axes = panels(2)
    axes[1].sharex(axes[0])
    axes[1].sharey(axes[0])
    for axis, kernel in zip(axes, ("P", "F")):
        for name in TRAINED if kernel == "F" else ("FT",):  # P is one and the same
            values = np.mean([r["ntk"][kernel]["singular_values"] for r in of_units(results, name, units)], 0)
            values = values[values > len(values) * np.finfo(np.float32).eps]  # those that the rank counts
            axis.semilogy(range(1, len(values) + 1), values, linestyle="--" if "LoRA" in name else "-",
                          color=COLOURS[name] if kernel == "F" else "#222222",
                          label=name if kernel == "F" else "all methods")
        axis.set(xlabel="index", ylabel="singular value / largest", title=f"{kernel}, start of the FT stage")
        axis.legend(fontsize=9)
    return figure


def trace_norms(out, results, units):
    """Fig. 8, 9: trace norm of each C x C block, all panels on one logarithmic scale; lines part classes."""
    names = read_json(out / "runs" / f"LP-FT-{units[0]}" / "classifier.json")["labels"]
    classes = [name if len(name) < 14 else f"{name[:12]}…" for name in names]  # short enough for an axis
    classes = classes if len(names) < 7 else range(len(names))
    drawn = [("LP-FT", "P", "pretrain")] + [(name, "F", "ft") for name in TRAINED]
    norms = []
    for name, _, key in drawn:
        saved = np.load(out / "runs" / f"{name}-{units[0]}" / "ntk.npz")
        order = np.argsort(saved["labels"], kind="stable")
        blocks = saved[key][order][:, :, order].swapaxes(1, 2)  # (N, N, C, C)
        norms.append(np.linalg.norm(blocks, "nuc", (2, 3)))  # sums of singular values
    labels, largest = saved["labels"][order], max(map(np.max, norms))
    scale = LogNorm(max(min(map(np.min, norms)), largest * 1e-5), largest)
    figure, (*axes, last) = panels(len(drawn) + 1)
    for axis, (name, kernel, _), norm in zip(axes, drawn, norms):
        image = axis.imshow(norm, cmap="cividis", norm=scale)
        for edge in np.flatnonzero(np.diff(labels)) + 0.5:
            axis.axhline(edge, color="white", linewidth=0.8)
            axis.axvline(edge, color="white", linewidth=0.8)
        middles = [np.flatnonzero(labels == c).mean() for c in range(len(classes))]
        axis.set_xticks(middles, classes, rotation=25, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_yticks(middles, classes, fontsize=9)
        axis.tick_params(length=0)
        axis.set(title=f"{kernel}, {name}", xlabel="samples of class", ylabel="samples of class")
        axis.grid(visible=False)
    last.set_axis_off()
    figure.colorbar(image, cax=last.inset_axes([0.05, 0.55, 0.9, 0.08]), orientation="horizontal",
                    label="trace norm")
    return figure


def head_scales(out, results, units):
    """Fig. 3, 10, 11: feature change against the factor on the starting head, with standard errors."""
    factors = scales_of(results)
    units = [unit for unit in units if all(f"{scaled(name, factor)}-{unit}" in results
                                           for name in ("FT", "LP-FT") for factor in factors)]
    if len(factors) < 2 or len(units) < 2:
        raise ValueError("no runs from scaled heads in two units or more")
    splits = list(results[f"LP-{units[0]}"]["accuracy"])
    groups = [("test", splits[:1])] + ([("out of distribution", splits[1:])] if splits[1:] else [])
    figure, axes = panels(len(groups))
    for axis, (title, group) in zip(axes, groups):
        for name in ("FT", "LP-FT"):
            runs = [of_units(results, scaled(name, factor), units) for factor in factors]
            diffs = np.array([[statistics.mean(r["features"][split]["diff"] for split in group) for r in row]
                              for row in runs])  # (factors, units)
            axis.errorbar(factors, diffs.mean(1), diffs.std(1, ddof=1) / len(units) ** 0.5, label=name,
                          color=COLOURS[name], marker="o", capsize=3)
        axis.set(xscale="log", xlabel="factor on the starting head", ylabel="Diff(F)", title=title)
        axis.set_ylim(0)
        axis.legend(title="mean, standard error", fontsize=9)
    return figure


def reliability(out, results, units):
    """Accuracy by confidence, 15 bins, over the test texts of all units; larger marks are of more texts."""
    figure, axes = panels(len(METHODS))
    for axis, name in zip(axes, METHODS):
        runs = of_units(results, name, units)
        fitted = [run["temperature"] for run in runs if run["temperature"]]  # the others have none
        arrays = [np.load(out / "runs" / f"{name}-{unit}" / "logits.npz") for unit in units]
        labels = np.concatenate([array["labels_test"] for array in arrays])
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1)
        for marker, colour, label in (("o", COLOURS[name], "as trained"), ("^", "#222222", "with T")):
            temperatures = [run["temperature"] if label == "with T" else None for run in runs]
            probs = torch.cat([(torch.from_numpy(array["logits_test"]).double() / (t or 1.0)).softmax(1)
                               for array, t in zip(arrays, temperatures)])  # (texts of all units, C)
            confidence, guess = (x.numpy() for x in probs.max(1))
            right, bins = guess == labels, np.ceil(confidence * 15)
            points = np.array([(confidence[bins == b].mean(), right[bins == b].mean(), (bins == b).mean())
                               for b in np.unique(bins)])
            axis.plot(points[:, 0], points[:, 1], color=colour, linewidth=1)
            axis.scatter(points[:, 0], points[:, 1], 8 + 150 * points[:, 2], marker=marker, color=colour,
                         clip_on=False, label=label)
        mean = f"mean T {statistics.mean(fitted):.3g}" if fitted else "T not fitted"
        axis.set_title(f"{name}, {len(right)} texts, {mean}", fontsize=11)
        axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        axis.legend(fontsize=8, loc="upper left", markerscale=0.6)  # no confidence is so low
    return figure


FIGURES = {  # {title: (file name, what draws it, caption)}
    "The head's norm (Fig. 1, 4)": ("head-norm", head_norms, "Left, along LP's solver, which may go too far "
        "and come back: the head's norm, and beside it training accuracy. Right, by epoch of the FT stage. "
        "In the paper LP makes the head grow, and the FT stage hardly does."),
    "Feature change against the head (Fig. 3, 10, 11)": ("head-scale", head_scales, "In the paper the "
        "curves fall: the larger the head that training starts from, the less features move. Compare along a "
        "curve: each method has its own learning rate."),
    "Spectra of P and F (Fig. 2, 7)": ("spectra", spectra, "Mean over units. In the paper F has the higher "
        "rank (its curve ends further to the right), and LoRA's F (dashed) has nearly the spectrum of FT's "
        "(solid). Each is divided by its largest value, so sizes are not compared. P's values come in equal "
        "groups, one for each class, since P is a number times I."),
    "Trace norms of P and F (Fig. 8, 9)": ("trace-norms", trace_norms, "Of the C x C block of each pair of "
        "texts, the sum of its singular values, in the first unit. One scale for all, so that the size of F "
        "can be compared: from a random head it is small, after LP many times larger."),
    "Reliability before and after temperature scaling": ("reliability", reliability, "All units; one without "
        "a T as it is. Points below the diagonal are too sure, above it too unsure; the larger a mark, the "
        "more texts. Triangles, after dividing by T, should lie near it; small marks are a few texts."),
}


def make_all(out, results, units):
    """Draw FIGURES into out/figures: ({title: (file name without suffix, caption)}, why the rest is not)."""
    (out / "figures").mkdir(exist_ok=True)
    drawn, problems = {}, []
    for title, (file, draw, caption) in FIGURES.items():
        try:
            save(out / "figures" / file, draw, out, results, units)
            drawn[title] = file, caption
        except (ValueError, OSError, KeyError, IndexError, EOFError, BadZipFile) as error:  # lost or cut
            for path in (out / "figures").glob(f"{file}.*"):  # of other runs, perhaps
                path.unlink()
            missing = "a run has no " if isinstance(error, KeyError) else ""
            problems.append(f"{title}: {missing}{str(error) or type(error).__name__}")
    return drawn, problems


def save(path, draw, *what):
    """The figure that draw(*what) gives, as .svg and .png."""
    with plt.rc_context(STYLE):
        figure = draw(*what)
        figure.savefig(f"{path}.svg", metadata={"Date": None})
        figure.savefig(f"{path}.png", dpi=150)
        plt.close(figure)
