from assignments.graders.a4 import (BRIER, CONFIDENCE, IN_PLACE, LOG, MULTIPLIED, NAN, NO_MINIMUM,
                                    NOT_BELOW_1, NOTHING, SQUARED, TOO_EARLY)

BISECTION = '''
def fit_temperature(logits, labels):
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    if not torch.isfinite(logits).all():
        raise ValueError("not finite")
    if why_no_temperature(logits, labels):
        return 1.0
    of_label = logits.gather(1, labels[:, None]).mean()
    low, high = 0.0, 1.0

    def slope(b):
        return ((b * logits).softmax(1) * logits).sum(1).mean() - of_label

    while slope(high) < 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(RESULT)
'''
BISECTED = BISECTION.replace("RESULT", "2 / (low + high)")
SEARCHED = '''
def fit_temperature(logits, labels):
    logits = logits.detach().double()
    scale = float((logits - logits.mean(1, keepdim=True)).square().mean().sqrt())
    if not math.isfinite(scale):
        raise ValueError("NaN or infinity")
    if why_no_temperature(logits, labels):
        return 1.0
    log_t = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / scale / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return scale * math.exp(log_t.item())
'''
GRID = '''
def fit_temperature(logits, labels):
    logits = logits.detach().double()
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
    if why_no_temperature(logits, labels) is not None:
        return 1.0
    low, high = -30.0, 30.0
    for _ in range(60):  # the loss has one minimum in log T: narrow a grid around it
        grid = torch.linspace(low, high, 21, dtype=torch.double)
        losses = [F.cross_entropy(logits / t.exp(), labels) for t in grid]
        best = min(range(21), key=lambda i: losses[i])
        low, high = float(grid[max(best - 2, 0)]), float(grid[min(best + 2, 20)])
        if high - low < 1e-6:
            break
    return math.exp((low + high) / 2)
'''
NEWTON = '''
def fit_temperature(logits, labels):
    logits = logits.detach().double()
    if not logits.isfinite().all():
        raise ValueError("NaN or infinity")
    if why_no_temperature(logits, labels):
        return 1.0
    logits = logits - logits.mean(1, keepdim=True)
    spread = logits.std().item()
    logits = logits / spread
    b = 0.0  # 1 / T: from uniform probabilities the slope is not flat
    for _ in range(100):
        p = (b * logits).softmax(1)
        mean = (p * logits).sum(1)
        slope = (mean - logits[torch.arange(len(labels)), labels]).mean().item()
        curvature = ((p * logits.square()).sum(1) - mean.square()).mean().item()
        b += max(-0.5, min(0.5, -slope / curvature))
    return spread / b
'''
FEW_STEPS = '''
def fit_temperature(logits, labels):
    logits = logits.detach()
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
    if why_no_temperature(logits, labels):
        return 1.0
    temperature = torch.ones((), dtype=logits.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return temperature.item()
'''
RIGHT = {"an optimizer over log T": {"fit_temperature": SEARCHED},
         "a grid that narrows": {"fit_temperature": GRID},
         "Newton in 1 / T": {"fit_temperature": NEWTON}}
BY_ACCURACY = GRID.replace("F.cross_entropy(", "-accuracy(").replace("-30.0, 30.0", "-2.0, 2.0").replace(
    "i: losses[i])", "i: (losses[i], abs(i - 10)))")  # of ties the middle
WRONG = {
    MULTIPLIED: {"fit_temperature": BISECTION.replace("RESULT", "(low + high) / 2")},
    NOTHING: {"fit_temperature": BY_ACCURACY},
    LOG: {"fit_temperature": BISECTION.replace("RESULT", "math.log(2 / (low + high))")},
    SQUARED: {"fit_temperature": BISECTION.replace("RESULT", "(2 / (low + high)) ** 0.5")},
    CONFIDENCE: {"fit_temperature": BISECTED.replace(
        "return ((b * logits).softmax(1) * logits).sum(1).mean() - of_label",
        "return (b * logits).softmax(1).amax(1).mean() - accuracy(logits, labels)")},
    BRIER: {"fit_temperature": GRID.replace(
        "F.cross_entropy(logits / t.exp(), labels)",
        "((logits / t.exp()).softmax(1) - F.one_hot(labels, logits.shape[1])).square().sum()")},
    NOT_BELOW_1: {"fit_temperature": BISECTION.replace("RESULT", "max(1.0, 2 / (low + high))")},
    TOO_EARLY: {"fit_temperature": FEW_STEPS},
    NO_MINIMUM: {"fit_temperature": GRID.replace(
        "if why_no_temperature(logits, labels) is not None", "if False")},
    IN_PLACE: {"fit_temperature": BISECTED.replace(
        "    of_label", "    logits -= logits.mean(1, keepdim=True)\n    of_label")},
    NAN: {"fit_temperature": GRID.replace("if not torch.isfinite(logits).all()", "if False")},
}
EQUIVALENT = {
    ("logits, labels = logits.detach().cpu().double(), labels.cpu()  # (N, C), (N,)", "pass"):
        "without float64, T is right to the four digits that are asked for",
    ("low, high = 0.0, 1.0", "2.0"): "where the search begins, not where it ends",
    ("low, high = high, 2 * high", "3"): "how fast the bracket grows",
    ("while slope(high) < 0:", "<="): "never exactly 0",
    ("while high - low > 1e-12 * high:  # bisection", ">="): "never exactly equal",
    ("low, high = (middle, high) if slope(middle) < 0 else (low, middle)", "<="): "never exactly 0",
}
