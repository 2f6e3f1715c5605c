"""Metrics of a run for Prometheus, under the names that vLLM's dashboards read.

Prometheus is a program that asks a server for its numbers every few seconds (`GET /metrics`) and
keeps them; Grafana draws them. Three kinds of numbers are enough. A gauge goes up and down
(sequences that run now), a counter only goes up (tokens so far). A histogram counts in buckets, for
example how many requests got their first token within 0.1 s. From buckets, percentiles can be
computed over many servers.

    step ─> Metrics(output): adds to plain numbers        in the thread that steps
    GET /metrics ─> text() ─> collect(): names, values    in any thread

`Metrics` is a watcher: a function of what a step returns. It adds to plain numbers, and the library
`prometheus_client` writes them when somebody asks. (The library's own histogram takes 2 us for each
value: half a millisecond in a step of 256 sequences.) A name that vLLM has means here what it means
there; the units are tokens, seconds, and shares from 0 to 1. The tests recompute the numbers from a
run's outputs, and read the text with the library's parser.

docs.vllm.ai, "Production Metrics".
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from outputs import RequestOutput, StepOutput
from scheduler import Scheduler
from sequence import Plan, Sequence

# Upper ends of buckets: 1, 2 and 5 times the powers of ten.
SHORT_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LONG_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)

GAUGES = {
    "num_requests_running": "sequences that run",
    "num_requests_waiting": "sequences that wait",
    "kv_cache_usage_perc": "share of the pool's blocks that are held, from 0 to 1",
}
COUNTERS = {
    "num_preemptions": "sequences that were preempted",
    "prefix_cache_queries": "tokens that were looked up in the prefix cache",
    "prefix_cache_hits": "tokens that were found there",
    "prompt_tokens": "tokens of prompts",
    "generation_tokens": "tokens that were written",
    "request_aborted": "requests that were aborted: their clients went away",
}
HISTOGRAMS = {
    "iteration_tokens_total": ("tokens that a step computed", TOKENS),
    "time_to_first_token_seconds": ("from a request's arrival to its first token", LONG_SECONDS),
    "inter_token_latency_seconds": ("between two tokens of a text", SHORT_SECONDS),
    "e2e_request_latency_seconds": ("from a request's arrival to its end", LONG_SECONDS),
    "request_queue_time_seconds": ("from a request's arrival to its start", LONG_SECONDS),
    "request_prompt_tokens": ("tokens of a request's prompt", TOKENS),
    "request_generation_tokens": ("tokens of a text that has ended", TOKENS),
}


class Buckets:
    """A histogram: how many values were at most 1, 2, 5, .. and their sum."""

    def __init__(self, ends: tuple[float, ...]):
        self.ends = ends
        self.counts = [0] * (len(ends) + 1)  # the last one: larger than all ends
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, which was seen this many times."""
        self.counts[bisect_left(self.ends, value)] += (
            times  # 2 belongs to the bucket that ends at 2
        )
        self.sum += value * times

    def cumulated(self) -> list[tuple[str, float]]:
        """(upper end as text, values up to it), as Prometheus wants them."""
        total = 0
        pairs = []
        for end, count in zip((*self.ends, "+Inf"), list(self.counts), strict=True):
            total += count
            pairs.append((str(end), total))
        return pairs


