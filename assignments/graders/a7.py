"""The kernel of one layer: Jacobians by its weight, from its input and the gradients by its output."""

import contextlib
import io
import traceback

import torch
import torch.nn as nn

import model as project
from assignments.graders import GET_BY, Wrong, expect, points

SAME_POSITION = "multiplying position by position: sum_t <g_t, g'_t> <a_t, a'_t>, before J is summed"
SUMMED_FIRST = "summing a and g over positions first: (sum_t g_t) (sum_t a_t)^T"
WITH_BIAS = "adding the kernel of the bias, which is added elsewhere"
PROBE_FIRST = "rows by probe, then sample, where they are by sample, then probe"
IN_BATCH = PROBE_FIRST + ", within each batch"
ONE_BATCH = "exact.add_gram for each batch: J has to hold the rows of all batches, and is then added once"
A_NOT_LINED_UP = "g is (n, r, T, out), a is (n, T, in): the n of a meets the r of g; a[:, None] lines them up"
NOT_ADDED = "writing over what was in the kernel, where J J^T is to be added"
NEW_TENSOR = "a new tensor: the kernel that was given did not change"
ONLY_INPUT = "the product of the inputs alone, without g"
NOT_NORMALISED = "a in place of x_hat: the input is not normalised"
NOT_LINED_UP = "g is (n, r, T, h), x_hat is (n, T, h): its n meets the r of g; x_hat[:, None] lines them up"
WITH_WEIGHT = "w * x_hat in place of x_hat: the derivative is by w, and w itself does not stay"
PROBES_LEAD = "the axes (r, n, h), where they are (n, r, h)"
OUTPUT = "the output of the layer, with its weight and bias, in place of x_hat"
UNBIASED = "the variance divided by h - 1, not by h"
NO_EPS = "leaving out eps"
POSITIONS_FIRST = "summing g and x_hat over the positions, then multiplying"
LAST_COUNTS = "of an id that is repeated in a text, only the last position counts"
PADDING = "a gradient for padding_idx, which has none"
PADDING_ZERO = "padding id 0 is an id too, and `if layer.padding_idx` is false for it; compare with None"
ALWAYS_ZERO = "id 0 taken for padding, where layer.padding_idx says which id that is"
IDS_IGNORED = "summing g over all positions, whatever the id: the rows v of J are mixed up"
MEAN = "the mean, not the sum, over the positions of an id"
ABOVE = "one of your three layer kernels is wrong: mend the checks above first, and this one follows"
LINEAR = "linear_kernel(kernel (8, 6), layer 3 to 5, a (2, T, 3) twice, g (2, 2, T, 5) twice)"


def kernel_with(rng, rows, columns):
    """A kernel in which something stands already, in its lower triangle, (R r, N r) float64."""
    return 3 * torch.randn(rows, columns, generator=rng, dtype=torch.double).tril()


def rows_of(layer, inputs, gradients):
    """J (R r, parameters of the weight) by autograd: a row for each sample and probe."""
    rows = []
    for a, g in zip(inputs, gradients):
        for a_n, g_n in zip(a, g):
            for probe in g_n:  # (T, out)
                rows.append(torch.autograd.grad((layer(a_n) * probe).sum(), layer.weight)[0].flatten())
    return torch.stack(rows).double()


def gram(J, columns):
    return J @ J[:columns].T


def by_positions(first, second):
    """sum_t <first_t, first'_t> <second_t, second'_t>, of tensors (rows, T, ...) of the same T."""
    return torch.einsum("itj,ktj,itl,ktl->ik", first, first, second, second)


