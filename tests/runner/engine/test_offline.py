"""Rank 0 of an offline run, with tokens given by hand: what it begins, writes and holds back."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_tokenizer, make_checkpoint

from parallel.errors import PreflightError
from runner.config.load import load
from runner.engine.control import Control
from runner.engine.kv_blocks import BlockPool
from runner.engine.offline import BATCHES_HELD_BACK, OfflineFront
from runner.engine.request_maker import RequestMaker
from runner.engine.scheduler import Output, Scheduler
from runner.engine.sequence import NOT_FINITE
from runner.planning import DecoderJob
from runner.prompts.folder import open_prompt_folder
from runner.prompts.reading import PromptFiles
from runner.text.generation_options import GenerationOptions

MAX_NUM_SEQS = 2
IN_ENGINE = 2 * MAX_NUM_SEQS


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> RequestMaker:
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("offline"), vocab_size=259)
    config = load(None, overrides=[f"model.path={add_tokenizer(folder)}"]).config
    return RequestMaker(DecoderJob.prepare(config))


class Run:
    """A front over lines of prompts, and the folder that it writes."""

    def __init__(self, maker: RequestMaker, folder: Path, *, in_order: bool = True) -> None:
        self.maker = maker
        self.folder = folder
        self.in_order = in_order

    def write(self, *lines: dict[str, Any] | str) -> None:
        encoded = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        (self.folder / "in.jsonl").write_text("\n".join(encoded))

    @contextmanager
    def front(self, max_length: int = 1000) -> Iterator[OfflineFront]:
        front = OfflineFront(
            PromptFiles([self.folder / "in.jsonl"]),
            self.maker,
            GenerationOptions(max_tokens=50, stop=("END",)),
            open_folder=lambda: open_prompt_folder(self.folder / "out", {}, overwrite=False),
            in_order=self.in_order,
            model="m",
            max_num_seqs=MAX_NUM_SEQS,
            max_model_len=128,
        )
        with front.hold():
            pool = BlockPool(max_length, 1)
            front.begin(Scheduler(pool, max_num_seqs=1, max_num_batched_tokens=1))
            yield front

    def say(self, front: OfflineFront, request_id: int, text: str, *, ends: bool = True) -> None:
        """A token for every byte; the last one ends the request."""
        tokens = self.maker.tokenizer.encode(text)
        for place, token_id in enumerate(tokens):
            last = ends and place == len(tokens) - 1
            front.take([Output(request_id, token_id, "length" if last else None)])

    def results(self) -> list[dict[str, Any]]:
        text = (self.folder / "out" / "results.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def errors(self) -> dict[int, str]:
        lines = (self.folder / "out" / "errors.jsonl").read_text().splitlines()
        return {line["index"]: line["error"] for line in map(json.loads, lines)}


@pytest.fixture
def run(maker: RequestMaker, tmp_path: Path) -> Run:
    return Run(maker, tmp_path)


def ids(control: Control) -> list[int]:
    return [request.request_id for request in control.added]


@pytest.mark.parametrize("in_order", [True, False])
def test_a_prompt_that_gets_no_token_is_a_bad_line_and_the_rest_goes_on(
    run: Run, in_order: bool
) -> None:
    run.in_order = in_order
    run.write(*prompts(IN_ENGINE + 1))
    with run.front() as front:
        front.next()
        run.say(front, 2, "c")
        front.take([Output(0, NOT_FINITE, None)])
        assert ids(front.next()) == [IN_ENGINE]
        for request_id in (1, 3, 4):
            run.say(front, request_id, "a")
        assert front.next().leave
        assert front.counts.answers == front.counts.completion_tokens == 4
    numbers = [line["id"] for line in run.results()]
    assert numbers == ([1, 2, 3, 4] if in_order else [2, 1, 3, 4])
    assert list(run.errors()) == [1]
    assert "logits are not finite" in run.errors()[1]


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"id": index, "prompt": "x"} for index in range(count)]


def test_as_many_are_begun_as_there_is_room_for(run: Run) -> None:
    run.write(*prompts(IN_ENGINE + 2))
    with run.front() as front:
        assert ids(front.next()) == list(range(IN_ENGINE))
        assert front.next() == Control()
        run.say(front, 1, "b")
        assert ids(front.next()) == [IN_ENGINE]
        for request_id in (0, 2, 3, 4):
            run.say(front, request_id, "a")
        assert ids(front.next()) == [IN_ENGINE + 1]
        assert not front.next().leave
        run.say(front, 5, "c")
        assert front.next().leave
        assert front.counts.answers == front.counts.completion_tokens == 6
        assert front.counts.prompt_tokens == 6
    assert [(line["id"], line["text"]) for line in run.results()] == [
        *((0, "a"), (1, "b"), (2, "a"), (3, "a"), (4, "a"), (5, "c"))
    ]


def test_a_long_answer_holds_back_a_bounded_number_of_others(run: Run) -> None:
    run.write(*prompts(200))
    begun = 0
    with run.front() as front:
        while added := ids(front.next()):
            begun += len(added)
            for request_id in added:
                if request_id:
                    run.say(front, request_id, "a")
        assert begun == BATCHES_HELD_BACK * MAX_NUM_SEQS
        assert run.results() == []
        run.say(front, 0, "at last")
        assert [line["id"] for line in run.results()] == list(range(begun))
        assert ids(front.next())[0] == begun


def test_without_an_order_nothing_is_held_back(run: Run) -> None:
    run.in_order = False
    run.write(*prompts(200))
    with run.front() as front:
        for request_id in range(199):
            front.next()
            run.say(front, request_id + 1, "a")
        assert [line["id"] for line in run.results()] == list(range(1, 200))
        assert not front.next().leave
        run.say(front, 0, "a")
        assert front.next().leave


def test_bad_lines_are_told_and_the_rest_goes_on(run: Run) -> None:
    run.write(
        "no",
        {"prompt": "x" * 128},
        {"prompt": "x", "max_tokens": 60},
        {"prompt": "x", "top_p": 0},
        {"prompt": ""},
        {"messages": [{"role": "user", "content": "x"}]},
        {"prompt": "good"},
    )
    with run.front(max_length=55) as front:
        (request,) = front.next().added
        assert request.prompt_ids == tuple(run.maker.tokenizer.encode("good"))
        run.say(front, request.request_id, "x")
        assert front.next().leave
        assert (front.folder.num_finished, front.folder.num_failed, front.num_lines) == (1, 6, 7)
        assert front.folder.first_failure == f"in.jsonl, line 1: {run.errors()[1]}"
    told = run.errors()
    assert list(told) == [1, 2, 3, 4, 5, 6]
    assert "it is not JSON" in told[1]
    assert "the prompt has 128 tokens, but max_model_len=128 leaves no room" in told[2]
    assert "may take 61 tokens, but the KV cache holds 55" in told[3]
    assert told[4] == "top_p=0.0 is not allowed; use more than 0, at most 1 (all tokens)"
    assert "the prompt is empty" in told[5]
    assert "has no chat template" in told[6]
    assert [line["index"] for line in run.results()] == [7]


def test_stop_strings_of_the_line_go_before_those_of_the_run(run: Run) -> None:
    run.write({"prompt": "a"}, {"prompt": "b", "stop": "X"}, {"prompt": "c", "stop": []})
    with run.front() as front:
        front.next()
        for request_id in range(3):
            run.say(front, request_id, "1 X 2 END"[: 3 if request_id == 1 else 9], ends=False)
        assert front.next().aborted == [0, 1]
        run.say(front, 2, ".")
    assert [(line["text"], line["finish_reason"]) for line in run.results()] == [
        *(("1 X 2 ", "stop"), ("1 ", "stop"), ("1 X 2 END.", "length"))
    ]


def test_a_later_run_does_what_is_left(run: Run) -> None:
    run.write(*prompts(3), "bad", {"id": 0, "prompt": "again"}, *prompts(5)[3:])
    with run.front() as front:
        front.next()
        run.say(front, 0, "a")
        run.say(front, 2, "held back")
    with run.front() as front:
        control = front.next()
        assert len(control.added) == IN_ENGINE
        for request in control.added:
            run.say(front, request.request_id, "z")
        assert front.next().leave
        assert front.counts.answers == 4
    assert [(line["id"], line["text"]) for line in run.results()] == [
        *((0, "a"), (1, "z"), (2, "z"), (3, "z"), (4, "z"))
    ]
    assert list(run.errors()) == [4, 5]


def test_many_finished_lines_are_passed_over_a_few_at_a_time(run: Run) -> None:
    """The other ranks wait between two steps, and must not think that rank 0 is lost."""
    run.write(*prompts(1000), {"prompt": "last"})
    (run.folder / "out").mkdir()
    with open_prompt_folder(run.folder / "out", {}, overwrite=False) as folder:
        for line in range(1, 1001):
            folder.write({"file": "in.jsonl", "index": line})
    with run.front() as front:
        idle = 0
        while (control := front.next()) == Control():
            idle += 1
        assert 2 <= idle <= 10
        assert len(control.added) == 1


def on_a_full_disk(run: Run, told: list[Control]) -> None:
    """A limit on the size of files ends a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with run.front() as front:
        front.next()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            run.say(front, 0, "a")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        told.append(front.next())


