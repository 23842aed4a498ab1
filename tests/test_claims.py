"""Verdicts are statistics: each claim on made-up numbers in which its truth is known."""

import math

import pytest
from scipy import stats
from scipy.stats import linregress

from lab import claims
from lab import report
from lab import reproduce
from lab.report import METHODS

SPLITS = ("test", "web", "news")


def made_up(sign=1, seeds=(1, 2, 3)):
    """Results in which every part of every claim holds (sign 1) or none does (sign -1)."""
    results = {}
    better = {"LP": 0.0, "FT": 0.2, "LoRA": 0.2, "LP-FT": 0.3, "LP-LoRA": 0.25}  # accuracy
    for seed in seeds:
        noise = 0.001 * seed
        for name in METHODS:
            lp = 1 if name == "LP-FT" else 0
            spectrum = [10 ** -(0.05 * i * (1 if sign > 0 or "LoRA" in name else 20)) for i in range(8)]
            result = {
                "metric": "accuracy", "samples": dict.fromkeys(SPLITS, 1000),
                "head_norm_initial": 0.0, "head_norm": (9.0 if (name == "LP") == (sign > 0) else 1.0) + noise,
                "accuracy": {}, "features": {}, "calibration": {},
                "ntk": {"ft_ratio": 0.5 + sign * 0.4 * lp, "test_samples": 100,
                        "P": {"rank": 6, "test_accuracy": 0.5, "singular_values": [1.0] * 9},
                        "F": {"rank": 6 + sign * 2 if sign > 0 or "LoRA" in name else 2,
                              "test_accuracy": 0.5 + 0.2 * sign, "singular_values": spectrum}}}
            for split in SPLITS:
                result["accuracy"][split] = 0.5 + sign * better[name] + noise
                result["features"][split] = {"diff": 5 - sign * lp + noise, "cs": 0.5 + 0.1 * sign * lp,
                                             "fdr": 3 - sign * lp}
                result["calibration"][split] = {"ece": 0.2 + 0.1 * sign * lp, "ece_scaled": 0.1 - 0.01 * sign * lp}
            results[f"{name}-seed{seed}"] = result
            for scale in reproduce.SCALES if name in ("FT", "LP-FT") else ():
                diff = 5 - sign * lp - sign * math.log10(scale) + noise
                if scale != 1:
                    results[f"{name}-scale{scale}-seed{seed}"] = {
                        "features": {split: {"diff": diff} for split in SPLITS}}
    return results


def judged(results, number, start=""):
    """(verdict of a claim, {part: what is judged of it}) of the parts whose names begin with `start`."""
    claim = claims.judge(results, [1, 2, 3])[number - 1]
    return claim["verdict"], {part["part"]: part for part in claim["parts"] if part["part"].startswith(start)}


def only(found):
    part, = found[1].values()
    return part


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_the_interval_is_that_of_a_paired_t_test(n):
    a, b = stats.norm.rvs(size=(2, n), random_state=n)
    mean, lower, upper = claims.confidence_interval(list(a - b))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (lower, upper) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert mean == pytest.approx((a - b).mean())


def test_every_claim_holds_where_it_is_true_and_not_in_the_mirror():
    for sign, verdict in ((1, "holds"), (-1, "does not hold")):
        for claim in claims.judge(made_up(sign), [1, 2, 3]):
            assert {part["verdict"] for part in claim["parts"]} == {verdict}, claim
            assert claim["verdict"] == verdict
    assert only(judged(made_up(), 6, "fall of Diff(F) per factor 10 of the head, 0.1 to 100, FT, in"))["mean"] == pytest.approx(1)


def test_one_part_that_does_not_hold_ends_a_claim():
    """Whatever the others do; and a part inside whose interval the margin lies leaves it undecided."""
    results = made_up()
    for seed in (1, 2, 3):
        results[f"LP-FT-seed{seed}"]["features"]["test"]["fdr"] = 3.5
    verdict, parts = judged(results, 2)
    assert verdict == "does not hold" and [part["verdict"] for part in parts.values()].count("does not hold") == 1
    for seed in (1, 2, 3):
        results[f"FT-seed{seed}"]["ntk"]["F"]["rank"] = 6  # as that of P, in every seed
    assert only(judged(results, 4, "rank: F - P, FT"))["verdict"] == "does not hold"
    results = made_up() | {"LP-FT-seed2": made_up(-1)["LP-FT-seed2"]}
    verdict, parts = judged(results, 2)
    assert verdict == "undecided" and all(part["lower"] < 0 < part["upper"] for part in parts.values())


