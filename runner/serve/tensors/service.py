"""The service of a tensor model: the Open Inference Protocol before a pipeline."""

from math import prod
from pathlib import Path

import torch

from parallel.errors import ConfigError
from runner.drawing.graph_plan_svg import draw_graph
from runner.graph_planning import GraphJob
from runner.pipeline.batching_policy import BatchingPolicy
from runner.pipeline.buckets import Buckets
from runner.pipeline.rank import run_graph_rank
from runner.serve.errors import ApiError
from runner.serve.page import page_router
from runner.serve.service import Service
from runner.serve.status_api import Observed, StatusRoutes
from runner.serve.tensors.front import TensorFront
from runner.serve.tensors.metrics import TensorMetrics
from runner.serve.tensors.routes import TensorRoutes
from runner.serve.tensors.signature import Signature


def tensor_service(job: GraphJob) -> Service:
    """Raises ConfigError: a limit that no request could keep, or an output that no answer holds."""
    config, plan, metrics = job.config, job.plan, TensorMetrics()
    _check_limit(job)
    observed = Observed.of(job, metrics)
    policy = BatchingPolicy.of(config.scheduler, is_batched=plan.is_batched)
    front = TensorFront(
        plan,
        policy,
        metrics,
        request_timeout_s=config.server.request_timeout_s,
    )
    model = _name(job)
    routes = TensorRoutes(front, observed.health, model=model, signature=Signature.of(plan))
    status = StatusRoutes(
        job,
        front,
        metrics,
        observed,
        model=model,
        kind="tensor",
        limits={"batch": policy.max_batch_size, "waiting": policy.max_queue_size},
        draw=lambda: draw_graph(plan),
    )
    return Service(
        model,
        front,
        (routes.router, page_router(), status.router),
        metrics,
        observed.health,
        ApiError.short_body,
        run=lambda env: run_graph_rank(job, env, front.use, show=observed.health.show),
    )


def _name(job: GraphJob) -> str:
    if name := job.config.server.model_name:
        return name
    source = (job.bundle.path if job.bundle else Path(job.config.model.path)).resolve()
    return source.stem if source.is_file() else source.name


def _check_limit(job: GraphJob) -> None:
    """One sample must fit into a request."""
    limit = job.config.server.max_request_bytes
    dtypes = [getattr(torch, value.dtype) for value in job.plan.buckets[0]]
    for shapes in Buckets.of(job.plan).by_shapes:
        needed = sum(
            prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        if needed > limit:
            raise ConfigError(
                f"server.max_request_bytes={limit}, and one sample takes {needed} bytes; use more "
                "than that, times the samples of a request"
            )