class Metrics:
    """A watcher that keeps the numbers of all steps so far. `model_name` is a label of each."""

    def __init__(self, scheduler: Scheduler, model_name: str):
        self.scheduler = scheduler
        self.model_name = model_name
        self.gauges = dict.fromkeys(GAUGES, 0.0)
        self.counters = Counter(dict.fromkeys(COUNTERS, 0))
        self.histograms = {name: Buckets(ends) for name, (_, ends) in HISTOGRAMS.items()}
        self.ended: Counter[str] = Counter()  # texts, by their finish_reason
        # When the last token of each unfinished sequence was drawn, in seconds.
        self._last_token: dict[Sequence, float] = {}
        # A registry of its own: two servers in one process do not share their numbers.
        self._registry = CollectorRegistry()
        self._registry.register(self)

    # ---- for Prometheus ----
    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator:
        """Each metric with its name and value; the library calls it."""
        labels, values = ["model_name"], [self.model_name]
        for name, help in GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", help, labels=labels)
            gauge.add_metric(values, self.gauges[name])
            yield gauge
        for name, help in COUNTERS.items():  # the library appends "_total" to their names
            counter = CounterMetricFamily(f"vllm:{name}", help, labels=labels)
            counter.add_metric(values, self.counters[name])
            yield counter
        for name, (help, _) in HISTOGRAMS.items():
            buckets = self.histograms[name]
            histogram = HistogramMetricFamily(f"vllm:{name}", help, labels=labels)
            histogram.add_metric(values, buckets.cumulated(), buckets.sum)
            yield histogram
        labels = [*labels, "finished_reason"]
        ended = CounterMetricFamily("vllm:request_success", "texts that have ended", labels=labels)
        for reason, count in list(self.ended.items()):
            ended.add_metric([self.model_name, reason], count)
        yield ended

    # ---- after each step ----
    def __call__(self, output: StepOutput) -> None:
        """Count one step."""
        allocator, plan = self.scheduler.allocator, output.plan
        self.gauges["num_requests_running"] = len(self.scheduler.running)
        self.gauges["num_requests_waiting"] = self.scheduler.num_waiting
        self.gauges["kv_cache_usage_perc"] = 1 - allocator.num_free / allocator.num_blocks
        self.counters["num_preemptions"] += len(plan.preempted)
        self.counters["request_aborted"] += len(output.aborted)
        self.counters["prefix_cache_hits"] += output.blocks.hit * allocator.block_size
        if plan.scheduled:
            self.histograms["iteration_tokens_total"].add(plan.num_tokens)
        if plan.started:
            self._count_started(plan)
        self._count_tokens(plan)
        self._count_ended(plan)
        for request in output.aborted:
            for seq in request.sequences:
                self._last_token.pop(seq, None)
        for finished in output.finished:
            self._count_request(finished)

    def _count_started(self, plan: Plan) -> None:
        """Count the tokens of the sequences that have begun, or begun again."""
        num_before = {seq: start for seq, start, _ in plan.extended}  # without this step's tokens
        for seq in plan.started:
            # The prefix cache is asked for all tokens but the last (see `Scheduler._find_blocks`).
            num_tokens = num_before.get(seq, len(seq.token_ids))
            self.counters["prefix_cache_queries"] += num_tokens - 1
            if seq.num_preemptions == 0:
                self.counters["prompt_tokens"] += seq.num_prompt_tokens

    def _count_tokens(self, plan: Plan) -> None:
        """Count the new tokens of each sequence, and the time since the one before."""
        now = time.monotonic()
        last_token = self._last_token
        # Nearly all sequences got their last token in the step before, so the times are few.
        gaps: Counter[float | None] = Counter()
        num_tokens = 0
        for seq, start, end in plan.extended:
            num_tokens += end - start
            before = last_token.get(seq)
            gaps[before] += 1
            if start == seq.num_prompt_tokens < end:  # the first one
                waited = now - seq.request.metrics.arrival_time
                self.histograms["time_to_first_token_seconds"].add(waited)
            last_token[seq] = now
        self.counters["generation_tokens"] += num_tokens
        for before, times in gaps.items():
            if before is not None:
                self.histograms["inter_token_latency_seconds"].add(now - before, times)

    def _count_ended(self, plan: Plan) -> None:
        """Count the texts that have ended."""
        for seq in plan.ended:
            self._last_token.pop(seq, None)
            # A strategy drops a sequence without a reason: a beam that lost, for example.
            if seq.finish_reason is not None:
                self.ended[seq.finish_reason] += 1
                self.histograms["request_generation_tokens"].add(seq.num_generated)

    def _count_request(self, output: RequestOutput) -> None:
        """Count a request that has ended."""
        times = output.metrics
        self.histograms["request_prompt_tokens"].add(len(output.prompt_token_ids))
        if times.finished_time is not None:
            latency = times.finished_time - times.arrival_time
            self.histograms["e2e_request_latency_seconds"].add(latency)
        if times.first_scheduled_time is not None:
            waited = times.first_scheduled_time - times.arrival_time
            self.histograms["request_queue_time_seconds"].add(waited)
