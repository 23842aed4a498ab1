"""Self-attention: every token takes from all tokens, in several heads, and nothing from padding."""

import math

import torch

from assignments.graders import expect, points, require

NO_SCALE = "no division by sqrt(d)"
SCALE_H = "dividing by sqrt(h), where d = h / heads is the length of a query"
SCALE_D = "dividing by d instead of its square root"
OVER_QUERIES = "a softmax over the queries, where it is over the tokens"
NO_OUTPUT = "leaving the layer `output` out"
RESHAPED = "reshaping to (N, heads, L, d) without a transpose: pieces of several tokens land in one head"
INTERLEAVED = "giving a head every heads-th column, not d columns side by side"
NOT_TURNED = "leaving the heads behind the tokens: (N, L, heads, d)"
JOINED = "joining the heads without the transpose: a token gets what belongs to others"
BACKWARDS = "joining the heads in the wrong order"
ONE_HEAD = "one head of width h"
MASK_AFTER = "the mask after the softmax: the weights that are left no longer sum to 1"
MASK_ZERO = "padding's scores set to 0 before the softmax: its weight is then exp(0) over the sum"
MASK_ADDED = "the mask added to the scores, as 1 and 0"
MASK_TURNED = "the mask the wrong way round: the weight goes to padding"
NO_MASK = "no mask"
MASKED_QUERIES = "the mask on the queries, where it is on the keys"
QUERY_FROM_X = "queries from x, where they come from query_input"
KEY_FROM_QUERY = "keys and values from query_input, where they come from x"
OVERFLOW = "exp(score) without the largest score subtracted: it overflows"
DETACHED = "the weights detached: no gradient goes through the softmax"
NO_DROPOUT = "no dropout in training"
EVAL_DROPOUT = "dropout in eval"
KEPT_WITH_P = "weights kept with probability p, where they are dropped with it"
NOT_RESCALED = "the weights that stay are not divided by 1 - p"
DROPPED_RESULTS = "dropout on the entries of the result, where it is on the weights"


def attention(student, rng, hidden, heads, dropout=0.0, own_split=False):
    """The student's layer, in eval mode, with random parameters; a right split_heads unless own_split."""
    config = student.EncoderConfig(
        vocab_size=8, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=8,
        max_position_embeddings=8, attention_probs_dropout_prob=dropout)
    layer = student.SelfAttention(config).eval()
    for parameter in layer.parameters():
        parameter.data.copy_(1.5 * torch.randn(parameter.shape, generator=rng) / hidden**0.5)
    if not own_split:
        layer.split_heads = lambda x: torch.stack(x.chunk(heads, 2), 1)  # (N, heads, L, d)
    return layer


def texts(rng, L, lengths, hidden):
    """x (N, L, h), random in the padding too, and mask (N, 1, 1, L)."""
    x = torch.randn(len(lengths), L, hidden, generator=rng)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]  # (N, L)
    return x, mask[:, None, None, :]


def softmax(scores):
    powers = (scores - scores.amax(1, keepdim=True)).exp()
    return powers / powers.sum(1, keepdim=True)


def right(scores, tokens, d, h):
    """Weights of one head, (queries, L), of scores q . k, (queries, L); tokens (L,) is False on padding."""
    return softmax((scores / d**0.5).masked_fill(~tokens, -math.inf))


def by_heads(layer, query_input, x, mask, weigh=right, heads=None):
    """What each head finds, (N, heads, queries, d), in float64, a sample and a head at a time."""
    heads = heads or layer.num_heads
    h, d = x.shape[2], x.shape[2] // heads
    found = []
    for sample in range(len(x)):
        Q, K, V = (tokens.double() @ part.weight.double().T + part.bias.double() for part, tokens in (
            (layer.query, query_input[sample]), (layer.key, x[sample]), (layer.value, x[sample])))
        for k in range(heads):
            columns = slice(k * d, (k + 1) * d)
            scores = Q[:, columns] @ K[:, columns].T  # (queries, L)
            found.append(weigh(scores, mask[sample, 0, 0], d, h) @ V[:, columns])
    return torch.stack(found).unflatten(0, (len(x), heads))


def joined(parts):
    return torch.cat(list(parts.unbind(1)), 2)  # (N, queries, h)


def expected(layer, query_input, x, mask, weigh=right, heads=None, join=joined):
    mixed = join(by_heads(layer, query_input, x, mask, weigh, heads))
    return mixed @ layer.output.weight.double().T + layer.output.bias.double()


def scales(layer, x, mask):
    """What wrong scales and a wrong axis give."""
    wrong = {NO_SCALE: lambda s, t, d, h: softmax(s.masked_fill(~t, -math.inf)),
             SCALE_H: lambda s, t, d, h: softmax((s / h**0.5).masked_fill(~t, -math.inf)),
             SCALE_D: lambda s, t, d, h: softmax((s / d).masked_fill(~t, -math.inf)),
             OVER_QUERIES: lambda s, t, d, h: softmax((s / d**0.5).T).T}
    return {name: expected(layer, x, x, mask, weigh) for name, weigh in wrong.items()}


