"""An output head with a multiple of 64 rows, so that rows of logits begin at multiples of 16 bytes.

GPT-2 has 50,257 tokens, an odd number. Row i of its logits begins at number 50,257 i, which in 16
bits is a multiple of 16 bytes for every eighth row alone, so a GPU cannot store or load these rows
16 bytes at a time. With 50,304 rows of weights every row begins at such a multiple.

`checkpoints/load.py` gives a model that is loaded to a GPU this head.

Checked by tests/kernels/test_padded_head.py: nothing that chooses tokens sees the rows of padding.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT

HEAD_ROWS = 64  # the head has a multiple of so many rows; 50,257 -> 50,304


class PaddedHead(nn.Linear):
    """An output head (V, C) whose product has more rows, a multiple of 64, and hides their logits.

    `weight` is a view of the V rows that a checkpoint has, so the others (zeros) are never counted
    or saved.
    """

    def __init__(self, weight: Tensor):  # (V, C)
        V, C = weight.shape
        super().__init__(C, V, bias=False, device="meta")  # without memory
        padded = weight.new_zeros(-(-V // HEAD_ROWS) * HEAD_ROWS, C)
        padded[:V] = weight.detach()
        self.register_buffer("padded", padded, persistent=False)  # not in the state_dict
        self.weight = nn.Parameter(padded[:V], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, V), a view: its rows are as far apart as the padded ones."""
        return F.linear(x, self.padded)[:, : self.out_features]


def pad_vocabulary(model: GPT) -> GPT:
    """Give a model a `PaddedHead`; a tied embedding stays tied. Returns the same model."""
    model.lm_head = PaddedHead(model.lm_head.weight)
    if model.config.tie_word_embeddings:
        model.wte.weight = model.lm_head.weight
    return model
