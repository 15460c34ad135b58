"""A model folder, read as far as a plan needs: its config, its layout and its tensors' headers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parallel.checkpoint import Checkpoint
from parallel.errors import ConfigError, IntegrityError
from parallel.layout import ModelLayout
from runner.models.config import DecoderConfig, HFConfig
from runner.models.families import family_of
from runner.models.layout import layout_of

LoadFormat = Literal["auto", "dummy"]
"""Where weights come from: the folder's safetensors files, or a random number generator."""

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Our name for each dtype of a safetensors header that can be loaded."""

_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""What beside the weights belongs to a model, where it is there."""

_HEADER_DTYPES = {ours: header for header, ours in _DTYPES.items()}


@dataclass(frozen=True)
class ModelSpec:
    """A model that can be planned and loaded.

    Attributes:
        checkpoint: with `load_format` "dummy" no file holds its tensors; see
            `parallel.random_weights`.
    """

    folder: Path
    config: DecoderConfig
    layout: ModelLayout
    checkpoint: Checkpoint
    load_format: LoadFormat = "auto"

    @classmethod
    def open(cls, folder: Path, *, load_format: LoadFormat = "auto") -> "ModelSpec":
        """Read config.json and the headers of the weights.

        Args:
            load_format: with "dummy", config.json is all that is read.

        Raises:
            ConfigError: the architecture, or something in its config, is not supported.
            IntegrityError: a file is absent, truncated or corrupt.
        """
        hf_config = HFConfig.open(folder)
        family = family_of(hf_config)
        config = family.read(hf_config)
        layout = layout_of(config, family.names)
        if load_format == "dummy":
            dtype = _HEADER_DTYPES[config.dtype or "bfloat16"]
            checkpoint = Checkpoint.imagined(folder, layout.stored_shapes(), dtype)
        else:
            checkpoint = Checkpoint.open(folder).with_prefix(family.names.prefix)
        return cls(folder, config, layout, checkpoint, load_format)

    @property
    def files(self) -> list[Path]:
        """The model's files beside its weights: its config, and what is about text."""
        return [self.folder / name for name in _FILES if (self.folder / name).is_file()]

    @property
    def dtype(self) -> str:
        """What the config says, or else the dtype that most bytes of the checkpoint have; of random
        weights bfloat16.

        Raises:
            IntegrityError: the config does not say, and no tensor can be loaded.
        """
        if self.config.dtype is not None:
            return self.config.dtype
        num_bytes: Counter[str] = Counter()
        for info in self.checkpoint.tensors.values():
            if info.dtype in _DTYPES:
                num_bytes[_DTYPES[info.dtype]] += info.num_bytes
        if not num_bytes:
            raise IntegrityError(
                f"{self.checkpoint.folder}: holds no tensor of {', '.join(_DTYPES)}; "
                f"convert the weights to one of them"
            )
        return num_bytes.most_common(1)[0][0]

    def max_model_len(self, requested: int | None) -> int:
        """The length to run with, in tokens; None asks for the model's own limit.

        Raises:
            ConfigError: more than the model is made for.
        """
        limit = self.config.max_positions
        if requested is not None and requested > limit:
            raise ConfigError(
                f"max_model_len={requested} exceeds the {limit} tokens this model is made for; "
                f"use 1 to {limit}"
            )
        return requested or limit
