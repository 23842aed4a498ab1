"""The paper's figures from a folder of runs that lab.reproduce made, as .svg and .png.

Each function draws one; `make_all` draws what can be drawn and says why the rest cannot. Colours are Okabe
and Ito's, which colour-blind readers tell apart, one to a method throughout (one to a class in the maps of
features).
"""

import functools
import json
import statistics

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # of scikit-learn

from data import load_task
from lab.runs import METHODS, scaled, scales_of
from lpft import predict
from ntk import kernel_statistics
from plumbing.export import load_classifier
from plumbing.files import read_json

COLOURS = {"pre-trained": "#555555", "LP": "#E69F00", "FT": "#0072B2", "LoRA": "#56B4E9", "LP-FT": "#D55E00",
           "LP-LoRA": "#CC79A7"}
CLASS_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "legend.frameon": False, "figure.constrained_layout.use": True, "lines.linewidth": 2, "svg.hashsalt": "lpft"}


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
    """Lines of metrics.jsonl of a run."""
    path = out / "runs" / f"{name}-{unit}" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def head_norms(out, results, units):
    """Fig. 1, 4: head norm and training accuracy along LP and along the FT stage, and the norms that are
    kept.
    """
    figure, (lp, ft, accuracy, end) = panels(4)
    norms, accuracies = zip(*metrics(out, "LP", units[0])[0]["path"])
    line, = lp.plot(norms, color=COLOURS["LP"])
    right = lp.twinx()  # accuracy has its own scale
    dots, = right.plot(accuracies, color="#222222", linestyle=":")
    right.set(ylabel="training accuracy", ylim=(0, 1.02))
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    lp.set(xlabel="step of the solver", ylabel="head norm", title=f"LP from V = 0, unit {units[0]}", ylim=(0, None))
    lp.legend([line, dots], ["head norm", "accuracy"], fontsize=9, loc="lower right")
    for name in METHODS:
        if name != "LP":
            records = [[r for r in metrics(out, name, unit) if r["stage"] == "ft"] for unit in units]
            for axis, key in ((ft, "head_norm"), (accuracy, "train_accuracy")):
                axis.plot(np.mean([[r[key] for r in run] for run in records], 0), color=COLOURS[name], label=name)
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    ft.set(xlabel="epoch", ylabel="head norm", title="FT stage, mean of units", ylim=(0, None))
    ft.set_ylim(0, 1.4 * ft.get_ylim()[1])  # room for the legend
    accuracy.set(xlabel="epoch (from 1 with dropout)", ylabel="training accuracy", title="FT stage, mean of units")
    for axis in (ft, accuracy):
        axis.legend(fontsize=9, ncols=2, loc="upper center" if axis is ft else "lower right")
    for i, name in enumerate(METHODS):
        values = [result["head_norm"] for result in of_units(results, name, units)]
        end.bar(i, statistics.mean(values), yerr=statistics.stdev(values), color=COLOURS[name], capsize=4)
    end.set_xticks(range(len(METHODS)), METHODS, rotation=30)
    end.set(ylabel="head norm", title="kept epoch, ± std of units")
    end.grid(axis="x", visible=False)
    return figure


def spectra(out, results, units):
    """Fig. 2, 7: singular values of P and F over the largest, mean over units."""
    figure, axes = panels(2)
    for axis, kernel in zip(axes, ("P", "F")):
        for name in METHODS if kernel == "F" else ("FT",):  # P is one and the same
            if name != "LP":
                values = np.mean([r["ntk"][kernel]["singular_values"] for r in of_units(results, name, units)], 0)
                values = values[values > len(values) * np.finfo(np.float32).eps]  # those that the rank counts
                axis.semilogy(range(1, len(values) + 1), values, linestyle="--" if "LoRA" in name else "-",
                              color=COLOURS[name] if kernel == "F" else "#222222",
                              label=name if kernel == "F" else "all methods")
        axis.set(xlabel="index", ylabel="singular value / largest", title=f"{kernel}, start of the FT stage")
        axis.legend(fontsize=9)
    return figure


