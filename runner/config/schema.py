"""Every key of the configuration: its type, its only default, and its meaning. It reads no files.

To add a key, add a field with a docstring of one sentence: the unit, and what null or 1 means.
Error messages, `docs/configuration.md`, `--show-config` and the JSON Schema follow from it. The two
largest sections have files of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from runner.config.model_schema import ModelConfig
from runner.config.parallel_schema import ParallelConfig
from runner.config.problems import ContradictionError, Loc
from runner.config.section import Count, Seconds, Section, Text


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
    """Whether GPUs run every step call by call; false means that decode steps, those with short
    prompts, and all buckets of a tensor model, are CUDA graphs.
    """

    allow_tf32: bool = False
    """Whether float32 products may be as coarse as TF32, which TensorRT-RTX multiplies in whatever
    it is told; false means that comparisons fail then, and that PyTorch's convolutions are exact.
    """

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
    """Most samples of a tensor model, or requests to a server, that wait."""

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
    """Seconds that one collective may take, and that a server's rank may be at one thing before the
    job ends; null means 30 on GPUs and 600 on a CPU."""

    all_reduce: Literal["auto", "nccl", "one_shot", "low_latency"] = "auto"
    """How the GPUs of a stage add up small tensors: one_shot means by reading one another's memory
    (NVLink), low_latency by writing into it without a barrier (needs Triton), nccl by NCCL alone;
    auto means one_shot where they can, and says where not."""


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


class ServerConfig(Section):
    """How `shardline serve` meets its clients."""

    host: Text = "127.0.0.1"
    """Address to listen at; 0.0.0.0 means every network of this host."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0 means any that is free."""

    uds: Text | None = None
    """Unix socket to listen at in place of host and port; null means none."""

    stall_timeout_s: Seconds | None = None
    """Seconds without a step after which health says that the server stalls; null means 15 on GPUs
    and 300 on a CPU."""

    model_name: Text | None = None
    """What clients call the model; null means the name of its folder, its file or its bundle."""

    api_key_file: Text | None = None
    """File with the key that clients must send; null means that none is asked for."""

    max_request_bytes: Count = 2097152
    """Most bytes of a request's body."""

    request_timeout_s: Seconds | None = None
    """Seconds that a request may take, waiting included; null means any time."""

    shutdown_timeout_s: Seconds = 60.0
    """Seconds that open requests have to finish after SIGTERM."""


class SecurityConfig(Section):
    """What the configuration may make run."""

    factories: list[Text] = Field(default=[])
    """Functions that `model.factory` may name; anything else is refused before it is imported."""

    network_guard: Literal["off", "warn", "strict"] = "off"
    """What becomes of Python's connections to other hosts: strict refuses and reports them, warn
    reports them, off looks at none."""

    network_report: Text | None = None
    """File that the network guard appends to; null means a temporary one, if there are
    any."""

    bundle_key: Text | None = None
    """File with the public key that a bundle must be signed by; null means none is asked for."""


class ObservabilityConfig(Section):
    """What a running job shows of itself."""

    nvtx: bool = False
    """Whether profilers see names of steps, stages, segments and collectives: Nsight on GPUs,
    PyTorch's profiler on a CPU; false costs nothing."""


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
    server: ServerConfig = Field(default_factory=ServerConfig)
    observability: ObservabilityConfig = Field(default_factory=ObservabilityConfig)
    security: SecurityConfig = Field(default_factory=SecurityConfig)

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_an_int(cls, version: Any) -> Any:
        """Python takes true and 1.0 for 1; a strict file does not."""
        if version == 1 and type(version) is not int:
            raise ValueError(f"{version!r} is not allowed; use 1")
        return version

    @model_validator(mode="after")
    def _fits_the_kind_of_model(self) -> RunnerConfig:
        """A key that would do nothing is a mistake."""
        if self.model.kind == "graph":
            return self
        given: dict[Loc, Any] = {
            ("parallel", "split_points"): self.parallel.split_points,
            ("parallel", "tp_plan"): self.parallel.tp_plan,
            ("tiling",): self.tiling,
        }
        message = "is for tensor models, and this is a language model; drop it"
        if faults := [(loc, message) for loc, value in given.items() if value]:
            raise ContradictionError(faults)
        return self
