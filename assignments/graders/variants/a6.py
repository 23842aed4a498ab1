from assignments.graders import a6

LOOP = '''
def ntk_by_jacobian(model, train_batches, test_batches=None):
    names, trained = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad])

    def jacobians(batches, of_head):  # (N, C, p)
        rows = []
        for batch in batches:
            for n in range(len(batch["input_ids"])):
                f = model(**{key: t[n:n + 1] for key, t in batch.items()})[0]  # (C,)
                gradients = [torch.autograd.grad(one, trained, retain_graph=True) for one in f]
                rows.append(torch.stack([
                    torch.cat([x.flatten() for name, x in zip(names, g) if (name[:5] == "head.") == of_head])
                    for g in gradients]))
        return torch.stack(rows).double()

    kernels = []
    for batches in (train_batches, test_batches):
        for of_head in (True, False):
            if batches:
                J, J_train = jacobians(batches, of_head), jacobians(train_batches, of_head)
                kernels.append(torch.tensordot(J, J_train, dims=([2], [2])))
            else:
                kernels.append(None)
    return NTK(*kernels)
'''
BATCHED = '''
def ntk_by_jacobian(model, train_batches, test_batches=None):
    head = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and n.startswith("head.")}
    encoder = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and n not in head}

    def matrix(batches, chosen):  # (N C, p): logits of a batch do not mix, so one Jacobian of all is enough
        parts = []
        for batch in batches:
            J = jacrev(lambda t: functional_call(model, t, (), batch).flatten())(chosen)
            parts.append(torch.cat([x.flatten(1) for x in J.values()], 1))
        return torch.cat(parts).double()

    C = model.head.out_features
    J_head, J_encoder = matrix(train_batches, head), matrix(train_batches, encoder)

    def kernel(J, J_train):
        return (J @ J_train.T).reshape(len(J) // C, C, len(J_train) // C, C)

    ntk = NTK(kernel(J_head, J_head), kernel(J_encoder, J_encoder))
    if test_batches is not None:
        ntk.test_pretrain = kernel(matrix(test_batches, head), J_head)
        ntk.test_ft = kernel(matrix(test_batches, encoder), J_encoder)
    return ntk
'''
DELTAS = '''
def initial_deltas(logits, labels):
    deltas = -logits.double().softmax(1)
    for i, label in enumerate(labels):
        deltas[i, label] += 1
    return deltas
'''
CHANGE = '''
def predicted_logit_change(ntk, deltas, lr, test=False):
    theta = ntk.pretrain + ntk.ft
    if test:
        theta = ntk.test_pretrain + ntk.test_ft
    M, C, N, _ = theta.shape
    return lr * (theta.reshape(M * C, N * C) @ deltas.double().reshape(N * C)).reshape(M, C)
'''
RATIO = '''
def ft_ratio(ntk, deltas):
    ratios = []
    for F_x, P_x in zip(ntk.ft, ntk.pretrain):  # (C, N, C)
        by_f, by_p = (torch.tensordot(K, deltas, dims=2) for K in (F_x, P_x))
        ratios.append(by_f.norm() / (by_f + by_p).norm())
    return (sum(ratios) / len(ratios)).item()
'''
RIGHT = {
    "loops over texts and logits": {"ntk_by_jacobian": LOOP, "initial_deltas": DELTAS,
                                    "predicted_logit_change": CHANGE, "ft_ratio": RATIO},
    "one Jacobian of a batch": {
        "ntk_by_jacobian": BATCHED,
        "initial_deltas": "def initial_deltas(logits, labels):\n    p = torch.exp(logits.double() - "
                          "logits.double().logsumexp(1, keepdim=True))\n"
                          "    return torch.eye(p.shape[1], dtype=p.dtype)[labels] - p\n",
        "predicted_logit_change": CHANGE.replace(
            "return lr * (theta.reshape(M * C, N * C) @ deltas.double().reshape(N * C)).reshape(M, C)",
            "return sum(lr * theta[:, :, i] @ deltas[i] for i in range(N))"),
        "ft_ratio": RATIO.replace("(sum(ratios) / len(ratios)).item()", "float(torch.stack(ratios).mean())")},
}


def changed(source, old, new):
    assert old in source, old
    return source.replace(old, new)


def of_kernels(old, new):
    return {"ntk_by_jacobian": changed(LOOP, old, new)}


