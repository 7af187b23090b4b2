"""Data sets of the hub, against a small hub of our own; and what is said without a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

READ = """
import sys
from danlu.data.settings import Source
from danlu.data.sources import read
from danlu.errors import DanluError
try:
    for name, rows in read(Source(path=sys.argv[1])):
        print(name, [row.value for row in rows])
except DanluError as error:
    print(error)
"""
COMMIT = "c0ffee" + "0" * 34


def parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), buffer)
    return buffer.getvalue()


FILES = {
    "one/small": {"default/train/0000.parquet": parquet("甲"), "default/train/0001.parquet": parquet("乙")},
    "one/large": {"en/train/0000.parquet": parquet("a"), "en/test/0000.parquet": parquet("b"), "README.md": b"#"},
    "one/empty": {"README.md": b"#"},
}


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that fetching a data set takes."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api").removeprefix("/datasets/")
        repo, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        if repo not in FILES:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/api/" in self.path and rest[:1] == ["revision"]:
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES[repo]]}
            self.reply(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        elif "/api/" in self.path and rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES[repo].items()
            ]
            self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            data = FILES[repo]["/".join(rest[2:])]
            tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.reply(200, data, tag | {"Content-Type": "application/octet-stream"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(reference: str, home: Path, **environment: str) -> str:
    """What reading a data set prints, in a process of its own: the library reads its settings once."""
    variables = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", READ, reference], env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_data_set_is_fetched_and_then_found_offline(hub: str, tmp_path: Path) -> None:
    read_once = read("hub:one/small", tmp_path, HF_ENDPOINT=hub)
    assert read_once == (
        "hub:one/small/default/train/0000.parquet [{'text': '甲'}]\n"
        "hub:one/small/default/train/0001.parquet [{'text': '乙'}]\n"
    )
    assert read("hub:one/small/default/train", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1") == read_once


def test_of_several_splits_one_must_be_named(hub: str, tmp_path: Path) -> None:
    several = read("hub:one/large", tmp_path, HF_ENDPOINT=hub)
    assert several == (
        "hub:one/large: the data set has several splits\n  name one: hub:one/large/en/test, hub:one/large/en/train\n"
    )
    assert read("hub:one/large/en/test", tmp_path, HF_ENDPOINT=hub) == (
        "hub:one/large/en/test/0000.parquet [{'text': 'b'}]\n"
    )


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hub:one/large/de", "hub:one/large/de: the data set has no such split\n  name one: hub:one/large/en/test"),
        ("hub:one/empty", "hub:one/empty: the data set has no Parquet files\n"),
        ("hub:one/absent", "hub:one/absent: the hub has no such data set\n  check the spelling"),
        ("hub:one", "hub:one: is no data set of the hub\n  write it as hub:OWNER/NAME\n"),
    ],
)
def test_what_is_not_there(hub: str, tmp_path: Path, reference: str, message: str) -> None:
    assert read(reference, tmp_path, HF_ENDPOINT=hub).startswith(message)


def test_without_a_network_it_says_what_to_do(tmp_path: Path) -> None:
    said = read("hub:one/small", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("hub:one/small: the hub cannot be reached (")
    assert "name their directory" in said
