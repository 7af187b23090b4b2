"""Who may ask: those with the token, or those on this machine."""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from danlu.serve.replies import error_response
from danlu.serve.requests import ApiError


class Guard:
    """Lets in who may ask: by token where one is set, else only who calls this machine by a loopback name.

    The second keeps out web pages whose server gave itself this machine's address (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health" and (error := self._refusal(Headers(scope=scope))):
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._token is None:
            if names_this_machine(headers.get("host", "")):
                return None
            return ApiError(403, "this server answers loopback names only; start it with a token to use another")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._token.encode()):
            return None
        return ApiError(401, "send the server's token as Authorization: Bearer TOKEN", code="invalid_api_key")


def names_this_machine(host: str) -> bool:
    """Whether a Host header, with or without its port, is a loopback address or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:  # no address, or brackets that do not close
        return False
