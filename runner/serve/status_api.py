"""What the operator's page shows, as JSON, and the picture of the plan. Not here: the page."""

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from runner.drawing.plan_svg import draw
from runner.observe.gpu_monitor import GpuMonitor
from runner.planning import DecoderJob
from runner.serve.front import ServeFront
from runner.serve.gpu_metrics import GpuMetrics
from runner.serve.health import Health
from runner.serve.metrics import Metrics


class StatusRoutes:
    """Tells how one server is."""

    def __init__(
        self,
        job: DecoderJob,
        front: ServeFront,
        metrics: Metrics,
        monitor: GpuMonitor,
        gpus: GpuMetrics,
        health: Health,
        *,
        model: str,
    ) -> None:
        self._job = job
        self._front = front
        self._metrics = metrics
        self._monitor = monitor
        self._gpus = gpus
        self._health = health
        self._model = model
        self._started = time.monotonic()
        self.router = APIRouter(prefix="/status")
        self.router.add_api_route("", self.status, methods=["GET"])
        self.router.add_api_route("/plan.svg", self.plan, methods=["GET"])

    async def status(self) -> JSONResponse:
        """Everything that changes."""
        return JSONResponse(await run_in_threadpool(self._told))

    async def plan(self) -> Response:
        """The plan drawn."""
        return Response(draw(self._job.plan), media_type="image/svg+xml")

    def _told(self) -> dict[str, Any]:
        scheduler = self._job.config.scheduler
        return {
            "model": self._model,
            "state": "stalled" if self._health.stalls() else self._front.state,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "max_num_seqs": scheduler.max_num_seqs,
            "max_queue_size": scheduler.max_queue_size,
            "requests": self._metrics.ended(),
            "ranks": self._ranks(),
            "gpus": self._gpu_state(),
            **self._metrics.history.told(),
        }

    def _ranks(self) -> list[dict[str, Any]]:
        known = {rank: at.doing.words for rank, at in enumerate(self._health.ranks())}
        return [
            self._rank(rank) | {"doing": known.get(rank)}
            for rank in range(len(self._job.plan.ranks))
        ]

    def _rank(self, rank: int) -> dict[str, Any]:
        held = self._job.plan.ranks[rank]
        return {
            "rank": rank,
            "stage": held.stage,
            "tp_rank": held.tp_rank,
            "device": f"{self._job.device_type}:{held.device}",
            "weight_bytes": held.weight_bytes,
        }

    def _gpu_state(self) -> dict[str, Any]:
        if self._job.device_type != "cuda":
            return {"reason": "the ranks run on the CPU", "by_rank": {}}
        inventory, xids = self._monitor.read(), self._monitor.last_xids
        return {
            "reason": inventory.reason,
            "by_rank": {
                rank: asdict(gpu) | {"last_xid": xids.get(gpu.index)}
                for rank, gpu in self._gpus.gpus().items()
            },
        }
