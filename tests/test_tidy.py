"""Does the source keep the house rules? Each rule walks the syntax trees and names its breaches.

ARCHITECTURE.md's "Layering" has the rules' reasons. A breach is reported as `file:line: rule;
remedy`. Every rule is tried on a small bad example and on a good one below, so that none of them
can pass by seeing nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("reference_cluster", "mooncake_bench", "workloads", "dashboards")
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600


@dataclass(frozen=True)
class Source:
    """One file: its path from the repository's root with forward slashes, text and tree."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return parse(self.text)

    def is_in(self, *places: str) -> bool:
        """Is it one of these files, or below one of these directories?"""
        return any(self.path == place or self.path.startswith(place + "/") for place in places)

    @property
    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of everything imported; `from a import b` gives a.b."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}"


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


Breach = tuple[int, str]  # Line, and what to do about it.
Rule = Callable[[Source], Iterator[Breach]]


def is_below(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


# ---- who may import whom ---------------------------------------------------------------------

MAY_START_A_CLUSTER = (
    "mooncake_bench/cli.py",
    "mooncake_bench/demo.py",
    "mooncake_bench/calibrate",
    "mooncake_bench/simulation.py",
    "mooncake_bench/reproduce",
    "mooncake_bench/gate/scenarios.py",
    "mooncake_bench/plan",
)
DRAWERS = (
    *("report", "report_replay", "cli", "look", "reproduce/page", "plan/page", "gate/page"),
    "replay/drawn",
)
MAY_DRAW = tuple(f"mooncake_bench/{name}.py" for name in DRAWERS)
SEEN = ("explore", "metrics", "opened", "records", "slo")
SEEN_BY_DASHBOARDS = tuple(f"mooncake_bench.{name}" for name in SEEN)


def layering(source: Source) -> Iterator[Breach]:
    """Packages depend on one another in one direction only."""
    package = source.path.split("/")[0]
    for line, name in source.imports:
        if name.startswith("."):
            yield line, "name the module in full instead of a relative import"
            continue
        target = name.split(".")[0]
        if target not in PACKAGES or target == package:
            continue
        if package in ("workloads", "reference_cluster"):
            yield line, f"{package} knows nothing of {target}; move the code or pass it in"
        elif package == "dashboards" and not is_below(name, *SEEN_BY_DASHBOARDS):
            yield line, f"dashboards see {', '.join(SEEN_BY_DASHBOARDS)}; pass frames in"
        elif target == "reference_cluster" and not source.is_in(*MAY_START_A_CLUSTER):
            yield line, f"only {', '.join(MAY_START_A_CLUSTER)} may; use records, or HTTP"
        elif target == "dashboards" and not source.is_in(*MAY_DRAW):
            yield line, f"only {', '.join(MAY_DRAW)} may; return a frame"


HOMES = {
    "plotly": ("dashboards",),
    "dash": ("dashboards/app",),
    "locust": ("mooncake_bench/replay/users.py", "mooncake_bench/replay/locustfile.py"),
    "gevent": ("mooncake_bench/replay/users.py", "mooncake_bench/replay/locustfile.py"),
    "torch": ("reference_cluster/engines/torch", "reference_cluster/engines/vllm"),
    "vllm": ("reference_cluster/engines/vllm",),
    "nixl": ("reference_cluster/engines/vllm",),
    "pyverbs": ("reference_cluster/transports/rdma/verbs.py",),
    "mooncake": ("reference_cluster/transports/mooncake.py",),
    "ray": ("reference_cluster/launch", "mooncake_bench/plan/ray_pool.py"),
    "aiconfigurator_core": ("mooncake_bench/plan/tables.py",),
}


def homes(source: Source) -> Iterator[Breach]:
    """A heavy or invasive library is imported in its one home only."""
    for line, name in source.imports:
        places = HOMES.get(name.split(".")[0])
        if places is not None and not source.is_in(*places):
            yield line, f"{name} belongs in {' or '.join(places)}; import from there"


# Inside reference_cluster, lowest first: a module imports its own layer and those before it.
CLUSTER_LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "request", "blocks", "config", "cost_model", "spans", "virtual_time", "presets"),
    ("policies",),
    ("engines", "transports", "kvpool", "messenger", "conductor", "samples", "reports"),
    ("prefill", "decode", "colocated", "replicator"),
    ("parts", "messages", "rpc", "membership", "peers", "worker_memory"),
    ("inside", "remote", "workers", "proxied", "servers", "carriers", "moves"),
    ("recovery",),
    ("cluster", "launch"),
    ("openai_protocol",),
    ("simulate", "api", "speech", "live_metrics", "worker"),
    ("serve",),
)
# The drivers and their helpers do not know the other driver.
DRIVERS = {"simulate": "serve", "serve": "simulate", "api": "simulate", "live_metrics": "simulate"}