def trace_norms(out, results, units):
    """Fig. 8, 9: trace norm of each C x C block, all panels on one logarithmic scale; lines part the classes.
    """
    classes = short(read_json(out / "runs" / f"LP-FT-{units[0]}" / "classifier.json")["labels"])
    drawn = [("LP-FT", "P", "pretrain")] + [(name, "F", "ft") for name in METHODS if name != "LP"]
    norms = []
    for name, _, key in drawn:
        saved = np.load(out / "runs" / f"{name}-{units[0]}" / "ntk.npz")
        order = np.argsort(saved["labels"], kind="stable")
        norms.append(kernel_statistics(torch.from_numpy(saved[key][order][:, :, order]))["trace_norms"].numpy())
    labels = saved["labels"][order]
    scale = LogNorm(max(min(map(np.min, norms)), max(map(np.max, norms)) * 1e-5), max(map(np.max, norms)))
    figure, (*axes, last) = panels(len(drawn) + 1)
    for axis, (name, kernel, _), of in zip(axes, drawn, norms):
        image = axis.imshow(of, cmap="cividis", norm=scale)
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
    figure.colorbar(image, cax=last.inset_axes([0.05, 0.55, 0.9, 0.08]), orientation="horizontal", label="trace norm")
    return figure


def short(names):
    """Class names that fit beside an axis; their indices where there are many."""
    if len(names) > len(CLASS_COLOURS):
        return [str(i) for i in range(len(names))]
    return [f"{name[:12]}…" if len(name) > 13 else name for name in names]


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
            diffs = np.array([[statistics.mean(r["features"][split]["diff"] for split in group)
                               for r in of_units(results, scaled(name, factor), units)] for factor in factors])
            axis.errorbar(factors, diffs.mean(1), diffs.std(1, ddof=1) / len(units) ** 0.5, color=COLOURS[name],
                          label=name, marker="o", capsize=3)
        axis.set(xscale="log", xlabel="factor on the starting head", ylabel="Diff(F)", title=title, ylim=(0, None))
        axis.legend(title="mean, standard error", fontsize=9)
    return figure


def load_run(out, name, unit):
    """(features, logits, T or None, head rows, labels, class names) of a run on the test split."""
    folder = out / "runs" / f"{name}-{unit}"
    (model, tokenizer, settings), config = load_classifier(folder), read_json(folder / "config.json")
    task = load_task(config["data"], tokenizer, config["max_length"], config.get("data_dir"),
                     max_test=config.get("max_test"), language=config.get("language") or 0)
    split = task.splits[task.test_names[0]]
    temperature = None if settings["temperature_reason"] else settings["temperature"]
    return *predict(model, split), temperature, model.head.weight.detach(), split.labels, task.labels


