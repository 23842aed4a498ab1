"""The Transformer encoder, the classifier on top of it, and LoRA.

The tiny encoder, BERT and RoBERTa are one architecture: post-LayerNorm, learned positions, exact GELU.

    f(x) = V phi(x) + b      V is `head.weight`, b is `head.bias`, phi(x) is `features`

phi(x) is the last hidden state of the first token, or the mean over all tokens: no pooler, no tanh. Read in
order: Encoder, Classifier, LoRALinear. Shapes: N samples, L tokens, C classes, h hidden width, r LoRA rank.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class EncoderConfig:
    """The sizes of an encoder, named as in a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2  # 0: no token types
    pad_token_id: int = 0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    model_type: str = "bert"  # "roberta" differs only in how positions are numbered
    pooling: str = "first"  # phi: the "first" token, as in the paper, or the "mean" over tokens

    @property
    def max_length(self):
        """The longest input in tokens: RoBERTa leaves the first pad_token_id + 1 positions unused."""
        unused = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - unused


# ---------------------------------------------------------------------------- the encoder


class SelfAttention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(h / heads)) V, with padding masked."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, query_input, x, mask):
        """Attention of the positions query_input (N, 1 or L, h) to all positions x (N, L, h): (N, 1 or L, h).

        Queries, keys and values are cut into heads (split_heads); their results are joined and go through
        `output`. mask (N, 1, 1, L) is True on tokens and False on padding, which gets no weight.
        """
        query = self.split_heads(self.query(query_input))  # (N, heads, 1 or L, h / heads)
        key = self.split_heads(self.key(x))  # (N, heads, L, h / heads)
        value = self.split_heads(self.value(x))  # (N, heads, L, h / heads)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (N, 1 or L, h)

    def split_heads(self, x):
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, L, h / heads)


class Layer(nn.Module):
    """Attention, then a two-layer network per token; each is added to its input and normalised."""

    def __init__(self, config):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, mask, first_token_only=False):
        # contiguous: else the matrix product that PyTorch takes, and so rounding, depends on what trains
        query_input = x[:, :1].contiguous() if first_token_only else x  # (N, 1 or L, h)
        attended = self.attention(query_input, x, mask)
        x = self.attention_norm(query_input + self.dropout(attended))
        transformed = self.ffn_out(F.gelu(self.ffn_in(x)))
        return self.ffn_norm(x + self.dropout(transformed))