def test_the_head_has_to_grow_twice_as_much():
    """Growth 4 in LP against 1.9 in FT, each from a start of its own; 2.1 is too much."""
    for growth, verdict in ((1.9, "holds"), (2.1, "does not hold")):
        results = made_up()
        for seed in (1, 2, 3):
            results[f"LP-seed{seed}"] |= {"head_norm_initial": 3.0, "head_norm": 7.0}
            results[f"FT-seed{seed}"] |= {"head_norm_initial": 5.0, "head_norm": 5.0 + growth}
        part = only(judged(results, 1, "growth of the norm: LP - 2 x FT"))
        assert part["mean"] == pytest.approx(4 - 2 * growth) and part["verdict"] == verdict


def test_one_point_less_is_a_match():
    for loss, verdict in ((0.002, "holds"), (0.018, "does not hold")):
        results = made_up()
        for seed in (1, 2, 3):
            ft = results[f"FT-seed{seed}"]["accuracy"]["test"]
            results[f"LP-FT-seed{seed}"]["accuracy"]["test"] = ft - loss + 1e-5 * seed
        assert only(judged(results, 3, "accuracy: LP-FT - FT (one"))["verdict"] == verdict
    assert judged(results, 3)[0] == "does not hold"


def test_scores_that_differ_by_few_test_samples_decide_nothing():
    """Of 6 samples that all go one way the sign test says p = 0.03, of 5 it says 0.06."""
    assert stats.binomtest(6, 6).pvalue < 0.05 < stats.binomtest(5, 5).pvalue
    for samples, verdict in ((5, "undecided"), (6, "holds")):
        results = made_up()
        for seed in (1, 2, 3):
            results[f"LoRA-seed{seed}"]["accuracy"]["test"] = (
                results[f"LP-seed{seed}"]["accuracy"]["test"] + samples / 1000)  # in every seed the same
        part = only(judged(results, 3, "accuracy: LoRA - LP"))
        assert part["verdict"] == verdict and part["lower"] == pytest.approx(samples / 1000)
        why = ": fewer than 6 test samples from the bound" if samples == 5 else ""
        every = claims.judge(results, [1, 2, 3])
        assert [cells[-1] for cells, _ in report.claim_rows(every) if cells[0] == part["part"]] == [verdict + why]
        assert f"| {verdict}{why} |" in report.as_markdown("", [], every, {}, {}, [])


@pytest.mark.parametrize("samples, verdict", [
    ((5, 5, 7), "undecided"), ((5, 6, 7), "holds"),
    ((-5, -5, -7), "undecided"), ((-5, -7, -7), "does not hold")])
def test_the_samples_guard_takes_the_mean_over_seeds_and_not_the_largest_or_the_smallest(samples, verdict):
    """5, 5 and 7 samples are fewer than 6 on average, though one seed has more; 5, 6 and 7 are not."""
    results = made_up()
    for seed, more in zip((1, 2, 3), samples):
        lp, lora = (results[f"{name}-seed{seed}"]["accuracy"] for name in ("LP", "LoRA"))
        lora["test"] = lp["test"] + more / 1000
    part = only(judged(results, 3, "accuracy: LoRA - LP"))
    assert part["lower"] > 0 or part["upper"] < 0  # the seeds alone would decide
    assert part["verdict"] == verdict and ("fewer than 6" in part.get("why", "")) == (verdict == "undecided")


def test_samples_are_counted_split_by_split_by_accuracy_and_from_the_bound():
    """Two of 10 samples are two, however large the other split; a Matthews of 0.5 may be one; 4 of 400 from a tie to
    one point less are 4."""
    results = made_up()
    for result in results.values():
        if "samples" in result:
            result["samples"] |= {"test": 400, "web": 10, "news": 10000}
            result["matthews"] = dict(result["accuracy"])
    for seed in (1, 2, 3):
        ft, lpft = (results[f"{name}-seed{seed}"] for name in ("FT", "LP-FT"))
        lpft["accuracy"] |= ft["accuracy"] | {"web": ft["accuracy"]["web"] + 0.2}
    out = only(judged(results, 3, "accuracy: LP-FT - FT, out"))
    assert out["mean"] == pytest.approx(0.1) and out["verdict"] == "undecided"
    assert only(judged(results, 3, "accuracy: LP-FT - FT (one"))["verdict"] == "undecided"
    for result in results.values():
        result["metric"] = "matthews"
    part = only(judged(results, 3, "matthews: LP-FT - FT (one"))
    assert part["mean"] == pytest.approx(0.1) and part["verdict"] == "undecided"