def check(compute, kernel, J, arguments, called, wrong, r):
    """Wrong unless compute(kernel, *arguments) adds J J^T to the lower triangle."""
    before, columns = kernel.clone(), kernel.shape[1]
    right, (by_probe, *of_batches) = gram(J, columns), [
        rows.unflatten(0, (-1, r)).transpose(0, 1).flatten(0, 1)  # (R r or n r, p)
        for rows in (J, *J.split([len(x) * r for x in arguments[1]]))]
    wrong = {name: before + value for name, value in wrong.items()}
    wrong |= {NOT_ADDED: right, NEW_TENSOR: before, PROBE_FIRST: before + gram(by_probe, columns),
              IN_BATCH: before + gram(torch.cat(of_batches), columns)}
    try:
        compute(kernel, *arguments)
    except RuntimeError as error:
        given = [frame.f_locals.get("J") for frame, _ in traceback.walk_tb(error.__traceback__)
                 if frame.f_code.co_name == "add_gram"]
        if given and isinstance(given[0], torch.Tensor) and given[0].shape[:1].numel() < len(J):
            error.add_note(GET_BY + ONE_BATCH)
        raise
    expect(kernel.tril(), (before + right).tril(), called + ": the lower triangle of the kernel",
           {name: value.tril() for name, value in wrong.items()})


def linear_inputs(rng, lengths, width=3, dtype=torch.double, odd=2):
    """A Linear with 5 outputs; for each batch, of T positions, a (n, T, in) and g (n, 2, T, 5).

    n is `odd` for an odd T, else 1.
    """
    layer = nn.Linear(width, 5).to(dtype)
    a = [torch.randn(odd if T % 2 else 1, T, width, generator=rng, dtype=dtype) for T in lengths]
    g = [torch.randn(len(x), 2, x.shape[1], 5, generator=rng, dtype=dtype) for x in a]
    return layer, a, g


def wrong_of_linear(J, a, g, columns):
    r = g[0].shape[1]
    inputs = torch.cat([x.sum(1).repeat_interleave(r, 0) for x in a])  # (R r, in)
    bias = torch.cat([x.sum(2).flatten(0, 1) for x in g])  # (R r, out)
    found = {WITH_BIAS: gram(J, columns) + gram(bias, columns), ONLY_INPUT: gram(inputs, columns),
             SUMMED_FIRST: gram(inputs, columns) * gram(bias, columns)}
    if {len(x) for x in a} <= {1, r}:  # else an error
        rows = [torch.einsum("nkto,kti->nkoi", y, x.expand(r, -1, -1)).flatten(2) for x, y in zip(a, g)]
        found[A_NOT_LINED_UP] = gram(torch.cat(rows).flatten(0, 1), columns)
    if len({x.shape[1] for x in a}) == 1:
        a_rows = torch.cat([x.repeat_interleave(r, 0) for x in a])
        g_rows = torch.cat([x.flatten(0, 1) for x in g])
        found[SAME_POSITION] = by_positions(a_rows, g_rows)[:, :columns]
    return found


@points(1)
def linear_of_one_position(student, rng):
    "T = 1: J = g a^T, so that <J, J'> = <g, g'> <a, a'>, for every sample and probe"
    layer, a, g = linear_inputs(rng, (1, 1))
    J = rows_of(layer, a, g)
    check(student.linear_kernel, kernel_with(rng, 8, 6), J, (layer, a, g),
          LINEAR.replace("T", "1"),
          wrong_of_linear(J, a, g, 6), 2)


@points(2)
def linear_sums_over_positions(student, rng):
    "J = sum_t g_t a_t^T is a sum over positions; only then come the products <J, J'>"
    layer, a, g = linear_inputs(rng, (3, 3))
    J = rows_of(layer, a, g)
    check(student.linear_kernel, kernel_with(rng, 8, 6), J, (layer, a, g),
          LINEAR.replace("T", "3"),
          wrong_of_linear(J, a, g, 6), 2)


