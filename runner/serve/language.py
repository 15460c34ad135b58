"""The service of a language model: OpenAI's API before the engine."""

from runner.drawing.plan_svg import draw
from runner.engine.rank import run_rank
from runner.engine.request_maker import RequestMaker
from runner.planning import DecoderJob
from runner.serve.bodies import ChatRequest, CompletionRequest
from runner.serve.errors import ApiError
from runner.serve.front import ServeFront
from runner.serve.metrics import Metrics
from runner.serve.openai_api import OpenAIRoutes
from runner.serve.page import page_router
from runner.serve.service import Service
from runner.serve.status_api import Observed, StatusRoutes


def language_service(job: DecoderJob) -> Service:
    """Raises IntegrityError: a file of the tokenizer is absent or corrupt."""
    scheduler = job.config.scheduler
    maker, metrics = RequestMaker(job), Metrics()
    front = ServeFront(
        maker,
        metrics,
        max_queue_size=scheduler.max_queue_size,
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=job.plan.max_model_len,
        request_timeout_s=job.config.server.request_timeout_s,
    )
    model = _name(job)
    routes = OpenAIRoutes(front, maker, model=model, vocab_size=job.spec.config.vocab_size)
    observed = Observed.of(job, metrics)
    status = StatusRoutes(
        job,
        front,
        metrics,
        observed,
        model=model,
        kind="language",
        limits={"running": scheduler.max_num_seqs, "waiting": scheduler.max_queue_size},
        draw=lambda: draw(job.plan),
    )
    return Service(
        model,
        front,
        (routes.router, page_router(), status.router),
        metrics,
        observed.health,
        ApiError.body,
        run=lambda env: run_rank(job, env, front, show=observed.health.show),
        bodies=(ChatRequest, CompletionRequest),
    )


def _name(job: DecoderJob) -> str:
    if name := job.config.server.model_name:
        return name
    return (job.bundle.path if job.bundle else job.spec.folder).resolve().name
