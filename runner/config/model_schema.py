"""The configuration's section about the model: its source, and a tensor model's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from runner.config.problems import ContradictionError, Loc, shown
from runner.config.section import Count, Section, Text

BATCH = "batch"
"""The dim of an input along which samples are put together."""


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

    factory_args: dict[str, Any] = Field(default={})
    """Keyword arguments of the factory."""

    inputs: Annotated[list[InputConfig], Field(min_length=1)] | None = None
    """Inputs of a tensor model, in the order of its arguments."""

    dims: dict[str, Annotated[list[Count], Field(min_length=1)]] = Field(default={})
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
        if found == "factory":
            return
        for name in ("factory", "factory_path", "factory_args"):
            if getattr(self, name):
                yield (name,), f"given, but format is {found}; drop the one or change the other"
        if self.kind == "graph" and self.load_format == "dummy":
            yield ("load_format",), f"dummy is not for format {found}, whose file is the model"

    def _input_faults(self) -> Iterator[tuple[Loc, str]]:
        if self.kind == "decoder":
            for name in ("inputs", "dims"):
                if getattr(self, name):
                    yield (name,), "a language model has none; drop them, or give another format"
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
