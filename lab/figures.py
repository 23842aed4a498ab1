"""The paper's figures from a folder of runs that lab.reproduce made, as .svg and .png.

    python -m lab.figures reproduction/tiny-tiny

Each function draws one; `make_all` draws what can be drawn and says why the rest cannot. Colours are Okabe
and Ito's, which colour-blind readers tell apart, one to a method throughout (one to a class in the maps of
features). Needs matplotlib and scikit-learn.
"""

import functools
import json
import statistics
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import matplotlib

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # of scikit-learn

from data import load_task
from lab.claims import scale_names
from lab.runs import METHODS, complete_seeds, read_plan, read_results
from lpft import predict
from ntk import kernel_statistics
from plumbing.export import load_classifier
from plumbing.files import read_json
from plumbing.flags import Parser, exit_status

COLOURS = {"pre-trained": "#555555", "LP": "#E69F00", "FT": "#0072B2", "LoRA": "#56B4E9", "LP-FT": "#D55E00",
           "LP-LoRA": "#CC79A7"}
MOST_NAMES = 6  # of classes beside an axis
CLASS_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.3, "legend.frameon": False, "figure.constrained_layout.use": True, "lines.linewidth": 2,
         "svg.hashsalt": "lpft"}


def panels(count, height=3.1):
    """A figure of `count` axes, two side by side: wide enough to be read on a phone."""
    rows = -(-count // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(6.8, height * rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def of_seeds(results, name, seeds):
    return [results[f"{name}-seed{seed}"] for seed in seeds]


def metrics(out, name, seed):
    """Lines of metrics.jsonl of a run."""
    path = out / "runs" / f"{name}-seed{seed}" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def head_norms(out, results, seeds):
    """Fig. 1, 4: head norm and training accuracy along LP and along the FT stage, and the norms that are
    kept.
    """
    figure, (lp, ft, accuracy, end) = panels(4)
    norms, accuracies = zip(*metrics(out, "LP", seeds[0])[0]["path"])
    line, = lp.plot(norms, color=COLOURS["LP"])
    right = lp.twinx()  # accuracy has its own scale
    dots, = right.plot(accuracies, color="#222222", linestyle=":")
    right.set(ylabel="training accuracy", ylim=(0, 1.02))
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    lp.set(xlabel="step of the solver", ylabel="head norm", title=f"LP from V = 0, seed {seeds[0]}", ylim=(0, None))
    lp.legend([line, dots], ["head norm", "accuracy"], fontsize=9, loc="lower right")
    for name in METHODS:
        if name != "LP":
            records = [[r for r in metrics(out, name, seed) if r["stage"] == "ft"] for seed in seeds]
            for axis, key in ((ft, "head_norm"), (accuracy, "train_accuracy")):
                axis.plot(np.mean([[r[key] for r in run] for run in records], 0), color=COLOURS[name], label=name)
    ft.set(xlabel="epoch", ylabel="head norm", title="FT stage, mean of seeds", ylim=(0, None))
    ft.set_ylim(0, 1.4 * ft.get_ylim()[1])  # room for the legend
    ft.legend(fontsize=9, ncols=2, loc="upper center")
    accuracy.set(xlabel="epoch (from 1 with dropout)", ylabel="training accuracy", title="FT stage, mean of seeds")
    for i, name in enumerate(METHODS):
        values = [result["head_norm"] for result in of_seeds(results, name, seeds)]
        end.bar(i, statistics.mean(values), yerr=statistics.stdev(values), color=COLOURS[name], capsize=4)
    end.set_xticks(range(len(METHODS)), METHODS, rotation=30)
    end.set(ylabel="head norm", title="kept epoch, ± std of seeds")
    end.grid(axis="x", visible=False)
    return figure


def spectra(out, results, seeds):
    """Fig. 2, 7: singular values of P and F over the largest, mean over seeds."""
    figure, axes = panels(2)
    for axis, kernel in zip(axes, ("P", "F")):
        for name in METHODS if kernel == "F" else ("FT",):  # P is one and the same
            if name != "LP":
                values = np.mean([r["ntk"][kernel]["singular_values"] for r in of_seeds(results, name, seeds)], 0)
                values = values[values > len(values) * np.finfo(np.float32).eps]  # those that the rank counts
                axis.semilogy(range(1, len(values) + 1), values, linestyle="--" if "LoRA" in name else "-",
                              color=COLOURS[name] if kernel == "F" else "#222222",
                              label=name if kernel == "F" else "all methods")
        axis.set(xlabel="index", ylabel="singular value / largest", title=f"{kernel}, start of the FT stage")
        axis.legend(fontsize=9)
    return figure


def trace_norms(out, results, seeds):
    """Fig. 8, 9: trace norm of each C x C block over the panel's largest; lines part the classes."""
    run = out / "runs" / f"LP-FT-seed{seeds[0]}"
    classes = short(read_json(run / "classifier.json")["labels"])
    drawn = [("LP-FT", "P", "pretrain")] + [(name, "F", "ft") for name in METHODS if name != "LP"]
    figure, (*axes, last) = panels(len(drawn) + 1)
    for axis, (name, label, key) in zip(axes, drawn):
        saved = np.load(out / "runs" / f"{name}-seed{seeds[0]}" / "ntk.npz")
        order = np.argsort(saved["labels"], kind="stable")
        norms = kernel_statistics(torch.from_numpy(saved[key][order][:, :, order]))["trace_norms"].numpy()
        image = axis.imshow(norms / norms.max(), cmap="cividis", vmin=0, vmax=1)
        for edge in np.flatnonzero(np.diff(saved["labels"][order])) + 0.5:
            axis.axhline(edge, color="white", linewidth=0.8)
            axis.axvline(edge, color="white", linewidth=0.8)
        middles = [np.flatnonzero(saved["labels"][order] == c).mean() for c in range(len(classes))]
        axis.set_xticks(middles, classes, rotation=25 if len(classes) <= MOST_NAMES else 90, ha="right",
                        rotation_mode="anchor", fontsize=9 if len(classes) <= MOST_NAMES else 6)
        axis.set_yticks(middles, classes, fontsize=9 if len(classes) <= MOST_NAMES else 6)
        axis.tick_params(length=0)
        axis.set(title=f"{label}, {name}", xlabel="samples of class", ylabel="samples of class")
        axis.grid(visible=False)
    last.set_axis_off()
    figure.colorbar(image, cax=last.inset_axes([0.05, 0.55, 0.9, 0.08]), orientation="horizontal",
                    label="trace norm / largest")
    return figure


def short(names):
    """Class names that fit beside an axis; their indices where there are many."""
    if len(names) > MOST_NAMES:
        return [str(i) for i in range(len(names))]
    return [f"{name[:12]}…" if len(name) > 13 else name for name in names]


def head_scales(out, results, seeds):
    """Fig. 3, 10, 11: feature change against the factor on the starting head, with standard errors."""
    scales = scale_names(results)
    if len(scales) < 2:
        raise ValueError("no runs from scaled heads")
    needed = [run for names in scales.values() for run in names.values()]
    seeds = [seed for seed in seeds if all(f"{run}-seed{seed}" in results for run in needed)]
    if len(seeds) < 2:
        raise ValueError(f"{len(seeds)} seeds have a finished run of every factor; expected two or more")
    splits = list(results[f"LP-seed{seeds[0]}"]["accuracy"])
    groups = [("test", splits[:1])] + ([("out of distribution", splits[1:])] if splits[1:] else [])
    figure, axes = panels(len(groups))
    for axis, (title, group) in zip(axes, groups):
        for name in ("FT", "LP-FT"):
            runs = [of_seeds(results, names[name], seeds) for names in scales.values()]
            diffs = np.array([[statistics.mean(r["features"][split]["diff"] for split in group) for r in of_scale]
                              for of_scale in runs])  # (scales, seeds)
            axis.errorbar(list(scales), diffs.mean(1), diffs.std(1, ddof=1) / len(seeds) ** 0.5, color=COLOURS[name],
                          label=name, marker="o", capsize=3)
        axis.set(xscale="log", xlabel="factor on the starting head", ylabel="Diff(F)", title=title, ylim=(0, None))
    axes[0].legend(title="mean, standard error")
    return figure


def load_runs(out, results, seed):
    """{method: (features, logits, T or None, head rows)} on the test split, its labels and class names."""
    found, task = {}, None
    for name in METHODS:
        model, tokenizer, settings = load_classifier(out / "runs" / f"{name}-seed{seed}")
        if task is None:
            config = json.loads((out / "runs" / f"{name}-seed{seed}" / "config.json").read_text(encoding="utf-8"))
            task = load_task(config["data"], tokenizer, config["max_length"], config.get("data_dir"),
                             max_test=config.get("max_test"))
            split = task.splits[task.test_names[0]]
        temperature = None if settings["temperature_reason"] else settings["temperature"]
        found[name] = (*predict(model, split), temperature, model.head.weight.detach())
    return found, split.labels, task.labels


def feature_maps(out, results, seeds, runs):
    """Fig. 5, 6: t-SNE of test features (dots) with the head's rows (stars), stretched to the features'
    length.
    """
    found, labels, names = runs
    some = np.random.default_rng(0).permutation(len(labels))[:400]
    many = len(names) > len(CLASS_COLOURS)
    colours = plt.get_cmap("turbo")(np.linspace(0, 1, len(names))) if many else CLASS_COLOURS
    figure, axes = panels(len(METHODS))
    for axis, (name, (features, _, _, head)) in zip(axes, found.items()):
        features = features[some]
        rows = head / head.norm(dim=1, keepdim=True).clamp(min=1e-12) * features.norm(dim=1).mean()
        points = np.concatenate([features.numpy(), rows.numpy()])
        if len(points) < 8:
            raise ValueError(f"{len(features)} test samples are too few for t-SNE")
        with threadpool_limits(1):  # with more, on a busy machine, threads wait for each other for minutes
            placed = TSNE(perplexity=min(30, len(points) // 4), random_state=0, init="pca").fit_transform(points)
        for c, label in enumerate(short(names)):
            colour, here = colours[c], (labels[some] == c).numpy()
            axis.scatter(*placed[:len(features)][here].T, s=10, color=colour, label=label, alpha=0.7, linewidths=0)
            axis.scatter(*placed[len(features) + c], s=170, marker="*", color=colour, edgecolors="black",
                         label=f"head row of {label}")
        axis.set(title=name, xticks=[], yticks=[])
    handles, labels_of = axes[0].get_legend_handles_labels()
    if not many:  # dots in one column, stars in the other
        figure.legend(handles[::2] + handles[1::2], labels_of[::2] + labels_of[1::2], loc="outside lower center",
                      ncols=2, fontsize=9)
    return figure


def reliability(out, results, seeds, runs):
    """Accuracy against confidence in 15 bins, the larger the mark the more samples; not in the paper."""
    found, labels, _ = runs
    figure, axes = panels(len(METHODS))
    for axis, (name, (_, logits, temperature, _)) in zip(axes, found.items()):
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1)
        for scale, marker in [(1.0, "o")] + [(temperature, "^")] * bool(temperature):
            confidence, prediction = (logits.double() / scale).softmax(1).max(1)
            right, bins = (prediction == labels).double().numpy(), np.ceil(confidence.numpy() * 15)
            points = np.array([(confidence.numpy()[bins == b].mean(), right[bins == b].mean(), (bins == b).mean())
                               for b in np.unique(bins)])
            colour = COLOURS[name] if scale == 1.0 else "#222222"
            axis.plot(points[:, 0], points[:, 1], color=colour, linewidth=1)
            axis.scatter(points[:, 0], points[:, 1], 8 + 150 * points[:, 2], marker=marker, color=colour, clip_on=False)
        title = f"{name}, T = {temperature:.3g}" if temperature else f"{name}, T not fitted"
        axis.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02),
                 ylim=(0, 1.02))
    marks = [plt.Line2D([], [], color=colour, marker=marker, label=label) for colour, marker, label in (
        ("#999999", "o", "as trained, in the method's colour"), ("#222222", "^", "divided by T"))]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def make_all(out, results, most):
    """Draw what there are runs for into out/figures.

    Returns {title: file name without suffix} and a list of why others could not be drawn.
    """
    (out / "figures").mkdir(exist_ok=True)
    seeds = complete_seeds(results, most)
    runs = functools.cache(lambda: load_runs(out, results, seeds[0]))
    figures = {
        "Head norm (Fig. 1, 4)": ("head-norm", head_norms),
        "Spectra of P and F (Fig. 2, 7)": ("spectra", spectra),
        f"Trace norms of P and F, seed {seeds[0]} (Fig. 8, 9)": ("trace-norms", trace_norms),
        "Feature change against the scale of the head (Fig. 3, 10, 11)": ("head-scale", head_scales),
        f"Test features and head rows, t-SNE, seed {seeds[0]} (Fig. 5, 6)": (
            "features", lambda *some: feature_maps(*some, runs())),
        f"Reliability, before and after temperature scaling, seed {seeds[0]}": (
            "reliability", lambda *some: reliability(*some, runs())),
    }
    drawn, problems = {}, []
    for title, (file, draw) in figures.items():
        paths = [out / "figures" / f"{file}.{kind}" for kind in ("svg", "png")]
        try:
            with plt.rc_context(STYLE):
                figure = draw(out, results, seeds)
                figure.savefig(paths[0], metadata={"Date": None})
                figure.savefig(paths[1], dpi=150)
            drawn[title] = file
        except (ValueError, OSError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:  # files lost or cut
            for path in paths:  # of other runs, perhaps
                path.unlink(missing_ok=True)
            why = f"a run has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            problems.append(f"{title}: {why}")
        finally:
            plt.close("all")
    return drawn, problems


def main(argv=None):
    parser = Parser("lab.figures", description="Figures of a folder that lab.reproduce made.")
    parser.add_argument("folder", type=Path, help="the --out of lab.reproduce")
    out = parser.parse_args(argv).folder

    def work():
        plan = read_plan(out)
        drawn, problems = make_all(out, read_results(out, plan["runs"]), plan["seeds"])
        for title, file in drawn.items():
            print(f"{title}: {out / 'figures' / file}.svg, .png")
        for problem in problems:
            print(f"not drawn: {problem}")

    return exit_status("lab.figures", work)


if __name__ == "__main__":
    sys.exit(main())
