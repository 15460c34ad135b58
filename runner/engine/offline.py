"""Rank 0 of `shardline run` of a language model: prompts are read, answered and written, a bounded
number at a time.

Not here: the files (`runner.prompts`), and when a step runs (`rank`).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from parallel.errors import ConfigError, IntegrityError, ShardlineError
from runner.engine.completion import NOT_FINITE_LOGITS, Completion, CompletionText
from runner.engine.control import Control
from runner.engine.request import Request
from runner.engine.request_maker import RequestMaker
from runner.engine.scheduler import Output, Scheduler
from runner.items.progress import ItemProgress
from runner.prompts.folder import PromptFolder
from runner.prompts.prompt import Answer, BadLine, Prompt
from runner.prompts.reading import PromptFiles
from runner.prompts.reorder import Reorder
from runner.prompts.results import result_of
from runner.text.generation_options import GenerationOptions

_LINES_A_STEP = 256
"""Lines that are read between two steps."""

_BATCHES_IN_ENGINE = 2
"""How much the engine has at once, in full batches: one that runs, and one to fill gaps with."""

BATCHES_HELD_BACK = 16
"""How much may be begun and not be written, for the sake of the order, in full batches."""


@dataclass
class OfflineCounts:
    """What one run did, those before it left out.

    Attributes:
        prompt_tokens, completion_tokens: of the answers alone.
        seconds: to the last answer, without loading the model.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    def add(self, answer: Answer) -> None:
        self.answers += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens


@dataclass
class _Open:
    """A prompt that the engine has."""

    prompt: Prompt
    text: CompletionText


class OfflineFront:
    """Answers the prompts that have no line in a folder yet; needs `hold` around its use.

    Attributes:
        counts: what was done.
        folder, num_lines: where results go, and how many lines the input has; within `hold`.
    """

    def __init__(
        self,
        files: PromptFiles,
        maker: RequestMaker,
        options: GenerationOptions,
        *,
        open_folder: Callable[[], AbstractContextManager[PromptFolder]],
        in_order: bool,
        model: str,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """
        Args:
            options: where a prompt does not say.
            in_order: write results in the order of their prompts.
            model: its name, for results in OpenAI's form.
        """
        self.counts = OfflineCounts()
        self._files = files
        self._maker = maker
        self._options = options
        self._open_folder = open_folder
        self._model = model
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._reorder: Reorder[tuple[Prompt, Answer | None]] | None = (
            Reorder() if in_order else None
        )
        self._lines: Iterator[Prompt | BadLine] = iter(files)
        self._open: dict[int, _Open] = {}
        self._aborted: list[int] = []
        self._num_begun = self._num_written = 0
        self._has_more = True
        self._error: ShardlineError | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the folder from before the ranks meet until they have parted.

        Raises:
            ShardlineError: the run could not go on; the ranks have ended well.
        """
        with self._open_folder() as self.folder, ExitStack() as self._closing:
            survey = self._files.survey(self._maker.max_tokens(self._options))
            self.num_lines, self._survey_length = survey
            yield
            if self._error:
                raise self._error

    def kv_blocks(self, block_size: int) -> int:
        """As many of the longest requests as can run at once, and one of any length in any case."""
        length = min(self._survey_length, self._max_model_len)
        together = min(self._max_num_seqs, self.num_lines) * -(-length // block_size)
        return max(together, -(-self._max_model_len // block_size))

    def begin(self, scheduler: Scheduler) -> None:
        """From here on the clock counts."""
        self._max_length = scheduler.max_length
        done = self.folder.num_finished + self.folder.num_failed
        self._progress = ItemProgress(self.num_lines, done, noun="requests")
        self._closing.enter_context(self._progress)
        self._started_s = time.monotonic()

    def next(self) -> Control:
        """Prompts for which there is room, and those that a stop string ended."""
        added: list[Request] = []
        with self._leaving_on_error():
            self.folder.sync()
            added = self._read()
        aborted, self._aborted = self._aborted, []
        is_done = not (self._has_more or self._open)
        return Control(added, aborted, leave=is_done or self._error is not None)

    def take(self, outputs: list[Output]) -> None:
        """Turn a step's tokens into text, and write what is complete."""
        self._progress.count_tokens(sum(not output.failed for output in outputs))
        with self._leaving_on_error():
            for output in outputs:
                text = self._open[output.request_id].text
                if not output.failed:
                    _, stopped = text.take(output)
                    if stopped:
                        self._aborted.append(output.request_id)
                if output.failed or text.completion.finish_reason:
                    self._finish(output.request_id)

    @contextmanager
    def _leaving_on_error(self) -> Iterator[None]:
        """Let the other ranks end well before `hold` raises what went wrong on this one."""
        try:
            yield
        except ShardlineError as error:
            self._error = error

    def _read(self) -> list[Request]:
        """The requests of some lines; of few, since the other ranks wait meanwhile."""
        requests = []
        for _ in range(_LINES_A_STEP):
            if not self._has_room():
                break
            line = next(self._lines, None)
            if line is None:
                self._has_more = False
                break
            if not self.folder.has(line.place) and (request := self._begin(line)):
                requests.append(request)
        return requests

    def _has_room(self) -> bool:
        """Neither the engine nor what waits for its turn to be written may grow for ever."""
        num_unwritten = self._num_begun - self._num_written
        return (
            len(self._open) < _BATCHES_IN_ENGINE * self._max_num_seqs
            and num_unwritten < BATCHES_HELD_BACK * self._max_num_seqs
        )

    def _begin(self, line: Prompt | BadLine) -> Request | None:
        """Make a request of a line, or record why there is none."""
        if isinstance(line, Prompt):
            try:
                return self._make(line)
            except (ConfigError, IntegrityError) as error:
                line = BadLine(line.place, line.id, str(error))
        self._fail(line)
        return None

    def _make(self, prompt: Prompt) -> Request:
        options = prompt.options.over(self._options)
        prompt_ids = self._maker.encode(prompt.content)
        request = self._maker.make(self._num_begun, prompt_ids, options)
        if request.max_length > self._max_length:
            raise ConfigError(
                f"prompt and completion may take {request.max_length} tokens, but the KV cache "
                f"holds {self._max_length}; lower max_tokens, or give the cache more memory"
            )
        completion = Completion(prompt.content, request)
        text = CompletionText(completion, self._maker.tokenizer, stops=options.stop or ())
        self._open[request.request_id] = _Open(prompt, text)
        self._num_begun += 1
        return request

    def _finish(self, request_id: int) -> None:
        """Write what came of a prompt, or of those that waited for it, too."""
        opened = self._open.pop(request_id)
        found = (opened.prompt, _answer(opened.text.completion))
        ready = self._reorder.put(request_id, found) if self._reorder else [found]
        for prompt, answer in ready:
            self._num_written += 1
            if answer is None:
                self._fail(BadLine(prompt.place, prompt.id, NOT_FINITE_LOGITS))
                continue
            self.folder.write(result_of(prompt, answer, model=self._model))
            self.counts.add(answer)
            self._progress.advance()
        self.counts.seconds = time.monotonic() - self._started_s

    def _fail(self, line: BadLine) -> None:
        self.folder.record_failure(line)
        self._progress.advance(failed=True)


def _answer(completion: Completion) -> Answer | None:
    """What is to be written; None: the model gave no token to go on with."""
    if completion.finish_reason is None:
        return None
    num_prompt, num_generated = len(completion.request.prompt_ids), len(completion.token_ids)
    return Answer(completion.text, completion.finish_reason, num_prompt, num_generated)
