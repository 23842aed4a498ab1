"""The neural tangent kernel as Prop. 4.1 defines it, and what eq. (1) says with it."""

import torch
import torch.nn.functional as F

import model as project
from assignments.graders import expect, points, require

NO_ONE = "leaving out the bias of the head: P lacks its + 1"
SUM = "one gradient of the sum of all logits, where each logit has its own"
TRACE = "summing the products over the classes"
ORDER = "axes in the order (N, N, C, C), not (N, C, N, C)"
THETA = "counting the head in F: that is Theta"
SWAPPED = "P and F exchanged"
PROBABILITIES = "differentiating the probabilities, not the logits"
ADDED_UP = "gradients that add up from logit to logit, because .grad was not reset"
NO_TYPES = "leaving out token_type_ids"
TURNED = "training samples as rows of the test kernels, test samples as columns"
FROZEN = "counting parameters that are frozen"
DROPOUT = "dropout on: the model was put into training mode"
SIGN = "the other sign: softmax minus onehot"
NO_SOFTMAX = "onehot minus logits, without softmax"
MEAN = "the mean over the training samples, where eq. (1) has the sum"
CLASSES = "summing over the classes of x, not over those of x_i"
ONLY_P, ONLY_F = "P alone, without F", "F alone, without P"
NO_LR = "leaving out lr"
TRAIN_FOR_TEST = "the training kernels, where test=True asks for the test kernels"
RATIO_OF_MEANS = "the ratio of the means, not the mean of the ratios"
F_TO_P = "dividing by the change through P, not through P + F"
NO_DELTA = "comparing the kernels themselves, without delta"
NO_NORM = "summing the entries, not taking the norm"
LOGITS = "ntk_by_jacobian(model, train_batches [3 and 2 texts, C = 3]{})"


def classifier(rng, classes=3, pooling="first", lora=False):
    """A tiny classifier, float64, in eval mode, no weight of it 0."""
    config = project.EncoderConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=6, max_position_embeddings=6, pooling=pooling)
    model = project.Classifier(project.Encoder(config), classes).double().eval()
    if lora:
        project.add_lora(model.encoder, r=2, lora_alpha=4)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.double) / 2
    return model


def batch_of(rng, lengths):
    """A padded batch of texts of these lengths."""
    n, longest = len(lengths), max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids, types = (torch.randint(low, high, (n, longest), generator=rng) for low, high in ((1, 9), (0, 2)))
    types[:, 0] = 1  # so that it matters
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types * mask}


def batches_of(rng):
    """Five training texts in two batches of other lengths, two test texts."""
    return [batch_of(rng, (4, 2, 3)), batch_of(rng, (2, 5))], [batch_of(rng, (3, 4))]


def jacobians(model, batches, logits=lambda model, sample: model(**sample)[0], frozen=False):
    """{name: (N, C, parameters of this name)}: for every text and logit one call of autograd.grad."""
    names, chosen = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad or frozen])
    before = [p.requires_grad for p in chosen]
    for p in chosen:
        p.requires_grad_(True)
    rows = []
    for batch in batches:
        for n in range(len(batch["input_ids"])):
            f = logits(model, {key: t[n:n + 1] for key, t in batch.items()})  # (C,)
            rows.append([torch.autograd.grad(one, chosen, retain_graph=True) for one in f])
    for p, trains in zip(chosen, before):
        p.requires_grad_(trains)
    return {name: torch.stack([torch.stack([g[i].flatten().double() for g in of_text]) for of_text in rows])
            for i, name in enumerate(names)}


def parts(rows, columns=None):
    """P and F, (N, C, N, C), of two dicts of Jacobians: entry by entry the product of two gradients."""
    columns = rows if columns is None else columns
    J = {head: [torch.cat([x for name, x in side.items() if name.startswith("head.") == head], 2)
                for side in (rows, columns)] for head in (True, False)}
    return [torch.stack([torch.stack([x @ y.T for y in second], 1) for x in first])
            for first, second in (J[True], J[False])]  # x (C, p), y (C, p)


def known(model, J, batches):
    """For P and for F: what known wrong solutions give instead."""
    P, theirs = parts(J)[0], parts(J)[1]
    summed = parts({name: x.sum(1, keepdim=True) for name, x in J.items()})
    added = parts({name: x.flatten(0, 1).cumsum(0).view_as(x) for name, x in J.items()})
    no_types = parts(jacobians(model, batches, lambda model, sample: model(
        **{key: t for key, t in sample.items() if key != "token_type_ids"})[0]))
    probabilities = parts(jacobians(model, batches, lambda model, sample: model(**sample)[0].softmax(0)))
    found = []
    for i, part in enumerate((P, theirs)):
        found.append({SUM: summed[i][:, 0, :, 0], TRACE: torch.einsum("ncmc->nm", part), ADDED_UP: added[i],
                      ORDER: part.transpose(1, 2), PROBABILITIES: probabilities[i], NO_TYPES: no_types[i],
                      SWAPPED: (theirs, P)[i]})
    found[0][NO_ONE] = parts({name: x for name, x in J.items() if name != "head.bias"})[0]
    found[1][THETA] = P + theirs
    return found