def feature_maps(out, results, units, load):
    """Fig. 5, 6: t-SNE of test features (dots) with the head's rows (stars), stretched to the features'
    length.
    """
    figure, axes = panels(len(METHODS))
    for axis, name in zip(axes, METHODS):
        features, _, _, head, labels, names = load(name, units[0])
        some = np.random.default_rng(0).permutation(len(labels))[:400]
        colours = CLASS_COLOURS if len(names) <= len(CLASS_COLOURS) else plt.get_cmap("turbo")(
            np.linspace(0, 1, len(names)))
        features = features[some]
        rows = head / head.norm(dim=1, keepdim=True).clamp(min=1e-12) * features.norm(dim=1).mean()
        points = np.concatenate([features.numpy(), rows.numpy()])
        if len(points) < 8:
            raise ValueError(f"{len(features)} test samples are too few for t-SNE")
        with threadpool_limits(1):  # with more, on a busy machine, threads wait for each other for minutes
            tsne = TSNE(perplexity=min(30, len(points) // 4), random_state=0, init="pca")
            placed = tsne.fit_transform(points)
        for c, label in enumerate(short(names)):
            here = (labels[some] == c).numpy()
            axis.scatter(*placed[:len(features)][here].T, s=10, color=colours[c], label=label, alpha=0.7, linewidths=0)
            axis.scatter(*placed[len(features) + c], s=170, marker="*", color=colours[c], edgecolors="black",
                         label=f"head row of {label}")
        axis.set(title=name, xticks=[], yticks=[])
    handles, titles = axes[0].get_legend_handles_labels()
    if len(names) <= len(CLASS_COLOURS):  # dots in one column, stars in the other
        figure.legend(handles[::2] + handles[1::2], titles[::2] + titles[1::2], loc="outside lower center", ncols=2,
                      fontsize=9)
    return figure


def reliability(out, results, units, load):
    """Accuracy against confidence in 15 bins over the test texts of all units, the larger the mark the more
    texts.
    """
    figure, axes = panels(len(METHODS))
    for axis, name in zip(axes, METHODS):
        runs = [load(name, unit) for unit in units]
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1)
        fitted = [run[2] for run in runs if run[2]]
        for marker, colour, by_t in (("o", COLOURS[name], False), ("^", "#222222", True)):
            found = [(logits.double() / ((t or 1.0) if by_t else 1.0)).softmax(1).max(1) for _, logits, t, *_ in runs]
            confidence = torch.cat([c for c, _ in found]).numpy()
            right = torch.cat([guess == run[4] for (_, guess), run in zip(found, runs)]).double().numpy()
            bins = np.ceil(confidence * 15)
            points = np.array([(confidence[bins == b].mean(), right[bins == b].mean(), (bins == b).mean())
                               for b in np.unique(bins)])
            axis.plot(points[:, 0], points[:, 1], color=colour, linewidth=1)
            axis.scatter(points[:, 0], points[:, 1], 8 + 150 * points[:, 2], marker=marker, color=colour,
                         clip_on=False, label=("divided by T" if by_t else "as trained") + f", {len(right)} texts")
        title = f"{name}, mean T = {statistics.mean(fitted):.3g}" if fitted else f"{name}, T not fitted"
        axis.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        axis.legend(fontsize=8)
    return figure


def make_all(out, results, units):
    """Draw what there are runs for into out/figures: ({title: (file name without suffix, caption)}, what is
    not).
    """
    (out / "figures").mkdir(exist_ok=True)
    load = functools.cache(lambda name, unit: load_run(out, name, unit))
    figures = {
        "The head grows (Fig. 1, 4)": ("head-norm", head_norms, "What to see: in LP the head's norm goes on "
            "growing after training accuracy has levelled off; in the FT stage it hardly moves from where it starts."),
        "Feature change against the head (Fig. 3, 10, 11)": ("head-scale", head_scales, "What to see: the "
            "larger the head that training starts from, the less features move."),
        "Spectra of P and F (Fig. 2, 7)": ("spectra", spectra, "What to see: F reaches further to the right, "
            "it has the higher rank; dashed (LoRA) and solid (FT) lines lie near each other."),
        f"Trace norms of P and F, unit {units[0]} (Fig. 8, 9)": ("trace-norms", trace_norms, "What to see: "
            "one scale for all. F is small where FT starts from a random head, and many times larger after LP."),
        f"Test features and head rows, unit {units[0]} (Fig. 5, 6)": (
            "features", lambda *some: feature_maps(*some, load), "What to see (t-SNE): methods that train "
            "the encoder pull the classes apart; the rows of the head lie at the clusters."),
        "Reliability before and after temperature scaling": (
            "reliability", lambda *some: reliability(*some, load), "What to see: points below the diagonal "
            "are too sure, above it too unsure. Dividing by T moves the large marks, most texts, to the diagonal."),
    }
    drawn, problems = {}, []
    for title, (file, draw, caption) in figures.items():
        paths = [out / "figures" / f"{file}.{kind}" for kind in ("svg", "png")]
        try:
            with plt.rc_context(STYLE):
                figure = draw(out, results, units)
                figure.savefig(paths[0], metadata={"Date": None})
                figure.savefig(paths[1], dpi=150)
            drawn[title] = file, caption
        except (ValueError, OSError, KeyError, IndexError, EOFError) as error:  # files lost or cut
            for path in paths:  # of other runs, perhaps
                path.unlink(missing_ok=True)
            why = f"a run has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            problems.append(f"{title}: {why}")
        finally:
            plt.close("all")
    return drawn, problems
