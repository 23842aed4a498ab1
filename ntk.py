"""The exact empirical neural tangent kernel of a classifier, and what the paper measures on it.

    Theta(x, x') = (df(x)/dtheta) (df(x')/dtheta)^T  =  P(x, x') + F(x, x')              Prop. 4.1
    P = (<phi(x), phi(x')> + 1) I_C                           the head's part, NTK.pretrain
    F = V (dphi(x)/dtheta_phi) (dphi(x')/dtheta_phi)^T V^T    the encoder's part, NTK.ft

over the parameters that require a gradient, at their present values, in eval mode. Read in order: the
definition, ntk_by_jacobian; the same numbers for a real encoder, one block at a time, empirical_ntk; the
three layer kernels that are its inner loop; what the paper measures.

Under LoRA theta_phi is A and B alone. LoRA starts at B = 0, and F is not zero there: the gradient by A is 0,
because A acts only through B, but the gradient by B is not. So at the start F comes from B alone.

Shapes: N training samples, M test samples, R = N + M, n samples of a batch, L tokens, C classes, h width, r
rank of V, p parameters; a layer (Linear, LayerNorm, Embedding) has T positions, widths in and out. A kernel
is (N, C, N, C), the paper's NC x NC matrix once reshaped; test kernels are (M, C, N, C).
"""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from lpft import fit_linear_probe, stratified_folds
from plumbing import devices, exact

MAX_NUMBERS = 2**23, 2**27  # in one piece of J: on a CPU, on CUDA


@dataclass
class NTK:
    """P and F of Prop. 4.1 on training pairs, and of test against training samples; float64, CPU."""

    pretrain: torch.Tensor  # P, (N, C, N, C)
    ft: torch.Tensor  # F, (N, C, N, C)
    test_pretrain: torch.Tensor | None = None  # P, (M, C, N, C)
    test_ft: torch.Tensor | None = None  # F, (M, C, N, C)


# ---------------------------------------------------------------------------- the definition


def ntk_by_jacobian(model, train_batches, test_batches=None):
    """Theta as Prop. 4.1 defines it: Jacobians of single samples, multiplied. Holds (N + M) C p floats.

    Batches are iterables of dicts {input_ids, attention_mask, token_type_ids}, each (n, L).
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def logits(trained, sample):  # of one sample: (C,)
        return functional_call(model, trained, (), {k: t.unsqueeze(0) for k, t in sample.items()})[0]

    def jacobians(batches):  # {name: (N, C, parameters of this name)}
        parts = [vmap(jacrev(logits), in_dims=(None, 0))(trained, batch) for batch in batches]
        return {name: torch.cat([part[name].flatten(2) for part in parts]) for name in trained}

    def contract(rows, columns, of_head):
        (n, c), m = rows["head.bias"].shape[:2], len(columns["head.bias"])
        total = torch.zeros(n, c, m, c, dtype=torch.double)  # (N or M, C, N, C)
        for name in trained:
            if name.startswith("head.") == of_head:
                total += torch.einsum("ncp,mdp->ncmd", rows[name], columns[name]).cpu()
        return total

    train = jacobians(train_batches)
    test = jacobians(test_batches) if test_batches else None
    return NTK(contract(train, train, True), contract(train, train, False),
               contract(test, train, True) if test else None,
               contract(test, train, False) if test else None)


# ---------------------------------------------------------------------------- the same, for a real encoder


def empirical_ntk(model, train_batches, test_batches=None):
    """The kernels of ntk_by_jacobian, one block of the encoder at a time, without a Jacobian of the whole.

    F = V K V^T, where K is the h x h kernel of the features. Write V = U S W with r singular values above 0.
    Then F = U (S W K W^T S) U^T: r backward passes are enough, one for each entry of S W phi, and the rank of
    F is at most N r. After LP the rows of V sum to zero, so r is at most C - 1.

    ValueError where the result would not be exact, ArithmeticError where autograd disagrees (spot_check).
    """
    exact.check_exactness(model, train_batches, test_batches)
    train, test = (devices.all_to_device(batches or (), model) for batches in (train_batches, test_batches))
    N, R = (sum(len(b["input_ids"]) for b in batches) for batches in (train, train + test))
    U, SW = split_head(model.head.weight)  # (C, r), (r, h)
    C, r = U.shape
    device = "cpu" if SW.device.type == "mps" else SW.device  # MPS has no float64
    kernel = torch.zeros(R * r, N * r, dtype=torch.double, device=device)
    with exact.full_precision():
        exact.print_size(model, trainable_layers(model.encoder), train + test, N, r)
        inputs, features = block_inputs(model, train + test)
        walk_blocks(model, inputs, SW, kernel)
        square = kernel[:N * r].tril()  # add_gram fills the lower triangle alone
        kernel = torch.cat([square + square.tril(-1).T, kernel[N * r:]]).cpu().view(R, r, N, r)
        ft = torch.einsum("cr,mrns,ds->mcnd", U, kernel, U)  # F, (R, C, N, C)
        pretrain = pretrain_kernel(features, features[:N], C)  # P, (R, C, N, C)
        exact.spot_check(model, train + test, N, pretrain, ft)
    return NTK(pretrain[:N], ft[:N], pretrain[N:] if test else None, ft[N:] if test else None)


def pretrain_kernel(features, train_features, num_classes):
    """P(x, x') = (<phi(x), phi(x')> + 1) I_C, of features (R, h) and (N, h): (R, C, N, C), float64."""
    products = features.cpu().double() @ train_features.cpu().double().T + 1  # (R, N)
    return torch.einsum("mn,cd->mcnd", products, torch.eye(num_classes, dtype=torch.double))


def split_head(weight):
    """V (C, h) = U (C, r), float64, times S W (r, h), in V's precision; r counts what is above rounding."""
    U, S, W = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
    rounding = max(len(weight) * torch.finfo(weight.dtype).eps, 1e-14)  # V's own; the decomposition's
    r = int((S > rounding * S[0]).sum())  # 0 if V = 0
    return U[:, :r], (S[:r, None] * W[:r]).to(weight)


