"""The server's routes put together."""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from runner.config.schema import ServerConfig
from runner.serve.errors import install_handlers
from runner.serve.guard import Guard, read_key
from runner.serve.health import Health
from runner.serve.lifecycle import RETRY_S, Front, State
from runner.serve.openapi_document import publish_bodies
from runner.serve.service import Service


def make_app(service: Service, config: ServerConfig) -> Guard:
    """All routes of a model, behind the guard.

    Raises:
        ConfigError: the file of the key cannot be read.
    """
    # Documents and pages would load scripts from elsewhere, and a path is what it is.
    app = FastAPI(title="shardline", docs_url=None, redoc_url=None, redirect_slashes=False)
    install_handlers(app, service.shape)
    for router in service.routers:
        app.include_router(router)
    if service.bodies:
        publish_bodies(app, service.bodies)
    _add_health(app, service.front, service.health)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        text = await run_in_threadpool(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4")

    return Guard(
        app,
        key=read_key(config.api_key_file),
        max_bytes=config.max_request_bytes,
        shape=service.shape,
    )


def _add_health(app: FastAPI, front: Front, health: Health) -> None:
    def told(wanted: Collection[State]) -> JSONResponse:
        stalls = [str(stall) for stall in health.stalls()]
        says: dict[str, Any] = {"status": front.state}
        if stalls:
            says = {"status": "stalled", "stalled": stalls}
        elif front.state == "starting":
            says["ranks"] = [rank.doing.words for rank in health.ranks()]
        if front.state in wanted and not stalls:
            return JSONResponse(says)
        return JSONResponse(says, 503, {"Retry-After": str(RETRY_S)})

    @app.get("/health/live")
    async def live() -> JSONResponse:
        return told(["starting", "ready", "draining"])

    @app.get("/health/startup")
    async def startup() -> JSONResponse:
        return told(["ready", "draining"])

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        return told(["ready"])