def test_a_mean_over_splits_that_most_samples_contradict_is_undecided():
    """Two of 50 samples lift one split by 4 points; in the other, of 10,000, 20 are lost."""
    results = made_up()
    for result in results.values():
        if "samples" in result:
            result["samples"] |= {"web": 50, "news": 10000}
    for seed in (1, 2, 3):
        ft, lpft = (results[f"{name}-seed{seed}"]["accuracy"] for name in ("FT", "LP-FT"))
        lpft |= {"web": ft["web"] + 0.04, "news": ft["news"] - 0.002}
    part = only(judged(results, 3, "accuracy: LP-FT - FT, out"))
    assert part["lower"] > 0 and part["verdict"] == "undecided" and "added over splits" in part["why"]


def test_out_of_distribution_is_the_mean_over_those_splits_alone():
    results = made_up()
    for seed in (1, 2, 3):
        of = results[f"LP-FT-seed{seed}"]
        of["features"]["news"]["diff"] = 2.0 + 0.001 * seed
        of["calibration"]["news"]["ece"] = 0.9
    assert only(judged(results, 2, "Diff(F): FT - LP-FT, in"))["mean"] == pytest.approx(1)
    assert only(judged(results, 2, "Diff(F): FT - LP-FT, out"))["mean"] == pytest.approx(2)
    assert only(judged(results, 7, "fall of ECE by T: LP-FT - FT, in"))["mean"] == pytest.approx(0.11)
    assert only(judged(results, 7, "fall of ECE by T: LP-FT - FT, out"))["mean"] == pytest.approx(0.11 + 0.3)
    assert only(judged(results, 7, "ECE: LP-FT - FT, out"))["mean"] == pytest.approx(0.1 + 0.3)


def test_nearly_is_nine_tenths_of_the_rank_and_half_of_the_singular_values():
    for rank, factor, verdict in ((19, 0.55, "holds"), (17, 0.45, "does not hold")):
        results = made_up()
        for seed in (1, 2, 3):
            for name in ("FT", "LoRA"):
                results[f"{name}-seed{seed}"]["ntk"]["F"] |= {"rank": 20, "singular_values": [1.0] * 20}
            results[f"LoRA-seed{seed}"]["ntk"]["F"] |= {"rank": rank, "singular_values": [factor] * 10 + [1 / factor] * 10}
        assert only(judged(results, 5, "rank, FT and LoRA"))["mean"] == pytest.approx(rank / 20)
        assert only(judged(results, 5, "singular values, FT and LoRA"))["mean"] == pytest.approx(factor)
        assert {part["verdict"] for part in judged(results, 5)[1].values() if "FT and LoRA" in part["part"]
                and "LP-FT" not in part["part"]} == {verdict}


def test_kernel_regression_on_all_test_samples_shares_them():
    """Then 5 samples decide nothing; on 100 of 1000, which each seed draws for itself, they may."""
    for drawn, verdict in ((100, "holds"), (1000, "undecided")):
        results = made_up()
        for seed in (1, 2, 3):
            results[f"FT-seed{seed}"]["ntk"] |= {"test_samples": drawn}
            results[f"FT-seed{seed}"]["ntk"]["F"]["test_accuracy"] = 0.505
        assert only(judged(results, 4, "test accuracy of regression: F - P, FT"))["verdict"] == verdict


def test_a_rank_above_full_rank_is_not_asked_for():
    """P has it where the features are more than the samples, whatever the claim is worth."""
    results = made_up()
    results["FT-seed2"]["ntk"]["P"]["rank"] = 9
    verdict, parts = judged(results, 4)
    assert verdict == "undecided" and parts["rank: F - P, FT"]["verdict"] == "not measured"
    assert "full rank" in parts["rank: F - P, FT"]["why"]
    assert parts["rank: F - P, LP-FT"]["mean"] == 2 and parts["test accuracy of regression: F - P, FT"]["mean"] == pytest.approx(0.2)


def test_a_number_that_is_not_defined_is_not_measured():
    """In one seed is enough: leaving that seed out would choose among the seeds."""
    for bad in (None, math.nan, math.inf, "3"):
        results = made_up()
        results["FT-seed3"]["features"]["test"]["fdr"] = bad
        part = only(judged(results, 2, "FDR(F): FT - LP-FT, in"))
        assert part["verdict"] == "not measured" and "features.test.fdr in FT-seed3" in part["why"]
    results["FT-seed3"]["ntk"]["F"]["singular_values"][1] = math.nan
    assert only(judged(results, 5, "singular values, FT and LoRA"))["verdict"] == "not measured"


