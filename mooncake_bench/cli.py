"""What can be typed? simulate | serve | replay | report | compare | gate | plan | demo | ..."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from mooncake_bench.calibrate.command import calibrate
from mooncake_bench.gate.command import gate_app
from mooncake_bench.gate.compare import compare
from mooncake_bench.gate.errors import GateError
from mooncake_bench.look import dashboard, watch
from mooncake_bench.plan.command import plan
from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.fit_command import trace_fit
from mooncake_bench.records import RecordsError, Run, read_run
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.options import ReplayOptions, as_command, options_from
from mooncake_bench.reproduce.errors import ReproduceError
from mooncake_bench.reproduce.progress import RunsBar
from mooncake_bench.slo import SloError, parse_slo, percent, seconds
from reference_cluster.config import ClusterConfig, load_config
from reference_cluster.cost_model import Profile, load_profile
from reference_cluster.errors import ClusterError
from workloads.trace import Trace, TraceError

if TYPE_CHECKING:
    from mooncake_bench.replay.client import Progress

BAD_INPUT, INVALID_RUN, INTERRUPTED = 2, 3, 130
EXPECTED = (
    ClusterError,
    GateError,
    PlanError,
    RecordsError,
    ReplayError,
    ReproduceError,
    SloError,
    TraceError,
)

results = Console()
diagnostics = Console(stderr=True)
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Does disaggregated serving pay for my traffic, and how much can I take within my SLOs?",
)
trace_app = typer.Typer(
    no_args_is_help=True,
    help="Workloads: look at, check, make, fetch. Files: Mooncake JSON lines (with session_id, "
    "delay, class where wanted), Azure CSV, BurstGPT CSV, Qwen-Bailian JSON lines, ShareGPT JSON, "
    "prompts or messages as JSON lines, a directory of ServeGen clients.",
)
app.add_typer(trace_app, name="trace")
app.add_typer(gate_app, name="gate")

# ---- flags shared by simulate and serve ------------------------------------------------------

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file; flags win over it")]
System = Annotated[str | None, typer.Option(help="disaggregated | colocated")]
PrefillCount = Annotated[int | None, typer.Option("--prefill", help="prefill instances")]
DecodeCount = Annotated[int | None, typer.Option("--decode", help="decode instances")]
Instances = Annotated[int | None, typer.Option(help="colocated instances")]
SchedulingName = Annotated[
    str | None,
    typer.Option(help="random | least-loaded | local-cache-aware | kvcache-centric"),
]
AdmissionName = Annotated[
    str | None, typer.Option(help="accept-all | load-based | early-rejection | predictive")
]
ProfileName = Annotated[str | None, typer.Option(help="cost profile: a name or a .toml file")]
BatchingName = Annotated[str | None, typer.Option(help="colocated: prefill-first | chunked")]
PrefixCaching = Annotated[
    bool | None, typer.Option("--prefix-caching/--no-prefix-caching", help="colocated")
]
SloText = Annotated[str | None, typer.Option(help='like "ttft<30s,tbt<100ms"')]
Seed = Annotated[int | None, typer.Option(help="of random choices")]


def cluster_config(
    config: Path | None,
    system: str | None,
    prefill: int | None,
    decode: int | None,
    instances: int | None,
    scheduling: str | None,
    admission: str | None,
    profile: str | None,
    batching: str | None,
    prefix_caching: bool | None,
    slo: str | None,
    seed: int | None,
    workers: str | None = None,
) -> tuple[ClusterConfig, Profile]:
    """The config file with the flags on top, and the profile that it names."""
    bounds = parse_slo(slo) if slo else None
    overrides: dict[str, Any] = {
        "system": system or ("colocated" if instances is not None else None),
        "prefill_instances": prefill,
        "decode_instances": decode,
        "colocated_instances": instances,
        "conductor.scheduling": scheduling,
        "conductor.admission": admission,
        "profile": profile,
        "colocated.batching": batching,
        "colocated.prefix_caching": prefix_caching,
        "slo.ttft_s": bounds and bounds.ttft_s,
        "slo.tbt_s": bounds and bounds.tbt_s,
        "seed": seed,
        "workers.placement": workers,
    }
    resolved = load_config(config, overrides)
    return resolved, load_profile(resolved.profile)


# ---- the verbs -------------------------------------------------------------------------------


@app.command()
def simulate(
    trace: Annotated[str, typer.Option(help="trace file or generator")],
    out: Annotated[Path, typer.Option(help="directory of the run")],
    config: ConfigFile = None,
    system: System = None,
    prefill: PrefillCount = None,
    decode: DecodeCount = None,
    instances: Instances = None,
    scheduling: SchedulingName = None,
    admission: AdmissionName = None,
    profile: ProfileName = None,
    batching: BatchingName = None,
    prefix_caching: PrefixCaching = None,
    slo: SloText = None,
    seed: Seed = None,
    speed: Annotated[float, typer.Option(min=1e-6, help="arrivals this many times faster")] = 1.0,
    jitter: Annotated[bool, typer.Option(help="spread arrivals inside timestamp buckets")] = False,
    window: Annotated[str, typer.Option(help="part of the trace, START-END in seconds")] = "",
    sample: Annotated[float, typer.Option(help="share of the trace's sessions")] = 1.0,
    limit: Annotated[int, typer.Option(help="the first N requests only; 0: all")] = 0,
    block_tokens: Annotated[int, typer.Option(min=1, help="tokens a block of the trace")] = 512,
    name: Annotated[str | None, typer.Option(help="name of the run in reports")] = None,
) -> None:
    """Run a trace through the cluster in virtual time: an hour in seconds."""
    from mooncake_bench.replay.prepare import load_trace
    from mooncake_bench.simulation import simulate_trace

    resolved, costs = cluster_config(
        config, system, prefill, decode, instances, scheduling, admission,
        profile, batching, prefix_caching, slo, seed,
    )  # fmt: skip  # one line a flag would be a page
    choice = {"trace": trace, "jitter": jitter, "window": window, "sample": sample, "limit": limit}
    choice |= {"block_tokens": block_tokens, "seed": resolved.seed}
    loaded = load_trace(options_from(choice))
    run = simulate_trace(loaded, resolved, costs, out, speed, name)
    show_summary([run])


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8000,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="MOONCAKE_BENCH_TOKEN", help="bearer token to ask for")
    ] = None,
    config: ConfigFile = None,
    system: System = None,
    prefill: PrefillCount = None,
    decode: DecodeCount = None,
    instances: Instances = None,
    scheduling: SchedulingName = None,
    admission: AdmissionName = None,
    profile: ProfileName = None,
    batching: BatchingName = None,
    prefix_caching: PrefixCaching = None,
    slo: SloText = None,
    seed: Seed = None,
    workers: Annotated[
        str | None, typer.Option(help="processes: one an instance | inside: all in one")
    ] = None,
) -> None:
    """Serve the live cluster (or the colocated baseline) behind an OpenAI-compatible API."""
    from reference_cluster.serve import serve as serve_cluster

    resolved, costs = cluster_config(
        config, system, prefill, decode, instances, scheduling, admission,
        profile, batching, prefix_caching, slo, seed, workers,
    )  # fmt: skip  # one line a flag would be a page

    def on_listening(url: str) -> None:
        diagnostics.print(
            f"{resolved.title} at {url} ({resolved.engine.kind} engine, profile {costs.name}); "
            "Ctrl-C ends it",
            highlight=False,
            soft_wrap=True,
        )

    serve_cluster(resolved, costs, host, port, token, on_listening)


def replay(options: ReplayOptions) -> None:
    """Replay a trace against an OpenAI-compatible endpoint, without Locust; or search capacity."""
    from mooncake_bench.replay.prepare import load_trace
    from mooncake_bench.replay.run import replay as replay_trace
    from mooncake_bench.replay.run import write

    if not options.url or not options.out:
        missing = "--url" if not options.url else "--out"
        raise ReplayError(
            f"{missing} is missing; give {missing} (see mooncake-bench replay --help)"
        )
    loaded = load_trace(options)
    if options.search:
        search_capacity(loaded, options)
        return
    with diagnostics.status("connecting") as status:
        result = replay_trace(
            loaded,
            options.url,
            options,
            lambda progress: status.update(str(progress)),
            directory=Path(options.out),
        )
    run = write(result, loaded, options, Path(options.out))
    show_summary([run])
    if not run.info.valid:
        raise typer.Exit(INVALID_RUN)


def search_capacity(trace: Trace, options: ReplayOptions) -> None:
    """Probe by bisection; the table and the capacity on stdout, progress on stderr."""
    from mooncake_bench.replay.search import Probe, SearchInterrupted, says, search

    with diagnostics.status("connecting") as status:

        def on_progress(value: float, progress: Progress) -> None:
            status.update(f"{options.search} {value:g}: {progress}")

        def on_probe(probe: Probe) -> None:
            diagnostics.print(says(probe, options.target), highlight=False, soft_wrap=True)
            status.update("next probe")

        try:
            found = search(trace, options.url, options, on_probe, on_progress)
        except SearchInterrupted as stop:
            diagnostics.print(
                f"{stop}; the probes are kept in {options.out}, the same command goes on there",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(INTERRUPTED) from None
    table = Table(
        str(options.search),
        "req/s",
        "offered",
        "within SLO",
        "95 % of it",
        "TTFT p99",
        "",
        box=None,
    )
    for one in sorted(found.probes, key=lambda probe: probe.value):
        span = f"{percent(one.low)} to {percent(one.high)}" if not one.stopped else "stopped early"
        verdict = ("holds" if one.holds else "over") + (
            "" if one.is_clear else ", too close to tell"
        )
        table.add_row(
            f"{one.value:g}", f"{one.rate_rps:.3g}", str(one.offered), percent(one.attainment),
            span, seconds(one.ttft_p99_s), verdict if one.valid else "client too slow",
        )  # fmt: skip  # one line a cell would hide the table
    results.print(table)
    results.print(found.sentence, highlight=False, soft_wrap=True)
    results.print(f"written to {options.out}", highlight=False, soft_wrap=True)
    if not found.valid:
        raise typer.Exit(INVALID_RUN)


app.command(name="replay")(as_command(replay))
app.command()(compare)
app.command()(dashboard)
app.command()(watch)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
) -> None:
    """Write one self-contained page that puts runs side by side."""
    from mooncake_bench.report import write_report

    written = write_report([read_run(directory) for directory in runs], out)
    results.print(str(written), highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="directory for the runs and report.html")] = Path(
        "demo"
    ),
    seconds_live: Annotated[float, typer.Option("--live-seconds", min=5.0)] = 60.0,
) -> None:
    """The main job end to end, small: live and simulated, disaggregated and colocated, one page."""
    from mooncake_bench.demo import run_demo

    run_demo(out, seconds_live, lambda line: diagnostics.print(line, highlight=False))


@app.command()
def reproduce(
    figures: Annotated[
        list[str] | None, typer.Argument(help="like fast25-fig1 arxiv-table3; none: all")
    ] = None,
    trace_dir: Annotated[
        Path | None,
        typer.Option(envvar="MOONCAKE_TRACES", help="directory with Mooncake's trace files"),
    ] = None,
    out: Annotated[Path, typer.Option(help="page, JSON, and the runs kept for the next time")] = (
        Path("reproduced")
    ),
    workers: Annotated[int, typer.Option(min=1, help="runs at a time, a process each")] = 2,
) -> None:
    """Run the Mooncake papers' experiments in virtual time, beside the published figures."""
    from mooncake_bench.reproduce.main import reproduce as reproduce_figures

    try:
        with RunsBar(diagnostics) as bar:
            found = reproduce_figures(figures or [], trace_dir, out, workers, bar.advance)
    except KeyboardInterrupt:
        diagnostics.print(
            f"interrupted; what had begun is kept in {out}, the same command goes on from there",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    table = Table("figure", "bounds", "largest error", "CPU s", box=None)
    for one in found:
        table.add_row(*one.in_short)
    results.print(table)
    results.print(f"written to {out}", highlight=False, soft_wrap=True)


app.command()(plan)
app.command()(calibrate)


# ---- workloads -------------------------------------------------------------------------------

TraceArgument = Annotated[str, typer.Argument(help="trace file or generator")]


@trace_app.command()
def info(trace: TraceArgument) -> None:
    """Duration, rate, lengths and prefix reuse of a trace."""
    from workloads.trace import describe, open_trace

    results.print_json(msgspec.json.encode(describe(open_trace(trace))).decode())


@trace_app.command()
def validate(trace: TraceArgument) -> None:
    """Check every row; the first that is wrong is named, with what to do about it."""
    from workloads.trace import open_trace

    loaded = open_trace(trace)
    results.print(
        f"{trace}: {loaded.frame.height} requests over {loaded.duration_s:.0f} s, all valid"
    )


@trace_app.command()
def generate(
    generator: Annotated[str, typer.Argument(help="like conversation-like:duration_s=600")],
    out: Annotated[Path, typer.Option(help="Mooncake JSON lines to write")],
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a generated trace to a file."""
    from workloads.trace import open_trace, write_mooncake

    write_mooncake(open_trace(generator, seed=seed), out)
    results.print(str(out), highlight=False, soft_wrap=True)


@trace_app.command()
def convert(
    trace: TraceArgument,
    out: Annotated[Path, typer.Option(help="Mooncake JSON lines to write")],
    timestamp_unit: Annotated[
        str | None, typer.Option(help="ms | s, where the file's own is not plain")
    ] = None,
) -> None:
    """Write a trace of another format as Mooncake JSON lines."""
    from workloads.trace import open_trace, write_mooncake

    write_mooncake(open_trace(trace, timestamp_unit=timestamp_unit), out)
    results.print(str(out), highlight=False, soft_wrap=True)


@trace_app.command()
def fetch(
    name: Annotated[str | None, typer.Argument(help="name in the catalogue; none lists it")] = None,
    directory: Annotated[Path, typer.Option(help="where to put it")] = Path("traces"),
) -> None:
    """Download a published trace and check its sha256."""
    from workloads.catalogue import fetch as fetch_trace
    from workloads.catalogue import read_catalogue

    if name is None:
        table = Table("name", "licence", "description")
        for key, entry in read_catalogue().items():
            table.add_row(key, entry.licence, entry.description)
        results.print(table)
    else:
        results.print(str(fetch_trace(name, directory)), highlight=False, soft_wrap=True)


trace_app.command(name="fit")(trace_fit)


# ---- showing ---------------------------------------------------------------------------------

ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("offered", lambda one: f"{one['offered']}"),
    ("finished", lambda one: f"{one['finished']}"),
    ("rejected / failed", lambda one: f"{one['rejected']} / {one['failed']}"),
    ("attainment", lambda one: percent(one["attainment"])),
    ("goodput, req/s", lambda one: f"{one['goodput_rps'] or 0:.3f}"),
    ("TTFT mean", lambda one: seconds(one["ttft_s"]["mean"])),
    ("TTFT p50", lambda one: seconds(one["ttft_s"]["p50"])),
    ("TTFT p90", lambda one: seconds(one["ttft_s"]["p90"])),
    ("TTFT p99", lambda one: seconds(one["ttft_s"]["p99"])),
    ("TBT p50", lambda one: seconds(one["tbt_s"]["p50"])),
    ("TBT p90", lambda one: seconds(one["tbt_s"]["p90"])),
    ("TBT p99", lambda one: seconds(one["tbt_s"]["p99"])),
    ("prefix hits", lambda one: percent(one["prefix_hit_ratio"])),
    ("lag p99", lambda one: seconds(one["lag_s"]["p99"])),
)


def show_summary(runs: list[Run]) -> None:
    """One column a run, on stdout; its warnings on stderr."""
    table = Table("", *[run.info.name for run in runs], box=None)
    for title, cell in ROWS:
        table.add_row(title, *[cell(run.summary) for run in runs])
    results.print(table)
    for run in runs:
        for line in [*run.info.warnings, *run.info.invalid_reasons]:
            diagnostics.print(line, highlight=False)
        if run.directory is not None:
            results.print(f"written to {run.directory}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except EXPECTED as error:
        diagnostics.print(
            f"mooncake-bench: {error}", style="red", highlight=False, soft_wrap=True, markup=False
        )
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