def block_inputs(model, batches):
    """One forward pass: the arguments each block is called with, inputs[block][batch], and phi, (R, h).

    Block 0 is the embeddings, block k is encoder.layers[k - 1].
    """
    inputs = [[((), batch) for batch in batches]] + [[] for _ in model.encoder.layers]
    with torch.no_grad(), ExitStack() as hooks:
        for layer, calls in zip(model.encoder.layers, inputs[1:]):
            hooks.enter_context(layer.register_forward_pre_hook(
                lambda layer, *arguments, calls=calls: calls.append(arguments), with_kwargs=True))
        return inputs, torch.cat([model.features(**batch) for batch in batches])


def walk_blocks(model, inputs, SW, kernel):
    """Add the kernel of every layer, from the last block down to the lowest that trains.

    `above` holds, for each batch, the gradients of S W phi by the output of the block: (r, n, L, h), at first
    by phi, (r, n, h).
    """
    blocks, layers = [model.encoder.embed, *model.encoder.layers], trainable_layers(model.encoder)
    last = blocks[-1]
    blocks[-1] = lambda *a, **k: model.pool(last(*a, **k), *(mask[:, 0, 0] for mask in a[1:2]))  # phi, (n, h)
    above = [SW[:, None].expand(-1, len(kwargs["input_ids"]), -1) for _, kwargs in inputs[0]]  # (r, n, h)
    lowest = min((b for b, some in enumerate(layers) if some and len(SW)), default=len(blocks))
    for b in tqdm(range(len(blocks) - 1, lowest - 1, -1), desc="NTK", unit="block"):
        wide, narrow = defaultdict(list), defaultdict(list)
        for i, (args, kwargs) in enumerate(inputs.pop()):
            calls, above[i] = run_block(blocks[b], layers[b], args, kwargs, above[i], b > lowest)
            for layer, a, g in calls:
                for name, p in layer.named_parameters(recurse=False):
                    if p.requires_grad and name == "bias":
                        narrow[p].append(g.sum(2))  # J = sum_t g_t, (n, r, out)
                    elif p.requires_grad and isinstance(layer, nn.LayerNorm):
                        narrow[p].append(layernorm_jacobian(layer, a, g))
                    elif p.requires_grad:
                        wide[layer].append((a, g))
        if narrow:
            exact.add_gram(kernel, torch.cat([torch.cat(J) for J in narrow.values()], 2).flatten(0, 1))
        while wide:
            layer, stored = wide.popitem()
            compute = embedding_kernel if isinstance(layer, nn.Embedding) else linear_kernel
            compute(kernel, layer, *zip(*stored))


def trainable_layers(encoder):
    """For each block, the modules with parameters of their own that train."""
    embeddings = [module for name, module in encoder.named_modules() if not name.startswith("layers.")]
    return [[module for module in modules if any(p.requires_grad for p in module.parameters(recurse=False))]
            for modules in (embeddings, *(layer.modules() for layer in encoder.layers))]


def run_block(block, layers, args, kwargs, above, input_trains):
    """Forward and backward through one block: [(layer, a, g), ...], and the gradients of its input.

    a (n, T, in) is the input of a layer, g (n, r, T, out) are the gradients of S W phi by its output.
    """
    calls, inputs = {}, [args[0].requires_grad_()] if input_trains else []
    with torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(
                lambda layer, args, output: calls.update({layer: (args[0].detach(), output)})))
        y = block(*args, **kwargs)
    targets = [output for _, output in calls.values()] + inputs  # no weights, so none gets a gradient
    passes = [torch.autograd.grad(y, targets, g, retain_graph=True) for g in above]
    gradients = [torch.stack(of_one, 1) for of_one in zip(*passes)]
    above = gradients.pop().transpose(0, 1) if input_trains else None  # (r, n, L, h)
    return [(layer, a, g) for (layer, (a, _)), g in zip(calls.items(), gradients)], above


