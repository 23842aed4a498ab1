"""Verdicts are statistics: each claim on made-up numbers in which its truth is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lab import claims, report
from lab.runs import METHODS
from lpft import calibration_error

SPLITS = ("test", "web", "news")
PLAN = {"unit": "language", "units": [0, 1, 2, 3]}


def made_up(sign=1, units=PLAN["units"]):
    """Results in which every claim holds (sign 1) or its opposite does (sign -1)."""
    results = {}
    better = {"LP": 0.0, "FT": 0.2, "LoRA": 0.2, "LP-FT": 0.3, "LP-LoRA": 0.25}  # accuracy
    for unit in units:
        noise = 0.001 * unit
        for name in METHODS:
            lp = (1 + noise) if name == "LP-FT" else 0
            spectrum = [10 ** -((0.05 + noise) * i * (1 if sign > 0 or "LoRA" in name else 20)) for i in range(8)]
            result = {
                "metric": "accuracy", "samples": dict.fromkeys(SPLITS, 1000), "temperature_reason": None,
                "val_accuracy": 0.5, "temperature": 1 + lp + noise,
                "head_norm_initial": 0.0, "head_norm": (9.0 if (name == "LP") == (sign > 0) else 1.0) * (1 + noise),
                "accuracy": {}, "features": {}, "features_pretrained": {}, "calibration": {},
                "ntk": {"ft_ratio": 0.5 + sign * 0.4 * lp, "train_samples": 3,
                        "P": {"rank": 6, "test_accuracy": 0.5, "singular_values": [1.0] * 9},
                        "F": {"rank": 8, "test_accuracy": 0.5 + 0.2 * sign, "singular_values": spectrum}}}
            for split in SPLITS:
                result["accuracy"][split] = 0.5 + sign * better[name] * (1 + noise)
                result["features"][split] = {"diff": 5 - sign * lp, "cs": 0.5 + 0.1 * sign * lp, "fdr": 3 - sign * lp}
                result["calibration"][split] = {"ece": 0.2 + 0.1 * sign * lp, "ece_scaled": 0.1 - 0.01 * sign * lp}
            results[f"{name}-{unit}"] = result
            for scale in (0.1, 10) if name in ("FT", "LP-FT") else ():
                diff = 5 - sign * lp - sign * (1 + noise) * math.log10(scale)
                results[f"{name}-scale{scale}-{unit}"] = result | {
                    "features": {split: {"diff": diff} for split in SPLITS}}
    return results


def judged(results, plan=PLAN, out=None):
    return claims.judge(out, plan, results)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_the_interval_and_p_are_those_of_a_paired_t_test(n):
    a, b = stats.norm.rvs(size=(2, n), random_state=n)
    mean, lower, upper, p = claims.paired_t(list(a - b))
    expected = stats.ttest_rel(a, b)
    assert (lower, upper) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
    assert (mean, p) == pytest.approx(((a - b).mean(), expected.pvalue))
    assert claims.paired_t(list(a - b), 0.3)[3] == pytest.approx(stats.ttest_1samp(a - b, 0.3).pvalue)


def test_holm_rejects_step_by_step():
    """0.01 <= 0.05 / 3, then 0.02 <= 0.05 / 2, then 0.06 > 0.05; after one that stays, all larger ones stay."""
    assert claims.holm([0.06, 0.01, 0.02]) == [False, True, True]
    assert claims.holm([0.02, 0.03, 0.04]) == [False, False, False]
    assert claims.holm([0.01, 0.03, 0.03]) == [True, False, False] and claims.holm([]) == []


def test_every_claim_holds_where_it_is_true_and_not_in_the_mirror():
    for sign, verdict in ((1, "holds"), (-1, "does not hold")):
        found = judged(made_up(sign))
        assert [claim["primary"]["verdict"] for claim in found] == [verdict] * 7
        side = "above" if sign == 1 else "below"
        assert all(claim["why"].startswith(f"In 4 of 4 units it is {side} ") for claim in found)
    slope = judged(made_up())[5]["primary"]
    assert slope["mean"] == pytest.approx(1.0015)  # per factor of ten
    assert len(slope["values"]) == slope["units"] == 4
    results = made_up()
    for name in results:  # out of distribution twice the change
        results[name] = results[name] | {"features": {split: numbers | {"diff": numbers["diff"] * (1 + (split != "test"))}
                                                      for split, numbers in results[name]["features"].items()}}
    slopes = {part["measure"].split("on ")[1]: part["mean"] for part in judged(results)[5]["parts"]}
    assert slopes == pytest.approx({"FT's head, out of distribution": 2.003, "LP-FT's head, in distribution": 1.0015,
                                    "LP-FT's head, out of distribution": 2.003})


def test_the_other_parts_have_no_part_in_the_verdict():
    results = made_up()
    for unit in PLAN["units"]:
        results[f"LP-FT-{unit}"]["features"]["test"]["fdr"] = 3.5
        results[f"FT-{unit}"]["ntk"]["F"]["test_accuracy"] = 0.1
    found = judged(results)
    assert found[1]["primary"]["verdict"] == found[3]["primary"]["verdict"] == "holds"
    assert any(part["measure"] == "FDR(F) in distribution: FT - LP-FT" and part["mean"] == -0.5
               for part in found[1]["parts"])


def test_the_last_column_counts_where_the_other_parts_lie():
    """By their intervals; a part that is not measured is in no count."""
    part = {"bound": 0.5, "mean": 1.0}
    parts = [part | {"lower": 0.6, "upper": 1.4}, part | {"lower": 0.4, "upper": 1.6}, {"bound": 0.5, "why": "a tie"},
             part | {"mean": 0.4, "lower": 0.1, "upper": 0.7}, part | {"mean": 0, "lower": -0.1, "upper": 0.1}, part | {"mean": 0.1, "lower": 0.1, "upper": 0.1}]
    primary = {"bound": 0, "mean": -1, "values": [-3, 1, 0], "units": 3, "verdict": "undecided"}
    assert claims.explain(primary, parts) == ("In 1 of 3 units it is below 0, too few or too different to tell it "
                                              "from chance. Further numbers: 1 above, 2 below, 2 open.")
    assert claims.explain(primary | {"verdict": "holds"}, parts[2:3]).endswith("below 0. Further numbers: not measured.")


def test_a_claim_that_units_disagree_on_is_undecided():
    results = made_up() | {f"LP-FT-{unit}": made_up(-1)[f"LP-FT-{unit}"] for unit in (1, 2)}
    claim = judged(results)[1]
    assert claim["primary"]["verdict"] == "undecided" and claim["primary"]["lower"] < 0 < claim["primary"]["upper"]
    assert "too few or too different" in claim["why"]


def test_what_is_not_defined_is_not_measured_and_says_why():
    """A full rank, a T that was not fitted, no scaled heads; to leave such units out would choose among them."""
    results = made_up()
    results["FT-2"]["ntk"]["P"]["rank"] = 9
    results["LP-FT-1"] |= {"temperature_reason": "every sample is right"}
    found = judged({run: result for run, result in results.items() if "scale" not in run})
    whys = {part["measure"]: part.get("why") for claim in found for part in (claim["primary"], *claim["parts"])}
    assert whys["rank: F - P, FT"] == "P has full rank, which F cannot exceed" and not whys["rank: F - P, LP-FT"]
    assert whys["fall of ECE by T in distribution: LP-FT - FT"] == "T of LP-FT in unit 1 is 1: every sample is right"
    assert found[5]["primary"]["verdict"] == "not measured" and "no runs from scaled heads" in found[5]["why"]
    assert "mean" not in found[5]["primary"]


def written_logits(out, results, units, texts=300):
    """logits.npz of every run: LP-FT is right where FT is, and in a share of the other texts, too sure of itself."""
    rng = np.random.default_rng(0)
    labels = {split: rng.integers(0, 3, texts) for split in SPLITS}  # one and the same for all units
    for name in METHODS:
        for unit in units:
            folder = out / "runs" / f"{name}-{unit}"
            folder.mkdir(parents=True, exist_ok=True)
            saved = {"labels_val": np.zeros(3), "logits_val": np.zeros((3, 3))}
            for split in SPLITS:
                right = rng.random(texts) < (0.8 if name == "LP-FT" else 0.6)
                guess = np.where(right, labels[split], (labels[split] + 1) % 3)
                logits = np.eye(3)[guess] * (6 if name == "LP-FT" else 1)
                saved |= {f"logits_{split}": logits, f"labels_{split}": labels[split]}
                of = results[f"{name}-{unit}"]
                of["accuracy"][split] = float(right.mean())
                of["calibration"][split]["ece"] = calibration_error(torch.from_numpy(logits), torch.from_numpy(labels[split]))[0]
            np.savez(folder / "logits.npz", **saved)


def test_on_real_data_the_chance_of_texts_and_of_seeds_is_in_the_interval(tmp_path, monkeypatch):
    """All seeds share the test texts: Student's t over seeds would not see their chance."""
    monkeypatch.setattr(claims, "DRAWS", 300)
    results, plan = made_up(), PLAN | {"unit": "seed"}
    written_logits(tmp_path, results, plan["units"])
    found = judged(results, plan, tmp_path)
    score, ece = found[2]["primary"], found[6]["primary"]
    by_seed = [np.mean([results[f"LP-FT-{u}"]["accuracy"][s] - results[f"FT-{u}"]["accuracy"][s] for s in SPLITS[1:]])
               for u in plan["units"]]
    assert score["values"] == pytest.approx(by_seed) and score["mean"] == pytest.approx(np.mean(by_seed))
    assert score["lower"] < np.mean(by_seed) < score["upper"] and score["verdict"] == "holds"
    assert ece["lower"] < ece["mean"] < ece["upper"]
    assert found[0]["primary"]["upper"] - found[0]["primary"]["lower"] < 0.1  # a norm: by seeds, as before
    by_texts = 2 * 1.96 * (0.6 * 0.4 / 600 + 0.8 * 0.2 / 600)**0.5 / 2  # of four seeds, each with its own guesses
    assert 0.7 * by_texts < score["upper"] - score["lower"] < 2.5 * by_texts


