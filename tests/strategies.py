"""Any ragged batch: what Hypothesis draws for the kernels, and shrinks where one of them fails."""

import torch
from hypothesis import strategies as st
from worlds import World


@st.composite
def worlds(draw, dtypes=(torch.float64,)):
    """A world of up to five sequences, small enough that a failing one can be read."""
    n = draw(st.integers(0, 5))

    def several(most):
        return draw(st.lists(st.integers(0, most), min_size=n, max_size=n))

    query_lens = several(6)
    # Mostly a context at least as long as its queries; sometimes any, as in padded rows.
    longer = draw(st.booleans())
    context_lens = [a + longer * b for a, b in zip(several(14), query_lens, strict=True)]
    return World(
        query_lens,
        context_lens,
        context_starts=draw(st.none() | st.just(several(16))),
        block_size=draw(st.integers(1, 6)),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([1, 2, 5])),
        dtype=draw(st.sampled_from(dtypes)),
        num_padded_rows=draw(st.integers(0, 3)),
        num_padded_columns=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 99)),
    )
