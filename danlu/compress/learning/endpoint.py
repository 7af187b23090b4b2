"""An OpenAI-compatible server as seen from a client: requests that are tried again, and answers that are checked.

It follows no redirection, so neither the text nor the key goes anywhere but where the user said.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

from danlu.console import say, warn
from danlu.errors import DanluError

KEY = "OPENAI_API_KEY"
FAULT = 500  # tried again, but not long: what a server cannot do is often told so
TRANSIENT = frozenset({408, 429, FAULT, 502, 503, 504})
TRIES = 8  # of a request; with the pauses between them over two minutes
FAULTS = 3  # of them with status 500
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
TIMEOUT = 600.0  # seconds without a byte
MOST_BYTES = 2**30  # of an answer


def is_endpoint(ref: str) -> bool:
    """Whether a model is named by the address of a server."""
    return ref.startswith(("http://", "https://"))


class Refused(Exception):
    """The server understood a request and does not do it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass
class Endpoint:
    """One server, one connection to it at a time.

    Attributes:
        url: up to and with /v1.
        model: as the server calls it; with "" the only one it has.
        tries: of a request that fails for now.
    """

    url: str
    model: str = ""
    tries: int = TRIES
    _open: http.client.HTTPConnection | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        place = self._place()
        if os.environ.get(KEY) and place.scheme == "http" and not _is_loopback(place.hostname or ""):
            warn(f"{self.url}: the key in {KEY} goes there unencrypted; use https")

    def _place(self) -> SplitResult:
        place = urlsplit(self.url)
        try:
            good = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
        except ValueError:  # a port that is no number
            good = False
        if not good or place.query or place.fragment or place.username:
            fix = "write it as http://127.0.0.1:8000/v1"
            raise DanluError("is no address of a server", where=self.url, fix=fix)
        return place

    def find_model(self) -> dict[str, Any]:
        """What the server says of the model, and note its name where none was given.

        Raises DanluError where the server cannot be reached, or has no such model or several to choose from.
        """
        try:
            listed = self.get("models").get("data")
        except Refused as refused:
            raise DanluError(f"does not list its models: {refused}", where=self.url) from None
        models = {str(one.get("id")): one for one in listed or () if isinstance(one, dict)}
        if not self.model and len(models) == 1:
            self.model = next(iter(models))
        if self.model not in models:
            what = f"has no model {self.model!r}" if self.model else "has several models"
            raise DanluError(what, where=self.url, fix=f"--teacher-model: {', '.join(models) or 'it names none'}")
        return dict(models[self.model])

    def get(self, path: str) -> dict[str, Any]:
        """What stands there. For errors see `post`."""
        return self._object("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request about the model.

        Raises Refused where the server refuses it, DanluError where it cannot be reached, fails again and again, or
        answers with something else than a JSON object.
        """
        return self._object("POST", path, json.dumps({"model": self.model, **body}).encode())

    def close(self) -> None:
        """Let the connection go; the next request opens another."""
        if self._open is not None:
            self._open.close()
        self._open = None

    def _object(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        status, answer = self._tried(method, path, body)
        try:
            made = json.loads(answer)
        except ValueError:
            made = None
        if not 200 <= status < 300:
            raise Refused(status, _message(made, answer))
        if isinstance(made, list) and all(isinstance(one, dict) for one in made):  # llama.cpp to several prompts
            return {"choices": [choice for one in made for choice in one.get("choices", ())]}
        if not isinstance(made, dict):
            raise DanluError("answers with something else than a JSON object", where=f"{self.url}/{path}")
        return made

    def _tried(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and body of the first answer that is no failure for now."""
        why, asked_for, faults = "", None, 0
        for number in range(self.tries):
            if number:
                self._pause(number, why, asked_for)
            try:
                status, asked_for, answer = self._held_or_new(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                asked_for, why = None, f"{type(error).__name__}: {error}".removesuffix(": ")
                continue
            faults += status == FAULT
            if status not in TRANSIENT or faults == FAULTS:
                return status, answer
            why = f"status {status}"
        what = f"cannot be reached, or fails: {why} ({self.tries} tries)"
        raise DanluError(what, where=self.url, fix="when it runs again, the same command goes on")

    def _held_or_new(self, method: str, path: str, body: bytes | None) -> tuple[int, float | None, bytes]:
        """As `_once`; a connection that lay idle may have been let go by the server, which is no failure of it."""
        if self._open is not None:
            try:
                return self._once(method, path, body)
            except ConnectionError:
                self.close()
        return self._once(method, path, body)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, float | None, bytes]:
        """Status, the seconds that the server asks to wait, and body of one answer."""
        place = self._place()
        if self._open is None:
            kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
            self._open = kind(place.hostname or "", place.port, timeout=TIMEOUT)
        headers: dict[str, str | bytes] = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key.strip()}".encode()
        self._open.request(method, f"{place.path.rstrip('/')}/{path}", body, headers)
        answer = self._open.getresponse()
        held = answer.read(MOST_BYTES + 1)
        if len(held) > MOST_BYTES:
            self.close()
            raise DanluError(f"answers with more than {MOST_BYTES:,} bytes", where=self.url, fix="lower --top")
        return answer.status, _seconds(answer.headers.get("Retry-After")), held

    def _pause(self, number: int, why: str, asked_for: float | None) -> None:
        """Wait longer each time, and never in step with other clients."""
        pause = min(FIRST_PAUSE * 2 ** (number - 1) * random.uniform(0.5, 1.0), LONGEST_PAUSE)
        pause = pause if asked_for is None else min(max(asked_for, 0.0), LONGEST_PAUSE)
        say(f"{self.url}: {why}; trying again in {pause:.0f} s ({number} of {self.tries - 1})")
        time.sleep(pause)


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; a date in it counts as nothing said."""
    return float(header) if header is not None and header.strip().isdigit() else None


def _message(made: Any, answer: bytes) -> str:
    """What an error's body says, in OpenAI's shape or any other, on one line."""
    error = made.get("error", made) if isinstance(made, dict) else made
    text = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(text or answer[:300].decode(errors="replace")).split())


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