def test_endpoints_are_those_that_the_paper_leads_with():
    """One number a claim; each is pinned by its name, and by a split of its own."""
    results = made_up()
    for unit in PLAN["units"]:  # numbers out of distribution that would turn claims 2 and 7, and in it claim 3
        results[f"LP-FT-{unit}"]["features"] = {s: {"diff": 3.0 if s == "test" else 9.0, "cs": 1.0, "fdr": 1.0} for s in SPLITS}
        results[f"LP-FT-{unit}"]["calibration"] = {s: {"ece": 0.5 if s == "test" else 0.01, "ece_scaled": 0.0} for s in SPLITS}
        results[f"LP-FT-{unit}"]["accuracy"] = {"test": 0.1, "web": 0.9, "news": 0.9}
    primary = [claim["primary"] for claim in judged(results)]
    assert [p["measure"] for p in primary] == [
        "growth of ||V||: LP - FT", "Diff(F) in distribution: FT - LP-FT", "score out of distribution: LP-FT - FT",
        "FT ratio: LP-FT - FT", "singular values of F, LoRA and FT: smaller / larger",
        "fall of Diff(F) per factor 10 on FT's head, in distribution", "ECE in distribution: LP-FT - FT"]
    assert {p["verdict"] for p in primary} == {"holds"}


