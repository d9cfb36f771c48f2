"""What can be asked of a replay? The flags of `mooncake-bench replay` and of Locust, in one place.

A field of ReplayOptions is a flag: `first_token_timeout` is `--first-token-timeout` in both.
"""

from __future__ import annotations

import argparse
import inspect
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.servers import SERVERS


def _flag(text: str, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, **limits)


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to replay, how, and where the results go. Times in seconds."""

    trace: Annotated[
        str, _flag("trace file (see `trace --help` for the formats) or the name of a generator")
    ] = "conversation-like"
    url: Annotated[
        str,
        _flag("the endpoint, like http://127.0.0.1:8000 (its token: $MOONCAKE_BENCH_TOKEN)"),
    ] = ""
    server: Annotated[
        Literal["", "vllm", "sglang", "dynamo", "tgi"],
        _flag("what answers at the URL: its kind of prompts, and a word where it tells too little"),
    ] = ""
    out: Annotated[str, _flag("directory of the run; nothing is written without it")] = ""
    name: Annotated[str, _flag("name of the run in reports (default: the trace's)")] = ""
    speed: Annotated[float, _flag("replay this many times faster than the trace", gt=0.0)] = 1.0
    jitter: Annotated[bool, _flag("spread arrivals inside the trace's timestamp buckets")] = False
    arrivals: Annotated[
        str,
        _flag(
            "when requests arrive: trace, constant, poisson, gamma or ramp, like poisson:rate_rps=5"
        ),
    ] = "trace"
    concurrency: Annotated[
        int, _flag("closed loop: so many requests at a time, times ignored; 0: open loop", ge=0)
    ] = 0
    sessions: Annotated[
        bool, _flag("a session's next turn waits for the answer, where the trace says so")
    ] = True
    seed: Annotated[int, _flag("of generator, arrivals, jitter and sampling")] = 0
    window: Annotated[str, _flag("replay this part of the trace, START-END in seconds")] = ""
    sample: Annotated[float, _flag("share of the trace's sessions to replay", gt=0.0, le=1.0)] = 1.0
    limit: Annotated[int, _flag("replay the first N requests only; 0: all", ge=0)] = 0
    block_tokens: Annotated[int, _flag("tokens a block of the trace's ids", ge=1)] = 512
    slo: Annotated[
        str,
        _flag('bounds that a request must meet; by class: "chat:ttft<2s,tbt<50ms;batch:ttft<60s"'),
    ] = "ttft<30s,tbt<100ms"
    slo_headers: Annotated[
        bool, _flag("tell the server the bounds: headers x-slo-ttft-ms and x-slo-tpot-ms")
    ] = False
    warmup: Annotated[
        float, _flag("s at the start whose requests are sent but left out of the summary", ge=0.0)
    ] = 0.0
    cooldown: Annotated[
        float, _flag("s before the last arrival whose requests are left out of the summary", ge=0.0)
    ] = 0.0
    retry: Annotated[
        Literal["none", "backoff"], _flag("what is done with a rejected request (attempts counted)")
    ] = "none"
    scrape: Annotated[bool, _flag("read the server's /metrics once a second")] = True
    prompt: Annotated[
        Literal["auto", "tokens", "text"],
        _flag("prompts as token ids or as text (auto: token ids where the endpoint takes them)"),
    ] = "auto"
    endpoint: Annotated[
        Literal["completions", "chat"], _flag("/v1/completions or /v1/chat/completions")
    ] = "completions"
    tokenizer: Annotated[
        str, _flag("tokenizer.json (or its directory) by which text prompts get their exact length")
    ] = ""
    salt: Annotated[
        str,
        _flag("changes all prefixes alike, against a warm cache: none, run (new each run), a text"),
    ] = "none"
    cache_salt: Annotated[bool, _flag("send the salt as cache_salt too (vLLM)")] = False
    model: Annotated[str, _flag("model name (default: the first of /v1/models)")] = ""
    connect_timeout: Annotated[float, _flag("s to open a connection", gt=0.0)] = 10.0
    first_token_timeout: Annotated[float, _flag("s from send to first token", gt=0.0)] = 600.0
    stall_timeout: Annotated[float, _flag("s between two tokens", gt=0.0)] = 120.0
    total_timeout: Annotated[float, _flag("s from send to the end of a request", gt=0.0)] = 3600.0
    max_lag: Annotated[float, _flag("s of p99 lag above which the run is invalid", gt=0.0)] = 0.1
    max_cpu: Annotated[float, _flag("share of a core above which the run is invalid", gt=0.0)] = 0.9
    max_stall: Annotated[
        float, _flag("s of p99 event-loop lateness above which the run is invalid", gt=0.0)
    ] = 0.1
    search: Annotated[
        Literal["", "speed", "rate"],
        _flag("find the highest speed, or rate in requests/s, at which the target is met"),
    ] = ""
    target: Annotated[float, _flag("attainment to be met in a search", gt=0.0, le=1.0)] = 0.9
    search_from: Annotated[float, _flag("where a search begins: must be met", ge=0.0)] = 0.0
    search_to: Annotated[float, _flag("where a search ends", ge=0.0)] = 0.0
    search_precision: Annotated[
        float, _flag("a search ends when its bounds are so close: 0.05 is 5 %", gt=0.0, le=1.0)
    ] = 0.05

    @property
    def sends_tokens(self) -> bool:
        """Whether prompts travel as token ids rather than as text."""
        takes = self.endpoint == "completions" and (
            not self.server or SERVERS[self.server].takes_token_ids
        )
        return self.prompt == "tokens" or (self.prompt == "auto" and takes)


@dataclass(frozen=True, slots=True)
class Flag:
    """One command-line flag; `kind` is str, float, int or bool."""

    field: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...]

    @property
    def name(self) -> str:
        return "--" + self.field.replace("_", "-")


def flags() -> tuple[Flag, ...]:
    """The fields of ReplayOptions as flags, in order."""
    info = msgspec.inspect.type_info(ReplayOptions)
    assert isinstance(info, msgspec.inspect.StructType)
    return tuple(_as_flag(field) for field in info.fields)


def options_from(values: Mapping[str, Any]) -> ReplayOptions:
    """ReplayOptions of a mapping by field name; other keys are ignored. Raises ReplayError."""
    mine = {name: values[name] for name in ReplayOptions.__struct_fields__ if name in values}
    try:
        options = msgspec.convert(mine, ReplayOptions, strict=False)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`")
        raise ReplayError(
            f"--{field.replace('_', '-')} {mine[field]}: {_remedy(field, text)}"
        ) from None
    if options.endpoint == "chat" and options.prompt == "tokens":
        raise ReplayError("--prompt tokens: chat takes no token ids; use --endpoint completions")
    parse_window(options.window)
    _check_together(options)
    return options


def settle_salt(options: ReplayOptions) -> ReplayOptions:
    """The options with `--salt run` replaced by a nonce of this run, so that it is recorded."""
    if options.salt != "run":
        return options
    return msgspec.structs.replace(options, salt=secrets.token_hex(8))


def _check_together(options: ReplayOptions) -> None:
    """Raise ReplayError for flags that do not go together."""
    server = SERVERS.get(options.server)
    if server is not None and options.prompt == "tokens" and not server.takes_token_ids:
        raise ReplayError(f"--prompt tokens: {server.title} takes none; leave out --prompt")
    if options.cache_salt and options.salt == "none":
        raise ReplayError("--cache-salt: there is no salt to send; add --salt run or --salt TEXT")
    if options.tokenizer and options.sends_tokens:
        raise ReplayError("--tokenizer: prompts go as token ids here; add --prompt text")
    if not options.salt.isprintable() or not options.salt:
        raise ReplayError(f"--salt {options.salt!r}: give none, run, or a printable text")
    if options.concurrency and (options.arrivals != "trace" or options.search):
        what = "--search" if options.search else "--arrivals"
        raise ReplayError(f"{what}: a closed loop has no arrivals of its own; leave --concurrency")
    if options.search and options.speed != 1.0:
        raise ReplayError(
            "--speed: a search chooses it; leave it out, or cut the trace by --window"
        )
    if options.search and not 0 < options.search_from < options.search_to:
        raise ReplayError(
            f"--search {options.search}: give --search-from above 0 and --search-to above that"
        )


def parse_window(text: str) -> tuple[float, float] | None:
    """`"60-600"` as (60.0, 600.0), seconds; None for "". Raises ReplayError."""
    if not text:
        return None
    start, _, end = text.partition("-")
    try:
        bounds = (float(start), float(end))
    except ValueError:
        raise ReplayError(f"--window {text}: write START-END in seconds, like 0-600") from None
    if not 0.0 <= bounds[0] < bounds[1]:
        raise ReplayError(f"--window {text}: the end must come after the start, like 0-600")
    return bounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to Locust's parser (an argparse one)."""
    # Not in a group: Locust's page shows what is added to its parser itself.
    for flag in flags():
        if flag.field.startswith("search") or flag.field == "target":
            continue  # A search is many runs; `mooncake-bench replay` does it.
        settings: dict[str, Any] = {"default": flag.default, "help": flag.help}
        if flag.kind is bool:
            # Those that are on by default need a way to be turned off.
            settings["action"] = argparse.BooleanOptionalAction if flag.default else "store_true"
        else:
            settings["type"] = flag.kind
        if flag.choices:
            settings["choices"] = list(flag.choices)
        action = parser.add_argument(flag.name, **settings)
        # The page has a field of its own for the address: Host.
        action.include_in_web_ui = flag.field != "url"  # type: ignore[attr-defined]  # Locust's


