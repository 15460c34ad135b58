"""The server's routes put together."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from runner.config.schema import ServerConfig
from runner.serve.errors import install_handlers
from runner.serve.guard import Guard, read_key
from runner.serve.lifecycle import RETRY_S, Front
from runner.serve.openapi_document import publish_bodies
from runner.serve.service import Service


def make_app(service: Service, config: ServerConfig) -> ASGIApp:
    """All routes of a model, behind the guard.

    Raises:
        ConfigError: the file of the key cannot be read.
    """
    # Documents and pages would load scripts from elsewhere.
    app = FastAPI(title="shardline", docs_url=None, redoc_url=None)
    install_handlers(app, service.shape)
    for router in service.routers:
        app.include_router(router)
    if service.bodies:
        publish_bodies(app, service.bodies)
    _add_health(app, service.front)

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


def _add_health(app: FastAPI, front: Front) -> None:
    def told(good: bool) -> JSONResponse:
        headers = None if good else {"Retry-After": str(RETRY_S)}
        return JSONResponse({"status": front.state}, 200 if good else 503, headers)

    @app.get("/health/live")
    async def live() -> JSONResponse:
        return told(front.state != "failed")

    @app.get("/health/startup")
    async def startup() -> JSONResponse:
        return told(front.state not in ("starting", "failed"))

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        return told(front.state == "ready")
