"""Requests are checked against the model; what nobody asks for, the model's folder decides."""

import json
from pathlib import Path

import pytest
from checkpoints import add_tokenizer, make_checkpoint

from parallel.errors import ConfigError, IntegrityError
from runner.config.load import load
from runner.engine.request import Request, SamplingParams
from runner.engine.request_maker import RequestMaker, make_request
from runner.planning import DecoderJob
from runner.text.generation_options import GenerationOptions

EOS = 2


def request_for(prompt_ids: list[int], max_tokens: int = 1) -> Request:
    return make_request(
        7,
        prompt_ids,
        vocab_size=50,
        max_model_len=10,
        max_tokens=max_tokens,
        sampling=SamplingParams(seed=3),
        stop_token_ids=frozenset({EOS}),
    )


def test_a_request_is_what_was_asked() -> None:
    assert request_for([5, 6], 3) == Request(7, (5, 6), 3, SamplingParams(seed=3), frozenset({EOS}))


@pytest.mark.parametrize(("max_tokens", "expected"), [(100, (7, 1)), (3, (3, 1)), (1, (1, 1))])
def test_completions_end_at_the_models_length(max_tokens: int, expected: tuple[int, int]) -> None:
    requests = [request_for([1] * length, max_tokens) for length in (3, 9)]
    assert tuple(request.max_tokens for request in requests) == expected


def test_prompts_without_room_or_without_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompt has 10 tokens, but max_model_len=10 leaves no"):
        request_for([1] * 10)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        request_for([])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(IntegrityError, match="token id 50, but the model knows 50 ids"):
        request_for([1, 50])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maker") / "model"
    make_checkpoint("llama", folder, vocab_size=259)
    values = {"do_sample": True, "temperature": 0.5, "top_k": 9, "max_new_tokens": 11}
    (folder / "generation_config.json").write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def maker(folder: Path) -> RequestMaker:
    return RequestMaker(DecoderJob.prepare(load(None, overrides=[f"model.path={folder}"]).config))


def test_a_prompts_options_then_the_flags_then_the_folder(maker: RequestMaker) -> None:
    flags = GenerationOptions(temperature=2.0, seed=1, stop=("a",))
    options = GenerationOptions(seed=0, max_tokens=3).over(flags)
    assert options.stop == ("a",)
    request = maker.make(0, [5], options)
    assert request.sampling == SamplingParams(temperature=2.0, top_k=9, seed=0)
    assert request.max_tokens == 3
    assert maker.make(0, [5], flags).max_tokens == 11


@pytest.mark.parametrize(
    ("line", "flag", "ends"), [(None, None, True), (None, True, False), (False, True, True)]
)
def test_tokens_that_end_a_text_can_be_ignored(
    maker: RequestMaker, line: bool | None, flag: bool | None, ends: bool
) -> None:
    options = GenerationOptions(ignore_eos=line).over(GenerationOptions(ignore_eos=flag))
    assert bool(maker.make(0, [5], options).stop_token_ids) == ends


def test_without_a_seed_each_request_has_its_own(maker: RequestMaker) -> None:
    seeds = {maker.make(0, [5], GenerationOptions()).sampling.seed for _ in range(3)}
    assert len(seeds) == 3


def test_a_chat_is_written_out_by_the_template(maker: RequestMaker) -> None:
    assert maker.encode([{"role": "user", "content": "Hi"}]) == [1, *maker.encode("Hi")]