@points(2)
def f_is_the_encoder_part(student, rng):
    "F(x_i, x_j)[c, d] = <df_c(x_i)/dtheta, df_d(x_j)/dtheta> over the encoder's parameters, (N, C, N, C)"
    model, (batches, _) = classifier(rng), batches_of(rng)
    J = jacobians(model, batches)
    expect(student.ntk_by_jacobian(model, batches).ft, parts(J)[1], LOGITS.format("") + ".ft",
           known(model, J, batches)[1])


@points(1)
def p_is_the_head_part(student, rng):
    "P(x_i, x_j) = (<phi(x_i), phi(x_j)> + 1) I_C, the product of the gradients by V and b"
    model, (batches, _) = classifier(rng, pooling="mean"), batches_of(rng)
    with torch.no_grad():
        phi = torch.cat([model.features(**batch) for batch in batches])  # (N, h)
    P = torch.zeros(5, 3, 5, 3, dtype=torch.double)
    for i, one in enumerate(phi):
        for j, other in enumerate(phi):
            P[i, :, j] = (one @ other + 1) * torch.eye(3)
    expect(student.ntk_by_jacobian(model, batches).pretrain, P, LOGITS.format("") + ".pretrain",
           known(model, jacobians(model, batches), batches)[0])


@points(2)
def rows_of_test_kernels_are_test_texts(student, rng):
    "test_pretrain and test_ft are (M, C, N, C), test texts against training texts; None without test texts"
    model, (batches, test_batches) = classifier(rng), batches_of(rng)
    train, test = jacobians(model, batches), jacobians(model, test_batches)
    P, theirs = parts(test, train)
    found = student.ntk_by_jacobian(model, batches, test_batches)
    called = LOGITS.format(", test_batches [2 texts]")
    expect(found.test_ft, theirs, called + ".test_ft", {TURNED: theirs.permute(2, 3, 0, 1),
                                                         THETA: P + theirs})
    expect(found.test_pretrain, P, called + ".test_pretrain", {TURNED: P.permute(2, 3, 0, 1)})
    expect(found.ft, parts(train)[1], called + ".ft")
    alone = student.ntk_by_jacobian(model, batches)
    expect([alone.test_pretrain, alone.test_ft], [None, None], LOGITS.format("") + ": the test kernels")


@points(1)
def only_what_trains_counts(student, rng):
    "theta are the parameters that require a gradient: under LoRA, A and B, and the head"
    model, (batches, _) = classifier(rng, lora=True), batches_of(rng)
    right, all_of_it = (parts(jacobians(model, batches, frozen=frozen))[1] for frozen in (False, True))
    expect(student.ntk_by_jacobian(model, batches).ft, right,
           LOGITS.format("") + ".ft, encoder frozen but for LoRA", {FROZEN: all_of_it})


@points(1)
def the_model_stays_as_it_is(student, rng):
    "Dropout is off (the model comes in eval mode), parameters and their .grad stay; results are float64"
    model, (batches, _) = classifier(rng).float(), batches_of(rng)
    model.dropout.p = 1.0  # in training mode phi would be 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    P, theirs = parts(jacobians(model, batches))
    found = student.ntk_by_jacobian(model, batches)
    called = LOGITS.format("") + ", model in float32, dropout 1 before the head"
    without_phi = torch.eye(3).expand(5, 5, 3, 3).transpose(1, 2)
    expect(found.pretrain, P, called + ".pretrain", {DROPOUT: without_phi}, 1e-4)
    expect(found.ft, theirs, called + ".ft", {DROPOUT: 0 * theirs}, 1e-4)
    for name, p in model.named_parameters():
        expect(p, before[name], f"{name} after {called}")
        require(p.grad is None, f"{name}.grad after {called}", "None, as before", p.grad)
    require(not model.training, f"model.training after {called}", "False, as before", model.training)
    for part, kernel in (("pretrain", found.pretrain), ("ft", found.ft)):
        require(kernel.dtype == torch.double, f"dtype of {called}.{part}", "torch.float64", str(kernel.dtype))


@points(1)
def delta_is_what_the_model_lacks(student, rng):
    "delta_i = onehot(y_i) - softmax(f(x_i)), (N, C), float64: minus the gradient of the loss by the logits"
    logits, labels = 2 * torch.randn(4, 3, generator=rng), torch.randint(3, (4,), generator=rng)
    exact = logits.double().requires_grad_()
    deltas = -torch.autograd.grad(F.cross_entropy(exact, labels, reduction="sum"), exact)[0]
    onehot = torch.eye(3, dtype=torch.double)[labels]
    found = student.initial_deltas(logits, labels)
    called = "initial_deltas(logits (4, 3), labels (4,))"
    expect(found, deltas, called, {SIGN: -deltas, NO_SOFTMAX: onehot - logits, MEAN: deltas / 4,
                                   "onehot alone: what the model already knows is not subtracted": onehot})
    require(found.dtype == torch.double, f"dtype of {called}", "torch.float64", str(found.dtype))