def test_the_score_of_cola_is_drawn_again_as_matthews_correlation():
    """Draws of texts give the metric that tables have, not accuracy."""
    part = claims.CLAIMS[2][3][0]
    labels = np.array([1] * 90 + [0] * 10)
    logits = {"LP-FT": np.eye(2)[labels], "FT": np.eye(2)[np.ones(100, int)]}  # always 1: 0
    arrays = {name: {"logits_test": of, "labels_test": labels} for name, of in logits.items()}
    assert part.predictions(arrays, {"test": np.arange(100)}, "matthews") == pytest.approx(1.0)


def test_validation_is_no_test_set_out_of_distribution():
    """What T and the epoch are chosen on has no part in the interval of an OOD score."""
    rng, part = np.random.default_rng(1), claims.CLAIMS[2][2]  # the score out of distribution, LP-FT - FT
    right = {f"labels_{split}": np.zeros(50, int) for split in ("test", "films")}
    arrays = {name: right | {f"logits_{split}": np.eye(2)[rng.integers(2, size=50)] for split in ("test", "films")}
              for name in METHODS}
    with_val = {name: {"labels_val": np.zeros(50, int), "logits_val": np.eye(2)[rng.integers(2, size=50)]} | array
                for name, array in arrays.items()}
    variance = claims.variance_of_texts(part, [arrays], "accuracy")
    assert variance > 0 and claims.variance_of_texts(part, [with_val], "accuracy") == variance


