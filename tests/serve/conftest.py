"""The real packaged model, and a server over it in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from danlu.serve.backend import GGUFBackend

CONTEXT = 320
START = f"""
import sys
from danlu.serve import server
server.GRACE = float(sys.argv[2])
server.run_server(sys.argv[1], port=0, context={CONTEXT}, threads=1, waiting=2)
"""


@pytest.fixture(scope="session")
def gguf(smollm2: Path) -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return smollm2


@pytest.fixture(scope="session")
def backend(gguf: Path) -> Iterator[GGUFBackend]:
    """The model in this process."""
    made = GGUFBackend(gguf, gguf.stem, context=CONTEXT, threads=1)  # as the server: the same sums in the same order
    yield made
    made.close()


class Server:
    """A server process, its address and what it says."""

    def __init__(self, ref: Path, grace: float = 10, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(ref), str(grace)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                break
        else:
            raise RuntimeError("".join(self.said))
        self._reader = threading.Thread(target=self.said.extend, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(how)
        status = self.process.wait(timeout=20)
        self._reader.join(timeout=5)
        return status


@pytest.fixture(scope="session")
def server(gguf: Path) -> Iterator[Server]:
    """A server without a token, on loopback."""
    made = Server(gguf)
    yield made
    if made.process.poll() is None:
        made.end()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    """The official client."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
