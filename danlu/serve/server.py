"""Starting and ending the server: where it listens, who may ask, and a clean end on a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.console import say
from danlu.errors import DanluError, need_extra

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

    from danlu.serve.backend import Guesses

GRACE = 10  # seconds that answers under way have to finish when the server ends
LAST_WORDS = 5  # seconds to tell their clients after that
TOKEN = "DANLU_TOKEN"


def run_server(
    ref: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    waiting: int = 16,
    guesses: Guesses | None = None,
) -> None:
    """Serve a model over HTTP until SIGINT or SIGTERM.

    Args:
        ref: what `open_backend` takes: a run, an artifact, a GGUF, a Hugging Face directory or a hub id.
        host: a loopback address, or any other together with a token.
        port: 0 takes a free one.
        token: asked of every client; without it the environment's DANLU_TOKEN counts.
        context: tokens of prompt and answer together; None leaves it to the model.
        threads: CPU threads; None leaves them to the engine.
        waiting: requests that may wait for their turn; one more gets a 503.
        guesses: guess answers at temperature 0 ahead; others are answered as without.

    Raises DanluError where the port is taken, the address is not this machine's or needs a token, or there is no model.
    """
    try:
        import uvicorn  # noqa: F401  # asked for here, to say at once what to install

        from danlu.serve.app import make_app
    except ModuleNotFoundError as missing:
        raise need_extra(str(missing.name), "serve") from None
    from danlu.serve.backend import open_backend

    token = token or os.environ.get(TOKEN) or None
    with listen(host, port, token) as listener:
        backend = open_backend(ref, context=context, threads=threads, guesses=guesses)
        app = make_app(backend, token=token, waiting=waiting)
        address, port = listener.getsockname()[:2]
        place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        say(f"serving {backend.name} at http://{place}/v1 (context {backend.context:,} tokens); Ctrl-C ends it")
        server = _make_server(app)
        with _ended_by_signals(server):
            server.run(sockets=[listener])
    say("the server has ended")


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """Open the port; done before the model is loaded, so that what is wrong here shows at once."""
    where = f"{host}:{port}"
    if not 0 <= port < 2**16:
        raise DanluError("is no port", where=where, fix="choose one from 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise DanluError("is no address to listen at", where=where, fix="use --host 127.0.0.1 --port 8000") from None
    if token is None and not ip_address(address[0]).is_loopback:
        raise DanluError(
            "other machines reach this address, so a token is needed",
            where=where,
            fix=f"set {TOKEN} in the environment or give --token, or leave --host out",
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        why = os.strerror(error.errno) if error.errno else str(error)
        raise DanluError(
            f"cannot listen: {why}", where=where, fix="choose another --port, or 0 for a free one"
        ) from None
    return listener


def _make_server(app: Starlette) -> uvicorn.Server:
    """uvicorn, but answers that outlast the grace end with an error their clients can read, not with a cut line."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(GRACE, app.state.api.end)
            await super().shutdown(sockets)

    limit = GRACE + LAST_WORDS
    return Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=limit))


@contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """uvicorn ends on a signal, then raises it again for the handler it found: that one must not kill the process."""

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
