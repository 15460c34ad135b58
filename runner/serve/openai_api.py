"""OpenAI's routes: models, completions and chat completions."""

import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from parallel.errors import ConfigError
from runner.config.section import Section
from runner.engine.request_maker import RequestMaker
from runner.serve.answers import Answer, Kind, no_such_model
from runner.serve.bodies import ChatRequest, CompletionRequest, parse_body
from runner.serve.disconnect import unless_gone
from runner.serve.errors import ApiError
from runner.serve.front import ServeFront
from runner.serve.openapi_document import ERRORS, takes


class OpenAIRoutes:
    """Answers requests about one model."""

    def __init__(
        self, front: ServeFront, maker: RequestMaker, *, model: str, vocab_size: int
    ) -> None:
        self._front = front
        self._maker = maker
        self._model = model
        self._vocab_size = vocab_size
        self._created = int(time.time())
        self.router = APIRouter(prefix="/v1", responses=ERRORS)
        self.router.add_api_route("/models", self.models, methods=["GET"])
        self.router.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        for path, answer, body in (
            ("/completions", self.complete, CompletionRequest),
            ("/chat/completions", self.chat, ChatRequest),
        ):
            self.router.add_api_route(path, answer, methods=["POST"], openapi_extra=takes(body))

        self.router.add_api_route(
            "/embeddings", self.embed, methods=["POST"], include_in_schema=False
        )

    async def models(self) -> JSONResponse:
        """The one model that there is."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> JSONResponse:
        """The same by its name."""
        self._check_model(name)
        return JSONResponse(self._card())

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        body = parse_body(CompletionRequest, await request.body())
        return await self._answer(request, body, "text", body.prompt)

    async def chat(self, request: Request) -> Response:
        """Continue a chat."""
        body = parse_body(ChatRequest, await request.body())
        return await self._answer(request, body, "chat", body.content())

    async def embed(self) -> Response:
        """Say that the model cannot; none that runs here is an encoder."""
        raise ApiError(400, f"{self._model} generates text and has no embeddings to give")

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        kind: Kind,
        prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
    ) -> Response:
        self._check_model(body.model)
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options is for streams; set stream", param="stream_options")
        self._front.check_open()
        try:
            options = body.options()
            self._maker.check(options)
            ids = await run_in_threadpool(self._ids, prompt)
            ticket = self._front.submit(ids, options, body.timeout, num_logprobs=body.num_logprobs)
        except ConfigError as error:
            message = str(error)
            raise ApiError(400, message, param=_key_at_the_front(message, body)) from None
        answer = Answer(kind, self._model, ticket, self._maker.tokenizer)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = self._until_closed(answer, include_usage=include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            return JSONResponse(await unless_gone(request, answer.whole()))
        finally:
            self._front.cancel(ticket)

    async def _until_closed(self, answer: Answer, *, include_usage: bool) -> AsyncIterator[str]:
        """The events; a client that leaves ends its request."""
        try:
            async for event in answer.events(include_usage=include_usage):
                yield event
        finally:
            self._front.cancel(answer.ticket)

    def _ids(self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]) -> list[int]:
        if isinstance(prompt, str) or not all(isinstance(part, int) for part in prompt):
            return self._maker.encode(prompt)  # type: ignore[arg-type]
        ids: list[int] = list(prompt)  # type: ignore[arg-type]
        for token_id in ids:
            if not 0 <= token_id < self._vocab_size:
                raise ConfigError(
                    f"prompt: {token_id} is no token id; use 0 to {self._vocab_size - 1}"
                )
        return ids

    def _check_model(self, asked: str | None) -> None:
        if asked not in (None, self._model):
            raise no_such_model(str(asked), self._model)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "shardline",
        }


def _key_at_the_front(message: str, body: Section) -> str | None:
    """Of the body, if the message begins with one: "temperature=-1 is not allowed"."""
    word = re.match(r"\w*", message)
    return word[0] if word and word[0] in type(body).model_fields else None
