"""Every key of the configuration: its type, its only default, and its meaning. It reads no files.

To add a key, add a field with a docstring of one sentence: the unit, and what null or 1 means.
Error messages, `docs/configuration.md`, `--show-config` and the JSON Schema follow from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from runner.config.problems import ContradictionError, Loc, shown

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
DeviceIndex = Annotated[int, Field(ge=0)]
TP_STYLES = (
    "colwise",
    "colwise_gather_output",
    "rowwise",
    "rowwise_split_input",
    "embedding_rowwise",
    "embedding_colwise",
    "heads",
    "replicate",
)

BATCH = "batch"
"""The dim of an input along which samples are put together."""

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


class InputConfig(Section):
    """One input of a tensor model."""

    name: Text
    """Name of the input, as files of several arrays have it."""

    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"] = "float32"
    """Type of its elements; floating-point ones are converted to `model.dtype`."""

    shape: list[Any]
    """Sizes of its dims, or names: of the first dim "batch", of any other one in `model.dims`."""

    @field_validator("shape")
    @classmethod
    def _dims_are_sizes_or_names(cls, shape: list[Any]) -> list[Any]:
        for dim in shape:
            is_size = type(dim) is int and dim > 0
            if not is_size and not (isinstance(dim, str) and dim):
                raise ValueError(f"{shown(dim)} is no size; use a whole number above 0, or a name")
        if BATCH in shape[1:]:
            raise ValueError(f"{shape}: only the first dim may be {BATCH}")
        return shape


class ImageConfig(Section):
    """How pictures become tensors: upright, resized, cropped, (pixel * scale - mean) / std."""

    resize: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """Length of the shorter side, or [height, width]; null means that the size stays."""

    crop: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """[height, width] from the middle; null means all of it."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How resizing interpolates, over all that a new pixel covers."""

    scale: float = 1 / 255
    """Factor of the pixels; 1/255 makes 0 to 1 of 8 bits."""

    mean: Annotated[list[float], Field(min_length=1)] | None = None
    """What is subtracted from each channel after scaling; null means nothing."""

    std: Annotated[list[float], Field(min_length=1)] | None = None
    """What each channel is divided by; null means 1."""

    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    """Order of the channels."""

    layout: Literal["chw", "hwc"] = "chw"
    """Order of the dims."""


class VolumeConfig(Section):
    """How NIfTI volumes become tensors: turned to RAS, resampled, windowed, padded or cropped."""

    spacing: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    """Distance of voxels in mm along each axis; null means as it is."""

    resample_to: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = None
    """Size in voxels, whatever the spacing; null means as it is."""

    window: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """[low, high] that become 0 and 1, what is beyond them too; null means no window."""

    pad_or_crop_to: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = None
    """Size in voxels, by zeros around or by cutting off; null means as it is."""


class PreprocessConfig(Section):
    """What is done to items that are not arrays."""

    image: ImageConfig = Field(default_factory=ImageConfig)
    volume: VolumeConfig = Field(default_factory=VolumeConfig)


