"""The real conversation trace as the server sees it: rows, lengths, shared prefixes."""

import json

import as_seen
import pytest

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not as_seen.TRACE.exists(), reason=f"no {as_seen.TRACE}; MOONCAKE_TRACES"),
]
SECONDS = 15.0


def test_the_live_cluster_sees_the_trace(tmp_path):
    """46 requests of 15 s, all at the trace's own times; the cluster counts their tokens too."""
    with as_seen.serving(as_seen.CLUSTER) as url:
        run, meant, notes = as_seen.replayed(url, SECONDS, tmp_path, "--speed", "3")
    assert as_seen.differences(meant, notes) == []
    requests = run.requests.sort("request")
    assert requests["status"].to_list() == ["finished"] * meant.height
    for name in ("input_tokens", "output_tokens"):
        assert requests[name].to_list() == meant[name].to_list()


def test_the_mock_endpoint_sees_the_trace(tmp_path):
    """The same against the C mock, whose times are exact."""
    try:
        program = as_seen.endpoint.build(tmp_path / "mock")
    except as_seen.endpoint.Unavailable as reason:
        pytest.skip(str(reason))
    with as_seen.mock(program) as url:
        run, meant, notes = as_seen.replayed(url, SECONDS, tmp_path, "--speed", "3")
    assert as_seen.differences(meant, notes) == []
    assert run.summary["finished"] == meant.height


def test_what_differs_is_named(tmp_path):
    """A row missing, a length, a prefix that only the server shares: each is told."""
    meant = as_seen.window(as_seen.open_trace(str(as_seen.TRACE)), 0.0, 3.0).frame
    notes = tmp_path / "seen.jsonl"

    def told(change) -> str:
        rows = [
            {name: row[name] for name in ("request", "input_tokens", "output_tokens")}
            | {"keys": row["hash_ids"]}
            for row in meant.iter_rows(named=True)
        ]
        change(rows)
        notes.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "; ".join(as_seen.differences(meant, notes))

    assert told(lambda rows: None) == ""
    assert "1 rows are missing" in told(lambda rows: rows.pop())
    assert "sent twice" in told(lambda rows: rows.append(rows[0]))
    assert "input_tokens 7" in told(lambda rows: rows[2].update(input_tokens=7))
    assert "another prefix" in told(
        lambda rows: rows[1]["keys"].__setitem__(-1, rows[0]["keys"][-1])
    )