@pytest.mark.parametrize("content", [b"", b"PK"])
def test_logits_that_are_cut_are_named(tmp_path, content):
    (tmp_path / "runs" / "LP-0").mkdir(parents=True)
    (tmp_path / "runs" / "LP-0" / "logits.npz").write_bytes(content)
    with pytest.raises(ValueError, match="LP-0/logits.npz: not the logits that train.py writes"):
        claims.read_logits(tmp_path, [0])


def test_the_chance_of_shared_texts_is_added_to_that_of_units():
    """Values of variance 0.01 on 3 units and 0.02 by texts: by hand, with Welch and Satterthwaite's freedom."""
    mean, lower, upper, p = claims.paired_t([0.1, 0.2, 0.3], 0.0, 0.02)
    of_units, of_texts = 0.01 / 3, 0.02
    freedom = (of_units + of_texts)**2 / (of_units**2 / 2 + of_texts**2 / (claims.DRAWS - 1))
    error = (of_units + of_texts)**0.5
    half = stats.t.ppf(0.975, freedom) * error
    assert (mean, lower, upper) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert p == pytest.approx(2 * stats.t.sf(0.2 / error, freedom))


def test_equal_numbers_are_a_tie_and_no_verdict():
    results = made_up()
    for unit in PLAN["units"]:
        results[f"LP-FT-{unit}"]["accuracy"] = results[f"FT-{unit}"]["accuracy"]
    primary = judged(results)[2]["primary"]
    assert primary["verdict"] == "not measured" and primary["why"] == "every unit ties"


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.01, 0.15])
def test_intervals_cover_what_they_say(monkeypatch, spread):
    """At a nominal 95 %: Student's t of 8 languages, and 3 seeds by 400 shared texts, whichever varies more."""
    rng, inside = np.random.default_rng(0), []
    monkeypatch.setattr(claims, "DRAWS", 200)
    for _ in range(2000):
        _, lower, upper, _ = claims.paired_t(list(rng.normal(0.3, 1, 8)))
        inside.append(lower <= 0.3 <= upper)
    assert 0.90 < np.mean(inside) < 0.98
    part = claims.CLAIMS[2][3][0]  # the score in distribution, LP-FT - FT
    inside = []
    for _ in range(200):
        hard, logits, values = {name: rng.random(400) for name in ("LP-FT", "FT")}, [], []  # of each text
        for seed in range(3):
            guess = {name: np.where(hard[name] < 0.5 + rng.uniform(-1, 1) * spread, 0, 1) for name in hard}
            labels = {"labels_test": np.zeros(400, int)}
            logits.append({"LP": labels} | {name: labels | {"logits_test": np.eye(2)[g]} for name, g in guess.items()})
            values.append(part.predictions(logits[seed], {"test": np.arange(400)}, "accuracy"))
        of_texts = claims.variance_of_texts(part, logits, "accuracy")
        _, lower, upper, _ = claims.paired_t(values, 0.0, of_texts)
        inside.append(lower <= 0.0 <= upper)
    assert 0.90 <= np.mean(inside)


@pytest.mark.slow
def test_with_no_difference_all_seven_verdicts_are_right_in_95_percent():
    """Expected are 4.9 % wrong reports, 1 - (1 - 0.05 / 7)^7; of 4,000, chance adds up to two standard errors."""
    rng, wrong = np.random.default_rng(1), []
    for _ in range(4000):
        ps = [claims.paired_t(list(rng.normal(0, 1, 8)))[3] for _ in range(7)]
        wrong.append(any(claims.holm(ps)))
    assert np.mean(wrong) <= 0.05 + 2 * (0.05 * 0.95 / 4000) ** 0.5


def test_numbers_are_short():
    assert [report.number(x) for x in (300.0, 95.4, 1234.56, 0.12345, 0.0098, 0.00054, 0.0, -0.0, -2.0)] == [
        "300", "95.4", "1235", "0.123", "0.010", "0.0005", "0", "0", "-2"]
