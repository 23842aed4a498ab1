"""How far confidence is from accuracy (ECE, MCE, Table 3), and how far features have moved (Table 1)."""

import math

import torch

from assignments.graders import expect, points, require

OVER_BINS = "the mean over bins, where it is over samples"
NO_BINS = "the gap of each sample, without bins"
ONE_BIN = "the gap of all samples together, without bins"
SIGNED = "gaps with their sign, not their absolute value"
OF_LABEL = "the probability of the label, where confidence is the largest probability"
BY_COUNT = "the largest share of ECE, where MCE is the largest gap of a bin"
OPEN_ABOVE = "bins closed below, where they are closed above"
LOST = "samples lost that are sure: confidence 1 belongs to the last bin"
EMPTY_NAN = "0 / 0 in an empty bin, where its gap is 0"
EMPTY_GAP = "the middle of an empty bin taken as its confidence, where its gap is 0"
NONE_RIGHT = "a bin in which no sample is right taken for an empty one: its gap is how sure it is"
OTHER_BINS = "bins of another number than was asked for"

PAIRS_I_I = "pairs i = i counted as well"
NOT_UNIT = "inner products, where a cosine divides by both norms"
HALF_PAIRS = "each pair once, divided by all n (n - 1) ordered ones"
OF_THE_MEANS = "the norm of the mean of differences, where it is the mean of their norms"
OF_THE_NORMS = "the difference of norms, where it is the norm of the difference"
SQUARED = "squared norms"
UNWEIGHTED = "classes that all count the same, where each counts with its number of samples"
MEAN_OF_MEANS = "the distance from the mean of the classes' means, where it is from the mean of all samples"
MEAN_WITHIN = "the mean spread of each class, where it is the sum over samples"
UPSIDE_DOWN = "S_within / S_between, where it is S_between / S_within"
TOTAL = "the spread around the mean of all samples, where S_within is around the class's mean"
PRETRAINED = "features_0, where it is features: the first argument is the trained one"


# ---------------------------------------------------------------------------- calibration


def texts(rng, count=80, classes=3):
    """Logits (N, C) that are too sure, and labels (N,)."""
    logits = 2 * torch.randn(count, classes, generator=rng, dtype=torch.double)
    return 2 * logits, torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]


def calibration(logits, labels, bins=15, open_above=False, of_label=False):
    """[(number of samples, sum of correct - confidence) of each bin], sample by sample."""
    held = [[0, 0.0] for _ in range(bins)]
    for row, label in zip(logits.double(), labels.tolist()):
        shares = [math.exp(a - max(row.tolist())) for a in row.tolist()]
        confidence = (shares[label] if of_label else max(shares)) / sum(shares)
        for m in range(bins):
            low, high = m / bins, (m + 1) / bins
            if low <= confidence < high if open_above else low < confidence <= high:
                held[m][0] += 1
                held[m][1] += float(int(row.argmax()) == label) - confidence
    return held


def closed_below(logits, labels, bins):
    """As `calibration`, but each bin is closed below, the last one above, too."""
    opened, sure = calibration(logits, labels, bins, open_above=True), logits.double().softmax(1).amax(1) >= 1
    if sure.any():
        count, gap = calibration(logits[sure], labels[sure], bins)[-1]
        opened[-1] = [opened[-1][0] + count, opened[-1][1] + gap]
    return opened


def some_right(logits, labels, bins):
    """As `calibration`, of the bins alone in which some sample is right."""
    hit = logits.argmax(1) == labels
    held, hits = calibration(logits, labels, bins), calibration(logits[hit], labels[hit], bins)
    return [of_bin for of_bin, (count, _) in zip(held, hits) if count]


def ece(held):
    return sum(abs(gap) for _, gap in held) / sum(count for count, _ in held)


def mce(held):
    return max(abs(gap) / count for count, gap in held if count)


