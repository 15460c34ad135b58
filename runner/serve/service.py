"""`Service`: what rank 0 of a server consists of, whatever kind of model it has."""

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import APIRouter
from pydantic import BaseModel

from parallel.launch import RankEnv
from runner.serve.errors import Shape
from runner.serve.exposition import Exposition
from runner.serve.health import Health
from runner.serve.lifecycle import Front


@dataclass(frozen=True)
class Service:
    """One model, and the API that clients know it by.

    Attributes:
        model: what clients call it.
        health: of the ranks.
        shape: of errors.
        bodies: what the routes say in the OpenAPI document that they take.
        run: rank 0's life, until the front has drained.
    """

    model: str
    front: Front
    routers: tuple[APIRouter, ...]
    metrics: Exposition
    health: Health
    shape: Shape
    run: Callable[[RankEnv], object]
    bodies: tuple[type[BaseModel], ...] = ()
