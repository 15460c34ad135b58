"""Text in and out of a language model: tokens, chat templates, streaming, stop strings, defaults.

Not here: sampling and the requests themselves.
"""

from runner.text.chat import ChatTemplate
from runner.text.detokenizer import IncrementalDetokenizer
from runner.text.generation_config import GenerationDefaults
from runner.text.stop import StopStrings
from runner.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "GenerationDefaults",
    "IncrementalDetokenizer",
    "StopStrings",
    "Tokenizer",
]