@points(2)
def a_head_holds_columns_side_by_side(student, rng):
    "split_heads(x)[n, k, l, i] = x[n, l, k d + i] with d = h / heads: head k holds the columns from k d on"
    for heads, d in ((3, 4), (2, 5)):
        x = torch.randn(2, 5, heads * d, generator=rng)
        right_heads = torch.empty(2, heads, 5, d)
        for k in range(heads):
            for i in range(d):
                right_heads[:, k, :, i] = x[:, :, k * d + i]
        expect(attention(student, rng, heads * d, heads, own_split=True).split_heads(x), right_heads,
               f"split_heads(x (2, 5, {heads * d})), {heads} heads",
               {RESHAPED: x.reshape(2, heads, 5, d), NOT_TURNED: x.unflatten(2, (heads, d)),
                INTERLEAVED: x.unflatten(2, (d, heads)).permute(0, 3, 1, 2)})


@points(1)
def a_token_gets_a_weighted_mean_of_values(student, rng):
    "One head: output(softmax(Q K^T / sqrt(d)) V), softmax over tokens; Q, K, V = query(x), key(x), value(x)"
    layer = attention(student, rng, 6, 1)
    x, mask = texts(rng, 4, (4, 4), 6)
    expect(layer(x, x, mask), expected(layer, x, x, mask),
           "forward(x (2, 4, 6), x, mask (2, 1, 1, 4)), 1 head",
           scales(layer, x, mask) | {NO_OUTPUT: joined(by_heads(layer, x, x, mask))}, tolerance=1e-4)


@points(2)
def heads_work_alone_and_are_joined(student, rng):
    """Head k does softmax(Q_k K_k^T / sqrt(h / heads)) V_k on its own.

    `output` reads the heads side by side, in order.
    """
    layer = attention(student, rng, 12, 3, own_split=True)
    x, mask = texts(rng, 5, (5, 5), 12)
    joins = {JOINED: lambda parts: parts.reshape(2, 5, 12),
             INTERLEAVED: lambda parts: parts.permute(0, 2, 3, 1).flatten(2),
             BACKWARDS: lambda parts: joined(parts.flip(1))}
    expect(layer(x, x, mask), expected(layer, x, x, mask),
           "forward(x (2, 5, 12), x, mask (2, 1, 1, 5)), 3 heads",
           scales(layer, x, mask) | {ONE_HEAD: expected(layer, x, x, mask, heads=1)}
           | {name: expected(layer, x, x, mask, join=join) for name, join in joins.items()}, tolerance=1e-4)


@points(2)
def padding_gets_no_weight(student, rng):
    "Where mask is False the weight is 0, and the others sum to 1: as if the text came without its padding"
    layer = attention(student, rng, 8, 2)
    x, mask = texts(rng, 5, (4, 3, 2), 8)
    wrong = {MASK_AFTER: lambda s, t, d, h: softmax(s / d**0.5) * t,
             MASK_ZERO: lambda s, t, d, h: softmax(s / d**0.5 * t),
             MASK_ADDED: lambda s, t, d, h: softmax(s / d**0.5 + t),
             MASK_TURNED: lambda s, t, d, h: right(s, ~t, d, h),
             NO_MASK: lambda s, t, d, h: softmax(s / d**0.5),
             MASKED_QUERIES: lambda s, t, d, h: softmax((s / d**0.5).masked_fill(~t[:, None], -math.inf))}
    alone = torch.cat([expected(layer, x[n:n + 1], x[n:n + 1, :length], mask[n:n + 1, :, :, :length])
                       for n, length in enumerate((4, 3, 2))])  # (3, 5, 8): keys and values are tokens alone
    values = {name: expected(layer, x, x, mask, weigh) for name, weigh in wrong.items()}
    expect(layer(x, x, mask), alone, "forward(x (3, 5, 8), x, mask (3, 1, 1, 5)), texts of 4, 3 and 2 tokens",
           values, tolerance=1e-4)


@points(1)
def the_first_token_can_ask_alone(student, rng):
    "query_input (N, 1, h) gives (N, 1, h): queries come from query_input, keys and values from x"
    layer = attention(student, rng, 8, 2)
    x, mask = texts(rng, 4, (4, 3), 8)
    one = torch.randn(2, 1, 8, generator=rng)
    seen = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    expect(layer(one, x, mask), expected(layer, one, x, mask),
           "forward(query_input (2, 1, 8), x (2, 4, 8), mask (2, 1, 1, 4))",
           {QUERY_FROM_X: expected(layer, x, x, mask), KEY_FROM_QUERY: expected(layer, one, one, seen)},
           tolerance=1e-4)


