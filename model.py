"""A GPT-2 that never learns where its keys and values are kept.

Attention is the only place where a transformer looks at other tokens, so it is the only place where
a cache can hide. Here that place is one socket, `attend(layer, q, k, v)`, handed to `forward` by
whoever calls it. Recomputing everything, a slab of memory per sequence, a pool of blocks, training:
four functions for the same socket, and the model is the same file for all of them. (In most code
bases the cache is threaded through every layer's signature.)

    input_ids (N,) ─> wte + wpe ─> [ LayerNorm ─> q, k, v ─> attend ─> + ─> MLP ─> + ] x n_layer
    positions (N,) ────┘                                        │
                                     the socket: where K and V live is decided outside

Tokens arrive flat: the N tokens of all sequences of a step laid end to end, no padding, no batch
dimension. A prompt of 300 tokens and seven sequences that each add one token are simply N = 307
rows for every linear layer. What a production engine does beyond this: splits the layers over
GPUs, joins the small operations into fewer kernels, quantises.

Letters used in all files: B sequences, T tokens each, N tokens of all sequences end to end,
C n_embd, H heads, D head_dim, V vocabulary.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3.
Run: python model.py
Try: set n_head=8 in the demo (more heads, each of half the size; the KV bytes stay as they are),
or let the second plug forget the oldest token and watch the assert fail.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# attend(layer, q, k, v) -> out: layer is an int; q (N, H, D), k and v (N, H_kv, D); out (N, H, D).
# Every socket scales the scores by D ** -0.5; a layer that wants another one multiplies it into q.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

ALL_ROWS = slice(None)  # as an index: a view, nothing is copied

ACTIVATIONS = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),  # what GPT-2 was trained with
    "gelu": F.gelu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M model's."""

    vocab_size: int = 50257
    max_seq_len: int = 1024  # Hugging Face says n_positions; nanoGPT block_size, a word we need
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # width of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True  # scores / sqrt(head_dim)
    # scores / (layer + 1) on top, as Mistral's GPT-2s were trained
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True  # the output head is the input embedding
    eos_token_id: int | None = None  # the token that ends a text; 50256 for GPT-2
    dropout: float = 0.0  # training only

    def __post_init__(self):
        for name in ("vocab_size", "max_seq_len", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner is {self.n_inner}: it must be at least 1, or None")
        if self.n_embd % self.n_head:
            sizes = f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}"
            raise ValueError(f"{sizes}: heads would differ")
        if not 0 <= self.layer_norm_epsilon < math.inf:  # NaN fails both comparisons
            found = self.layer_norm_epsilon
            raise ValueError(f"layer_norm_epsilon is {found}: it must be finite and not negative")
        if self.activation_function not in ACTIVATIONS:
            found, known = self.activation_function, ", ".join(ACTIVATIONS)
            raise ValueError(f"activation_function is {found!r}: choose one of {known}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's K and V in all layers: 36,864 for the 124M shape in 16 bits."""
        return 2 * self.n_layer * self.n_embd * dtype.itemsize


class Attention(nn.Module):
    """Project to q, k and v, hand them to the socket, project what comes back."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        # The socket always divides the scores by sqrt(D). What a layer wants on top goes into q.
        self.q_scale = 1.0 if config.scale_attn_weights else math.sqrt(config.head_dim)
        if config.scale_attn_by_inverse_layer_idx:
            self.q_scale /= layer + 1

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | slice) -> Tensor:
        """(N, C) -> (M, C): all N tokens bring their k and v, `rows` get an answer."""
        N, C = x.shape
        # Three views of one product, not copies: after a row of q come the same token's k and v.
        parts = self.c_attn(x).split(C, dim=1)
        q, k, v = (part.view(N, self.n_head, -1) for part in parts)  # (N, H, D) each
        if self.q_scale != 1.0:
            q = q * self.q_scale
        return self.c_proj(attend(self.layer, q, k, v).reshape(N, C)[rows])


class MLP(nn.Module):
    """Two linear layers around an activation: the part that looks at one token only."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, width)
        self.c_proj = nn.Linear(width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:  # (N, C) -> (N, C)
        return self.c_proj(self.activation(self.c_fc(x)))


class Layer(nn.Module):
    """One transformer layer (nanoGPT calls it a Block; here a block is a piece of KV memory)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)  # does nothing in eval mode

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | slice) -> Tensor:
        """(N, C) -> (M, C): what the chosen rows go on with."""
        x = x[rows] + self.dropout(self.attn(self.ln_1(x), attend, rows))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """The model. Attribute names are Hugging Face's, so that a checkpoint's names need no table."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.max_seq_len, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Layer(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        # Counted now: a layer may come to hold its weights in another shape, filled up with zeros.
        self._num_parameters = sum(parameter.numel() for parameter in self.parameters())

    def init_weights(self, std: float = 0.02, seed: int = 0) -> "GPT":
        """Fill all weights at random, as GPT-2 does with std 0.02.

        What is added to the residual stream starts smaller. A test wants std 0.2: with 0.02
        greedy decoding repeats one token whatever the cache holds.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:  # the gain of a LayerNorm
                nn.init.ones_(parameter)
            else:
                added = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=std / math.sqrt(added), generator=generator)
        return self

    def forward(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor | slice = ALL_ROWS
    ) -> Tensor:
        """Run N flat tokens through all layers.

        `input_ids` and `positions` are (N,) integers, a position being the token's index in its
        own sequence. `rows` (M,) are those whose hidden states are wanted: of a prompt only the
        last. Returns (M, C), after the last LayerNorm.
        """
        x = self.dropout(self.wte(input_ids) + self.wpe(positions))  # (N, C)
        *earlier, last = self.h
        for layer in earlier:
            x = layer(x, attend, ALL_ROWS)
        # Nobody attends to what the last layer makes of a token, so only the wanted rows go through
        # its MLP: for a prompt and 12 layers that saves a sixteenth of the multiplications.
        return self.ln_f(last(x, attend, rows))

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Scores of the next token for M chosen rows: (M, C) -> (M, V).

        The caller picks the rows: of a 300-token prompt only the last one predicts something new,
        and for the 124M shape this product is 31% of all weights.
        """
        return self.lm_head(hidden_rows)

    def num_parameters(self) -> int:
        """How many numbers the model holds, the tied output head counted once."""
        return self._num_parameters


def attend_one_sequence(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The simplest plug: the N tokens are one sequence from its first token on, nothing is kept.

    `q` (N, H, D), `k` and `v` (N, H_kv, D) -> (N, H, D). The dense oracle of the tests.
    """
    heads_first = (x.transpose(0, 1) for x in (q, k, v))  # (H, N, D)
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(0, 1)


# --------------------------------------------------------------------------------------------------
def demo():
    """One model, two plugs: recompute everything, or keep K and V in a list. The same logits."""
    config = GPTConfig(vocab_size=97, max_seq_len=64, n_layer=3, n_head=4, n_embd=64)
    model = GPT(config).init_weights(std=0.2).eval()
    ids = torch.randint(97, (24,), generator=torch.Generator().manual_seed(1))

    kept: list[tuple[list, list]] = [([], []) for _ in range(config.n_layer)]

    def attend_from_a_list(layer, q, k, v):  # the same socket, another memory
        keys, values = kept[layer]
        keys.append(k)
        values.append(v)
        heads_first = (x.transpose(0, 1) for x in (q, torch.cat(keys), torch.cat(values)))
        return F.scaled_dot_product_attention(*heads_first).transpose(0, 1)

    with torch.inference_mode():
        whole = model.logits(model(ids, torch.arange(24), attend_one_sequence))  # (24, 97)
        rows = [model(ids[i : i + 1], torch.tensor([i]), attend_from_a_list) for i in range(24)]
        one_by_one = model.logits(torch.cat(rows))  # (24, 97)

    error = (whole - one_by_one).abs().max().item()
    layers = f"{config.n_layer} layers, head_dim {config.head_dim}"
    print(f"a small GPT: {model.num_parameters():,} parameters, {layers}")
    print("recompute all   :  24 tokens in 1 call  of 24 rows, nothing kept")
    print("keep in a list  :  24 tokens in 24 calls of 1 row,  24 rows of K and V kept per layer")
    span = f"{whole.min():.1f} to {whole.max():.1f}"
    print(f"largest difference of the logits: {error:.1e}, logits span {span}\n")
    print("What a kept token costs, in 16 bits:")
    for name, shape in (("gpt2", (12, 12, 768)), ("gpt2-xl", (48, 25, 1600))):
        big = GPTConfig(n_layer=shape[0], n_head=shape[1], n_embd=shape[2])
        per_token = big.kv_bytes_per_token(torch.bfloat16)
        per_1024_mb = per_token * 1024 / 1e6
        print(f"  {name:8} {per_token:>8,} bytes a token, {per_1024_mb:5.1f} MB for 1,024 tokens")
    assert error < 1e-4, error
    print("ok: the model cannot tell which memory is behind its socket")


if __name__ == "__main__":
    demo()
