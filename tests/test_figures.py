"""What a figure shows, read back from its axes: hand-made runs in, lines, marks and colours out."""

import json

import numpy as np
import pytest

from lab import figures
from lab.runs import METHODS


def write_run(out, run, records=(), **kernel):
    folder = out / "runs" / run
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "classifier.json").write_text(json.dumps({"labels": ["a rather long name", "b"]}))
    if kernel:
        np.savez(folder / "ntk.npz", **kernel)


def test_each_method_has_a_colour_of_its_own():
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS) == len(METHODS)


def test_head_norms_are_those_of_the_logs(tmp_path):
    """LP's path of one seed; of the FT stage the mean over seeds by epoch."""
    results = {}
    for m, name in enumerate(METHODS):
        for seed in (1, 2):
            write_run(tmp_path, f"{name}-{seed}", [{"stage": "lp", "path": [[0.0, 0.3], [2.0, 0.8]]}] * ("LP" in name) + [
                {"stage": "ft", "head_norm": m + seed + epoch}
                for epoch in (0, 1)] * (name != "LP"))
    lp, ft, right = figures.head_norms(tmp_path, results, [1, 2]).axes
    assert lp.lines[0].get_ydata().tolist() == [0.0, 2.0] and right.lines[0].get_ydata().tolist() == [0.3, 0.8]
    assert [line.get_ydata().tolist() for line in ft.lines] == [[m + 1.5, m + 2.5] for m in (1, 2, 3, 4)]
    assert [line.get_color() for line in ft.lines] == [figures.COLOURS[name] for name in METHODS if name != "LP"]


def test_spectra_are_means_over_seeds_of_what_the_rank_counts(tmp_path):
    results = {f"{name}-{seed}": {"ntk": {"P": {"singular_values": [1.0, 0.1, 1e-9]},
                                              "F": {"singular_values": [1.0, 0.2 * m * seed, 1e-9]}}}
               for m, name in enumerate(METHODS) for seed in (1, 2)}
    p, f = figures.spectra(tmp_path, results, [1, 2]).axes
    assert p.lines[0].get_ydata().tolist() == [1.0, 0.1] and len(p.lines) == 1 and p.get_yscale() == "log"
    assert [line.get_ydata()[1] for line in f.lines] == pytest.approx([0.3, 0.6, 0.9, 1.2])
    assert [line.get_color() for line in f.lines] == [figures.COLOURS[name] for name in METHODS if name != "LP"]


