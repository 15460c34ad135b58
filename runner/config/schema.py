"""Every key of the configuration: its type, its only default, and its meaning. It reads no files.

To add a key, add a field with a docstring of one sentence: the unit, and what null or 1 means.
Error messages, `docs/configuration.md`, `--show-config` and the JSON Schema follow from it.
"""

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from runner.config.problems import ContradictionError, Loc

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
DeviceIndex = Annotated[int, Field(ge=0)]

_PATTERN_PART = re.compile(r"\*|[^\s*{}.]+|\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_DOT_OUTSIDE_BRACES = re.compile(r"\.(?![^{]*\})")


class Section(BaseModel):
    """What all sections share: no unknown keys, no conversions, no change after reading."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelConfig(Section):
    """Which model is run, and in which precision."""

    path: Text
    """Local directory that holds the model, relative to the working directory; never a hub id."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto is that of the checkpoint's config, on a CPU too."""

    load_format: Literal["auto", "dummy"] = "auto"
    """Where weights come from; dummy means random ones at the shape of config.json, to measure."""

    max_model_len: Count | None = None
    """Most tokens of a sequence, prompt and completion; null means the model's own limit."""


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

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device; auto is cuda where a GPU is usable, else cpu."""

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
        stages = given.get("stages")
        if not isinstance(stages, list) or not stages:
            return given
        return given | {"pipeline_parallel_size": len(stages)}

    @model_validator(mode="after")
    def _stages_agree(self) -> "ParallelConfig":
        faults = [*self._size_faults(), *self._modules_faults(), *self._device_faults()]
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


class ParityConfig(Section):
    """What a compiled model must keep of the original to be accepted."""

    max_error_ratio: Annotated[float, Field(ge=1)] = 4.0
    """Largest error of a layer, as a multiple of that of the uncompiled one."""

    min_cosine: Annotated[float, Field(gt=0, le=1)] = 0.999
    """Smallest cosine between a layer's contribution and that of the original in full precision."""

    max_gain_error: Annotated[float, Field(gt=0)] = 0.02
    """Largest relative difference in size between a layer's contribution and the original's."""

    min_top1: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Smallest share of positions at which the likeliest token is that of the uncompiled model."""

    max_kl: Annotated[float, Field(gt=0)] = 0.02
    """Largest mean KL divergence from the uncompiled model's distribution, in nats."""

    num_tokens: Count = 128
    """Positions that the whole model is compared at."""


class CompileConfig(Section):
    """How the parts of a stage are compiled."""

    backend: Literal["tensorrt", "inductor", "eager", "auto"] = "tensorrt"
    """What compiles them; auto measures all that are installed on this GPU, part by part."""

    buckets: Annotated[list[Count], Field(min_length=1)] | None = None
    """Numbers of tokens that steps are padded to, ascending; null means the powers of two."""

    enforce_eager: bool = False
    """Whether GPUs run every step call by call; false means decode steps are CUDA graphs."""

    parity: ParityConfig = Field(default_factory=ParityConfig)

    @field_validator("buckets")
    @classmethod
    def _ascending(cls, buckets: list[int] | None) -> list[int] | None:
        if buckets is not None and buckets != sorted(set(buckets)):
            raise ValueError(f"{buckets} is not ascending; use {sorted(set(buckets))}")
        return buckets


class SchedulerConfig(Section):
    """How many sequences and tokens one step may hold."""

    max_num_seqs: Count = 32
    """Most sequences that run at once; 1 means one after the other."""

    max_num_batched_tokens: Count = 8192
    """Most tokens of one step, over all its sequences."""


class KVCacheConfig(Section):
    """The paged cache of keys and values."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.90
    """Fraction of a GPU's memory for weights, activations and cache together; 1 means all."""

    block_size: Count = 16
    """Tokens of one cache block, a power of two."""

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, block_size: int) -> int:
        if block_size & (block_size - 1):
            below = 1 << (block_size.bit_length() - 1)
            raise ValueError(f"{block_size} is not a power of two; use {below} or {2 * below}")
        return block_size


class DistributedConfig(Section):
    """How the ranks talk, and how long they wait for one another."""

    init_timeout_s: Seconds = 300.0
    """Seconds that the ranks have to find each other, and to load the model."""

    build_timeout_s: Seconds = 7200.0
    """Seconds that ranks which compile wait for one another."""

    collective_timeout_s: Seconds | None = None
    """Seconds that one collective may take; null means 30 on GPUs and 600 on a CPU."""


class RunnerConfig(Section):
    """The whole configuration of a job."""

    version: Literal[1]
    """Version of this language; write 1."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    compile: CompileConfig = Field(default_factory=CompileConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    kv_cache: KVCacheConfig = Field(default_factory=KVCacheConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_an_int(cls, version: Any) -> Any:
        """Python takes true and 1.0 for 1; a strict file does not."""
        if version == 1 and type(version) is not int:
            raise ValueError(f"{version!r} is not allowed; use 1")
        return version
