"""Work for a client that may leave before it is done."""

import asyncio
import contextlib
from typing import Any

from fastapi import Request

from runner.serve.errors import ApiError


async def unless_gone(request: Request, work: Any) -> Any:
    """What `work` comes to, unless the client leaves before.

    Raises:
        ApiError: it has left; nobody reads the answer.
    """
    answering = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise ApiError(499, "the client has gone")
    finally:
        for task in (answering, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