class ModelConfig(Section):
    """Which model is run, and in which precision."""

    path: Text
    """Local folder or file of the model, relative to the working directory; never a hub id."""

    format: Literal["auto", "safetensors", "factory", "pt2", "onnx"] = "auto"
    """What `path` holds: safetensors is a language model's folder, any other a tensor model; auto
    goes by `factory` and by the name of the file."""

    factory: Text | None = None
    """Function "package.module:function" that makes the module, one of `security.factories`; `path`
    then holds its weights."""

    factory_path: Text | None = None
    """Folder in which the factory's module is looked for first; null means installed packages."""

    factory_args: dict[str, Any] = {}
    """Keyword arguments of the factory."""

    inputs: Annotated[list[InputConfig], Field(min_length=1)] | None = None
    """Inputs of a tensor model, in the order of its arguments."""

    dims: dict[str, Annotated[list[Count], Field(min_length=1)]] = {}
    """Sizes of each named dim of `inputs`, ascending; every combination is a bucket."""

    preprocess: PreprocessConfig = Field(default_factory=PreprocessConfig)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto is that of the checkpoint, on a CPU too."""

    load_format: Literal["auto", "dummy"] = "auto"
    """Where weights come from; dummy means random ones at the shape of config.json, to measure."""

    max_model_len: Count | None = None
    """Most tokens of a sequence, prompt and completion; null means the model's own limit."""

    @property
    def kind(self) -> Literal["decoder", "graph"]:
        """Whether it is a language model, or any other."""
        return "decoder" if self.resolved_format == "safetensors" else "graph"

    @property
    def resolved_format(self) -> Literal["safetensors", "factory", "pt2", "onnx"]:
        """The format, found by names where it is auto; no file is opened."""
        if self.format != "auto":
            return self.format
        if self.factory:
            return "factory"
        if self.path.endswith(".onnx"):
            return "onnx"
        return "pt2" if self.path.endswith(".pt2") else "safetensors"

    @model_validator(mode="after")
    def _belongs_together(self) -> ModelConfig:
        faults = [*self._factory_faults(), *self._input_faults()]
        if faults:
            raise ContradictionError(faults)
        return self

    def _factory_faults(self) -> Iterator[tuple[Loc, str]]:
        found = self.resolved_format
        if found == "factory" and self.factory is None:
            yield ("factory",), 'missing; format factory needs it: "package.module:function"'
        if found != "factory" and self.factory is not None:
            yield ("factory",), f"given, but format is {found}; drop the one or change the other"

    def _input_faults(self) -> Iterator[tuple[Loc, str]]:
        if self.kind == "decoder":
            if self.inputs:
                yield ("inputs",), "a language model has none; drop them, or give another format"
            return
        if self.inputs is None:
            message = "missing; a tensor model needs the name and shape of every input"
            yield ("inputs",), message
        used = {dim for given in self.inputs or [] for dim in given.shape if isinstance(dim, str)}
        for index, given in enumerate(self.inputs or []):
            for dim in given.shape:
                if isinstance(dim, str) and dim != BATCH and dim not in self.dims:
                    message = f"{dim!r} has no sizes; give them as model.dims.{dim}: [...]"
                    yield ("inputs", index, "shape"), message
        for name, sizes in self.dims.items():
            if name not in used:
                yield ("dims", name), "stands in no input's shape; drop it"
            elif sizes != sorted(set(sizes)):
                yield ("dims", name), f"{sizes} is not ascending; use {sorted(set(sizes))}"


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
    """Numbers of tokens that steps are padded to, or of samples of a tensor model, ascending; null
    means the powers of two."""

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
    """How much is computed at a time, and how long requests wait for company."""

    max_num_seqs: Count = 32
    """Most sequences that run at once; 1 means one after the other."""

    max_num_batched_tokens: Count = 8192
    """Most tokens of one step, over all its sequences."""

    max_batch_size: Count = 8
    """Most samples of a tensor model in one batch; 1 means no batching."""

    preferred_batch_size: Annotated[list[Count], Field(min_length=1)] | None = None
    """Sizes at which a batch goes before it is full, ascending; null means only full ones do."""

    max_queue_delay_ms: Annotated[float, Field(ge=0)] = 5.0
    """Milliseconds that a sample waits for others of its shape; 0 means not at all."""

    max_queue_size: Count = 256
    """Most samples that wait."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> SchedulerConfig:
        sizes = self.preferred_batch_size
        if sizes and (sizes != sorted(set(sizes)) or sizes[-1] > self.max_batch_size):
            message = f"{sizes} must ascend to at most max_batch_size={self.max_batch_size}"
            raise ContradictionError([(("preferred_batch_size",), message)])
        return self


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


class TilingConfig(Section):
    """How volumes or images that are larger than the model's input are cut into windows."""

    roi_size: Annotated[list[Count], Field(min_length=2, max_length=3)]
    """Size of a window; the spatial dims of the model's one input."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of a window that the next one covers, too."""

    sw_batch_size: Count | None = None
    """Windows of one batch; null means scheduler.max_batch_size."""

    mode: Literal["constant", "gaussian"] = "constant"
    """Weight of a window's elements where windows overlap; gaussian means less at the edges."""

    sigma_scale: Annotated[float, Field(gt=0)] = 0.125
    """Width of the gaussian, as a share of roi_size."""


class SecurityConfig(Section):
    """What the configuration may make run."""

    factories: list[Text] = []
    """Functions that `model.factory` may name; anything else is refused before it is imported."""


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
    tiling: TilingConfig | None = None
    security: SecurityConfig = Field(default_factory=SecurityConfig)

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_an_int(cls, version: Any) -> Any:
        """Python takes true and 1.0 for 1; a strict file does not."""
        if version == 1 and type(version) is not int:
            raise ValueError(f"{version!r} is not allowed; use 1")
        return version
