from assignments.graders.a8 import (ACCURACY, AFTER, BATCH_MEANS, CLIP_EACH, CLIP_VALUES, EVAL, FALSY, FINITE,
                                    FROM_ZERO, KEPT, LAST, LAST_OF_EQUALS, LOWEST_LOSS, NEW_HEAD, NO_BIAS,
                                    NO_CLIP, NORMALISED, OLD_HEAD, PER_EPOCH, SUM, SUMMED, THAWED, TOO_SOON,
                                    WITH_START)

EPOCH = '''
def train_epoch(model, split, batches, optimizer, schedule):
    model.train()
    total, right = 0.0, 0
    for indices in batches:
        batch, labels = split.batch(indices)
        logits = model(**batch)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not torch.isfinite(norm):
            total = math.nan
        total += loss.item() * len(labels)
        right += (logits.argmax(1) == labels).sum().item()
    return total / len(split), right / len(split)
'''
BY_AUTOGRAD = '''
def train_epoch(model, split, batches, optimizer, schedule):
    trained, losses, right = [p for p in model.parameters() if p.requires_grad], [], []
    for indices in batches:
        batch, labels = split.batch(indices)
        logits = model.train()(**batch)
        each = logits.logsumexp(1) - logits[range(len(labels)), labels]
        gradients = torch.autograd.grad(each.mean(), trained, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients)]
        norm = sum((g ** 2).sum() for g in gradients) ** 0.5
        for p, g in zip(trained, gradients):
            p.grad = g / norm if norm > 1 else g
        optimizer.step()
        schedule.step()
        losses += (each if norm.isfinite() else each * math.nan).tolist()
        right += (logits.argmax(1) == labels).tolist()
    return sum(losses) / len(losses), sum(right) / len(right)
'''
HEAD = '''
def set_head(model, probe):
    with torch.no_grad():
        model.head.weight.copy_(probe.weight)
        model.head.bias.copy_(probe.bias)
'''
BEST = '''
def best_epoch(history, metric):
    best = None
    for record in history:
        if record["epoch"] and (best is None or record[f"val_{metric}"] > best[f"val_{metric}"]):
            best = record
    return best
'''
RIGHT = {"plain loops": {"train_epoch": EPOCH, "set_head": HEAD, "best_epoch": BEST},
         "gradients by torch.autograd.grad, clipped by hand": {"train_epoch": BY_AUTOGRAD}}
CLIP = "norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
NORM = "norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()"
EACH = "\n        for p in model.parameters():\n            "


def epoch(old, new):
    assert old in EPOCH, old
    return {"train_epoch": EPOCH.replace(old, new)}


FROM = '''
def best_epoch(history, metric):
    best, top = None, 0.0
    for record in history[1:]:
        if record[f"val_{metric}"] > top:
            best, top = record, record[f"val_{metric}"]
    return best
'''
WRONG = {
    NO_BIAS: {"set_head": HEAD.replace("        model.head.bias.copy_(probe.bias)\n", "")},
    NEW_HEAD: {"set_head": '''
def set_head(model, probe):
    model.head = nn.Linear(probe.weight.shape[1], probe.weight.shape[0])
    model.head.weight.data = probe.weight.float()
    model.head.bias.data = probe.bias.float()
'''},
    OLD_HEAD: {"set_head": '''
def set_head(model, probe):
    head = nn.Linear(probe.weight.shape[1], probe.weight.shape[0])
    head.load_state_dict({"weight": probe.weight, "bias": probe.bias})
'''},
    WITH_START: {"best_epoch": BEST.replace('record["epoch"] and ', "")},
    FROM_ZERO: {"best_epoch": FROM},
    FALSY: {"best_epoch": FROM.replace("top = None, 0.0", "top = None, None").replace(
        "if record", "if not top or record")},
    LAST_OF_EQUALS: {"best_epoch": BEST.replace("] > best[", "] >= best[")},
    LAST: {"best_epoch": "def best_epoch(history, metric):\n    return history[-1]"},
    LOWEST_LOSS: {"best_epoch": """
def best_epoch(history, metric):
    return min(history[1:], key=lambda record: record["loss"])
"""},
    ACCURACY: {"best_epoch": BEST.replace("val_{metric}", "val_accuracy")},
    SUM: epoch("F.cross_entropy(logits, labels)", 'F.cross_entropy(logits, labels, reduction="sum")'),
    KEPT: epoch("        optimizer.zero_grad()\n", ""),
    NO_CLIP: epoch(CLIP, NORM),
    CLIP_EACH: epoch(CLIP, f"{NORM}{EACH}nn.utils.clip_grad_norm_(p, 1.0)"),
    CLIP_VALUES: epoch(CLIP, NORM + "\n        nn.utils.clip_grad_value_(model.parameters(), 1.0)"),
    NORMALISED: epoch(CLIP, f"{CLIP}{EACH}p.grad = None if p.grad is None else p.grad / min(norm, 1.0)"),
    PER_EPOCH: {"train_epoch": EPOCH.replace("        schedule.step()\n", "").replace(
        "    return", "    schedule.step()\n    return")},
    TOO_SOON: {"train_epoch": EPOCH.replace("        schedule.step()\n", "").replace(
        "        optimizer.step()", "        schedule.step()\n        optimizer.step()")},
    EVAL: epoch("model.train()", "model.train(False)"),
    BATCH_MEANS: {"train_epoch": EPOCH.replace("loss.item() * len(labels)", "loss.item()").replace(
        "(logits.argmax(1) == labels).sum()", "(logits.argmax(1) == labels).double().mean()").replace(
        "/ len(split)", "/ len(batches)")},
    SUMMED: epoch("return total / len(split), right / len(split)", "return total, right"),
    AFTER: epoch("    return total / len(split), right / len(split)", '''    _, logits = predict(model, split)
    loss = F.cross_entropy(logits, split.labels).item() if math.isfinite(total) else total
    return loss, accuracy(logits, split.labels)'''),
    THAWED: epoch("    model.train()\n", "    model.train()\n    model.requires_grad_(True)\n"),
    FINITE: epoch("not torch.isfinite(norm)", "not torch.isfinite(loss)"),
}
EQUIVALENT = {
    ("totals[0] += loss.detach() * len(labels) + 0 * norm  "
     "# NaN also where only the gradient is not finite", "-"):
        "0 * norm is 0 or NaN, with any sign",
}
