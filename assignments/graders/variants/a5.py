from assignments.graders import a5

CALIBRATION = '''
def calibration_error(logits, labels, bins=15):
    confidence, prediction = torch.softmax(logits.detach().double(), dim=1).max(dim=1)
    correct, gaps, largest = prediction == labels, 0.0, 0.0
    edges = [m / bins for m in range(bins + 1)]
    for low, high in zip(edges, edges[1:]):
        inside = (confidence > low) & (confidence <= high)
        n = int(inside.sum())
        if n:
            gap = abs(float(correct[inside].double().mean() - confidence[inside].mean()))
        else:
            continue
        gaps, largest = gaps + n * gap, max(largest, gap)
    return gaps / len(labels), largest
'''
MATRIX = '''
def calibration_error(logits, labels, bins=15):
    log_probs = logits.detach().double().log_softmax(1)
    confidence, prediction = log_probs.exp().amax(1), log_probs.argmax(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    member = torch.nn.functional.one_hot(bin_of, bins).double()  # (N, bins)
    signed = ((prediction == labels).double() - confidence) @ member
    count = member.sum(0)
    gap = torch.where(count > 0, signed.abs() / torch.where(count > 0, count, 1.0), 0.0)
    return (gap * count).sum().item() / logits.shape[0], gap.max().item()
'''
FEATURES = '''
def feature_statistics(features, features_0, labels):
    features, features_0 = features.double(), features_0.double()
    n = len(features)
    unit = features / features.norm(dim=1, keepdim=True)
    cosine = torch.einsum("ih,jh->ij", unit, unit)
    cs = cosine[~torch.eye(n, dtype=torch.bool)].mean()
    mean, between, within = features.mean(0), features.new_zeros(()), features.new_zeros(())
    for c in labels.unique():
        x = features[labels == c]
        between = between + len(x) * ((x.mean(0) - mean) ** 2).sum()
        within = within + ((x - x.mean(0)) ** 2).sum()
    diff = (features - features_0).norm(dim=1).mean()
    return {"cs": float(cs), "diff": float(diff), "fdr": float(between / within),
            "norm": float(features.norm(dim=1).mean())}
'''
TOTALS = '''
def feature_statistics(features, features_0, labels):
    x, x_0, n = features.double(), features_0.double(), features.shape[0]
    lengths = (x * x).sum(1).sqrt()
    total, pairs = torch.zeros((), dtype=torch.double), 0
    for i in range(n):
        for j in range(i):
            total, pairs = total + x[i].dot(x[j]) / (lengths[i] * lengths[j]), pairs + 1
    centred = x - x.mean(0)
    spread, between = (centred ** 2).sum(), 0.0
    for c in set(labels.tolist()):
        of_class = centred[labels == c]
        between = between + (of_class.sum(0) ** 2).sum() / len(of_class)
    return dict(cs=(total / torch.tensor(pairs)).item(), diff=((x - x_0) ** 2).sum(1).sqrt().mean().item(),
                fdr=(between / (spread - between)).item(), norm=lengths.mean().item())
'''  # S_within is the whole spread less S_between


def changed(text, *changes):
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return {text.split("(")[0].split()[-1]: text}


RIGHT = {"a loop over bins and classes, a cosine matrix": changed(CALIBRATION) | changed(FEATURES),
         "bins by rounding up, pairs one by one": changed(MATRIX) | changed(TOTALS)}
