"""Tokens become text, and stop strings end a request, however the tokens cut the text up."""

from collections.abc import Sequence as Seq

import pytest
import tokenizers
from checkpoints import add_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.engine.completion import BatchFront, Completion
from runner.engine.control import Control
from runner.engine.request import Request
from runner.engine.scheduler import Output
from runner.engine.sequence import FinishReason
from runner.text.tokenizer import Tokenizer

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for every byte, and one for a few words."""
    folder = add_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["hello END world"])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


class Job:
    """A front and what its display has seen; tokens are given by hand."""

    def __init__(self, tokenizer: Tokenizer, prompts: Seq[str], *stops: str, **sizes: int) -> None:
        self.tokenizer = tokenizer
        prompt_ids = [tuple(tokenizer.encode(prompt)) for prompt in prompts]
        self.completions = [
            Completion(prompt, Request(10 + i, ids, sizes.get("max_tokens", 1000)))
            for i, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
        ]
        self.seen: list[list[str]] = []
        self.front = BatchFront(
            self.completions,
            tokenizer,
            stops=stops,
            max_num_seqs=sizes.get("max_num_seqs", 8),
            on_progress=lambda: self.seen.append([c.text for c in self.completions]),
        )

    def take(self, *tokens: int, reason: FinishReason | None = None, of: int = 0) -> None:
        """Tokens of one request, one a step, until it is done; `reason` comes with the last."""
        for place, token_id in enumerate(tokens):
            if self.completions[of].finish_reason is None:
                last = place == len(tokens) - 1
                self.front.take([Output(10 + of, token_id, reason if last else None)])

    def say(self, text: str, *, reason: FinishReason | None = None, of: int = 0) -> None:
        """A token for every byte of `text`."""
        self.take(*self.tokenizer.encode(text), reason=reason, of=of)


def test_all_requests_go_first_and_the_last_to_end_ends_the_job(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a", "b"])
    assert job.front.next() == Control([c.request for c in job.completions])
    assert job.front.next() == Control()
    job.say("x", reason="length")
    assert job.front.next() == Control()
    job.say("y", reason="length", of=1)
    assert job.front.next() == Control(leave=True)
    assert [c.text for c in job.completions] == ["x", "y"]


def test_steps_of_several_requests_are_kept_apart(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a", "b", "c"])
    x, y = tokenizer.encode("xy")
    job.front.take([Output(12, y, None), Output(10, x, None)])
    job.front.take([Output(11, x, "length"), Output(12, x, "stop")])
    assert [c.text for c in job.completions] == ["x", "x", "yx"]
    assert [c.finish_reason for c in job.completions] == [None, "length", "stop"]
    assert [c.token_ids for c in job.completions] == [[x], [x], [y, x]]


def test_a_stop_string_over_several_tokens_ends_and_aborts(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a"], "END", "\n\n")
    job.front.next()
    job.say("one ENvy, two EN")
    assert job.completions[0].text == "one ENvy, two "
    job.say("D and more")
    (completion,) = job.completions
    assert (completion.text, completion.finish_reason) == ("one ENvy, two ", "stop")
    assert tokenizer.decode(completion.token_ids) == "one ENvy, two END"
    assert job.front.next() == Control(aborted=[10], leave=True)


def test_a_stop_string_within_a_token_cuts_it(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a"], "END")
    job.take(*tokenizer.encode("hello END world"))
    assert len(job.completions[0].token_ids) == 1
    assert (job.completions[0].text, job.completions[0].finish_reason) == ("hello ", "stop")


def test_a_request_that_ended_by_itself_is_not_aborted(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a", "b"], "END")
    job.front.next()
    job.say("x END", reason="length")
    assert (job.completions[0].text, job.completions[0].finish_reason) == ("x ", "stop")
    assert job.front.next() == Control()


def test_text_held_back_is_shown_where_nothing_came_of_it(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a"], "END")
    job.say("x EN", reason="length")
    assert (job.completions[0].text, job.completions[0].finish_reason) == ("x EN", "length")


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a"])
    ids = [1, *tokenizer.encode("x"), 0, *tokenizer.encode("y"), EOS]
    job.take(*ids, reason="stop")
    (completion,) = job.completions
    assert (completion.text, completion.finish_reason) == ("xy", "stop")
    assert completion.token_ids == ids


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a"])
    job.say("né 🙂日", reason="length")
    assert list(dict.fromkeys(texts[0] for texts in job.seen)) == [
        *("n", "né", "né ", "né 🙂", "né 🙂日")
    ]


def test_half_a_character_at_the_end_is_shown_as_one(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a"])
    job.take(*tokenizer.encode("x🙂")[:3], reason="length")
    assert job.completions[0].text == "x\N{REPLACEMENT CHARACTER}"


def test_a_character_that_the_prompt_began(tokenizer: Tokenizer) -> None:
    job = Job(tokenizer, ["a"])
    first, second = tokenizer.encode("é")
    completion = Completion("?", Request(0, (first,), 5))
    front = BatchFront(
        [completion], tokenizer, stops=[], max_num_seqs=1, on_progress=job.seen.clear
    )
    front.take([Output(0, second, None)])
    assert completion.text == "é"


def test_the_display_is_told_of_every_step_with_the_text_that_is_certain(
    tokenizer: Tokenizer,
) -> None:
    job = Job(tokenizer, ["a"], "END")
    job.say("é")
    assert job.seen == [[""], ["é"]]
    job.say("EN")
    assert job.seen[2:] == [["é"], ["é"]]
    job.take(EOS, reason="stop")
    assert job.seen[4:] == [["éEN"]]


@settings(deadline=None)
@given(
    text=st.text(alphabet="abé🙂", max_size=20),
    stops=st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=3), max_size=3),
)
def test_any_text_and_any_stop_strings(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    job = Job(tokenizer, ["a"], *stops)
    job.say(text + "a", reason="length")
    (completion,) = job.completions
    ends = [(text + "a").find(stop) for stop in stops if stop in text + "a"]
    assert completion.finish_reason == ("stop" if ends else "length")
    assert (text + "a").startswith(completion.text)
    assert not any(stop in completion.text for stop in stops)
    assert ends or completion.text == text + "a"
    for texts in job.seen:
        assert completion.text.startswith(texts[0])


def test_blocks_are_wanted_for_the_longest_that_run_at_once(tokenizer: Tokenizer) -> None:
    """Prompt and completion take 11, 19 and 12 tokens: 3, 5 and 3 blocks of 4."""
    prompts = ["a", "a" * 9, "aa"]
    for max_num_seqs, num_blocks in ((1, 5), (2, 8), (3, 11), (9, 11)):
        job = Job(tokenizer, prompts, max_tokens=10, max_num_seqs=max_num_seqs)
        assert job.front.kv_blocks(4) == num_blocks
