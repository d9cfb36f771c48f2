"""Does a fetched trace arrive whole or not at all?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from workloads.catalogue import Entry, fetch, read_catalogue, sha256_of
from workloads.errors import TraceError

BODY = b'{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [0]}\n' * 1000


class Files(BaseHTTPRequestHandler):
    """Answers /trace whole, /cut with less than announced, everything else with 404."""

    def do_GET(self) -> None:
        """The name that http.server calls."""
        self.send_response(200 if self.path in ("/trace", "/cut") else 404)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY if self.path == "/trace" else BODY[:100])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    """A server on 127.0.0.1, and its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def entries(url: str, content: bytes = BODY) -> dict[str, Entry]:
    """A catalogue of one trace."""
    digest = hashlib.sha256(content).hexdigest()
    return {"tiny": Entry(url, "tiny.jsonl", digest, "CC0-1.0", "mooncake", "a test's")}


def names(directory: Path) -> list[str]:
    """What lies in a directory."""
    return sorted(path.name for path in directory.iterdir())


def test_a_fetched_trace_is_the_listed_bytes(server, tmp_path) -> None:
    """It lands under its name, nothing else beside it, in a directory made for it."""
    path = fetch("tiny", tmp_path / "traces", catalogue=entries(server + "/trace"))
    assert path == tmp_path / "traces" / "tiny.jsonl"
    assert path.read_bytes() == BODY
    assert names(tmp_path / "traces") == ["tiny.jsonl"]


def test_what_is_there_already_is_not_fetched_again(tmp_path) -> None:
    """A file with the right bytes needs no network."""
    (tmp_path / "tiny.jsonl").write_bytes(BODY)
    found = fetch("tiny", tmp_path, catalogue=entries("http://127.0.0.1:9/trace"))
    assert found.read_bytes() == BODY


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("/trace", b"other", "has sha256 .* nothing kept"),
        ("/cut", BODY, "sha256|not fetched"),
        ("/none", BODY, "not fetched .*404.* check the network"),
    ],
)
def test_other_bytes_are_not_kept(server, tmp_path, path, content, says) -> None:
    """A mismatch, a cut answer and a missing page are one line each and leave nothing."""
    with pytest.raises(TraceError, match=says) as error:
        fetch("tiny", tmp_path, catalogue=entries(server + path, content))
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []


def test_a_failed_fetch_leaves_an_older_file_alone(server, tmp_path) -> None:
    """What was there before is still there."""
    (tmp_path / "tiny.jsonl").write_bytes(b"older")
    with pytest.raises(TraceError):
        fetch("tiny", tmp_path, catalogue=entries(server + "/none"))
    assert (tmp_path / "tiny.jsonl").read_bytes() == b"older"


def test_an_endless_answer_is_cut_off(server, tmp_path) -> None:
    """Over the size limit nothing is kept."""
    with pytest.raises(TraceError, match="over 100 bytes"):
        fetch("tiny", tmp_path, catalogue=entries(server + "/trace"), size_limit_bytes=100)
    assert names(tmp_path) == []


def test_no_network_is_one_line(tmp_path) -> None:
    """A port nobody listens on: the address, the reason and where to put the file by hand."""
    with pytest.raises(TraceError, match=r"not fetched .* put the file at") as error:
        fetch("tiny", tmp_path, catalogue=entries("http://127.0.0.1:9/trace"))
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_is_one_line(server, tmp_path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="not fetched"):
        fetch("tiny", tmp_path / "file", catalogue=entries(server + "/trace"))


def test_unknown_names_list_the_known() -> None:
    """The message is the list."""
    with pytest.raises(TraceError, match="mooncake-conversation, mooncake-toolagent"):
        fetch("nonsense", ".")


def test_the_catalogue_is_complete() -> None:
    """Four Mooncake traces and Azure's, each with address, hash and licence."""
    catalogue = read_catalogue()
    assert len(catalogue) == 5
    for entry in catalogue.values():
        assert entry.url.startswith("https://raw.githubusercontent.com/")
        assert entry.url.endswith("/" + entry.file)
        assert len(entry.sha256) == 64
        assert entry.licence in ("Apache-2.0", "CC-BY-4.0")


def test_the_traces_at_hand_have_the_listed_bytes(
    azure_file: Path, conversation_file: Path
) -> None:
    """Two entries checked against the files themselves."""
    listed = [
        read_catalogue()[name].sha256 for name in ("azure-conversation", "mooncake-conversation")
    ]
    assert [sha256_of(path) for path in (azure_file, conversation_file)] == listed
