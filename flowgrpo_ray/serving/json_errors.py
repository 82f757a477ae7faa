"""What Serve's HTTP proxy answers by itself, as JSON: a path without a reward, a lost replica.

A proxy asks the function that RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names for middlewares. Ray
reads that variable in the proxy's process: it must be set where Ray is started.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SAYS = {
    404: "no reward is served at this path",
    408: "the reward took longer than the proxy waits",
    503: "no replica of this reward takes calls now; try again",
}
OTHERWISE = "the request was not answered by a reward"
LOST = "the replica that had this call was lost; try again"


def middlewares() -> list[Middleware]:
    """For the proxy."""
    return [Middleware(JsonErrors)]


class JsonErrors:
    """Answers `{"error": message}` where an application answers an error in another form, or not
    at all: that is how the proxy tells that it has lost a replica.

    The message is not what was said, which may be a traceback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = replaced = False

        async def as_json(message: Message) -> None:
            nonlocal answered, replaced
            if message["type"] == "http.response.start":
                answered, status = True, message["status"]
                kind = Headers(raw=list(message["headers"])).get("content-type", "")
                replaced = status >= 400 and not kind.startswith("application/json")
                if replaced:
                    said = {"error": SAYS.get(status, OTHERWISE)}
                    await JSONResponse(said, status)(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, as_json)
        if scope["type"] == "http" and not answered:
            await JSONResponse({"error": LOST}, 500)(scope, receive, send)
