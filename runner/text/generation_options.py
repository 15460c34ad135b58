"""What is asked of a completion: by the flags of a command, or by the author of one prompt.

Not here: what a model's folder says where nothing is asked (`generation_config`).
"""

from dataclasses import asdict, dataclass, replace

DEFAULT_MAX_TOKENS = 256
"""Where neither a prompt, a flag nor the model's folder says."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to sample and when to stop; None leaves it to whoever comes next.

    Attributes:
        max_tokens: most tokens to generate.
        stop: strings that end the text and are not part of it.
        ignore_eos: goes on after tokens that end a text, as load generators ask.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool | None = None

    def over(self, others: "GenerationOptions") -> "GenerationOptions":
        """These, and what the others say where these say nothing."""
        return replace(others, **{k: v for k, v in asdict(self).items() if v is not None})
