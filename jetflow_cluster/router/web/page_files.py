"""The live page: files of this package, with headers that keep everything from outside out of it."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: What the browser may load, run and call is this server's own.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """The page at ``/`` and what it loads, read once. They say nothing of the model and need no token."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in _TYPES}

    def answer(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "Not Found")
        return Response(files[name], headers={"content-type": _TYPES[Path(name).suffix], **HEADERS})

    async def index(request: Request) -> Response:
        return answer("index.html")

    async def part(request: Request) -> Response:
        return answer(request.path_params["name"])

    return [Route("/", index, methods=["GET"]), Route("/page/{name}", part, methods=["GET"])]
