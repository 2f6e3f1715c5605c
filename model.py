"""A GPT-2 with one socket, `attend`: it does not know where its keys and values are kept.

Attention is the only place where a transformer reads other tokens, so it is the only place that
needs a cache. Most code bases pass the cache through every layer. Here the caller passes `forward`
one function, the socket `attend(layer, q, k, v)`. Attention without a cache, one slab of memory per
sequence, a pool of blocks and training are four such functions, and the model is the same for all.

    input_ids (N,) ─> wte + wpe ─> [ LayerNorm ─> q, k, v ─> attend ─> + ─> MLP ─> + ] x n_layer
    positions (N,) ────┘                                        │
                                     the socket: the caller decides where K and V are kept

The tokens are flat: the N tokens of all sequences of a step lie end to end, without padding and
without a batch dimension. A prompt of 300 tokens and seven sequences with one new token each are
N = 307 rows. Every linear layer multiplies them in one product.

Letters used in all files: B sequences, T tokens each, N tokens of all sequences end to end,
C n_embd, H heads, D head_dim, V vocabulary.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3.
Run: python model.py
Try: NUM_HEADS = 8 above the demo (twice the heads of half the size: as many parameters, and the
same bytes of K and V), or OLDEST = 1: the list then forgets the oldest token, and the assert "the
logits differ" fails.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# attend(layer, q, k, v) -> out: `layer` is an int, q is (N, H, D), k and v are (N, H_kv, D), out is
# (N, H, D). The function scales the scores by D ** -0.5. Where a layer needs another scale, the
# model multiplies q by the ratio of the two, so `attend` needs no argument for it.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

ALL_ROWS = slice(None)  # x[ALL_ROWS] is a view of all rows: nothing is copied

ACTIVATIONS = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),  # what GPT-2 was trained with
    "gelu": F.gelu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M model's."""

    vocab_size: int = 50257
    max_seq_len: int = 1024  # n_positions in Hugging Face's configs, block_size in nanoGPT
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # width of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True  # scores are divided by sqrt(head_dim)
    # Scores are also divided by layer + 1. Stanford's GPT-2 models "Mistral" were trained this way.
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
            epsilon = self.layer_norm_epsilon
            raise ValueError(f"layer_norm_epsilon is {epsilon}: it must be finite and not negative")
        if self.activation_function not in ACTIVATIONS:
            name, known = self.activation_function, ", ".join(ACTIVATIONS)
            raise ValueError(f"activation_function is {name!r}: choose one of {known}")

    @property
    def head_dim(self) -> int:
        """Numbers in one head's q, k or v: 64 for the 124M shape."""
        return self.n_embd // self.n_head

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's K and V in all layers: 36,864 for the 124M shape in 16 bits."""
        # K and V, each n_head * head_dim = n_embd numbers in every layer
        return 2 * self.n_layer * self.n_embd * dtype.itemsize


