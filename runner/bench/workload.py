"""What a benchmark asks of the model: so many requests of fixed lengths, sent at once.

Prompts are random token ids, and no token ends a completion.
"""

import random
from dataclasses import dataclass

from parallel.decoder_plan import DecoderPlan
from parallel.errors import ConfigError
from runner.engine.request import Request


@dataclass(frozen=True)
class Workload:
    """One round of requests.

    Attributes:
        input_len: tokens of each prompt.
        output_len: tokens generated for each.
    """

    num_requests: int
    input_len: int
    output_len: int

    @property
    def length(self) -> int:
        """Tokens of one sequence when it is complete."""
        return self.input_len + self.output_len

    def check(self, plan: DecoderPlan) -> None:
        """Raises ConfigError: the sequences are longer than the job allows."""
        if self.length > plan.max_model_len:
            raise ConfigError(
                f"--input-len {self.input_len} and --output-len {self.output_len} make sequences "
                f"of {self.length} tokens, but max_model_len={plan.max_model_len}; use shorter "
                "ones, or raise --max-model-len"
            )

    def requests(self, round_index: int, vocab_size: int) -> list[Request]:
        """The requests of a round; no two rounds have the same prompts or the same ids."""
        ids = random.Random(round_index)
        first = round_index * self.num_requests
        return [
            Request(
                first + number,
                tuple(ids.randrange(vocab_size) for _ in range(self.input_len)),
                self.output_len,
            )
            for number in range(self.num_requests)
        ]

    def kv_blocks(self, block_size: int, max_num_seqs: int) -> int:
        """KV blocks of the sequences that run at once."""
        return min(self.num_requests, max_num_seqs) * -(-self.length // block_size)
