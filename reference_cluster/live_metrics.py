"""What does Prometheus see? vLLM's names where the meaning is the same, ours for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reference_cluster.cluster import Cluster
from reference_cluster.colocated import ColocatedLoad
from reference_cluster.decode import DecodeLoad
from reference_cluster.request import Request

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 30, 60, 120)


# What workers count (`carriers.py:COUNTED` and others), by the name it has here.
COUNTS = {
    "sent_bytes": ("mooncake_bench_kv_sent_bytes", "KV bytes written to decode workers"),
    "stream_busy_s": ("mooncake_bench_kv_transfer_seconds", "Spent on writing them"),
    "stream_tail_s": (
        "mooncake_bench_kv_transfer_exposed_seconds",
        "Of that, after the prefills' ends: what layer-wise streaming did not hide",
    ),
    "fetched_bytes": ("mooncake_bench_kv_fetched_bytes", "KV bytes of prefixes read from peers"),
    "fetch_s": ("mooncake_bench_kv_fetch_seconds", "Spent on reading them"),
    "failed_fetches": ("mooncake_bench_kv_failed_fetches", "Prefixes computed instead"),
    "verified_blocks": ("mooncake_bench_kv_verified_blocks", "Blocks looked at byte by byte"),
    "mismatched_blocks": ("mooncake_bench_kv_mismatched_blocks", "Of these, damaged"),
}


RECOVERED = {
    "lost_instances": "Instances that were lost, with all they held",
    "replaced": "Requests placed again before their first token",
    "resumed": "Streams that went on elsewhere",
}


class WorkerMetrics(Collector):
    """Workers as their last heartbeats tell; counters of a restarted one begin anew."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def collect(self) -> Iterator[Metric]:
        rows = self.cluster.house.rows()
        up = GaugeMetricFamily("mooncake_bench_worker_up", "Is it a member?", labels=["instance"])
        age = GaugeMetricFamily(
            "mooncake_bench_worker_report_age_seconds", "Of its last report", labels=["instance"]
        )
        for row in rows:
            up.add_metric([row["name"]], float(row["state"] == "member"))
            if row["report_age_s"] is not None:
                age.add_metric([row["name"]], row["report_age_s"])
        yield up
        yield age
        for key, text in RECOVERED.items():
            family = CounterMetricFamily(f"mooncake_bench_{key}", text)
            family.add_metric([], self.cluster.recovery.counts[key])
            yield family
        for key, (name, text) in COUNTS.items():
            family = CounterMetricFamily(name, text, labels=["instance"])
            for row in rows:
                if key in row:
                    family.add_metric([row["name"]], row[key])
            yield family


class LiveMetrics:
    """Counters and histograms are fed as requests end, gauges read when somebody asks."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # A second series is noise.
        self.cluster = cluster
        self.registry = CollectorRegistry()
        self.registry.register(WorkerMetrics(cluster))
        self.model = model
        self.histograms = {
            name: self.histogram(f"vllm:{name}_seconds", text)
            for name, text in (
                ("time_to_first_token", "From receipt to first token"),
                ("e2e_request_latency", "From receipt to last token"),
                ("request_queue_time", "From receipt to the start of the prefill"),
                ("request_prefill_time", "From the start of the prefill to the first token"),
                ("request_decode_time", "From first to last token"),
                ("request_time_per_output_token", "Mean time between a request's tokens"),
            )
        }
        self.prompt = self.counter("vllm:prompt_tokens", "Prompt tokens prefilled or reused")
        self.generated = self.counter("vllm:generation_tokens", "Output tokens")
        self.queries = self.counter("vllm:prefix_cache_queries", "Prompt tokens looked up")
        self.hits = self.counter("vllm:prefix_cache_hits", "Prompt tokens reused")
        self.success = self.counter("vllm:request_success", "Finished", "finished_reason")
        self.decisions = self.counter(
            "mooncake_bench_conductor_decisions", "Requests placed or rejected", "decision"
        )
        self.rejections = self.counter(
            "mooncake_bench_conductor_rejections", "Rejected requests", "reason"
        )
        self.failures = self.counter("mooncake_bench_failures", "Failed requests", "reason")
        self.wasted = self.counter(
            "mooncake_bench_wasted_prefill_tokens", "Computed for requests that did not finish"
        )
        self.running = self.gauge("vllm:num_requests_running", "Requests in a batch or prefill")
        self.waiting = self.gauge("vllm:num_requests_waiting", "Requests queued")
        self.usage = self.gauge("vllm:kv_cache_usage_perc", "Share of device KV in use", "instance")
        self.lag = self.gauge(
            "mooncake_bench_engine_lag_seconds_max", "How late a modelled engine woke at worst"
        )

    def histogram(self, name: str, text: str) -> Histogram:
        family = Histogram(name, text, ["model_name"], registry=self.registry, buckets=SECONDS)
        return family.labels(self.model)

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        family = Counter(name, text, ["model_name", *labels], registry=self.registry)
        return family if labels else family.labels(self.model)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        family = Gauge(name, text, ["model_name", *labels], registry=self.registry)
        return family if labels else family.labels(self.model)

    def ended(self, request: Request) -> None:
        """Count one request that has finished, was rejected or failed."""
        is_rejected = request.status == "rejected"
        self.decisions.labels(self.model, "rejected" if is_rejected else "placed").inc()
        computed = request.prefilled_tokens - request.reused_tokens
        if request.status == "finished":
            self.finished(request)
            return
        self.wasted.inc(computed)
        family = self.rejections if is_rejected else self.failures
        family.labels(self.model, request.reason or "unknown").inc()

    def finished(self, request: Request) -> None:
        stamps = request.timeline
        assert stamps.first_token_s is not None
        assert stamps.prefill_start_s is not None
        assert stamps.finished_s is not None
        decode_s = stamps.finished_s - stamps.first_token_s
        seconds = {
            "time_to_first_token": stamps.first_token_s - stamps.arrived_s,
            "e2e_request_latency": stamps.finished_s - stamps.arrived_s,
            "request_queue_time": stamps.prefill_start_s - stamps.arrived_s,
            "request_prefill_time": stamps.first_token_s - stamps.prefill_start_s,
            "request_decode_time": decode_s,
        }
        if request.produced_tokens > 1:
            seconds["request_time_per_output_token"] = decode_s / (request.produced_tokens - 1)
        for name, value in seconds.items():
            self.histograms[name].observe(max(0.0, value))
        self.prompt.inc(request.input_tokens)
        self.queries.inc(request.input_tokens)
        self.hits.inc(request.reused_tokens)
        self.generated.inc(request.produced_tokens)
        self.success.labels(self.model, "length").inc()

    def render(self) -> bytes:
        """The text that `/metrics` answers with."""
        running = waiting = 0
        for instance in self.cluster.prefill:
            running += int(instance.running is not None)
            waiting += len(instance.queue)
        for decode in self.batching():
            running += decode.batch.size
            waiting += len(decode.waiting)
            self.usage.labels(self.model, decode.name).set(self.used_share(decode))
        self.running.set(running)
        self.waiting.set(waiting)
        self.lag.set(self.cluster.house.engine_lag_s)
        return generate_latest(self.registry)

    def batching(self) -> Iterable[DecodeLoad | ColocatedLoad]:
        return [*self.cluster.decode, *self.cluster.colocated]

    def used_share(self, instance: DecodeLoad | ColocatedLoad) -> float:
        if isinstance(instance, DecodeLoad):
            return instance.batch.kv_tokens / instance.capacity_tokens
        return instance.pool.used / instance.pool.capacity