@points(1)
def large_scores_are_no_trouble(student, rng):
    "softmax(s) = softmax(s - max s): scores of some hundreds give weights near 0 and 1, and no NaN"
    layer = attention(student, rng, 6, 1)
    layer.query.weight.data *= 300
    x, mask = texts(rng, 4, (4, 4), 6)

    def overflow(s, t, d, h):
        powers = (s.float() / d**0.5).exp()
        return (powers / powers.sum(1, keepdim=True)).double()

    expect(layer(x, x, mask), expected(layer, x, x, mask),
           "forward(x (2, 4, 6), x, mask), query.weight 300 times larger",
           {OVERFLOW: expected(layer, x, x, mask, overflow)}, tolerance=1e-2)


@points(1)
def gradients_reach_every_matrix(student, rng):
    "The loss falls by way of Q, K, V and `output`: autograd finds the derivative for the weights of each"
    layer = attention(student, rng, 8, 2)
    x, mask = texts(rng, 4, (4, 3), 8)
    goal = torch.randn(2, 4, 8, generator=rng)
    names = ("query", "key", "value", "output")
    parameters = [getattr(layer, name).weight for name in names]

    def gradients(result):
        return torch.autograd.grad((result * goal).sum(), parameters, materialize_grads=True)

    found = layer(x, x, mask)
    expect(found, expected(layer, x, x, mask),
           "forward(x (2, 4, 8), x, mask (2, 1, 1, 4)), 2 heads", tolerance=1e-4)
    require(found.requires_grad, "forward(x, x, mask).requires_grad", "True", False)
    known = gradients(expected(layer, x, x, mask))
    stopped = gradients(expected(layer, x, x, mask, lambda s, t, d, h: right(s, t, d, h).detach()))
    for name, of_theirs, of_ours, of_stopped in zip(names, gradients(found), known, stopped):
        expect(of_theirs, of_ours, f"the gradient of sum(goal * forward(x, x, mask)) for {name}.weight",
               {DETACHED: of_stopped}, tolerance=1e-3)


def weights_of(layer, x, mask):
    """The weights that forward used, (2, N, heads, L, L): twice, from the two halves of each head.

    x is (N, L, heads * 2 L), and token l starts with e_l. In each head the value of token l becomes
    (e_l, e_l), and `output` the identity: then what a token finds is its row of weights, two times.
    """
    N, L, h = x.shape
    for part, weight in ((layer.value, torch.eye(L, h).repeat(h // L, 1)), (layer.output, torch.eye(h))):
        part.weight.data.copy_(weight)
        part.bias.data.zero_()
    found = layer(x, x, mask)
    require(isinstance(found, torch.Tensor) and found.shape == x.shape, f"forward(x {(N, L, h)}, x, mask)",
            f"a tensor of shape {(N, L, h)}", found)
    return found.detach().double().unflatten(2, (h // (2 * L), 2, L)).permute(3, 0, 2, 1, 4)


def marked(student, rng, count, dropout):
    """A layer, x (count, 4, 16) whose token l starts with e_l, mask, the right weights (count, 2, 4, 4)."""
    layer = attention(student, rng, 16, 2, dropout)
    x, mask = texts(rng, 4, (4,) * count, 16)
    x[:, :, :4] = torch.eye(4)
    Q, K = (x.double() @ part.weight.double().T + part.bias.double() for part in (layer.query, layer.key))
    scores = [Q[:, :, k:k + 8] @ K[:, :, k:k + 8].transpose(1, 2) / 8**0.5 for k in (0, 8)]  # of two heads
    return layer, x, mask, torch.stack(scores, 1).softmax(3).detach()


@points(1)
def training_drops_weights(student, rng):
    "In training each weight becomes 0 with probability p = self.dropout, and otherwise weight / (1 - p)"
    p = 0.3
    layer, x, mask, weights = marked(student, rng, 400, p)
    called = "forward(x (400, 4, 16), x, mask) in training, p = 0.3: "
    used = weights_of(layer.train(), x, mask)
    dropped = (used == 0).double()
    share = float(dropped.mean())  # of 12,800 weights: 0.3 +- 0.004
    expect(share, p, called + "the share of weights that are 0",
           {NO_DROPOUT: 0.0, KEPT_WITH_P: 1 - p}, tolerance=0.15)
    expect(used[1], used[0], called + "each weight, from the second and from the first half of a value",
           {DROPPED_RESULTS: used[1]})
    kept = weights * (1 - dropped[0])
    expect(used[0], kept / (1 - p), called + "the weights that are left",
           {NOT_RESCALED: kept}, tolerance=1e-4)
    require(not torch.equal(dropped[0, :, 0], dropped[0, :, 1]), called + "which weights are 0 in two heads",
            "not the same ones", "the same ones")


@points(1)
def eval_drops_nothing(student, rng):
    "In eval every weight is kept as it is, whatever self.dropout is, so that a text gets one prediction"
    p = 0.4
    layer, x, mask, weights = marked(student, rng, 400, p)
    called = "forward(x (400, 4, 16), x, mask) in eval, p = 0.4: "
    used = weights_of(layer.eval(), x, mask)
    expect(float((used == 0).double().mean()), 0.0, called + "the share of weights that are 0",
           {EVAL_DROPOUT: p}, tolerance=0.15)
    expect(used[0], weights, called + "the weights", tolerance=1e-4)
