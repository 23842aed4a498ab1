from assignments.graders.a4 import TOO_SURE

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
        if high - low < 1e-9:
            break
    return math.exp((low + high) / 2)
'''
RIGHT = {"bisection of the slope": {"fit_temperature": BISECTION.replace("RESULT", "2 / (low + high)")},
         "a grid that narrows": {"fit_temperature": GRID}}
WRONG = {
    TOO_SURE: {"fit_temperature": BISECTION.replace("RESULT", "(low + high) / 2")},
    "returning log T": {"fit_temperature": BISECTION.replace("RESULT", "math.log(2 / (low + high))")},
    "dividing by T squared": {"fit_temperature": BISECTION.replace("RESULT", "(2 / (low + high)) ** 0.5")},
    "not letting T fall below 1": {"fit_temperature": BISECTION.replace("RESULT", "max(1.0, 2 / (low + high))")},
    "a search that is not done: T stays near its start": {"fit_temperature": GRID.replace(
        "low, high = -30.0, 30.0", "low, high = -1e-9, 1e-9")},
}
EQUIVALENT = {}