def known_ece(logits, labels, bins=15):
    held, n = calibration(logits, labels, bins), len(labels)
    gaps = [abs(gap) / count for count, gap in held if count]
    confidence, prediction = logits.double().softmax(1).max(1)
    opened = calibration(logits, labels, bins, open_above=True)
    return {OPEN_ABOVE: ece(closed_below(logits, labels, bins)), LOST: sum(abs(gap) for _, gap in opened) / n,
            OVER_BINS: sum(gaps) / bins, OVER_BINS + ", of those that are not empty": sum(gaps) / len(gaps),
            NO_BINS: ((prediction == labels).double() - confidence).abs().mean(),
            ONE_BIN: abs(sum(gap for _, gap in held)) / n, SIGNED: sum(gap for _, gap in held) / n,
            OF_LABEL: ece(calibration(logits, labels, bins, of_label=True)),
            NONE_RIGHT: sum(abs(gap) for _, gap in some_right(logits, labels, bins)) / n,
            OTHER_BINS: ece(calibration(logits, labels, 15 if bins != 15 else 10))}


def known_mce(logits, labels, bins=15):
    held, n = calibration(logits, labels, bins), len(labels)
    middles = [(m + 0.5) / bins for m, (count, _) in enumerate(held) if not count]
    return {BY_COUNT: max(abs(gap) for _, gap in held) / n, EMPTY_NAN: math.nan,
            SIGNED: max(gap / count for count, gap in held if count),
            OF_LABEL: mce(calibration(logits, labels, bins, of_label=True)),
            NONE_RIGHT: mce([*some_right(logits, labels, bins), [1, 0.0]]),
            EMPTY_GAP: max([mce(held), *middles]),
            OTHER_BINS: mce(calibration(logits, labels, 15 if bins != 15 else 10))}


def errors(student, called, logits, labels, *bins):
    """(ECE, MCE) of the student; Wrong if there are not two."""
    found = student.calibration_error(logits, labels, *bins)
    require(isinstance(found, (tuple, list)) and len(found) == 2, called, "(ECE, MCE)", found)
    return found


def check_calibration(student, logits, labels, what, *bins):
    number = f", bins={bins[0]}" if bins else ""
    called = f"calibration_error(logits {tuple(logits.shape)}, labels ({len(labels)},){number}){what}"
    found, held = errors(student, called, logits, labels, *bins), calibration(logits, labels, *bins)
    expect(found[0], ece(held), called + ": [0], ECE", known_ece(logits, labels, *bins))
    expect(found[1], mce(held), called + ": [1], MCE", known_mce(logits, labels, *bins))
    return called, found


@points(2)
def ece_is_a_mean_over_samples(student, rng):
    """ECE = sum over bins of (samples in it / N) * |accuracy - confidence in it|; confidence is the largest
    probability of softmax(logits)"""
    logits, labels = texts(rng)
    called = "calibration_error(logits (80, 3), labels (80,))"
    found = errors(student, called, logits, labels)[0]
    expect(found, ece(calibration(logits, labels)), called + ": [0], ECE", known_ece(logits, labels))


@points(1)
def mce_is_the_largest_gap_of_a_bin(student, rng):
    """MCE = max over bins of |accuracy - confidence in it|, however few samples the bin has"""
    logits, labels = texts(rng)
    called = "calibration_error(logits (80, 3), labels (80,))"
    found = errors(student, called, logits, labels)[1]
    expect(found, mce(calibration(logits, labels)), called + ": [1], MCE", known_mce(logits, labels))


@points(1)
def bins_are_closed_above(student, rng):
    "Bin m of M holds the confidences above (m - 1) / M, up to and with m / M: of 2 bins 0.5 is in the first"
    count = int(torch.randint(3, 9, (1,), generator=rng))
    edge = torch.tensor([[0.0, 0.0, -2000.0]]).repeat(count, 1)  # confidence 1/2 exactly, label 2: wrong
    sure = torch.tensor([[0.0, 0.0, -2000.0]]).repeat(8, 1)  # confidence above 1/2, label 0: right
    sure[:, 0] = 1 + 2 * torch.rand(8, generator=rng)
    logits, labels = torch.cat([edge, sure]).double(), torch.tensor([2] * count + [0] * 8)
    check_calibration(student, logits, labels, f", {count} of confidence 0.5", 2)


