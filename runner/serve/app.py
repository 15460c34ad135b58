"""The server's routes put together."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp

from runner.engine.request_maker import RequestMaker
from runner.planning import DecoderJob
from runner.serve.errors import install_handlers
from runner.serve.front import ServeFront
from runner.serve.guard import Guard, read_key
from runner.serve.metrics import Metrics
from runner.serve.openai_api import OpenAIRoutes


def make_app(job: DecoderJob, front: ServeFront, maker: RequestMaker, metrics: Metrics) -> ASGIApp:
    """All routes of a language model, behind the guard.

    Raises:
        ConfigError: the file of the key cannot be read.
    """
    config = job.config.server
    # Documents and pages would load scripts from elsewhere.
    app = FastAPI(title="shardline", docs_url=None, redoc_url=None)
    install_handlers(app)
    routes = OpenAIRoutes(
        front, maker, model=model_name(job), vocab_size=job.spec.config.vocab_size
    )
    app.include_router(routes.router)
    _add_health(app, front)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return Guard(app, key=read_key(config.api_key_file), max_bytes=config.max_request_bytes)


def model_name(job: DecoderJob) -> str:
    """What clients call the model."""
    if name := job.config.server.model_name:
        return name
    return (job.bundle.path if job.bundle else job.spec.folder).resolve().name


def _add_health(app: FastAPI, front: ServeFront) -> None:
    def told(good: bool) -> JSONResponse:
        return JSONResponse({"status": front.state}, 200 if good else 503)

    @app.get("/health/live")
    async def live() -> JSONResponse:
        return told(front.state != "failed")

    @app.get("/health/startup")
    async def startup() -> JSONResponse:
        return told(front.state not in ("starting", "failed"))

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        return told(front.state == "ready")
