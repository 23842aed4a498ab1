from assignments.graders import a7

LINEAR = '''
def linear_kernel(kernel, layer, a, g):
    rows = []
    for a_n, g_n in zip(a, g):
        for x, of_probes in zip(a_n, g_n):
            for probe in of_probes:  # (T, out)
                rows.append((probe.T @ x).flatten())
    J = torch.stack(rows).double()
    kernel += J @ J[:kernel.shape[1]].T
'''
AT_ONCE = '''
def linear_kernel(kernel, layer, a, g):
    J = torch.cat([torch.einsum("nrto,nti->nroi", y, x).flatten(0, 1) for x, y in zip(a, g)])
    exact.add_gram(kernel, J.flatten(1).double())
'''
PAIRS = '''
def linear_kernel(kernel, layer, a, g):
    samples = [(x, g_x) for a_n, g_n in zip(a, g) for x, g_x in zip(a_n, g_n)]
    r = g[0].shape[1]
    for i, (x, g_x) in enumerate(samples):
        for j, (y, g_y) in enumerate(samples[:kernel.shape[1] // r]):
            if j <= i:  # <J, J'> = sum over pairs of positions of <g_t, g'_s> <a_t, a'_s>
                kernel[i * r:i * r + r, j * r:j * r + r] += torch.einsum("kto,lso,ti,si->kl", g_x, g_y, x, y)
'''
NORM = '''
def layernorm_jacobian(layer, a, g):
    centred = a - a.mean(2, keepdim=True)
    x_hat = centred / torch.sqrt(centred.square().mean(2, keepdim=True) + layer.eps)
    return (g * x_hat[:, None]).sum(2)
'''
NORM_LOOP = '''
def layernorm_jacobian(layer, a, g):
    J = torch.zeros_like(g[:, :, 0])
    for t in range(a.shape[1]):
        x = a[:, t]
        x_hat = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + layer.eps) ** 0.5
        for k in range(g.shape[1]):
            J[:, k] += g[:, k, t] * x_hat
    return J
'''
EMBEDDING = '''
def embedding_kernel(kernel, layer, ids, g):
    rows = []
    for x, g_x in zip(ids, g):
        for text, of_probes in zip(x.tolist(), g_x):
            for probe in of_probes:
                J = torch.zeros(layer.num_embeddings, layer.embedding_dim, dtype=torch.double)
                for t, v in enumerate(text):
                    if v != layer.padding_idx:
                        J[v] += probe[t]
                rows.append(J.flatten())
    J = torch.stack(rows)
    kernel += J @ J[:kernel.shape[1]].T
'''
ONEHOT = '''
def embedding_kernel(kernel, layer, ids, g):
    parts = []
    for x, g_x in zip(ids, g):
        onehot = F.one_hot(x, layer.num_embeddings).to(g_x)  # (n, T, ids)
        if layer.padding_idx is not None:
            onehot[:, :, layer.padding_idx] = 0
        parts.append(torch.einsum("ntv,nrth->nrvh", onehot, g_x).flatten(2).flatten(0, 1))
    exact.add_gram(kernel, torch.cat(parts))
'''
RIGHT = {
    "loops": {"linear_kernel": LINEAR, "layernorm_jacobian": NORM_LOOP, "embedding_kernel": EMBEDDING},
    "J of all batches at once": {"linear_kernel": AT_ONCE},
    "pairs and one-hot": {"linear_kernel": PAIRS, "layernorm_jacobian": NORM, "embedding_kernel": ONEHOT},
}


def changed(name, source, *pairs):
    for old, new in pairs:
        assert old in source, old
        source = source.replace(old, new)
    return {name: source}


def of_linear(*pairs):
    return changed("linear_kernel", LINEAR, *pairs)


def of_embedding(*pairs):
    return changed("embedding_kernel", EMBEDDING, *pairs)