@points(1)
def sure_samples_count_and_empty_bins_do_not(student, rng):
    "Confidence 1 is in the last bin; the gap of a bin without samples is 0"
    logits, labels = texts(rng, count=4)
    logits = torch.cat([logits, torch.tensor([[2000.0, 0.0, 0.0]] * 5).double()])
    labels = torch.cat([labels, torch.tensor([0, 0, 1, 2, 1])])
    check_calibration(student, logits, labels, ", 5 of confidence 1")
    sure = logits[4:]
    check_calibration(student, sure, labels[4:], ", all of confidence 1")
    two = torch.stack([torch.zeros(2), torch.randn(2, generator=rng)], dim=1).double()  # one or two bins
    check_calibration(student, two, two.argmax(1), ", both right")


@points(1)
def the_number_of_bins_is_an_argument(student, rng):
    "`bins` equal bins, 15 if nothing is said; two Python floats come back, and logits stay as they are"
    logits, labels = texts(rng)
    before = logits.clone()
    for bins in ((4,), (10,), ()):
        called, found = check_calibration(student, logits, labels, "", *bins)
        kinds = [type(x).__name__ for x in found]
        require(kinds == ["float", "float"], f"types of {called}", "float and float", kinds)
    expect(logits, before, "logits after calibration_error(logits, labels)")


# ---------------------------------------------------------------------------- features


def clouds(rng, counts=(9, 3, 5), width=4):
    """(features (N, h), features_0 (N, h), labels (N,)), counts[c] samples of class c."""
    labels = torch.tensor([c for c, count in enumerate(counts) for _ in range(count)])
    labels = labels[torch.randperm(len(labels), generator=rng)]
    centres = torch.randn(len(counts), width, generator=rng, dtype=torch.double)
    features_0 = torch.randn(len(labels), width, generator=rng, dtype=torch.double) + 1
    return 2 * features_0 + 2 * centres[labels], features_0, labels


def norm(vector):
    return math.sqrt(sum(x * x for x in vector.tolist()))


def average(values):
    values = list(values)
    return sum(values) / len(values)


def cosines(features, unit=True):
    """Of all pairs i, j, the pairs i = i too: (N, N)."""
    n = len(features)
    return [[float(features[i] @ features[j]) / (norm(features[i]) * norm(features[j]) if unit else 1)
             for j in range(n)] for i in range(n)]


