"""What a run of a tensor model came to, as text."""

import json
from dataclasses import dataclass
from pathlib import Path

from parallel.graph_plan import GraphPlan
from runner.drawing.words import plural
from runner.items.writing import Summary
from runner.pipeline.batch_metrics import BatchSnapshot
from runner.pipeline.rank import PipelineReport


@dataclass(frozen=True)
class RunReport:
    """One run to its end.

    Attributes:
        output: the folder.
        summary: how many items it holds, those of earlier runs among them.
        metrics: the batches of this run.
        ran: the pipeline at work.
    """

    plan: GraphPlan
    output: Path
    summary: Summary
    metrics: BatchSnapshot
    ran: PipelineReport

    def to_text(self) -> str:
        """A line, and one more of the bubble where there are several stages."""
        metrics, ran = self.metrics, self.ran
        results = f"{plural(self.summary.finished, 'result')} in {self.output}"
        if not metrics.completed:
            left = "nothing was left to compute: every item was computed before, or failed"
            return f"{results}; {left}"
        reasons = ", ".join(f"{why} {count}" for why, count in metrics.by_reason.items() if count)
        lines = [
            f"{results}; {metrics.completed} samples in {ran.seconds:.1f} s ({self._rate:.1f} a "
            f"second), {metrics.mean_batch_size:.1f} a batch; batches by what cut them: {reasons}"
        ]
        if len(self.plan.stages) > 1:
            lines.append(
                f"pipeline bubble over {plural(ran.num_batches, 'micro-batch')}: {ran.bubble:.1%} "
                f"measured, {ran.predicted_bubble:.1%} predicted of the stages' times"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """One object; times in seconds."""
        metrics, ran = self.metrics, self.ran
        values = {
            "output": str(self.output),
            "finished": self.summary.finished,
            "failed": self.summary.failed,
            "samples": metrics.completed,
            "seconds": ran.seconds,
            "samples_per_s": self._rate,
            "batches": metrics.batches,
            "mean_batch_size": metrics.mean_batch_size,
            "batches_by_reason": metrics.by_reason,
            "busy_s": ran.busy_s,
            "bubble_measured": ran.bubble,
            "bubble_predicted": ran.predicted_bubble,
        }
        return json.dumps(values)

    @property
    def _rate(self) -> float:
        return self.metrics.completed / self.ran.seconds if self.ran.seconds else 0.0