@points(1)
def linear_takes_batches_of_any_length(student, rng):
    "Batches differ in n and T; rows are in the order of the batches, the first N r of them are the columns"
    before = student.MAX_NUMBERS
    try:
        for limit, lengths, width in ((0, (1, 4, 3), 3), (12, (2, 1), 3), (48, (2, 1), 3), (10**6, (3,), 1),
                                      (10**6, (2, 2), 3), (10**6, (4, 1, 1, 2), 3)):
            student.MAX_NUMBERS = limit, limit  # a solution may form J in parts, of so many numbers
            dtype = torch.float32 if limit == 48 else torch.double
            layer, a, g = linear_inputs(rng, lengths, width, dtype, odd=3)  # n is not r
            J = rows_of(layer, a, g)
            columns, shapes = len(J) - 2, [tuple(x.shape) for x in a]
            check(student.linear_kernel, kernel_with(rng, len(J), columns), J, (layer, a, g),
                  f"linear_kernel(kernel ({len(J)}, {columns}), layer {width} to 5, a {shapes}, g), {dtype}",
                  wrong_of_linear(J, *([x.double() for x in part] for part in (a, g)), columns), 2)
    finally:
        student.MAX_NUMBERS = before


@points(2)
def layernorm_multiplies_by_the_normalised_input(student, rng):
    "J = sum_t g_t * x_hat_t, x_hat = (a - mean) / sqrt(variance + eps), entry by entry: (n, r, h)"
    layer = nn.LayerNorm(4, eps=0.2).double()
    for n, r, T in ((2, 2, 3), (3, 2, 5)):  # where n is r, axes that are not lined up are no error
        layer.weight.data, layer.bias.data = torch.randn(2, 4, generator=rng, dtype=torch.double)
        a = torch.randn(n, T, 4, generator=rng, dtype=torch.double) + 1
        g = torch.randn(n, r, T, 4, generator=rng, dtype=torch.double)
        J = rows_of(layer, [a], [g]).view(n, r, 4)
        expect(student.layernorm_jacobian(layer, a, g), J,
               f"layernorm_jacobian(layer of 4, a {tuple(a.shape)}, g {tuple(g.shape)})",
               wrong_of_layernorm(J, layer, a, g))


def wrong_of_layernorm(J, layer, a, g):
    def with_x_hat(x_hat):
        return (g * x_hat[:, None]).sum(2)

    centred = a - a.mean(2, keepdim=True)
    x_hat = centred / (a.var(2, correction=0, keepdim=True) + layer.eps).sqrt()
    found = {NOT_NORMALISED: with_x_hat(a), OUTPUT: with_x_hat(layer(a).detach()),
             UNBIASED: with_x_hat(centred / (a.var(2, keepdim=True) + layer.eps).sqrt()),
             NO_EPS: with_x_hat(centred / a.std(2, correction=0, keepdim=True)),
             WITH_WEIGHT: with_x_hat(layer.weight.detach() * x_hat),
             POSITIONS_FIRST: g.sum(2) * x_hat.sum(1)[:, None], PROBES_LEAD: J.transpose(0, 1),
             "the mean over positions, not the sum": J / a.shape[1]}
    return found | {NOT_LINED_UP: (g * x_hat).sum(2)} if len(a) == g.shape[1] else found


def embedding_inputs(rng, texts, padding=None, r=2):
    """An Embedding of 7 ids, ids (n, T) of the batches as given, and g (n, r, T, 3)."""
    layer = nn.Embedding(7, 3, padding_idx=padding).double()
    ids = [torch.tensor(batch) for batch in texts]
    return layer, ids, [torch.randn(len(x), r, x.shape[1], 3, generator=rng, dtype=torch.double) for x in ids]