def mean_of_pairs(matrix):
    n = len(matrix)
    return sum(matrix[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


def spreads(features, labels):
    """[(n_c, ||mean_c - mean||^2, ||mean_c - mean of means||^2, sum_i ||x_i - mean_c||^2)] of the classes."""
    members = [features[labels == c] for c in sorted(set(labels.tolist()))]
    means = [m.mean(0) for m in members]
    middle = sum(means) / len(means)
    return [(len(x), norm(mean - features.mean(0)) ** 2, norm(mean - middle) ** 2,
             sum(norm(row - mean) ** 2 for row in x)) for x, mean in zip(members, means)]


def fdr(features, labels):
    of_class = spreads(features, labels)
    return sum(n * far for n, far, _, _ in of_class) / sum(within for *_, within in of_class)


def known_fdr(features, features_0, labels):
    of_class = spreads(features, labels)
    between, within = sum(n * far for n, far, _, _ in of_class), sum(within for *_, within in of_class)
    unweighted, mean_within = sum(far for _, far, _, _ in of_class), sum(w / n for n, _, _, w in of_class)
    return {UNWEIGHTED: unweighted / within, UNWEIGHTED + ", in both": unweighted / mean_within,
            MEAN_OF_MEANS: sum(n * far for n, _, far, _ in of_class) / within,
            MEAN_WITHIN: between / mean_within, UPSIDE_DOWN: within / between,
            TOTAL: between / (between + within), PRETRAINED: fdr(features_0, labels)}


def statistics(student, features, features_0, labels, key):
    """(one number of the student's dict, what was called)."""
    called = f"feature_statistics(features {tuple(features.shape)}, features_0, labels ({len(labels)},))"
    found = student.feature_statistics(features, features_0, labels)
    known = isinstance(found, dict) and key in found
    require(known, called, "a dict with the keys cs, diff, fdr, norm", found)
    return found[key], f"{called}[{key!r}]"


@points(1)
def cs_is_the_mean_cosine_of_different_samples(student, rng):
    "cs = mean over pairs i != j of <x_i, x_j> / (||x_i|| ||x_j||), of the features after training"
    for counts in ((9, 3, 5), (1, 1)):
        features, features_0, labels = clouds(rng, counts)
        found, called = statistics(student, features, features_0, labels, "cs")
        matrix, n = cosines(features), len(features)
        expect(found, mean_of_pairs(matrix), called,
               {PAIRS_I_I: average(x for row in matrix for x in row), HALF_PAIRS: mean_of_pairs(matrix) / 2,
                NOT_UNIT: mean_of_pairs(cosines(features, unit=False)),
                PAIRS_I_I + ", divided by n (n - 1)": sum(x for row in matrix for x in row) / (n * (n - 1)),
                PRETRAINED: mean_of_pairs(cosines(features_0))})


@points(1)
def diff_is_the_mean_distance_from_the_start(student, rng):
    "diff = mean over samples of ||phi(x) - phi_0(x)||"
    features, features_0, labels = clouds(rng)
    found, called = statistics(student, features, features_0, labels, "diff")
    moved = features - features_0
    expect(found, average(norm(x) for x in moved), called,
           {OF_THE_MEANS: norm(moved.mean(0)), SQUARED: average(norm(x) ** 2 for x in moved),
            OF_THE_NORMS: average(norm(x) - norm(y) for x, y in zip(features, features_0)),
            OF_THE_NORMS + " ": average(abs(norm(x) - norm(y)) for x, y in zip(features, features_0)),
            "the norm of the matrix, where it is the mean over its rows": float(moved.norm())})


@points(2)
def fdr_weighs_classes_by_their_samples(student, rng):
    """fdr = sum_c n_c ||mean_c - mean||^2 / sum_i ||x_i - mean_{y_i}||^2; mean is that of all samples, and a
    class without samples counts nothing"""
    for counts in ((9, 3, 5), (9, 0, 1, 4)):
        features, features_0, labels = clouds(rng, counts)
        found, called = statistics(student, features, features_0, labels, "fdr")
        expect(found, fdr(features, labels), f"{called}, classes of {counts} samples",
               known_fdr(features, features_0, labels))
    features, features_0 = 1e4 + features.float(), 1e4 + features_0.float()
    found, called = statistics(student, features, features_0, labels, "fdr")
    expect(found, fdr(features.double(), labels), called + ", float32 and far from 0: compute in float64")


@points(1)
def norm_is_of_the_trained_features(student, rng):
    """norm = mean over samples of ||phi(x)||; the trained features come first, then the pre-trained ones.
    The dict has the keys cs, diff, fdr, norm, in this order, and floats"""
    features, features_0, labels = inputs = clouds(rng)
    before = [x.clone() for x in inputs]
    found, called = statistics(student, *inputs, "norm")
    expect(found, average(norm(x) for x in features), called,
           {PRETRAINED: average(norm(x) for x in features_0),
            SQUARED: average(norm(x) ** 2 for x in features), OF_THE_MEANS: norm(features.mean(0))})
    whole = student.feature_statistics(*inputs)
    kinds = [(key, type(value).__name__) for key, value in whole.items()]
    right = [(key, "float") for key in ("cs", "diff", "fdr", "norm")]
    require(kinds == right, "feature_statistics(...): keys and types", right, kinds)
    for x, was in zip(inputs, before):
        expect(x, was, "what was given to feature_statistics, after the call")


@points(1)
def what_is_undefined_is_not_finite(student, rng):
    "One sample has no pair, and no class with one point has spread: cs, fdr are NaN or infinite; norm is not"
    points_ = torch.randint(1, 9, (2, 3), generator=rng).double()
    one, twice, labels = points_[:1], points_.repeat(2, 1), torch.tensor([0, 1, 0, 1])
    for features, labels, key in ((one, torch.tensor([0]), "cs"), (twice, labels, "fdr")):
        found, called = statistics(student, features, features + 1, labels, "norm")
        expect(found, average(norm(x) for x in features), called)
        found, called = statistics(student, features, features + 1, labels, key)
        huge = math.isnan(found) or abs(found) > 1e9  # a spread of 0 may be rounded
        require(huge, called, "NaN or infinity", found)