PRODUCT = "torch.tensordot(J, J_train, dims=([2], [2]))"
GRADIENTS = "gradients = [torch.autograd.grad(one, trained, retain_graph=True) for one in f]"
EQ_1 = '''
def predicted_logit_change(ntk, deltas, lr, test=False):
    theta = ntk.test_pretrain + ntk.test_ft if test else ntk.pretrain + ntk.ft
    return lr * torch.einsum("mcnd,nd->mc", theta, deltas)
'''
MEAN_OF = '''
def ft_ratio(ntk, deltas):
    top, whole = (torch.einsum("mcnd,nd->mc", K, deltas) for K in (ntk.ft, ntk.pretrain + ntk.ft))
    return float((top.norm(dim=1) / whole.norm(dim=1)).mean())
'''
WRONG = {
    a6.NO_ONE: of_kernels('if (name[:5] == "head.") == of_head',
                          'if (name[:5] == "head.") == of_head and name != "head.bias"'),
    a6.SUM: of_kernels(PRODUCT, "J.sum(1) @ J_train.sum(1).T"),
    a6.TRACE: of_kernels(PRODUCT, 'torch.einsum("ncp,mcp->nm", J, J_train)'),
    a6.ORDER: of_kernels(PRODUCT, 'torch.einsum("ncp,mdp->nmcd", J, J_train)'),
    a6.THETA: of_kernels('if (name[:5] == "head.") == of_head', 'if not of_head or name[:5] == "head."'),
    a6.SWAPPED: of_kernels('(name[:5] == "head.") == of_head', '(name[:5] == "head.") != of_head'),
    a6.PROBABILITIES: of_kernels("for one in f]", "for one in f.softmax(0)]"),
    a6.ADDED_UP: of_kernels(GRADIENTS, '''gradients = []
                if not rows:
                    for p in trained:
                        p.grad = None
                for one in f:
                    one.backward(retain_graph=True)
                    gradients.append([p.grad.clone() for p in trained])'''),
    a6.NO_TYPES: of_kernels("in batch.items()}", 'in batch.items() if key[:5] != "token"}'),
    a6.TURNED: of_kernels(PRODUCT, "torch.tensordot(J_train, J, dims=([2], [2]))"),
    a6.FROZEN: of_kernels("(name, p) for name, p in model.named_parameters() if p.requires_grad",
                          "(name, p.requires_grad_()) for name, p in model.named_parameters()"),
    a6.DROPOUT: of_kernels("    kernels = []", "    model.train()\n    kernels = []"),
    a6.SIGN: {"initial_deltas": changed(DELTAS, "return deltas", "return -deltas")},
    a6.NO_SOFTMAX: {"initial_deltas": changed(DELTAS, ".softmax(1)", "")},
    a6.MEAN: {"predicted_logit_change": changed(EQ_1, "lr *", "lr / len(deltas) *")},
    a6.CLASSES: {"predicted_logit_change": changed(EQ_1, "mcnd,nd->mc", "mcnd,nc->md")},
    a6.ONLY_P: {"predicted_logit_change": changed(EQ_1, "ntk.pretrain + ntk.ft", "ntk.pretrain")},
    a6.ONLY_F: {"predicted_logit_change": changed(EQ_1, "ntk.test_pretrain + ntk.test_ft", "ntk.test_ft")},
    a6.NO_LR: {"predicted_logit_change": changed(EQ_1, "lr * ", "")},
    a6.TRAIN_FOR_TEST: {"predicted_logit_change": changed(EQ_1, "if test else", "if test is None else")},
    a6.RATIO_OF_MEANS: {"ft_ratio": changed(MEAN_OF, "(top.norm(dim=1) / whole.norm(dim=1)).mean()",
                                            "top.norm(dim=1).mean() / whole.norm(dim=1).mean()")},
    a6.F_TO_P: {"ft_ratio": changed(MEAN_OF, "ntk.pretrain + ntk.ft", "ntk.pretrain")},
    a6.NO_DELTA: {"ft_ratio": "def ft_ratio(ntk, deltas):\n"
                              "    return float(ntk.ft.norm() / (ntk.pretrain + ntk.ft).norm())"},
    a6.NO_NORM: {"ft_ratio": changed(MEAN_OF, "norm(dim=1)", "sum(1)")},
}
EQUIVALENT = {}
