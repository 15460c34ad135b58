"""The configuration's section about the division of the model among ranks."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from runner.config.problems import ContradictionError, Loc
from runner.config.section import Count, DeviceIndex, Section, Text

TP_STYLES = (
    "colwise",
    "colwise_gather_output",
    "colwise_rep",
    "rowwise",
    "rowwise_split_input",
    "rowwise_rep",
    "embedding_rowwise",
    "embedding_colwise",
    "heads",
    "replicate",
)

_PATTERN_PART = re.compile(r"\*|[^\s*{}.]+|\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_DOT_OUTSIDE_BRACES = re.compile(r"\.(?![^{]*\})")


class StageConfig(Section):
    """One pipeline stage; leave `modules` out in all stages to have the cut chosen by cost."""

    modules: Annotated[list[Text], Field(min_length=1)] | None = None
    """Patterns of module names: `*` is one dotted segment, `{a..b}` a range; null: cut by cost."""

    tensor_parallel_size: Count | None = None
    """Ranks that share each layer of this stage; null means `parallel.tensor_parallel_size`."""

    devices: Annotated[list[DeviceIndex], Field(min_length=1)] | None = None
    """Device index of each rank of this stage; null in all stages means rank r on device r."""

    @field_validator("modules")
    @classmethod
    def _patterns_are_readable(cls, modules: list[str] | None) -> list[str] | None:
        for pattern in modules or []:
            for part in _DOT_OUTSIDE_BRACES.split(pattern):
                match = _PATTERN_PART.fullmatch(part)
                if match is None or (match[1] and int(match[1]) > int(match[2])):
                    raise ValueError(
                        f"{pattern!r} is not a pattern of module names; use names joined by dots, "
                        "`*` for one of them, `{a..b}` with a <= b for a range of numbers"
                    )
        return modules


class ParallelConfig(Section):
    """How the model is divided among ranks, one device each."""

    tensor_parallel_size: Count = 1
    """Ranks that share each layer; 1 means that layers are not split."""

    pipeline_parallel_size: Count = 1
    """Stages in a row; 1 means no pipeline; where `stages` is given it is their number."""

    stages: Annotated[list[StageConfig], Field(min_length=1)] | None = None
    """The stages one by one; null means equal tensor-parallel sizes and a cut by cost."""

    split_points: Annotated[list[Text], Field(min_length=1)] | None = None
    """Modules with which all stages but the first begin, of a tensor model; null: cut by cost."""

    tp_plan: Annotated[dict[str, str], Field(min_length=1)] | None = None
    """How modules of a tensor model are split: pattern of names -> style; null means not at all."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device; auto is cuda where a GPU is usable, else cpu."""

    @field_validator("tp_plan")
    @classmethod
    def _styles_are_known(cls, plan: dict[str, str] | None) -> dict[str, str] | None:
        for pattern, style in (plan or {}).items():
            if style not in TP_STYLES:
                raise ValueError(f"{pattern}: {style!r} is no style; use {', '.join(TP_STYLES)}")
        return plan

    @property
    def tensor_parallel_sizes(self) -> list[int]:
        """The ranks of each stage."""
        if self.stages is None:
            return [self.tensor_parallel_size] * self.pipeline_parallel_size
        return [stage.tensor_parallel_size or self.tensor_parallel_size for stage in self.stages]

    @property
    def devices(self) -> list[int] | None:
        """The device index of each rank, stage by stage; None if no stage names any."""
        named = [device for stage in self.stages or [] for device in stage.devices or []]
        return named or None

    @model_validator(mode="before")
    @classmethod
    def _count_stages(cls, given: Any) -> Any:
        """The pipeline size follows the stages, so that the key always holds what is in effect."""
        if not isinstance(given, dict) or "pipeline_parallel_size" in given:
            return given
        stages, points = given.get("stages"), given.get("split_points")
        if isinstance(stages, list) and stages:
            return given | {"pipeline_parallel_size": len(stages)}
        if isinstance(points, list) and points:
            return given | {"pipeline_parallel_size": len(points) + 1}
        return given

    @model_validator(mode="after")
    def _stages_agree(self) -> ParallelConfig:
        faults = [
            *self._size_faults(),
            *self._split_faults(),
            *self._modules_faults(),
            *self._device_faults(),
        ]
        if faults:
            raise ContradictionError(faults)
        return self

    def _size_faults(self) -> list[tuple[Loc, str]]:
        if self.stages is None or len(self.stages) == self.pipeline_parallel_size:
            return []
        message = (
            f"{self.pipeline_parallel_size} contradicts the {len(self.stages)} entries of "
            "parallel.stages; drop the one or change the other"
        )
        return [(("pipeline_parallel_size",), message)]

    def _split_faults(self) -> list[tuple[Loc, str]]:
        if self.split_points is None:
            return []
        if any(stage.modules for stage in self.stages or []):
            return [(("split_points",), "parallel.stages lists the modules already; drop one")]
        if len(self.split_points) + 1 != self.pipeline_parallel_size:
            message = (
                f"{len(self.split_points)} points make {len(self.split_points) + 1} stages, and "
                f"pipeline_parallel_size is {self.pipeline_parallel_size}; make them agree"
            )
            return [(("split_points",), message)]
        return []

    def _modules_faults(self) -> list[tuple[Loc, str]]:
        stages = self.stages or []
        if all(stage.modules is None for stage in stages):
            return []
        message = (
            "missing, though another stage has them; name the modules of all stages or of none"
        )
        return [
            (("stages", i, "modules"), message)
            for i, stage in enumerate(stages)
            if stage.modules is None
        ]

    def _device_faults(self) -> list[tuple[Loc, str]]:
        """All stages name devices or none; a stage names one a rank; none is named twice."""
        counts = Counter(self.devices or [])
        faults: list[tuple[Loc, str]] = []
        for index, stage in enumerate(self.stages or []):
            loc, size = ("stages", index, "devices"), self.tensor_parallel_sizes[index]
            if stage.devices is None and counts:
                faults.append((loc, "missing, though another stage has them; give all or none"))
            elif stage.devices is not None and len(stage.devices) != size:
                message = f"{stage.devices} has {len(stage.devices)} devices for"
                faults.append((loc, f"{message} tensor_parallel_size={size}; give one a rank"))
            repeated = sorted(device for device in set(stage.devices or []) if counts[device] > 1)
            if repeated:
                faults.append((loc, f"device {repeated[0]} is given twice; give each rank its own"))
        return faults