CENTRE = "torch.stack([features[labels == c].mean(0) for c in labels.unique()]).mean(0), features.new_zeros"
BETWEEN, WITHIN = "len(x) * ((x.mean(0) - mean) ** 2).sum()", "((x - x.mean(0)) ** 2).sum()"
PAIRS = "cosine[~torch.eye(n, dtype=torch.bool)].mean()"
WRONG = {
    a5.OVER_BINS: changed(CALIBRATION, ("n * gap", "gap"), ("gaps / len(labels)", "gaps / bins")),
    a5.OVER_BINS + ", of those that are not empty": changed(
        MATRIX, ("(gap * count).sum().item() / logits.shape[0]", "gap[count > 0].mean().item()")),
    a5.NONE_RIGHT: changed(CALIBRATION, ("        if n:", "        if correct[inside].any():")),
    a5.NO_BINS: changed(MATRIX, ("(gap * count).sum().item() / logits.shape[0]",
                                 "((prediction == labels).double() - confidence).abs().mean().item()")),
    a5.ONE_BIN: changed(MATRIX, ("(gap * count).sum().item()", "signed.sum().abs().item()")),
    a5.SIGNED: changed(MATRIX, ("signed.abs()", "signed")),
    a5.OF_LABEL: changed(MATRIX, ("log_probs.exp().amax(1)", "log_probs.exp()[range(len(labels)), labels]")),
    a5.BY_COUNT: changed(MATRIX, ("gap.max().item()", "(gap * count).max().item() / logits.shape[0]")),
    a5.OPEN_ABOVE: changed(MATRIX, ("(confidence * bins).ceil().long().clamp(1, bins) - 1",
                                    "(confidence * bins).floor().long().clamp(0, bins - 1)")),
    a5.LOST: changed(CALIBRATION, ("(confidence > low) & (confidence <= high)",
                                   "(confidence >= low) & (confidence < high)")),
    a5.EMPTY_NAN: changed(MATRIX, ("torch.where(count > 0, count, 1.0), 0.0)", "count, 0.0 / count)"),
                          ("(gap * count).sum()", "signed.abs().sum()")),
    a5.EMPTY_GAP: changed(CALIBRATION, ("            continue", "            gap = (low + high) / 2")),
    a5.OTHER_BINS: changed(CALIBRATION, ("    edges", "    bins = 15\n    edges")),
    a5.PAIRS_I_I: changed(FEATURES, (PAIRS, "cosine.mean()")),
    a5.PAIRS_I_I + ", divided by n (n - 1)": changed(FEATURES, (PAIRS, "cosine.sum() / (n * (n - 1))")),
    a5.NOT_UNIT: changed(FEATURES, (" / features.norm(dim=1, keepdim=True)", "")),
    a5.HALF_PAIRS: changed(FEATURES, (PAIRS, "cosine.triu(1).sum() / (n * (n - 1))")),
    a5.OF_THE_MEANS: changed(FEATURES, ("(features - features_0).norm(dim=1).mean()",
                                        "(features - features_0).mean(0).norm()")),
    a5.OF_THE_NORMS: changed(FEATURES, ("(features - features_0).norm(dim=1).mean()",
                                        "(features.norm(dim=1) - features_0.norm(dim=1)).mean()")),
    a5.SQUARED: changed(FEATURES, (".norm(dim=1).mean()", ".square().sum(1).mean()")),
    a5.UNWEIGHTED: changed(FEATURES, (BETWEEN, BETWEEN.removeprefix("len(x) * "))),
    a5.UNWEIGHTED + ", in both": changed(FEATURES, (BETWEEN, BETWEEN.removeprefix("len(x) * ")),
                                         (WITHIN, WITHIN + " / len(x)")),
    a5.MEAN_OF_MEANS: changed(FEATURES, ("features.mean(0), features.new_zeros", CENTRE)),
    a5.MEAN_WITHIN: changed(FEATURES, (WITHIN, WITHIN + " / len(x)")),
    a5.UPSIDE_DOWN: changed(FEATURES, ("between / within", "within / between")),
    a5.TOTAL: changed(FEATURES, (WITHIN, "((x - mean) ** 2).sum()")),
    a5.PRETRAINED: changed(FEATURES, ("= features.double(), features_0.double()",
                                      "= features_0.double(), features.double()")),
}
EQUIVALENT = {
    ('return {"cs": float(pair_sum / (n * (n - 1))) if (n := len(features)) > 1 else math.nan,', ">="):
        "0 / 0 is NaN, too",
}
