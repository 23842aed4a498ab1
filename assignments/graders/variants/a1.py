from assignments.graders import a1

SPLIT = '''
def split_heads(self, x):
    N, L, h = x.shape
    return x.view(N, L, self.num_heads, h // self.num_heads).permute(0, 2, 1, 3)
'''
BY_HAND = '''
def forward(self, query_input, x, mask):
    query = self.split_heads(self.query(query_input))
    key, value = self.split_heads(self.key(x)), self.split_heads(self.value(x))
    scores = torch.einsum("nkqd,nkld->nkql", query, key) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    weights = F.dropout(weights, self.dropout, self.training)
    mixed = torch.einsum("nkql,nkld->nqkd", weights, value)
    return self.output(mixed.reshape(query_input.shape))
'''
LOOP = '''
def forward(self, query_input, x, mask):
    bias = torch.zeros(mask.shape, device=x.device, dtype=x.dtype).masked_fill(~mask, -1e9)[:, 0]
    heads = []
    for q, k, v in zip(self.query(query_input).chunk(self.num_heads, 2), self.key(x).chunk(self.num_heads, 2),
                       self.value(x).chunk(self.num_heads, 2)):
        weights = torch.softmax(q @ k.mT * q.shape[2] ** -0.5 + bias, 2)
        if self.training:
            weights = weights * (torch.rand_like(weights) >= self.dropout) / (1 - self.dropout)
        heads.append(weights @ v)
    return self.output(torch.cat(heads, 2))
'''
LOOP_SPLIT = '''
def split_heads(self, x):
    return torch.stack(torch.chunk(x, self.num_heads, dim=2), dim=1)
'''


def wrong(old, new, forward=BY_HAND):
    assert old in forward, old
    return {"forward": forward.replace(old, new), "split_heads": SPLIT}


def full(functions):
    return {f"SelfAttention.{name}": text for name, text in functions.items()}


SCALE = "/ math.sqrt(query.shape[-1])"
SOFTMAX = 'scores.masked_fill(~mask, float("-inf")).softmax(-1)'
DROPOUT = "F.dropout(weights, self.dropout, self.training)"
RIGHT = {"einsum": full({"forward": BY_HAND, "split_heads": SPLIT}),
         "a loop over the heads": full({"forward": LOOP, "split_heads": LOOP_SPLIT})}
WRONG = {name: full(functions) for name, functions in {
    a1.NO_SCALE: wrong(SCALE, ""),
    a1.SCALE_H: wrong(SCALE, "/ math.sqrt(x.shape[-1])"),
    a1.SCALE_D: wrong(SCALE, "/ query.shape[-1]"),
    a1.OVER_QUERIES: wrong(SOFTMAX, "scores.softmax(-2)"),
    a1.NO_OUTPUT: wrong("self.output(mixed.reshape(query_input.shape))", "mixed.reshape(query_input.shape)"),
    a1.RESHAPED: {"forward": BY_HAND, "split_heads": SPLIT.replace(
        "x.view(N, L, self.num_heads, h // self.num_heads).permute(0, 2, 1, 3)",
        "x.reshape(N, self.num_heads, L, h // self.num_heads)")},
    a1.INTERLEAVED: {"forward": BY_HAND, "split_heads": SPLIT.replace(
        "x.view(N, L, self.num_heads, h // self.num_heads).permute(0, 2, 1, 3)",
        "x.view(N, L, h // self.num_heads, self.num_heads).permute(0, 3, 1, 2)")},
    a1.NOT_TURNED: {"forward": BY_HAND, "split_heads": SPLIT.replace(".permute(0, 2, 1, 3)", "")},
    a1.JOINED: wrong("nqkd", "nkqd"),
    a1.BACKWARDS: wrong("mixed.reshape", "mixed.flip(2).reshape"),
    a1.ONE_HEAD: {"forward": BY_HAND, "split_heads": "def split_heads(self, x):\n    return x[:, None]"},
    a1.MASK_AFTER: wrong(SOFTMAX, "scores.softmax(-1) * mask"),
    a1.MASK_ZERO: wrong(SOFTMAX, "(scores * mask).softmax(-1)"),
    a1.MASK_ADDED: wrong(SOFTMAX, "(scores + mask).softmax(-1)"),
    a1.MASK_TURNED: wrong("~mask", "mask"),
    a1.NO_MASK: wrong(".masked_fill(~mask, float(\"-inf\"))", ""),
    a1.MASKED_QUERIES: wrong("~mask", "~mask.mT"),
    a1.QUERY_FROM_X: wrong("(query_input)", "(x)", BY_HAND.replace("query_input.shape", "x.shape")),
    a1.KEY_FROM_QUERY: wrong("(x)", "(query_input)", BY_HAND.replace(
        "~mask", "~mask[..., :query_input.shape[1]]")),
    a1.OVERFLOW: wrong(SOFTMAX, "scores.exp() * mask\n    weights = weights / weights.sum(-1, keepdim=True)"),
    a1.DETACHED: wrong("weights = F", "weights = weights.detach()\n    weights = F"),
    a1.NO_DROPOUT: wrong(DROPOUT, "weights"),
    a1.EVAL_DROPOUT: wrong("self.training", "True"),
    a1.KEPT_WITH_P: wrong("self.dropout,", "1 - self.dropout,"),
    a1.NOT_RESCALED: wrong(DROPOUT, "weights * (torch.rand_like(weights) >= self.dropout * self.training)"),
    a1.DROPPED_RESULTS: wrong("(mixed", "(F.dropout(mixed, self.dropout, self.training)",
                              BY_HAND.replace(DROPOUT, "weights")),
}.items()}
EQUIVALENT = {}
