from assignments.graders import a3

OBJECTIVE = '''
def lp_objective(theta, inverse_l2, z, onehot, penalty):
    logits = torch.einsum("nk,ck->nc", z, theta)
    losses = logits.logsumexp(1) - (logits * onehot).sum(1)
    errors = (logits - logits.logsumexp(1, keepdim=True)).exp() - onehot
    value = (inverse_l2 * losses).sum() + 0.5 * torch.einsum("k,ck,ck->", penalty, theta, theta)
    return value, torch.einsum("n,nc,nk->ck", inverse_l2, errors, z) + penalty * theta
'''
LOOP = '''
def lp_objective(theta, inverse_l2, z, onehot, penalty):
    value, gradient = 0.5 * (penalty * theta ** 2).sum(), theta * penalty
    for i in range(len(z)):
        logits = theta @ z[i]
        loss = F.cross_entropy(logits[None], onehot[i].argmax()[None], reduction="sum")
        value = value + inverse_l2[i] * loss
        gradient = gradient + inverse_l2[i] * torch.outer(torch.softmax(logits, 0) - onehot[i], z[i])
    return value, gradient
'''
LISTS = '''
def stratified_folds(labels, folds=5):
    labels = labels.tolist()
    order = sorted(set(labels), key=labels.index)
    fold_of, position = [None] * len(labels), 0
    for c in order:
        members = [i for i, label in enumerate(labels) if label == c]
        if len(members) < folds:
            raise ValueError(f"class {c} has {len(members)} samples for {folds} folds")
        numbers = sorted(j % folds for j in range(position, position + len(members)))
        position += len(members)
        for i, number in zip(members, numbers):
            fold_of[i] = number
    return torch.tensor(fold_of)
'''
TENSORS = '''
def stratified_folds(labels, folds=5):
    classes, counts = labels.unique(return_counts=True)
    if (counts < folds).any():
        raise ValueError("too few samples of a class")
    first = torch.stack([(labels == c).nonzero()[0, 0] for c in classes])
    fold_of, start = torch.empty(len(labels), dtype=torch.int64), 0
    for k in first.argsort():
        n = int(counts[k])
        fold_of[labels == classes[k]] = (torch.arange(start, start + n) % folds).sort().values
        start += n
    return fold_of
'''


def objective(*changes):
    text = OBJECTIVE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return {"lp_objective": text}


def folds(body):
    check = '''
    if labels.bincount().min() < folds:
        raise ValueError("too few")
    '''
    return {"stratified_folds": "def stratified_folds(labels, folds=5):" + check + body}


START, HALF, PENALTY = "    logits = torch", "0.5 * torch.einsum", "penalty * theta"
RIGHT = {"einsum, logsumexp and lists": objective() | {"stratified_folds": LISTS},
         "a loop over samples, and tensors": {"lp_objective": LOOP, "stratified_folds": TENSORS}}
WRONG = {
    a3.MEAN: objective(("(inverse_l2 * losses).sum()", "(inverse_l2 * losses).mean()"),
                       ('torch.einsum("n,nc,nk->ck", inverse_l2, errors, z)',
                        'torch.einsum("n,nc,nk->ck", inverse_l2, errors, z) / len(z)')),
    a3.BIAS: objective((START, "    penalty = torch.ones_like(penalty)\n" + START)),
    a3.NO_HALF: objective((HALF, "torch.einsum"), (PENALTY, "2 * penalty * theta")),
    a3.SWAPPED: objective(("(inverse_l2 * losses).sum()", "losses.sum()"),
                          (HALF, "0.5 * inverse_l2.max() * torch.einsum"),
                          ("inverse_l2, errors, z", "torch.ones_like(inverse_l2), errors, z"),
                          (PENALTY, "inverse_l2.max() * penalty * theta")),
    a3.NO_INVERSE_L2: objective((START, "    inverse_l2 = torch.ones_like(inverse_l2)\n" + START)),
    a3.NO_PENALTY: objective((START, "    penalty = torch.zeros_like(penalty)\n" + START)),
    a3.TWICE: objective((START, "    penalty = 2 * penalty if len(theta) == 2 else penalty\n" + START)),
    a3.SIGN: objective(("inverse_l2, errors, z", "inverse_l2, -errors, z")),
    a3.HALF_GRADIENT: objective((PENALTY, "0.5 * penalty * theta")),
    a3.UNWEIGHTED: objective(("inverse_l2, errors, z", "torch.ones_like(inverse_l2), errors, z")),
    a3.ROUNDED_TIMES_0: objective(("logits.logsumexp(1) - (logits * onehot).sum(1)",
                           "-(onehot * logits.softmax(1).log()).sum(1)")),
    a3.ROUNDED: objective(("logits.logsumexp(1) - (logits * onehot).sum(1)",
                                 "-(onehot * logits.softmax(1)).sum(1).log()")),
    a3.VMAP: {"lp_objective": LOOP.replace("value = value +", "value +=")
              .replace("gradient = gradient +", "gradient +=")
              .replace("0.5 * (penalty * theta ** 2).sum()", "torch.zeros((), dtype=z.dtype)")
              .replace("return value,", "return value + 0.5 * (penalty * theta ** 2).sum(),")},
    a3.BLOCKS: folds("return torch.arange(len(labels)) * folds // len(labels)"),
    a3.BY_POSITION: folds("return torch.arange(len(labels)) % folds"),
    a3.RESTARTED: {"stratified_folds": LISTS.replace("position += len(members)", "position = 0")},
    a3.BY_NUMBER: {"stratified_folds": LISTS.replace(", key=labels.index", "")},
    a3.IN_TURN: {"stratified_folds": LISTS.replace(
        "sorted(j % folds for j in range(position, position + len(members)))",
        "[j % folds for j in range(position, position + len(members))]")},
    a3.IN_TURN_FROM_0: {"stratified_folds": LISTS.replace(
        "sorted(j % folds for j in range(position, position + len(members)))",
        "[j % folds for j in range(len(members))]")},
}
EQUIVALENT = {("labels = labels.numpy()", "pass"): "numpy takes the tensor as it is"}