class Encoder(nn.Module):
    """Token ids to hidden states: the part of BERT or RoBERTa that is kept for fine-tuning."""

    def __init__(self, config):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of "
                             f"num_attention_heads {config.num_attention_heads}")
        self.config = config
        h = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, h, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, h)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, h)
        self.embedding_norm = nn.LayerNorm(h, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.apply(lambda module: init_weights(module, config.initializer_range))

    def forward(self, input_ids, attention_mask, token_type_ids=None, first_token_only=False):
        """Last hidden states, (N, L, h).

        input_ids, attention_mask, token_type_ids: long, (N, L); the mask is 1 on tokens and 0 on
        padding. With first_token_only the last layer computes its first position alone: (N, 1, h).
        """
        x = self.embed(input_ids, attention_mask, token_type_ids)
        mask = attention_mask.bool()[:, None, None, :]  # (N, 1, 1, L): every query sees every token
        for layer in self.layers:
            x = layer(x, mask, first_token_only and layer is self.layers[-1])
        return x

    def embed(self, input_ids, attention_mask, token_type_ids=None):
        """What the first layer reads, (N, L, h): word, position and type embeddings, added and normalised."""
        x = self.word_embeddings(input_ids) + self.position_embeddings(
            self.position_ids(input_ids, attention_mask))  # (N, L, h)
        if self.config.type_vocab_size:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(types)
        return self.dropout(self.embedding_norm(x))

    def position_ids(self, input_ids, attention_mask):
        """(N, L): BERT counts 0, 1, 2, ...; RoBERTa counts tokens from pad_token_id + 1."""
        if self.config.model_type == "roberta":
            return attention_mask.cumsum(1) * attention_mask + self.config.pad_token_id
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def init_weights(module, std):
    """BERT's initialisation: weights N(0, std^2), biases zero, the padding embedding zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight.data[module.padding_idx])


class Classifier(nn.Module):
    """f(x) = V phi(x) + b: one linear head on the pooled tokens, dropout before it in training.

    The head is initialised as the paper's FT: V drawn from N(0, 0.02^2), b = 0.
    """

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob)
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)
        init_weights(self.head, std=0.02)

    def features(self, **batch):
        """phi(x), (N, h). `batch` holds input_ids, attention_mask, token_type_ids, each (N, L)."""
        first = self.encoder.config.pooling == "first"
        return self.pool(self.encoder(**batch, first_token_only=first), batch["attention_mask"])

    def pool(self, hidden, attention_mask=None):
        """phi, (N, h), of last hidden states (N, L, h): the first token's, or the mean without padding."""
        if self.encoder.config.pooling == "first":
            return hidden[:, 0]
        mask = attention_mask[:, :, None].to(hidden)  # (N, L, 1)
        return (mask * hidden).sum(1) / mask.sum(1)

    def forward(self, **batch):
        """Logits f(x), (N, C)."""
        return self.head(self.dropout(self.features(**batch)))  # (N, C)


# ---------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """W = W_0 + (lora_alpha / r) B A, with W_0 frozen (Hu et al. 2021; Prop. 4.4).

    lora_A is (r, in), drawn as nn.Linear draws its weights; lora_B is (out, r) and starts at zero, so the
    layer starts as W_0. train() and eval() never touch the weights.
    """

    def __init__(self, linear, r, lora_alpha):
        super().__init__()
        self.linear = linear.requires_grad_(False)  # W_0 and its bias
        self.scaling = lora_alpha / r
        factory = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(linear.in_features, r, bias=False, **factory)
        self.lora_B = nn.Linear(r, linear.out_features, bias=False, **factory)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(linear.training)

    def forward(self, x):
        """W_0 x + bias + (lora_alpha / r) B A x: (..., in) to (..., out), without forming B A."""
        return self.linear(x) + self.scaling * self.lora_B(self.lora_A(x))

    def merged(self):
        """A new nn.Linear with the weight W_0 + (lora_alpha / r) B A and W_0's bias, frozen; W_0 stays."""
        linear = copy.deepcopy(self.linear)
        with torch.no_grad():
            linear.weight += self.scaling * self.lora_B.weight @ self.lora_A.weight  # (out, in)
        return linear


def add_lora(encoder, r=8, lora_alpha=8):
    """Freeze the encoder, put LoRA on query and value of every layer, in place; ValueError if it has LoRA."""
    if r < 1:
        raise ValueError(f"the LoRA rank r is {r}; expected 1 or more")
    if has_lora(encoder):
        raise ValueError("this encoder has LoRA already; merge_lora(encoder) first")
    encoder.requires_grad_(False)
    for layer in encoder.layers:
        layer.attention.query = LoRALinear(layer.attention.query, r, lora_alpha)
        layer.attention.value = LoRALinear(layer.attention.value, r, lora_alpha)


def merge_lora(encoder):
    """Replace each LoRALinear by its merged(), in place; all stays frozen. ValueError if there is none."""
    if not has_lora(encoder):
        raise ValueError("this encoder has no LoRA to merge; add_lora(encoder) first")
    for layer in encoder.layers:
        layer.attention.query = layer.attention.query.merged()
        layer.attention.value = layer.attention.value.merged()


def has_lora(encoder):
    return any(isinstance(module, LoRALinear) for module in encoder.modules())


def count_parameters(model):
    """(trainable, total) numbers of parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())
