"""What the operator's page shows, as JSON, and the picture of the plan. Not here: the page."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from runner.job import Job
from runner.observe.gpu_monitor import GpuMonitor
from runner.serve.exposition import Exposition
from runner.serve.gpu_metrics import GpuMetrics
from runner.serve.health import Health
from runner.serve.lifecycle import Front
from runner.serve.rank_metrics import RankMetrics


@dataclass(frozen=True)
class Observed:
    """What is known of a server's ranks and of their GPUs."""

    health: Health
    monitor: GpuMonitor
    gpus: GpuMetrics

    @classmethod
    def of(cls, job: Job, metrics: Exposition) -> "Observed":
        """And tell Prometheus of it."""
        devices = job.plan.topology.devices if job.device_type == "cuda" else ()
        health, monitor = Health.of(job), GpuMonitor()
        gpus = GpuMetrics(monitor, devices)
        metrics.add(gpus)
        metrics.add(RankMetrics(health, job.plan.topology))
        return cls(health, monitor, gpus)


class Told(Protocol):
    """What a server did, as JSON has it."""

    def ended(self) -> dict[str, int]:
        """Requests so far by why they ended."""
        ...

    def recent(self) -> dict[str, Any]:
        """The last minutes, and how busy it is now; see `History`."""
        ...


class StatusRoutes:
    """Tells how one server is."""

    def __init__(
        self,
        job: Job,
        front: Front,
        told: Told,
        observed: Observed,
        *,
        model: str,
        kind: Literal["language", "tensor"],
        limits: Mapping[str, int],
        draw: Callable[[], str],
    ) -> None:
        """
        Args:
            kind: decides which figures the page shows.
            limits: to what runs and what waits at once.
            draw: the plan, as SVG.
        """
        self._job = job
        self._front = front
        self._told = told
        self._observed = observed
        self._model = model
        self._kind = kind
        self._limits = dict(limits)
        self._draw = draw
        self._started = time.monotonic()
        self.router = APIRouter(prefix="/status")
        self.router.add_api_route("", self.status, methods=["GET"])
        self.router.add_api_route("/plan.svg", self.plan, methods=["GET"])

    async def status(self) -> JSONResponse:
        """Everything that changes."""
        return JSONResponse(await run_in_threadpool(self._status))

    async def plan(self) -> Response:
        """The plan drawn."""
        return Response(await run_in_threadpool(self._draw), media_type="image/svg+xml")

    def _status(self) -> dict[str, Any]:
        health = self._observed.health
        quiet_s = [s for rank in health.ranks() if (s := rank.quiet_s()) is not None]
        return {
            "model": self._model,
            "kind": self._kind,
            "state": "stalled" if health.stalls() else self._front.state,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "idle_s": round(max(quiet_s), 1) if quiet_s else None,
            "limits": self._limits,
            "requests": self._told.ended(),
            "ranks": self._ranks(),
            "gpus": self._gpu_state(),
            **self._told.recent(),
        }

    def _ranks(self) -> list[dict[str, Any]]:
        known = {rank: at.doing.words for rank, at in enumerate(self._observed.health.ranks())}
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
        monitor = self._observed.monitor
        inventory, xids = monitor.read(), monitor.last_xids
        return {
            "reason": inventory.reason,
            "by_rank": {
                rank: asdict(gpu) | {"last_xid": xids.get(gpu.index)}
                for rank, gpu in self._observed.gpus.gpus().items()
            },
        }