def check_embedding(student, rng, texts, padding, columns, what):
    layer, ids, g = embedding_inputs(rng, texts, padding)
    J = rows_of(layer, ids, g)
    with_padding, without_0 = (rows_of(nn.Embedding(7, 3, padding_idx=i).double(), ids, g) for i in (None, 0))
    last, divided = [], []
    for x, g_x in zip(ids, g):
        for text, g_text in zip(x.tolist(), g_x):
            for probe in g_text:
                last.append(torch.zeros(7, 3, dtype=torch.double))
                divided.append(torch.zeros(7, 3, dtype=torch.double))
                for t, token in enumerate(text):
                    if token != padding:
                        last[-1][token] = probe[t]
                        divided[-1][token] += probe[t] / text.count(token)
    absent = -1 if padding is None else padding
    mixed = [(g_x * (x != absent)[:, None, :, None]).sum(2).flatten(0, 1) for x, g_x in zip(ids, g)]
    wrong = {PADDING_ZERO if padding == 0 else PADDING: with_padding, ALWAYS_ZERO: without_0,
             LAST_COUNTS: torch.stack(last).flatten(1),
             IDS_IGNORED: torch.cat(mixed), MEAN: torch.stack(divided).flatten(1)}
    check(student.embedding_kernel, kernel_with(rng, len(J), columns), J, (layer, ids, g),
          f"embedding_kernel(kernel ({len(J)}, {columns}), 7 ids, ids {[x.tolist() for x in ids]}, g){what}",
          {name: gram(rows, columns) for name, rows in wrong.items()}, 2)


@points(1)
def embedding_rows_belong_to_ids(student, rng):
    "Row v of J is the sum of g_t over the positions of id v: texts meet only in ids that both contain"
    order = (torch.randperm(6, generator=rng) + 1).tolist()
    check_embedding(student, rng, [[[order[0], order[1], order[2]], [order[1], order[3], order[0]]],
                                   [[order[4], order[5], order[0]]]], None, 6, "")


@points(2)
def embedding_sums_repeated_ids(student, rng):
    "An id that a text contains twice has the sum of both gradients as its row"
    v, w, u = (torch.randperm(6, generator=rng)[:3] + 1).tolist()
    check_embedding(student, rng, [[[v, v, w, v], [w, u, v, u]], [[w, w], [u, v]], [[u, u, u]]], None, 6, "")
    check_embedding(student, rng, [[[v, w, v], [u, u, v], [w, u, u]]], None, 4, "")


@points(1)
def padding_has_no_gradient(student, rng):
    "The row of padding_idx stays 0, however many positions are padded; any id can be padding_idx, 0 as well"
    v, w, u = (torch.randperm(6, generator=rng)[:3] + 1).tolist()
    for v, w, padding in ((0, v, w), (v, w, u), (v, w, 0)):
        check_embedding(student, rng, [[[v, w, padding], [w, padding, padding]], [[padding, v, w, v]],
                                       [[v, v]]], padding, 4, f", padding_idx {padding}")


def tiny(rng):
    """A tiny classifier, float64, in eval mode, of random weights; batches of training and of test texts."""
    config = project.EncoderConfig(vocab_size=8, hidden_size=4, num_hidden_layers=2, num_attention_heads=2,
                                   intermediate_size=6, max_position_embeddings=6)
    model = project.Classifier(project.Encoder(config), 2).double().eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.double) / 2
    batches = []
    for lengths in ((4, 2), (3,), (2, 5)):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, 8, mask.shape, generator=rng)
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": 0 * mask})
    return model, batches[:2], batches[2:]


@points(2)
def the_engine_gives_f_with_them(student, rng):
    "empirical_ntk, with your three functions, gives the F of autograd on a whole Transformer"
    model, batches, test_batches = tiny(rng)
    trained = [p for p in model.encoder.parameters()]
    J = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(f, trained, retain_graph=True)])
                     for batch in batches + test_batches for f in model(**batch).flatten()])  # (R C, p)
    right = gram(J, 6).view(5, 2, 3, 2)
    called = "empirical_ntk(model of 2 layers, 3 training texts, 2 test texts)"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = student.empirical_ntk(model, batches, test_batches)
    except ArithmeticError as error:
        raise Wrong(f"first    {ABOVE}\ncalled   {called}\nexpected the F of autograd\n"
                    f"found    {str(error).partition('. Does')[0]}") from None
    except Exception as error:
        error.add_note(f"first    {ABOVE}")
        raise
    expect(found.ft, right[:3], called + ".ft")
    expect(found.test_ft, right[3:], called + ".test_ft")
