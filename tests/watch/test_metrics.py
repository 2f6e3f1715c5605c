"""The numbers that Prometheus reads, against what the run itself returned."""

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from llm import LLM
from sampling import SamplingParams
from watch import metrics
from watch.metrics import Buckets, Metrics


def numbers(watcher) -> dict[str, float]:
    """The text as the library's own parser reads it: name without "vllm:" -> value.

    A bucket's name ends with its upper end: `x_bucket 0.5`.
    """
    found = {}
    for family in text_string_to_metric_families(watcher.text().decode()):
        for sample in family.samples:
            labels = [v for k, v in sorted(sample.labels.items()) if k != "model_name"]
            assert sample.labels["model_name"] == "toy"
            found[" ".join([sample.name.removeprefix("vllm:"), *labels])] = sample.value
    return found


@pytest.mark.parametrize("plan_ahead", [False, True], ids=["one by one", "planned ahead"])
def test_each_number_is_what_the_run_returned(tiny_gpt, plan_ahead):
    """Three texts in a pool that is too small for them, and a fourth whose client goes away."""
    model = tiny_gpt(dtype=torch.float64)
    engine = LLM(model, num_blocks=9, block_size=4, plan_ahead=plan_ahead).engine
    watcher = Metrics(engine.scheduler, "toy")
    engine.watchers.append(watcher)
    prompts = [[7, 3, 9, 1, 4], list(range(20, 34)), [5, 5]]
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=12))
    gone = engine.add_request([9], SamplingParams(max_tokens=12))
    outputs = [engine.step()]
    engine.abort(gone)
    assert numbers(watcher)["num_requests_running"] == len(engine.scheduler.running) > 0
    while engine.has_unfinished():
        outputs.append(engine.step())
    seen = numbers(watcher)

    num_written = sum(end - start for o in outputs for _, start, end in o.plan.extended)
    num_started = {seq for o in outputs for seq in o.plan.started}
    assert seen["num_requests_running"] == seen["num_requests_waiting"] == 0
    assert seen["kv_cache_usage_perc"] == 0
    assert seen["num_preemptions_total"] == engine.scheduler.num_preemptions > 0
    assert seen["generation_tokens_total"] == num_written >= 3 * 12
    assert seen["prompt_tokens_total"] == sum(seq.num_prompt_tokens for seq in num_started)
    assert seen["request_aborted_total"] == 1
    assert seen["request_success_total length"] == 3
    num_steps = len([o for o in outputs if o.plan.scheduled])
    assert seen["iteration_tokens_total_count"] == num_steps
    assert seen["iteration_tokens_total_sum"] == sum(o.plan.num_tokens for o in outputs)
    # A first token for each text that began to write, and a gap before each other token.
    num_first = seen["time_to_first_token_seconds_count"]
    assert num_first in (3, 4)
    assert seen["inter_token_latency_seconds_count"] == num_written - num_first
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert seen[f"{name}_count"] == seen[f"{name}_bucket +Inf"] == 3
    assert seen["request_prompt_tokens_sum"] == 5 + 14 + 2
    assert seen["request_generation_tokens_sum"] == 3 * 12
    assert not watcher._last_token, "nothing is kept of what has ended"


def test_times_are_from_arrival_and_between_tokens(tiny_gpt, monkeypatch):
    """A clock that the test moves: arrival at 100 s, tokens at 101, 103 and 106 s."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    engine = LLM(tiny_gpt(), num_blocks=9, block_size=4).engine
    watcher = Metrics(engine.scheduler, "toy")
    engine.watchers.append(watcher)
    request_id = engine.add_request([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.requests[request_id].metrics.arrival_time = 100.0
    for second in (101.0, 103.0, 106.0):
        now[0] = second
        engine.step()
    seen = numbers(watcher)
    assert seen["time_to_first_token_seconds_sum"] == 1
    assert seen["inter_token_latency_seconds_sum"] == 2 + 3
    assert seen["inter_token_latency_seconds_bucket 2"] == 1
    assert seen["inter_token_latency_seconds_bucket 5"] == 2
    assert seen["e2e_request_latency_seconds_sum"] == 6


def test_a_value_belongs_to_the_first_bucket_that_does_not_end_before_it():
    buckets = Buckets((1, 2, 5))
    for value in (0.5, 1, 1.5, 2, 6):
        buckets.add(value)
    buckets.add(4, times=3)
    assert buckets.cumulated() == [("1", 2), ("2", 4), ("5", 7), ("+Inf", 8)]
    assert buckets.sum == 0.5 + 1 + 1.5 + 2 + 6 + 3 * 4


def test_the_names_are_those_of_vllms_dashboards():
    """Its Grafana dashboard reads these; a dashboard made for vLLM works here."""
    names = {*metrics.GAUGES, *metrics.COUNTERS, *metrics.HISTOGRAMS}
    assert names >= {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens",
        "generation_tokens",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    }