def layer_of(module: str) -> int | None:
    """The layer of a module of reference_cluster, from its first name."""
    for level, names in enumerate(CLUSTER_LAYERS):
        if module in names:
            return level
    return None


def cluster_layers(source: Source) -> Iterator[Breach]:
    """request, blocks, config, cost_model <- policies <- instances <- cluster <- drivers."""
    if not source.is_in("reference_cluster") or source.path.endswith("cluster/__init__.py"):
        return
    own = source.path.split("/")[1].removesuffix(".py")
    level = layer_of(own)
    if level is None:
        yield 1, f"give {own} its layer in CLUSTER_LAYERS of tests/test_tidy.py"
        return
    for line, name in source.imports:
        if not is_below(name, "reference_cluster"):
            continue
        target = name.split(".")[1]
        other = layer_of(target)
        if (other is not None and other > level) or DRIVERS.get(own) == target:
            yield line, f"{own} is below {target} or beside it; pass what it needs in"


def pure_policies(source: Source) -> Iterator[Breach]:
    """Policies and the cost model decide: no loop, clock, I/O or logging."""
    pure = ("reference_cluster/policies", "reference_cluster/cost_model.py")
    if not source.is_in(*pure):
        return
    for line, name in source.imports:
        if is_below(name, "asyncio", "time", "datetime", "logging", "threading", "socket", "os"):
            yield line, f"a policy is pure: put what {name} tells into its view"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await):
            yield node.lineno, "a policy never waits: let its caller do it"


# ---- what has a better replacement -----------------------------------------------------------