# ---------------------------------------------------------------------------- the kernels of three layers


def linear_kernel(kernel, layer, a, g):
    """Add J J^T of a Linear's weight, J = sum_t g_t a_t^T, (out, in) for each sample and row of S W.

    kernel (R r, N r), float64: row i r + k is sample i, row k of S W; the lower triangle counts. a (n, T, in)
    and g (n, r, T, out) of each batch. J is formed for a few outputs at a time, and not at all where there is
    one position: J J^T = (a a^T) * (g g^T).
    """
    R, r, (out, width) = sum(map(len, a)), g[0].shape[1], layer.weight.shape
    if all(x.shape[1] == 1 for x in a):
        a, g = torch.cat(a)[:, 0].repeat_interleave(r, 0), torch.cat(g).flatten(0, 2)  # (R r, in), (R r, out)
        rows = kernel.shape[1]
        kernel += ((a @ a[:rows].T) * (g @ g[:rows].T)).to(kernel.device)
        return
    size = max(1, min(out, MAX_NUMBERS[g[0].is_cuda] // (R * r * width)))  # outputs at a time
    J = g[0].new_empty(R, r, size, width)
    for o in range(0, out, size):
        J, first = J[:, :, :out - o], 0
        for a_n, g_n in zip(a, g):
            for k in range(r):
                torch.bmm(g_n[:, k, :, o:o + size].transpose(1, 2), a_n, out=J[first:first + len(a_n), k])
            first += len(a_n)
        exact.add_gram(kernel, J.flatten(2).flatten(0, 1))


def layernorm_jacobian(layer, a, g):
    """J of a LayerNorm's weight, sum_t g_t * x_hat_t, x_hat its normalised input a (n, T, h): (n, r, h)."""
    x_hat = F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    return torch.einsum("nrth,nth->nrh", g, x_hat)


def embedding_kernel(kernel, layer, ids, g):
    """Add J J^T of an Embedding's weight: row v of J is the sum of g_t over the positions t of token id v.

    ids (n, T) and g (n, r, T, h) of each batch; padding_idx has no gradient. An entry of two samples is a sum
    over the ids that both contain. J is stored for the pairs (id, sample) that occur; ids in equally many
    samples are one batched product.
    """
    R, r, h = sum(map(len, ids)), g[0].shape[1], g[0].shape[3]
    samples = torch.arange(R, device=g[0].device).split([len(x) for x in ids])
    samples = torch.cat([s[:, None].expand_as(x).flatten() for s, x in zip(samples, ids)])  # (positions,)
    ids = torch.cat([x.flatten() for x in ids])  # (positions,)
    g = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in g])  # (positions, r, h)
    if layer.padding_idx is not None:  # this row has no gradient
        g[ids == layer.padding_idx] = 0
    pairs, where = (ids * R + samples).unique(return_inverse=True)  # sorted by id
    J = g.new_zeros(len(pairs), r, h).index_add_(0, where, g)
    counts = (pairs // R).unique_consecutive(return_counts=True)[1]  # how many samples contain each id
    square = kernel.new_zeros(R * r, R * r)
    for count in counts.unique().tolist():
        chosen = (counts == count).repeat_interleave(counts)
        x, J_x = (pairs[chosen] % R).view(-1, count), J[chosen].view(-1, count, r, h)  # (ids, count, ...)
        if count == R:  # [CLS], a position: an ordinary J
            exact.add_gram(kernel, J_x.permute(1, 2, 0, 3).flatten(2).flatten(0, 1))
            continue
        J_x = J_x.flatten(1, 2)  # (ids, count r, h)
        products = (J_x @ J_x.transpose(1, 2)).to(kernel)  # (ids, count r, count r)
        rows = (x[..., None] * r + torch.arange(r, device=x.device)).flatten(1).to(kernel.device)
        square.index_put_((rows[:, :, None], rows[:, None]), products, accumulate=True)
    kernel += square[:, :kernel.shape[1]]


# ---------------------------------------------------------------------------- what the paper measures


def initial_deltas(logits, labels):
    """delta_i = onehot(y_i) - softmax(f_0(x_i)), (N, C): minus the gradient of the loss by the logits."""
    return F.one_hot(labels, logits.shape[1]).double() - logits.double().softmax(1)


def predicted_logit_change(ntk, deltas, lr, test=False):
    """eq. (1): lr * sum_i (P + F)(x, x_i) delta_i, for training x (N, C), or with test=True (M, C).

    The first-order effect of one gradient step of size lr on the summed loss; deltas (N, C). Training takes
    Adam steps with clipping and dropout, on batches: eq. (1) and (2) describe one plain gradient step.
    """
    theta = ntk.test_pretrain + ntk.test_ft if test else ntk.pretrain + ntk.ft
    return lr * torch.einsum("mcnd,nd->mc", theta, deltas.double())


def predicted_feature_change(model, train_batches, deltas, lr, batches):
    """eq. (2): lr * sum_i Theta_phi(x, x_i) V^T delta_i for the M samples x of `batches`, (M, h).

    Theta_phi(x, x_i) = J(x) J(x_i)^T, J = dphi/dtheta_phi; deltas (N, C), in batch order. No Jacobian
    is needed: the step of theta_phi, sum_i J(x_i)^T V^T delta_i, is a backward pass; J(x) times it, the
    derivative along it, a forward one.
    """
    exact.check_exactness(model, train_batches, batches)
    trained = {name: p.detach() for name, p in model.encoder.named_parameters() if p.requires_grad}
    pulled = deltas.to(model.head.weight) @ model.head.weight.detach()  # V^T delta_i, (N, h)
    step = dict.fromkeys(trained, 0.0)

    def features(batch):
        return lambda t: model.pool(functional_call(model.encoder, t, (), batch), batch.get("attention_mask"))

    with exact.full_precision(), sdpa_kernel(SDPBackend.MATH):  # no other attention code can do jvp
        for batch in devices.all_to_device(train_batches, model):
            n = len(batch["input_ids"])
            gradients = vjp(features(batch), trained)[1](pulled[:n])[0]
            step = {name: step[name] + g for name, g in gradients.items()}
            pulled = pulled[n:]
        changes = [jvp(features(b), (trained,), (step,))[1] for b in devices.all_to_device(batches, model)]
    return lr * torch.cat(changes)


def ft_ratio(ntk, deltas):
    """Table 2: mean over training x of ||sum_i F(x, x_i) delta_i|| / ||sum_i (P + F)(x, x_i) delta_i||."""
    from_ft = torch.einsum("mcnd,nd->mc", ntk.ft, deltas.double())  # (N, C)
    return float((from_ft.norm(dim=1) / predicted_logit_change(ntk, deltas, 1.0).norm(dim=1)).mean())


def kernel_statistics(kernel):
    """Of a kernel (N, C, N, C) as an NC x NC matrix, in a dict:

    rank             number of singular values above eps NC times the largest, eps = 1.2e-7 of float32
    frobenius        Frobenius norm
    singular_values  divided by the largest, falling (Fig. 2, 7)
    """
    matrix = kernel.flatten(2).flatten(0, 1).double()  # (N C, N C)
    values = torch.linalg.svdvals(matrix)
    tolerance = max(matrix.shape) * torch.finfo(torch.float32).eps * values[0]
    return {"rank": int((values > tolerance).sum()), "frobenius": float(matrix.norm()),
            "singular_values": values / values[0].clamp(min=1e-300)}


def kernel_regression(train_kernel, train_labels, test_kernel, test_labels):
    """Table 2's kernel regression: L2 logistic regression on kernel rows, one row per sample and logit.

    Row (i, c) of the NC x NC matrix is the input, its target is whether c is the label of sample i. Returns a
    dict: train_accuracy, test_accuracy of classes (the logit with the highest score), train_logit_accuracy,
    test_logit_accuracy of the single decisions, and inverse_l2, chosen by 5-fold cross-validation; the C rows
    of a sample are in one fold. Both are divided by the training kernel's mean diagonal: one grid fits all.
    """
    C, rows = train_kernel.shape[1], train_kernel.flatten(2).flatten(0, 1)  # (N C, N C)
    scale = float(rows.diagonal().mean()) or 1.0  # 0: F of a head V = 0
    probe = fit_linear_probe(rows / scale, F.one_hot(train_labels, C).flatten(), 2,
                             fold_of=stratified_folds(train_labels).repeat_interleave(C))
    result = {"inverse_l2": probe.inverse_l2}
    for name, kernel, labels in (("train", train_kernel, train_labels), ("test", test_kernel, test_labels)):
        logits = kernel.flatten(2) / scale @ probe.weight.T + probe.bias  # (N or M, C, 2): no, yes
        score, target = logits[:, :, 1] - logits[:, :, 0], F.one_hot(labels, C)  # (N or M, C)
        result[f"{name}_accuracy"] = float((score.argmax(1) == labels).double().mean())
        result[f"{name}_logit_accuracy"] = float(((score > 0) == (target == 1)).double().mean())
    return result
