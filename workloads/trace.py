"""Which trace is meant? A file's path or a generator's name becomes a checked Trace."""

from __future__ import annotations

import os
from difflib import get_close_matches

from workloads.catalogue import read_catalogue
from workloads.errors import TraceError
from workloads.fit import open_fitted
from workloads.formats import read_trace, write_mooncake
from workloads.model import Trace
from workloads.servegen import read_clients
from workloads.statistics import describe
from workloads.synthesize import GENERATORS, generate

__all__ = [
    "GENERATORS",
    "Trace",
    "TraceError",
    "describe",
    "generate",
    "open_trace",
    "read_trace",
    "write_mooncake",
]


def open_trace(
    spec: str, *, seed: int = 0, block_tokens: int = 512, timestamp_unit: str | None = None
) -> Trace:
    """The trace that `spec` names: a path, or `generator[:parameter=value,...]`.

    A directory of ServeGen clients (servegen.py) and a file of `trace fit` (fit.py) take parameters
    as a generator does.

    `seed` is a generator's; `timestamp_unit` ("ms" or "s") a JSONL file's, see `read_trace`.
    Raises TraceError, one line, for a name that is neither or a file that is no trace.
    """
    name, _, text = spec.partition(":")
    if name in GENERATORS:
        return generate(name, seed=seed, block_tokens=block_tokens, **_parameters(name, text))
    # A path may hold a colon; parameters follow the last one.
    directory, _, text = spec.rpartition(":") if not os.path.exists(spec) else (spec, "", "")
    if directory.endswith(".toml") and os.path.isfile(directory):
        return open_fitted(directory, seed=seed, **_parameters(directory, text))
    if os.path.isdir(directory):
        parameters = _parameters(directory, text)
        return read_clients(directory, seed=seed, block_tokens=block_tokens, **parameters)
    if not os.path.exists(spec):
        raise TraceError(f"{spec}: no such file, and no generator of that name; {_hint(spec)}")
    return read_trace(spec, block_tokens=block_tokens, timestamp_unit=timestamp_unit)


def _parameters(name: str, text: str) -> dict[str, float]:
    """The parameters in "rate_rps=2,duration_s=75"."""
    parameters: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        try:
            parameters[key.strip()] = float(value)
        except ValueError:
            raise TraceError(
                f"{name}: {part!r} is no parameter; write one like duration_s=600"
            ) from None
    return parameters


def _hint(spec: str) -> str:
    """What to do about a name that leads nowhere."""
    if spec in read_catalogue():
        return f"the catalogue has it: fetch it first (trace fetch {spec})"
    close = get_close_matches(spec, GENERATORS, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"give a path, or one of {', '.join(GENERATORS)}"