WALL_CLOCKS = {
    f"time.{name}{unit}"
    for name in ("time", "monotonic", "perf_counter", "process_time")
    for unit in ("", "_ns")
} | {"time.sleep", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
# The response's `created` is a date by OpenAI's definition; the others are the live front.
OWN_CLOCK = tuple(
    f"reference_cluster/{name}.py"
    for name in ("openai_protocol", "serve", "api", "live_metrics", "launch/local", "workers")
)


def calls(source: Source) -> Iterator[tuple[ast.Call, str]]:
    """Every call and what it calls, as written."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def library_calls(source: Source) -> Iterator[tuple[ast.Call, str]]:
    """Calls of what the file imports, by their full dotted names; locals are left out."""
    known = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                known[alias.asname or name] = name
    for call, written in calls(source):
        first, *rest = written.split(".")
        if first in known:
            yield call, ".".join([known[first], *rest])


def wall_clocks(source: Source) -> Iterator[Breach]:
    """Time in the cluster's shared part is the loop's, virtual or not."""
    if not source.is_in("reference_cluster") or source.is_in(*OWN_CLOCK):
        return
    for call, name in library_calls(source):
        if name in WALL_CLOCKS or any(name.endswith("." + clock) for clock in WALL_CLOCKS):
            yield call.lineno, f"{name}() is host time; use the running loop's time()"


def asyncio_wait(source: Source) -> Iterator[Breach]:
    """`asyncio.wait` gives sets, whose order changes from run to run."""
    if source.is_in("reference_cluster"):
        for call, name in library_calls(source):
            if name == "asyncio.wait":
                yield call.lineno, "asyncio.wait returns sets; use a TaskGroup, gather or an Event"


MADE_IN_ORDER = ("list", "tuple", "enumerate", "iter")


def is_a_set(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("set", "frozenset")
    return isinstance(node, ast.Set | ast.SetComp)


def set_iteration(source: Source) -> Iterator[Breach]:
    """The order of a set depends on PYTHONHASHSEED."""
    for node in ast.walk(source.tree):
        looped: list[ast.expr] = []
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            looped = [node.iter]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "list",
            "tuple",
            "enumerate",
        ):
            looped = node.args[:1]
        for one in filter(is_a_set, looped):
            yield one.lineno, "a set has no order; loop over sorted(...) or dict.fromkeys(...)"


def module_random(source: Source) -> Iterator[Breach]:
    """Nobody shares a hidden random state."""
    allowed = ("random.Random", "numpy.random.default_rng", "numpy.random.Generator")
    bit_generators = ("numpy.random.PCG64", "numpy.random.Philox", "numpy.random.SeedSequence")
    for call, name in library_calls(source):
        if is_below(name, "random", "numpy.random") and not is_below(
            name, *allowed, *bit_generators
        ):
            yield call.lineno, f"{name}() draws from a shared state; pass a random.Random(seed) in"
        elif name in allowed[:2] and not call.args and not call.keywords:
            yield call.lineno, f"{name}() without a seed differs from run to run; give it one"


def prints(source: Source) -> Iterator[Breach]:
    """Only the command line talks to the terminal."""
    if source.is_in("mooncake_bench/cli.py"):
        return
    for call, name in calls(source):
        if name == "print":
            yield call.lineno, "return it, log it, or let mooncake_bench/cli.py print it"


def swallowed(source: Source) -> Iterator[Breach]:
    """An exception that nobody hears of is a bug that nobody finds."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "name the exceptions that are expected"
            if all(isinstance(one, ast.Pass) for one in node.body):
                yield node.lineno, "handle it, log it, or say contextlib.suppress(Expected)"


def unnamed_tasks(source: Source) -> Iterator[Breach]:
    """A task without a name is "Task-17" in a Deadlock's message."""
    for call, name in calls(source):
        is_a_task = name.endswith((".create_task", ".ensure_future"))
        if is_a_task and not any(keyword.arg == "name" for keyword in call.keywords):
            yield call.lineno, "say create_task(..., name=...)"


def long_functions(source: Source) -> Iterator[Breach]:
    """A function fits a screen; 70 lines is the wall."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} has {lines} lines; move branches or leaves out"


def long_files(source: Source) -> Iterator[Breach]:
    """One file answers one question."""
    lines = source.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield lines, f"{lines} lines; split by question"


EVERYWHERE = (long_functions, long_files)  # These hold for the tests as well.
RULES: tuple[Rule, ...] = (
    layering,
    homes,
    cluster_layers,
    pure_policies,
    wall_clocks,
    asyncio_wait,
    set_iteration,
    module_random,
    prints,
    swallowed,
    unnamed_tasks,
    long_functions,
    long_files,
)


# ---- the tests -------------------------------------------------------------------------------


@cache
def sources(*roots: str) -> list[Source]:
    paths = sorted(path for root in roots for path in (REPO / root).rglob("*.py"))
    return [Source(path.relative_to(REPO).as_posix(), path.read_text()) for path in paths]


def breaches(rule: Rule, source: Source) -> list[str]:
    name = rule.__name__.replace("_", " ")
    return [f"{source.path}:{line}: {name}; {remedy}" for line, remedy in rule(source)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Rule) -> None:
    """No file of ours breaks it."""
    roots = (*PACKAGES, "tests") if rule in EVERYWHERE else PACKAGES
    found = [line for source in sources(*roots) for line in breaches(rule, source)]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_all_packages_are_looked_at() -> None:
    """The walk finds each package, or every rule would pass."""
    seen = {source.path.split("/")[0] for source in sources(*PACKAGES)}
    assert seen == {*PACKAGES}


CLUSTER, POLICY = "reference_cluster/prefill.py", "reference_cluster/policies/x.py"
BENCH, REPLAY = "mooncake_bench/metrics.py", "mooncake_bench/replay/client.py"
LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX
BAD: list[tuple[Rule, str, str]] = [
    (layering, "workloads/trace.py", "from mooncake_bench.slo import Slo"),
    (layering, CLUSTER, "import workloads"),
    (layering, CLUSTER, "def f():\n    from dashboards import theme"),
    (layering, "dashboards/figures.py", "from mooncake_bench import report"),
    (layering, "dashboards/figures.py", "import reference_cluster.config"),
    (layering, BENCH, "from reference_cluster.config import Slo"),
    (layering, BENCH, "import dashboards.theme"),
    (layering, BENCH, "from . import records"),
    (homes, "mooncake_bench/report.py", "import plotly.graph_objects as go"),
    (homes, REPLAY, "from locust import User"),
    (homes, REPLAY, "import gevent"),
    (homes, "reference_cluster/engines/modelled.py", "import torch"),
    (homes, "reference_cluster/transports/tcp.py", "from mooncake.engine import TransferEngine"),
    (cluster_layers, "reference_cluster/request.py", "from reference_cluster.policies import view"),
    (cluster_layers, POLICY, "from reference_cluster.kvpool.pool import BlockPool"),
    (cluster_layers, CLUSTER, "from reference_cluster.cluster import Cluster"),
    (cluster_layers, "reference_cluster/cluster.py", "import reference_cluster.simulate"),
    (cluster_layers, "reference_cluster/serve.py", "from reference_cluster.simulate import replay"),
    (cluster_layers, "reference_cluster/brand_new.py", "x = 1"),
    (pure_policies, POLICY, "import asyncio"),
    (pure_policies, POLICY, "from logging import getLogger"),
    (pure_policies, POLICY, "async def f(): ..."),
    (wall_clocks, CLUSTER, "import time\nx = time.monotonic()"),
    (wall_clocks, CLUSTER, "from time import perf_counter as clock\nclock()"),
    (wall_clocks, CLUSTER, "import datetime\ndatetime.datetime.now()"),
    (wall_clocks, CLUSTER, "import time as t\nt.time_ns()"),
    (asyncio_wait, CLUSTER, "import asyncio\nasyncio.wait([])"),
    (asyncio_wait, CLUSTER, "from asyncio import wait\nwait([])"),
    (set_iteration, CLUSTER, "for x in {1, 2}: f(x)"),
    (set_iteration, CLUSTER, "y = [x for x in set(z)]"),
    (set_iteration, CLUSTER, "y = list({x for x in z})"),
    (module_random, BENCH, "import random\nrandom.random()"),
    (module_random, BENCH, "from random import shuffle\nshuffle(x)"),
    (module_random, BENCH, "import numpy as np\nnp.random.seed(0)"),
    (module_random, BENCH, "import random\nrandom.Random()"),
    (prints, BENCH, "print(1)"),
    (swallowed, BENCH, "try:\n    f()\nexcept ValueError:\n    pass"),
    (swallowed, BENCH, "try:\n    f()\nexcept:\n    g()"),
    (unnamed_tasks, CLUSTER, "import asyncio\nasyncio.create_task(f())"),
    (unnamed_tasks, CLUSTER, "group.create_task(f())"),
    (long_functions, BENCH, LONG),
    (long_files, BENCH, "x = 1\n" * (FILE_LINES_MAX + 1)),
]
GOOD: list[tuple[Rule, str, str]] = [
    (layering, "dashboards/figures.py", "from mooncake_bench import metrics"),
    (layering, "mooncake_bench/cli.py", "from reference_cluster.config import ClusterConfig"),
    (layering, "mooncake_bench/report.py", "from dashboards import figures"),
    (homes, "dashboards/figures.py", "import plotly.graph_objects as go"),
    (homes, "mooncake_bench/replay/users.py", "import gevent, locust"),
    (cluster_layers, "reference_cluster/simulate.py", "from reference_cluster.cluster import C"),
    (pure_policies, POLICY, "import random, math"),
    (wall_clocks, "reference_cluster/openai_protocol.py", "import time\ntime.time()"),
    (wall_clocks, CLUSTER, "now_s = loop.time()"),
    (asyncio_wait, CLUSTER, "import asyncio\nasyncio.wait_for(f(), 1)"),
    (set_iteration, CLUSTER, "for x in sorted({1, 2}): f(x)"),
    (module_random, BENCH, "import random\nrng = random.Random(3)\nrng.random()"),
    (module_random, BENCH, "def f(random): return random.random()"),
    (prints, "mooncake_bench/cli.py", "print(1)"),
    (swallowed, BENCH, "try:\n    f()\nexcept ValueError:\n    x = 1"),
    (unnamed_tasks, CLUSTER, "group.create_task(f(), name='f')"),
    (long_functions, BENCH, LONG.removesuffix("    x = 1\n")),
    (long_files, BENCH, "x = 1\n" * FILE_LINES_MAX),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_the_rule_sees_a_breach(rule: Rule, path: str, text: str) -> None:
    """A small bad example is named with its place, and with what to do instead."""
    found = breaches(rule, Source(path, text))
    assert len(found) == 1
    assert found[0].startswith(f"{path}:")
    assert len(found[0].split("; ", 1)[1]) > 10


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_the_rule_lets_good_code_pass(rule: Rule, path: str, text: str) -> None:
    """What the rule recommends, or allows where it stands, is no breach."""
    assert breaches(rule, Source(path, text)) == []


def test_every_rule_has_a_bad_example() -> None:
    """A rule without one could be blind."""
    assert {rule.__name__ for rule, _, _ in BAD} == {rule.__name__ for rule in RULES}
