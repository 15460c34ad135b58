"""The operator's page at `/`: files of this package, with nothing of this server in them.

Not here: what they show, which is `status_api`'s.
"""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_files() -> dict[str, Response]:
    """Path -> what is answered there."""
    found = {f.name: f.read_bytes() for f in (files("runner.serve") / "static").iterdir()}
    return {
        "/" if name == "index.html" else f"/static/{name}": Response(
            content, media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS
        )
        for name, content in found.items()
    }


def page_router() -> APIRouter:
    """A route for each file."""
    router = APIRouter()
    for path, response in page_files().items():
        router.add_api_route(path, lambda response=response: response, include_in_schema=False)
    return router
