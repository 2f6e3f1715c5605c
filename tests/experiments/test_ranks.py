"""One process against two ranks: the bytes that are sent, counted by hand."""

import pytest
from rows import run

from llm import SHIPPED_MODEL


@pytest.mark.slow
def test_two_ranks_hold_half_and_send_the_sums_of_each_layer(tmp_path):
    flags = "--batches 3 --new-tokens 4 --rounds 1"
    rows = run(tmp_path, f"ranks --model {SHIPPED_MODEL} {flags}")
    found = {(row["contender"], row["metric"]): row["median"] for row in rows}
    one, two = "1 process, 1 thread", "2 ranks, 1 thread each"
    assert found[two, "pool a rank"] == found[one, "pool a rank"] / 2
    # whole on both: 1,024 positions and 13 LayerNorms; 6 x 2 output biases are on rank 0
    whole = (1024 + 13 * 2 + 12) * 256 * 4
    assert found[two, "weights a rank"] - whole == (found[one, "weights a rank"] - whole) / 2
    # A text computes 8 + 3 tokens of 256 numbers of 4 bytes, and draws 4. The embedding and two
    # sums in 5 layers have all tokens, the sums of the last layer only those that are drawn from.
    sums = (1 + 2 * 5) * 11 + 2 * 4
    assert found[two, "bytes added up an output token"] == sums * 256 * 4 / 4
    assert found[two, "bytes gathered an output token"] == 3072 * 4  # the vocabulary
    assert found[two, "output tokens"] > 0
    assert {contender for contender, metric in found if metric == "speed against " + one} == {
        "1 process, 2 threads",
        two,
    }