def test_heat_maps_are_trace_norms_sorted_by_class(tmp_path):
    """Samples 0 and 2 are of class 1, sample 1 of class 0, which comes first. A block of singular values 1 and 2 has
    norm 3, one of 3 and 0 too."""
    labels = np.array([1, 0, 1])
    strength = np.array([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    kernel = np.einsum("nm,cd->ncmd", strength, np.diag([1.0, 2.0]))  # (N, C, N, C)
    kernel[2, :, 2] = 6 * np.diag([3.0, 0.0])
    for name in METHODS:
        if name != "LP":
            other = kernel * (1 + np.eye(3))[:, None, :, None]
            write_run(tmp_path, f"{name}-1", labels=labels, pretrain=kernel, ft=other)
    axes = figures.trace_norms(tmp_path, {}, [1, 2]).axes
    order = [1, 0, 2]
    assert np.asarray(axes[0].images[0].get_array()) == pytest.approx(3 * strength[order][:, order])
    doubled = 3 * strength * (1 + np.eye(3))
    assert np.asarray(axes[1].images[0].get_array()) == pytest.approx(doubled[order][:, order])
    scales = {(axis.images[0].norm.vmin, axis.images[0].norm.vmax) for axis in axes[:5]}
    assert scales == {(3.0, 36.0)}  # one scale for all: how much larger F is than in another panel can be seen
    assert [axis.get_title() for axis in axes[:5]] == ["P, LP-FT", "F, FT", "F, LoRA", "F, LP-FT", "F, LP-LoRA"]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["a rather lon…", "b"]
    assert axes[0].get_xticks().tolist() == [0.0, 1.5]  # the middle of each class


def test_feature_change_has_standard_errors():
    """Factors 0.1, 1, 10; seeds 1, 3, 5 around each mean: standard deviation 2, standard error 2 / sqrt(3)."""
    results = {f"LP-{seed}": {"accuracy": dict.fromkeys(("test", "web", "news"))} for seed in (1, 2, 3)}
    for name, base in (("FT", 10), ("LP-FT", 20)):
        for scale, end in ((0.1, "-scale0.1"), (1, ""), (10, "-scale10")):
            for seed, noise in ((1, -2), (2, 0), (3, 2)):
                diffs = {"test": base + scale + noise, "web": 1.0, "news": 3.0}
                results[f"{name}{end}-{seed}"] = {"features": {k: {"diff": v} for k, v in diffs.items()}}
    test, ood = figures.head_scales(None, results, [1, 2, 3]).axes
    ft, lpft = test.containers
    assert ft.lines[0].get_xdata().tolist() == [0.1, 1, 10] and test.get_xscale() == "log"
    assert ft.lines[0].get_ydata().tolist() == pytest.approx([10.1, 11, 20])
    assert lpft.lines[0].get_ydata().tolist() == pytest.approx([20.1, 21, 30])
    (low, high), = {tuple(segment[:, 1] - 11) for segment in [ft.lines[2][0].get_segments()[1]]}
    assert (low, high) == pytest.approx((-2 / 3**0.5, 2 / 3**0.5))
    assert ood.containers[0].lines[0].get_ydata().tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="no runs from scaled heads"):
        figures.head_scales(None, {k: v for k, v in results.items() if "scale" not in k}, [1, 2, 3])
    test, _ = figures.head_scales(None, results, [2, 3]).axes  # the seeds that tables and claims are about
    assert test.containers[0].lines[0].get_ydata().tolist() == pytest.approx([11.1, 12, 21])
    del results["FT-scale10-3"]
    with pytest.raises(ValueError, match="no runs from scaled heads in two units"):
        figures.head_scales(None, results, [2, 3])


def write_logits(out, logits, labels, units=(1,), **temperatures):
    """The saved logits (N, C) of every method and unit; results with T."""
    results = {}
    for name in METHODS:
        for unit in units:
            write_run(out, f"{name}-{unit}")
            np.savez(out / "runs" / f"{name}-{unit}" / "logits.npz", logits_test=logits, labels_test=labels)
            t = temperatures.get(name, 2.0)
            results[f"{name}-{unit}"] = {"temperature": t}  # None, as read_results has it, where none was fitted
    return results


def test_reliability_is_accuracy_by_confidence_before_and_after(tmp_path):
    """One bin: confidence 1 / (1 + e^-2), then with T = 2 1 / (1 + e^-1); half of the samples are right."""
    always_the_second = np.tile(np.float32([0.0, 2.0]), (40, 1))
    results = write_logits(tmp_path / "one", always_the_second, np.arange(40) % 2)
    axis = figures.reliability(tmp_path / "one", results, [1]).axes[0]
    before, after = (scatter.get_offsets()[0] for scatter in axis.collections)
    assert before.tolist() == pytest.approx([1 / (1 + np.exp(-2)), 0.5])
    assert after.tolist() == pytest.approx([1 / (1 + np.exp(-1)), 0.5])
    spread = np.linspace(0, 4, 60, dtype=np.float32)  # confidences from 1/2 to 0.98
    results = write_logits(tmp_path, np.stack([0 * spread, spread], 1), np.arange(60) % 2, units=(1, 2), LP=1.0)
    axis = figures.reliability(tmp_path, results, [1, 2]).axes[0]
    expected = len(set(np.ceil((1 / (1 + np.exp(-spread.astype(float)))) * 15)))
    assert len(axis.collections[0].get_offsets()) == expected == 8  # of the 15 bins, as in ECE
    assert axis.get_title() == "LP, 120 texts, mean T 1"  # of both units
    assert axis.get_legend_handles_labels()[1] == ["as trained", "with T"]


def test_without_a_temperature_reliability_stays_as_trained(tmp_path):
    results = write_logits(tmp_path, np.tile(np.float32([0.0, 2.0]), (40, 1)), np.arange(40) % 2, FT=None)
    axes = figures.reliability(tmp_path, results, [1]).axes
    before, after = (scatter.get_offsets()[0].tolist() for scatter in axes[1].collections)
    assert before == after
    assert [axis.get_title() for axis in axes[:2]] == ["LP, 40 texts, mean T 2", "FT, 40 texts, T not fitted"]


def test_what_cannot_be_drawn_is_named_and_the_rest_is_drawn(tmp_path):
    """Runs whose logits are gone: no reliability, but norms and spectra; a picture of other runs does not stay."""
    results = {}
    for name in METHODS:
        for seed in (1, 2):
            write_run(tmp_path, f"{name}-{seed}", [{"stage": "lp", "path": [[0.0, 0.3], [2.0, 0.8]]}] * ("LP" in name) + [
                {"stage": "ft", "head_norm": 1.0, "train_accuracy": 0.5}] * (name != "LP"))
            results[f"{name}-{seed}"] = {"head_norm": 1.0, "ntk": {
                kernel: {"singular_values": [1.0, 0.5]} for kernel in "PF"}}
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "reliability.png").write_text("old")
    (tmp_path / "runs" / "FT-1" / "ntk.npz").write_text("cut")
    drawn, problems = figures.make_all(tmp_path, results, [1, 2])
    assert sorted(file for file, _ in drawn.values()) == ["head-norm", "spectra"] and len(problems) == 3
    assert all(len(problem.splitlines()) == 1 for problem in problems)
    assert not (tmp_path / "figures" / "reliability.png").exists()
    assert (tmp_path / "figures" / "head-norm.svg").stat().st_size > 5000