def test_what_temperature_takes_off_is_not_measured_where_there_was_none():
    """T = 1 takes nothing off, but says nothing of temperature scaling; the rest of the claim is judged."""
    results, reason = made_up(), "every validation sample is right"
    results["LoRA-seed2"]["temperature_reason"] = reason
    verdict, parts = judged(results, 7)
    without = {name: part for name, part in parts.items() if part["verdict"] == "not measured"}
    part = "fall of ECE by T: LP-FT - LoRA"
    assert [*without] == [f"{part}, in distribution", f"{part}, out of distribution"]
    assert {part["why"] for part in without.values()} == {f"T of LoRA-seed2 is 1: {reason}"}
    assert verdict == "undecided"
    assert {part["verdict"] for part in parts.values()} == {"holds", "not measured"}
    results["LP-FT-seed1"]["temperature_reason"] = reason
    _, parts = judged(results, 7, "fall")
    assert {part["verdict"] for part in parts.values()} == {"not measured"}


def test_without_other_domains_only_the_claim_about_them_stays_open():
    results = made_up()
    for result in results.values():
        for key in ("accuracy", "features", "calibration"):
            if key in result:
                result[key] = {"test": result[key]["test"]}
    verdicts = [claim["verdict"] for claim in claims.judge(results, [1, 2, 3])]
    assert verdicts == ["holds", "holds", "undecided", "holds", "holds", "holds", "holds"]
    assert only(judged(results, 3, "accuracy: LP-FT - FT, out"))["why"] == "no such split"


def test_scaled_heads_are_judged_on_the_seeds_that_have_them():
    results = {name: result for name, result in made_up(seeds=(1, 2, 3)).items() if name != "FT-scale10-seed3"}
    part = only(judged(results, 6, "fall of Diff(F) per factor 10 of the head, 0.1 to 100, FT, in"))
    assert part["seeds"] == [1, 2] and part["verdict"] == "holds"
    unscaled = {name: result for name, result in made_up().items() if "scale" not in name}
    verdict, parts = judged(unscaled, 6)
    assert verdict == "not measured" and {part["why"] for part in parts.values()} == {"no runs from scaled heads"}


def test_the_parts_of_claim_6_name_their_factors_and_none_is_there_twice():
    """With factors on one side of 1 alone, or none beyond it, one range says all."""
    for kept, ranges in (((0.1, 10), {"0.1 to 10", "1 to 10"}), ((10, 100), {"1 to 100"}), ((0.1, 0.5), {"0.1 to 1"})):
        results = {name: result for name, result in made_up().items()
                   if "scale" not in name or float(name.split("scale")[1].split("-")[0]) in kept}
        claim = claims.judge(results, [1, 2, 3])[5]
        names = [part["part"] for part in claim["parts"]]
        assert {name.split(", ")[1] for name in names} == ranges and len(names) == 4 * len(ranges)
        assert claim["verdict"] == "holds"


def test_a_fall_that_ends_at_the_head_itself_is_seen():
    """Over all factors Diff(F) falls; from 1 up it rises again, and that alone leaves the claim without ground."""
    results = made_up()
    for run, result in results.items():
        if "LP-FT-scale" in run and float(run.split("scale")[1].split("-")[0]) > 1:
            result["features"]["test"]["diff"] += 1.3 * math.log10(float(run.split("scale")[1].split("-")[0]))
    for seed in (1, 2, 3):
        results[f"LP-FT-seed{seed}"]["features"]["test"]["diff"] += 0.1  # the head itself counts, too
    verdict, parts = judged(results, 6)
    assert parts["fall of Diff(F) per factor 10 of the head, 0.1 to 100, LP-FT, in distribution"]["verdict"] == "holds"
    slope = linregress([0, *map(math.log10, (2, 5, 10, 50, 100))], [0.1] + [0.3 * math.log10(s) for s in (2, 5, 10, 50, 100)])
    assert parts["fall of Diff(F) per factor 10 of the head, 1 to 100, LP-FT, in distribution"]["mean"] == pytest.approx(-slope.slope)
    assert verdict == "does not hold"


def test_each_part_names_the_files_and_keys_behind_it():
    part = only(judged(made_up(), 4, "FT ratio"))
    assert ["runs/FT-seed2/result.json", "ntk.ft_ratio"] in part["sources"] and len(part["sources"]) == 6
    part = only(judged(made_up(), 5, "singular values, FT and LoRA"))
    assert ["runs/LoRA-seed1/result.json", "ntk.F.singular_values"] in part["sources"]