PRODUCT = "kernel += J @ J[:kernel.shape[1]].T"
J_OF = "(probe.T @ x).flatten()"
BY_POSITION = '''
def linear_kernel(kernel, layer, a, g):
    samples = [(x, g_x) for a_n, g_n in zip(a, g) for x, g_x in zip(a_n, g_n)]
    r = g[0].shape[1]
    for i, (x, g_x) in enumerate(samples):
        for j, (y, g_y) in enumerate(samples[:kernel.shape[1] // r]):
            T = min(len(x), len(y))
            kernel[i * r:i * r + r, j * r:j * r + r] += torch.einsum(
                "kto,lto,ti,ti->kl", g_x[:, :T], g_y[:, :T], x[:T], y[:T])
'''
BY_BATCH = '''
def linear_kernel(kernel, layer, a, g):
    for x, y in zip(a, g):
        J = torch.einsum("nrto,nti->nroi", y, x).flatten(2).flatten(0, 1)
        exact.add_gram(kernel, J.double())
'''
WRONG = {
    a7.IN_BATCH: changed("linear_kernel", AT_ONCE, ("->nroi", "->rnoi")),
    a7.A_NOT_LINED_UP: changed("linear_kernel", AT_ONCE, (
        'torch.einsum("nrto,nti->nroi", y, x)', "(y.transpose(2, 3) @ x)")),
    a7.NOT_LINED_UP: changed("layernorm_jacobian", NORM, ("x_hat[:, None]", "x_hat")),
    a7.WITH_WEIGHT: changed("layernorm_jacobian", NORM, ("x_hat[:, None]", "layer.weight * x_hat[:, None]")),
    a7.PROBES_LEAD: changed("layernorm_jacobian", NORM, (".sum(2)", ".sum(2).transpose(0, 1)")),
    a7.ONE_BATCH: {"linear_kernel": BY_BATCH},
    a7.PADDING_ZERO: of_embedding(("if v != layer.padding_idx:",
                                   "if not layer.padding_idx or v != layer.padding_idx:")),
    a7.ALWAYS_ZERO: of_embedding(("if v != layer.padding_idx:", "if v != 0:")),
    a7.SAME_POSITION: {"linear_kernel": BY_POSITION},
    a7.SUMMED_FIRST: of_linear((J_OF, "torch.outer(probe.sum(0), x.sum(0)).flatten()")),
    a7.WITH_BIAS: of_linear((J_OF, "torch.cat([(probe.T @ x).flatten(), probe.sum(0)])")),
    a7.PROBE_FIRST: of_linear(("    kernel +=", "    J = J.unflatten(0, (-1, g[0].shape[1]))\n"
                               "    J = J.transpose(0, 1).flatten(0, 1)\n    kernel +=")),
    a7.NOT_ADDED: of_linear((PRODUCT, "kernel.copy_(J @ J[:kernel.shape[1]].T)")),
    a7.NEW_TENSOR: of_linear((PRODUCT, "kernel = kernel + J @ J[:kernel.shape[1]].T\n    return kernel")),
    a7.ONLY_INPUT: of_linear((J_OF, "x.sum(0)")),
    a7.NOT_NORMALISED: changed("layernorm_jacobian", NORM, ("x_hat[:, None]", "a[:, None]")),
    a7.OUTPUT: changed("layernorm_jacobian", NORM, ("x_hat[:, None]", "layer(a)[:, None]")),
    a7.UNBIASED: changed("layernorm_jacobian", NORM, ("centred.square().mean(2", "a.var(2")),
    a7.NO_EPS: changed("layernorm_jacobian", NORM, (" + layer.eps", "")),
    a7.POSITIONS_FIRST: changed("layernorm_jacobian", NORM, ("(g * x_hat[:, None]).sum(2)",
                                                             "g.sum(2) * x_hat.sum(1)[:, None]")),
    a7.LAST_COUNTS: of_embedding(("J[v] += probe[t]", "J[v] = probe[t].double()")),
    a7.PADDING: of_embedding(("if v != layer.padding_idx:", "if True:")),
    a7.IDS_IGNORED: of_embedding(("J[v] += probe[t]", "J[0] += probe[t]")),
    a7.MEAN: of_embedding(("J[v] += probe[t]", "J[v] += probe[t] / text.count(v)")),
}
SIZE = "size = max(1, min(out, MAX_NUMBERS[g[0].is_cuda] // (R * r * width)))  # outputs at a time"
EQUIVALENT = {
    ("if all(x.shape[1] == 1 for x in a):", "pass"): "a short cut: J is formed, to the same product",
    (SIZE, "2"): "two outputs at once at least: more memory, the same sums",
    (SIZE, "*"): "all outputs at once: more memory, the same sums",
    ("if count == R:  # [CLS], a position: an ordinary J", "pass"): "a short cut to the same product",
}
