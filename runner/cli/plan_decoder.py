"""What `shardline plan` finds out about a language model; needs no torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli.plan_inputs import Gpus, refuse_given
from runner.drawing.words import plural

if TYPE_CHECKING:
    from parallel.autoplan import Candidate
    from parallel.decoder_plan import DecoderPlan
    from parallel.fit import Fit
    from runner.config.load import LoadedConfig

_SIZES = ("parallel.tensor_parallel_size", "parallel.pipeline_parallel_size", "parallel.stages")


@dataclass(frozen=True)
class DecoderResult:
    """What is printed; `candidates` is empty without --auto.

    Attributes:
        fit: None where the memory is not known.
    """

    loaded: "LoadedConfig"
    plan: "DecoderPlan"
    gpus: Gpus
    fit: "Fit | None"
    candidates: "list[Candidate]" = field(default_factory=list)
    chosen: "Candidate | None" = None
    num_gpus: int = 0

    @classmethod
    def prepare(cls, loaded: "LoadedConfig", gpus: Gpus) -> "DecoderResult":
        """Divide the model as the configuration says."""
        from parallel.fit import fit_of
        from runner.planning import DecoderJob, budget_of

        made = DecoderJob.prepare(loaded.config).plan
        memory = gpus.memory_bytes
        fit = fit_of(made, budget_of(loaded.config, memory)) if memory else None
        return cls(loaded, made, gpus, fit)

    @classmethod
    def choose(cls, loaded: "LoadedConfig", gpus: Gpus, count: int | None) -> "DecoderResult":
        """Try every possible pair of sizes and take the best; the closest where none fits."""
        from parallel.autoplan import assess, choose, closest, sizes
        from runner.models.spec import ModelSpec
        from runner.planning import budget_of, plan_of, with_sizes

        given = [key for key in _SIZES if key != "parallel.stages" or loaded.config.parallel.stages]
        refuse_given(loaded, given, "--auto", "the sizes")
        num_gpus, memory_bytes = gpus.for_auto(count)
        config = loaded.config
        spec = ModelSpec.open(Path(config.model.path), load_format=config.model.load_format)
        budget = budget_of(config, memory_bytes)
        candidates = [
            assess(plan_of(with_sizes(config, tp_size=tp_size, pp_size=pp_size), spec), budget)
            for tp_size, pp_size in sizes(spec.layout, num_gpus)
        ]
        chosen = choose(candidates) or closest(candidates)
        config = with_sizes(config, tp_size=chosen.tp_size, pp_size=chosen.pp_size)
        origins = loaded.origins | dict.fromkeys(_SIZES[:2], "--auto")
        effective = replace(loaded, config=config, origins=origins)
        return cls(effective, chosen.plan, gpus, chosen.fit, candidates, chosen, num_gpus)

    def describe(self, rank: int | None) -> list[str]:
        """The parts of the text; with a rank, that rank in full."""
        from runner.cli.fit_text import describe_candidates, describe_fit
        from runner.cli.plan_text import describe_plan, describe_rank

        parts = []
        if self.chosen:
            parts.append(describe_candidates(self.candidates, self.chosen, self.num_gpus))
        parts.append(describe_plan(self.plan) if rank is None else describe_rank(self.plan, rank))
        if self.fit:
            parts.append(describe_fit(self.fit, self.gpus.origin))
        return parts

    def to_dict(self) -> dict[str, Any]:
        """What --json has beside the plan."""
        chosen = self.chosen
        return {
            "fit": self.fit.to_dict() if self.fit else None,
            "candidates": [c.to_dict() | {"chosen": c is chosen} for c in self.candidates] or None,
        }

    def draw(self) -> str:
        from runner.drawing.plan_svg import draw

        return draw(self.plan)

    def shortage(self) -> str | None:
        """Why it does not fit; None if it does, or if the memory is not known."""
        if self.fit is None or self.fit.fits:
            return None
        if not self.chosen:
            return f"the plan does not fit: {self.fit.shortage()}"
        return (
            f"no sizes for up to {plural(self.num_gpus, 'GPU')} fit; the closest is "
            f"tensor_parallel_size={self.chosen.tp_size}, "
            f"pipeline_parallel_size={self.chosen.pp_size}: {self.fit.shortage()}"
        )