def as_command(run: Callable[[ReplayOptions], None]) -> Callable[..., None]:
    """`run` as a function with one typer option a flag, for `app.command()(as_command(run))`."""
    import typer

    parameters = []
    for flag in flags():
        # The words are checked by options_from: ways to tell them to typer differ by its version.
        words = "[" + "|".join(filter(None, flag.choices)) + "]" if flag.choices else None
        name = f"{flag.name}/--no-{flag.name[2:]}" if flag.kind is bool else flag.name
        parameters.append(
            inspect.Parameter(
                flag.field,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(flag.default, name, help=flag.help, metavar=words),
                annotation=flag.kind,
            )
        )

    def command(**values: Any) -> None:
        run(options_from(values))

    command.__doc__ = run.__doc__
    command.__name__ = run.__name__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {flag.field: flag.kind for flag in flags()}
    return command


def _remedy(field: str, text: str) -> str:
    choices = next(flag.choices for flag in flags() if flag.field == field)
    words = ", ".join(filter(None, choices))
    return f"use one of {words}" if choices else text.replace("`", "").lower()


_KINDS: dict[type, type] = {
    msgspec.inspect.StrType: str,
    msgspec.inspect.FloatType: float,
    msgspec.inspect.IntType: int,
    msgspec.inspect.BoolType: bool,
    msgspec.inspect.LiteralType: str,
}


def _as_flag(field: msgspec.inspect.Field) -> Flag:
    kind = field.type
    text = ""
    if isinstance(kind, msgspec.inspect.Metadata):
        text = str((kind.extra_json_schema or {}).get("description", ""))
        kind = kind.type
    choices = kind.values if isinstance(kind, msgspec.inspect.LiteralType) else ()
    return Flag(
        field.name, _KINDS[type(kind)], field.default, text, tuple(str(one) for one in choices)
    )
