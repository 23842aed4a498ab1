from assignments.graders import a2

INIT = '''
def __init__(self, linear, r, lora_alpha):
    super().__init__()
    self.linear = linear
    self.linear.weight.requires_grad = False
    if self.linear.bias is not None:
        self.linear.bias.requires_grad = False
    self.scaling = lora_alpha / r
    self.lora_A = nn.Linear(linear.in_features, r, bias=False)
    self.lora_B = nn.Linear(r, linear.out_features, bias=False)
    self.lora_A.weight.data.uniform_(-linear.in_features ** -0.5, linear.in_features ** -0.5)
    self.lora_B.weight.data.zero_()
    self.to(device=linear.weight.device, dtype=linear.weight.dtype)
    self.train(linear.training)
'''
FORWARD = '''
def forward(self, x):
    low = self.lora_A(x)
    return self.linear(x) + self.scaling * self.lora_B(low)
'''
MERGED = '''
def merged(self):
    update = torch.einsum("or,ri->oi", self.lora_B.weight, self.lora_A.weight)
    weight = self.linear.weight + self.scaling * update
    new = nn.Linear(self.linear.in_features, self.linear.out_features, bias=self.linear.bias is not None)
    new.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if self.linear.bias is not None:
        new.bias = nn.Parameter(self.linear.bias.detach().clone(), requires_grad=False)
    return new.train(self.linear.training)
'''
LOOP_INIT = '''
def __init__(self, linear, r, lora_alpha):
    super().__init__()
    self.linear, self.r, self.lora_alpha = linear, r, lora_alpha
    self.scaling = lora_alpha * (1 / r)
    for parameter in linear.parameters():
        parameter.requires_grad_(False)
    like = {"bias": False, "device": linear.weight.device, "dtype": linear.weight.dtype}
    self.lora_A = nn.utils.skip_init(nn.Linear, linear.in_features, r, **like)
    self.lora_B = nn.utils.skip_init(nn.Linear, r, linear.out_features, **like)
    nn.init.kaiming_uniform_(self.lora_A.weight, a=5 ** 0.5)
    nn.init.constant_(self.lora_B.weight, 0.0)
    self.training = linear.training
    self.lora_A.training = self.lora_B.training = linear.training
'''
LOOP_FORWARD = '''
def forward(self, x):
    update = self.lora_B(self.lora_A(x) * (self.lora_alpha / self.r))
    return torch.add(update, F.linear(x, self.linear.weight, self.linear.bias))
'''
LOOP_MERGED = '''
@torch.no_grad()
def merged(self):
    linear = copy.deepcopy(self.linear)
    for k in range(self.r):
        outer = torch.outer(self.lora_B.weight[:, k], self.lora_A.weight[k])
        linear.weight += self.lora_alpha / self.r * outer
    return linear
'''
RIGHT_PARTS = {"__init__": INIT, "forward": FORWARD, "merged": MERGED}


def full(functions):
    return {f"LoRALinear.{name}": text for name, text in functions.items()}


def wrong(name, old, new):
    assert old in RIGHT_PARTS[name], old
    return RIGHT_PARTS | {name: RIGHT_PARTS[name].replace(old, new)}


DRAW = "self.lora_A.weight.data.uniform_(-linear.in_features ** -0.5, linear.in_features ** -0.5)"
RIGHT = {"einsum": full(RIGHT_PARTS),
         "a loop over ranks": full({"__init__": LOOP_INIT, "forward": LOOP_FORWARD, "merged": LOOP_MERGED})}
WRONG = {name: full(functions) for name, functions in {
    a2.NO_SCALE: wrong("forward", "self.scaling * ", ""),
    a2.ALPHA: wrong("__init__", "lora_alpha / r", "lora_alpha"),
    a2.TIMES_R: wrong("__init__", "lora_alpha / r", "lora_alpha * r"),
    a2.UPSIDE_DOWN: wrong("__init__", "lora_alpha / r", "r / lora_alpha"),
    a2.WHOLE: wrong("__init__", "lora_alpha / r", "lora_alpha // r"),
    a2.ROOT: wrong("__init__", "lora_alpha / r", "lora_alpha / r ** 0.5"),
    a2.TRANSPOSED: wrong("merged", '"or,ri->oi"', '"or,ri->io"'),
    a2.NO_BIAS: RIGHT_PARTS | {"merged": MERGED.replace("self.linear.bias is not None", "False")},
    a2.UPDATE_ALONE: wrong("forward", "self.linear(x) + ", ""),
    a2.W_0_ALONE: wrong("forward", " + self.scaling * self.lora_B(low)", ""),
    a2.TWICE: wrong("merged", "+ self.scaling", "+ 2 * self.scaling"),
    a2.SCALED_ALL: wrong("forward", "self.linear(x) + self.scaling * self.lora_B(low)",
                         "self.scaling * (self.linear(x) + self.lora_B(low))"),
    a2.IN_PLACE: RIGHT_PARTS | {"merged": '''
def merged(self):
    with torch.no_grad():
        self.linear.weight += self.scaling * self.lora_B.weight @ self.lora_A.weight
    return self.linear
'''},
    a2.A_ZERO: wrong("__init__", DRAW, "self.lora_A.weight.data.zero_()"),
    a2.B_RANDOM: wrong("__init__", "self.lora_B.weight.data.zero_()", "pass"),
    a2.A_NO_ROOT: wrong("__init__", DRAW, "nn.init.kaiming_uniform_(self.lora_A.weight)"),
    a2.A_OUT: wrong("__init__", DRAW, "self.lora_A.weight.data.uniform_(-r ** -0.5, r ** -0.5)"),
    a2.A_SMALL: wrong("__init__", DRAW, "nn.init.normal_(self.lora_A.weight, std=0.02)"),
    a2.A_NORMAL: wrong("__init__", DRAW,
                       "nn.init.normal_(self.lora_A.weight, std=(3 * linear.in_features) ** -0.5)"),
    a2.BIAS_TRAINS: wrong("__init__", "self.linear.bias.requires_grad = False", "pass"),
    a2.W_0_TRAINS: wrong("__init__", "requires_grad = False", "requires_grad = True"),
    a2.OWN_BIAS: wrong("__init__", "bias=False", "bias=True"),
    a2.NOTHING_TRAINS: wrong("__init__", "self.train(", "self.requires_grad_(False)\n    self.train("),
    a2.MERGED_TRAINS: wrong("merged", "requires_grad=False", "requires_grad=True"),
    a2.FORMED: RIGHT_PARTS | {"forward": '''
def forward(self, x):
    weight = self.linear.weight + self.scaling * self.lora_B.weight @ self.lora_A.weight
    return F.linear(x, weight, self.linear.bias)
'''},
    a2.MODE: wrong("__init__", "self.train(linear.training)", "pass"),
}.items()}
EQUIVALENT = {
    ("nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))", "pass"):
        "nn.Linear has drawn it from the same distribution",
}