def test_a_disk_that_is_full_lets_the_others_leave_first(run: Run) -> None:
    run.write(*prompts(2))
    told: list[Control] = []
    with pytest.raises(PreflightError, match=r"results\.jsonl: File too large"):
        on_a_full_disk(run, told)
    assert told == [Control(leave=True)]
    assert run.results() == []


@pytest.mark.parametrize(
    ("lines", "num_blocks"),
    [
        ([{"prompt": "x", "max_tokens": 1}] * 9, 8),
        ([{"prompt": "x"}] * 9, 2 * 5),
        ([{"prompt": "x"}], 8),
        ([{"prompt": "x"}, {"prompt": "x", "max_tokens": 99}], 2 * 8),
        ([{"prompt": "x"}, {"prompt": "x" * 999}], 2 * 8),
    ],
    ids=["short", "by default", "one", "long completion", "long prompt"],
)
def test_blocks_are_wanted_for_the_longest_that_run_at_once(
    lines: list[dict[str, Any]], num_blocks: int, run: Run
) -> None:
    """At most 128 tokens, 8 blocks, of which there are enough for one in any case. By default a
    completion has 50 tokens, and the line of a prompt of one letter 16 bytes.
    """
    run.write(*lines)
    with run.front() as front:
        assert front.kv_blocks(16) == num_blocks
