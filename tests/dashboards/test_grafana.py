"""Do the Grafana dashboard and the alert rules fit what the cluster's /metrics says?

The rules and every query go through a real Prometheus where there is one. Grafana itself is not
packaged here: its dashboard is held to the parts of its schema that an import depends on.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.reference_cluster.live import live, wait_until
from tests.reference_cluster.small import a_config

HERE = Path(__file__).resolve().parents[2] / "dashboards" / "grafana"
BOARD = json.loads((HERE / "mooncake-bench.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(r"\b(?:vllm:|mooncake_bench_)\w+")
# Of instances in processes of their own alone: the cluster of these tests has none.
OF_WORKERS = ("mooncake_bench_kv_", "mooncake_bench_worker_")


def queries() -> list[str]:
    """Every query, with the variables of the dashboard filled in."""
    values = {"$job": "cluster", "$ttft": "30.0", "$tpot": "0.1", "$__rate_interval": "30s"}
    found = []
    for panel in PANELS:
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in values.items():
                text = text.replace(name, value)
            found.append(text)
    return found


def test_the_dashboard_can_be_imported() -> None:
    """What Grafana asks of a dashboard: ids, places without overlap, queries, a data source."""
    assert BOARD["uid"]
    assert BOARD["title"]
    assert BOARD["schemaVersion"] >= 36
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert [target["refId"] for target in panel["targets"]]
    variables = {one["name"] for one in BOARD["templating"]["list"]}
    assert variables == {"datasource", "job", "ttft", "tpot"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool; apt install prometheus")
def test_the_rules_alert_when_they_should() -> None:
    """promtool: the rules parse, and its own unit tests of them pass."""
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=HERE, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def scraped(tmp_path: Path) -> Iterator[httpx.Client]:
    """A real Prometheus that scrapes a live cluster which has served a few requests."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus; apt install prometheus")
    with live(a_config()) as (client, _):
        shutil.copy(HERE / "alerts.yml", tmp_path)
        config = {
            "global": {"scrape_interval": "1s"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [
                {
                    "job_name": "cluster",
                    "honor_labels": True,
                    "static_configs": [{"targets": [client.base_url.netloc.decode()]}],
                }
            ],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml"]
        command += [f"--storage.tsdb.path={tmp_path}/data", "--web.listen-address=127.0.0.1:0"]
        log = tmp_path / "log"
        with log.open("w") as file, subprocess.Popen(command, stderr=file) as server:
            try:
                wait_until(lambda: bool(_address(log)))
                with httpx.Client(base_url=f"http://{_address(log)}", timeout=10.0) as prometheus:
                    wait_until(lambda: _is_ready(prometheus))
                    # It takes up new targets every five seconds.
                    wait_until(lambda: bool(_known(prometheus)))
                    for _ in range(4):
                        _serve_some(client)
                        time.sleep(1.1)
                    yield prometheus
            finally:
                server.terminate()


def _address(log: Path) -> str:
    found = re.search(r'msg="Listening on" address=(\S+)', log.read_text())
    return found.group(1) if found else ""


def _is_ready(prometheus: httpx.Client) -> bool:
    return prometheus.get("/-/ready").status_code == 200


def _known(prometheus: httpx.Client) -> list[str]:
    """The names of all series."""
    found: list[str] = prometheus.get("/api/v1/label/__name__/values").json()["data"]
    return found


def _serve_some(client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "any", "prompt": [1, 2, 3] * 20, "max_tokens": 3}
    assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.live
def test_every_query_runs_in_a_real_prometheus(scraped: httpx.Client) -> None:
    """All parse; what they ask for is what the cluster exposes; the main ones have an answer."""
    names = set(_known(scraped))
    answered = 0
    for query in queries():
        answer = scraped.get("/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        answered += bool(answer["data"]["result"])
        for name in NAME.findall(query):
            if not name.startswith(OF_WORKERS) and "rejections" not in name:
                assert name in names or name.endswith("failures_total"), name
    assert answered >= 15
    rules = scraped.get("/api/v1/rules").json()["data"]["groups"]
    assert [rule["health"] for group in rules for rule in group["rules"]].count("err") == 0