def random_ntk(student, rng, N=4, M=2, C=3):
    """An NTK of random Jacobians, and deltas (N, C)."""
    P, theirs = (torch.einsum("mcp,ndp->mcnd", J, J[:N]) for J in torch.randn(
        2, N + M, C, 20, generator=rng, dtype=torch.double))
    return (student.NTK(P[:N], theirs[:N], P[N:], theirs[N:]),
            torch.randn(N, C, generator=rng, dtype=torch.double))


def change(kernel, deltas):
    """sum_i K(x, x_i) delta_i, (M, C), by loops."""
    return torch.stack([sum(K_x[:, i] @ delta for i, delta in enumerate(deltas)) for K_x in kernel])


@points(1)
def a_step_changes_the_logits_by_eq_1(student, rng):
    "eq. (1): lr * sum_i (P + F)(x, x_i) delta_i, for the training x: (N, C)"
    ntk, deltas = random_ntk(student, rng)
    right, lr = 0.1 * change(ntk.pretrain + ntk.ft, deltas), 0.1
    theta = ntk.pretrain + ntk.ft
    expect(student.predicted_logit_change(ntk, deltas, lr), right,
           "predicted_logit_change(kernels (4, 3, 4, 3), deltas (4, 3), lr 0.1)",
           {MEAN: right / 4, CLASSES: lr * change(theta.transpose(1, 3), deltas), NO_LR: right / lr,
            ONLY_P: lr * change(ntk.pretrain, deltas), ONLY_F: lr * change(ntk.ft, deltas),
            "the other sign: a step goes along delta": -right})


@points(1)
def eq_1_holds_for_texts_not_trained_on(student, rng):
    "With test=True, x are the test texts and x_i still the training texts: (M, C)"
    ntk, deltas = random_ntk(student, rng)
    right = 0.1 * change(ntk.test_pretrain + ntk.test_ft, deltas)
    expect(student.predicted_logit_change(ntk, deltas, 0.1, test=True), right,
           "predicted_logit_change(test kernels (2, 3, 4, 3), deltas (4, 3), lr 0.1, test=True)",
           {TRAIN_FOR_TEST: 0.1 * change(ntk.pretrain + ntk.ft, deltas), MEAN: right / 4, NO_LR: 10 * right,
            ONLY_P: 0.1 * change(ntk.test_pretrain, deltas), ONLY_F: 0.1 * change(ntk.test_ft, deltas)})


@points(1)
def a_real_step_does_what_was_predicted(student, rng):
    "A small step of plain gradient descent on the summed loss moves the logits as eq. (1) says"
    model, (batches, test_batches), lr = classifier(rng), batches_of(rng), 1e-6
    labels = torch.randint(3, (5,), generator=rng)

    def logits(batches):
        return torch.cat([model(**batch) for batch in batches])

    predicted = student.predicted_logit_change(
        student.ntk_by_jacobian(model, batches, test_batches),
        student.initial_deltas(logits(batches).detach(), labels), lr, test=True)
    trained = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(logits(batches), labels, reduction="sum"), trained)
    moved = []
    with torch.no_grad():  # half a step forward, half a step back: what is left of second order cancels
        for step in (-lr / 2, lr):
            for p, g in zip(trained, gradients):
                p += step * g
            moved.append(logits(test_batches))
    expect(predicted, moved[0] - moved[1],
           "predicted_logit_change of your kernels and deltas, test=True, lr 1e-6",
           {"the other sign": moved[1] - moved[0], MEAN: (moved[0] - moved[1]) / 5}, 1e-3)


@points(1)
def ft_ratio_is_a_mean_of_ratios(student, rng):
    "mean over the training x of ||sum_i F(x, x_i) delta_i|| / ||sum_i (P + F)(x, x_i) delta_i||, a float"
    ntk, deltas = random_ntk(student, rng)
    theta = ntk.pretrain + ntk.ft
    top, both, head = (change(kernel, deltas) for kernel in (ntk.ft, theta, ntk.pretrain))
    lengths, whole = top.norm(dim=1), both.norm(dim=1)
    found = student.ft_ratio(ntk, deltas)
    called = "ft_ratio(kernels (4, 3, 4, 3), deltas (4, 3))"
    expect(found, float((lengths / whole).mean()), called,
           {RATIO_OF_MEANS: float(lengths.mean() / whole.mean()),
            F_TO_P: float((lengths / head.norm(dim=1)).mean()),
            NO_DELTA: float(ntk.ft.norm() / theta.norm()), NO_NORM: float((top.sum(1) / both.sum(1)).mean()),
            "the ratio of the norms over all texts at once": float(top.norm() / both.norm())})
    require(type(found) is float, f"type of {called}", "float", type(found).__name__)
