"""The protocol's routes: the server, its model, and inference."""

from collections.abc import Callable
from importlib.metadata import version
from typing import ParamSpec, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from runner.serve.disconnect import unless_gone
from runner.serve.errors import ApiError
from runner.serve.health import Health
from runner.serve.tensors.decode import decode
from runner.serve.tensors.encode import encode
from runner.serve.tensors.front import TensorFront
from runner.serve.tensors.signature import Signature

P = ParamSpec("P")
T = TypeVar("T")

_FEW_BYTES = 32 * 1024
"""Dealt with in less time than another thread needs to begin."""

VERSION = "1"
"""Of the one model: the protocol asks for a name of it."""


class TensorRoutes:
    """Answers requests about one model."""

    def __init__(
        self, front: TensorFront, health: Health, *, model: str, signature: Signature
    ) -> None:
        self._front = front
        self._health = health
        self._model = model
        self._signature = signature
        self.router = APIRouter(prefix="/v2")
        names = ("/models/{name:path}/versions/{number}", "/models/{name:path}")
        # Routes are tried in turn, so the one that is asked for most is the first.
        for name in names:
            self.router.add_api_route(f"{name}/infer", self.infer, methods=["POST"])
        for name in names:
            self.router.add_api_route(f"{name}/ready", self.model_ready, methods=["GET"])
            self.router.add_api_route(name, self.model, methods=["GET"])
        self.router.add_api_route("", self.server, methods=["GET"])
        self.router.add_api_route("/health/live", self.live, methods=["GET"])
        self.router.add_api_route("/health/ready", self.ready, methods=["GET"])

    async def server(self) -> JSONResponse:
        """What this is, and what it can beyond the protocol's core."""
        told = {"name": "shardline", "version": version("shardline")}
        return JSONResponse({**told, "extensions": ["binary_tensor_data"]})

    async def live(self) -> JSONResponse:
        """Whether there is any use in waiting."""
        return _told("live", self._front.state != "failed" and not self._health.stalls())

    async def ready(self) -> JSONResponse:
        """Whether requests are taken."""
        return _told("ready", self._front.state == "ready" and not self._health.stalls())

    async def model_ready(self, name: str, number: str = VERSION) -> JSONResponse:
        """The same of the model."""
        self._check_model(name, number)
        return await self.ready()

    async def model(self, name: str, number: str = VERSION) -> JSONResponse:
        """What it takes and returns."""
        self._check_model(name, number)
        told = {"name": self._model, "versions": [VERSION], "platform": "shardline"}
        return JSONResponse({**told, **self._signature.metadata()})

    async def infer(self, request: Request, name: str, number: str = VERSION) -> Response:
        """Compute."""
        self._check_model(name, number)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "compressed bodies are not read; send it without Content-Encoding")
        header_length = request.headers.get("inference-header-content-length")
        body = await request.body()
        asked = await _apart(len(body), decode, body, header_length, self._signature)
        computing = self._front.infer(asked.samples, asked.haste)
        results = await unless_gone(request, computing)
        about = {"model_name": self._model, "model_version": VERSION}
        size = sum(tensor.nbytes for result in results for tensor in result)
        content, headers = await _apart(size, encode, asked, results, self._signature, about)
        return Response(content, headers=headers)

    def _check_model(self, name: str, number: str) -> None:
        if (name, number) != (self._model, VERSION):
            raise ApiError(
                404,
                f"there is no model {name!r} of version {number!r}; this server has "
                f"{self._model!r} of version {VERSION!r}",
            )


async def _apart(num_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` on so many bytes returns: of few at once, of many from another thread, so that
    other clients do not wait for it.
    """
    if num_bytes <= _FEW_BYTES:
        return work(*args, **kwargs)
    return await run_in_threadpool(work, *args, **kwargs)


def _told(what: str, good: bool) -> JSONResponse:
    return JSONResponse({what: good}, 200 if good else 503)
