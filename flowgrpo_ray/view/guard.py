"""Who may see the monitor: whoever has its token, and asks for this machine by its own name."""

from __future__ import annotations

import hashlib
import html
import ipaddress
import secrets
from urllib.parse import urlencode, urlsplit

from fastapi.responses import HTMLResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.view.page import POLICY_SERVED

TOKEN_VARIABLE = "FLOWGRPO_MONITOR_TOKEN"
SHORTEST_TOKEN = 16

_HEADERS = {
    "Content-Security-Policy": POLICY_SERVED,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PLAIN = '<!doctype html><link rel="icon" href="data:,">{}'


class Guard:
    """Lets through who has the token and asked for this machine by a name that is its own.

    The second keeps out web pages of others whose name was pointed at this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, token: str, names: frozenset[str]) -> None:
        self._app, self._names = app, names
        self._digest = _digest(token)
        self._cookie = f"flowgrpo-{_digest(self._digest)[:8]}"  # not that of another monitor here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        assert scope["type"] == "http", "served without web sockets"

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self._answer(Request(scope)) or self._app
        return await answer(scope, receive, sealed)

    def _answer(self, request: Request) -> Response | None:
        """What is said instead of the page, if anything."""
        if not self._is_mine(request.headers.get("host", "")):
            return _refusal(400, "This address is not one of this machine's names.")
        given = request.query_params.get("token")
        if request.url.path == "/" and given is not None:
            if self._is_token(_digest(given)):
                return self._welcome(request)
        elif self._is_token(request.cookies.get(self._cookie, "")):
            return None
        return _refusal(
            401, "Open the address that flowgrpo-ray monitor printed: it has the token."
        )

    def _is_token(self, digest: str) -> bool:
        return secrets.compare_digest(digest.encode(), self._digest.encode())

    def _is_mine(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._names:
                return True
            ipaddress.ip_address(name)  # no DNS server can give an IP address another meaning
        except ValueError:
            return False
        return True

    def _welcome(self, request: Request) -> Response:
        """Sets the cookie. A page that goes on, not a redirect: after one that began elsewhere (a
        link in a chat) a browser would not send a strict cookie."""
        rest = [(key, value) for key, value in request.query_params.items() if key != "token"]
        target = html.escape("/?" + urlencode(rest) if rest else "/")
        onward = f'<meta http-equiv="refresh" content="0; url={target}">'
        answer = HTMLResponse(_PLAIN.format(onward))
        answer.set_cookie(self._cookie, self._digest, httponly=True, samesite="strict")
        return answer


def _digest(text: str) -> str:
    """What the cookie holds in place of the token."""
    return hashlib.sha256(b"flowgrpo monitor\0" + text.encode()).hexdigest()


def _refusal(status: int, says: str) -> Response:
    return HTMLResponse(_PLAIN.format(f"<title>{status}</title><p>{says}</p>"), status)


def choose_token(given: str | None) -> str:
    """The one from the environment, or a new one."""
    if given is None:
        return secrets.token_urlsafe(24)
    if len(given) < SHORTEST_TOKEN:
        raise SpecError(
            f"{TOKEN_VARIABLE} has {len(given)} characters: give at least {SHORTEST_TOKEN}, or "
            "unset it for a new token at every start"
        )
    return given