class Attention(nn.Module):
    """Project x to q, k and v, pass them to the socket, project its result."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        # The socket divides the scores by sqrt(D). For another scale, q is multiplied by q_scale.
        self.q_scale = 1.0 if config.scale_attn_weights else math.sqrt(config.head_dim)
        if config.scale_attn_by_inverse_layer_idx:
            self.q_scale /= layer + 1

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | slice) -> Tensor:
        """(N, C) -> (M, C): attention needs k and v of all N tokens, only `rows` are returned."""
        # Views of one product, no copies. So a token's q, k and v are neighbours in memory, and the
        # stride from one token's q to the next one's is 3 * C.
        q, k, v = self.c_attn(x).view(len(x), 3, self.n_head, -1).unbind(1)  # (N, H, D) each
        if self.q_scale != 1.0:
            q = q * self.q_scale
        return self.c_proj(attend(self.layer, q, k, v).flatten(1)[rows])


class MLP(nn.Module):
    """Two linear layers with an activation between them. Each token is computed by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, width)
        self.c_proj = nn.Linear(width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C): each token alone."""
        return self.c_proj(self.activation(self.c_fc(x)))


class Layer(nn.Module):
    """One transformer layer. (nanoGPT calls it a Block; here a block is a piece of KV memory.)"""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)  # does nothing in eval mode

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | slice) -> Tensor:
        """(N, C) -> (M, C): the hidden states of `rows` after this layer."""
        # Each half adds its result to the residual stream x.
        x = x[rows] + self.dropout(self.attn(self.ln_1(x), attend, rows))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """The model. Its attributes have Hugging Face's names, so the weights of a checkpoint fit."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a vector for each token id
        self.wpe = nn.Embedding(config.max_seq_len, config.n_embd)  # and one for each position
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Layer(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight  # one tensor, counted and stored once
        # Counted here because `kernels/packed_linear.py` may later store weights padded with zeros.
        self._num_parameters = sum(parameter.numel() for parameter in self.parameters())

    def init_weights(self, std: float = 0.02, seed: int = 0) -> "GPT":
        """Fill all weights with random numbers, by default as GPT-2 was initialised.

        The tests use std 0.2. With 0.02 greedy decoding repeats one token, even if the cache is
        broken.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:  # the gain of a LayerNorm
                nn.init.ones_(parameter)
            else:
                # Each layer adds two terms to the residual stream, the results of its two c_proj.
                # The variance of a sum grows with the number of terms, so each starts smaller.
                num_terms = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=std / math.sqrt(num_terms), generator=generator)
        return self

    def forward(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor | slice = ALL_ROWS
    ) -> Tensor:
        """Run N flat tokens through all layers.

        `input_ids` and `positions` are (N,) integers. A position is a token's index in its own
        sequence. `rows` (M,) choose the tokens whose hidden states are returned, for example only
        the last token of a prompt. Returns (M, C), after the last LayerNorm.
        """
        x = self.dropout(self.wte(input_ids) + self.wpe(positions))  # (N, C)
        *earlier, last = self.h
        for layer in earlier:
            x = layer(x, attend, ALL_ROWS)
        # No layer attends to the last layer's output, so its MLP runs for the chosen rows only. For
        # a prompt and 12 layers that saves a sixteenth of all multiplications.
        return self.ln_f(last(x, attend, rows))

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Scores of every possible next token for M chosen rows: (M, C) -> (M, V).

        For the 124M shape this product uses 31% of all weights, and a prompt of 300 tokens needs it
        for its last row only. So the caller chooses the rows.
        """
        return self.lm_head(hidden_rows)

    def num_parameters(self) -> int:
        """How many weights the model has; a tied output head is counted once."""
        return self._num_parameters


def attend_one_sequence(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The simplest function for the socket: the N tokens are one whole sequence, nothing is kept.

    `q` (N, H, D), `k` and `v` (N, H_kv, D) -> (N, H, D). It is the tests' dense oracle.
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (H, N, D), as PyTorch wants them
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


# --------------------------------------------------------------------------------------------------
NUM_HEADS = 4
OLDEST = 0  # the list of the demo gives attention the tokens [OLDEST, ..)


def demo():
    """One model and two sockets: recompute everything, or keep K and V in a list. Equal logits."""
    config = GPTConfig(vocab_size=97, max_seq_len=64, n_layer=3, n_head=NUM_HEADS, n_embd=64)
    model = GPT(config).init_weights(std=0.2).eval()
    ids = torch.randint(97, (24,), generator=torch.Generator().manual_seed(1))

    # keys[layer] and values[layer] are lists with one tensor for each token.
    keys: list[list[Tensor]] = [[] for _ in range(config.n_layer)]
    values: list[list[Tensor]] = [[] for _ in range(config.n_layer)]

    def attend_from_a_list(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[layer].append(k)  # (1, H, D)
        values[layer].append(v)
        q = q.transpose(0, 1)
        k = torch.cat(keys[layer][OLDEST:] or [k]).transpose(0, 1)  # (H, T, D)
        v = torch.cat(values[layer][OLDEST:] or [v]).transpose(0, 1)
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)

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
    print("Memory of a token's K and V, in 16 bits:")
    gpt2 = GPTConfig()
    gpt2_xl = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
    for name, big in (("gpt2", gpt2), ("gpt2-xl", gpt2_xl)):
        token_bytes = big.kv_bytes_per_token(torch.bfloat16)
        total_mb = token_bytes * 1024 / 1e6
        print(f"  {name:8} {token_bytes:>8,} bytes a token, {total_mb:5.1f} MB for 1,024 tokens")
    assert error < 1e-4, f"the logits differ by {error}"
    print("ok: both sockets give the same logits, and the model's code is the same for both")


if __name__ == "__main__":
    demo()
