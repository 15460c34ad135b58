"""Sampling agrees with transformers' processors, and depends on nothing but seed and place."""

import itertools
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runner.engine import sampler
from runner.engine.request import Request, SamplingParams
from runner.engine.sampler import choose_greedily, uniform
from runner.engine.sequence import NOT_FINITE, Sequence

NUM_DRAWS = 4000
PROMPT = (3, 5, 5, 1)
LOGITS = torch.tensor([1.3, -0.4, 2.2, 2.9, 0.1, 1.9, -1.5, 0.8, 2.5, -0.2, 1.0, 0.4])

PARAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 4},
    "top-k-1": {"top_k": 1},
    "top-k-beyond-vocabulary": {"top_k": 50},
    "top-p": {"top_p": 0.7},
    "tiny-top-p": {"top_p": 0.01},
    "min-p": {"min_p": 0.15},
    "min-p-1": {"min_p": 1.0},
    "penalty": {"repetition_penalty": 1.8},
    "reward": {"repetition_penalty": 0.7},
    "temperature-before-top-p": {"temperature": 2.0, "top_p": 0.7},
    "temperature-before-min-p": {"temperature": 0.5, "min_p": 0.15},
    "top-k-before-top-p": {"top_k": 5, "top_p": 0.8},
    "top-p-before-min-p": {"temperature": 1.5, "top_p": 0.9, "min_p": 0.3},
    "penalty-before-all": {"repetition_penalty": 2.0, "top_k": 4, "top_p": 0.9},
    "all": {
        "temperature": 1.7,
        "top_k": 9,
        "top_p": 0.95,
        "min_p": 0.12,
        "repetition_penalty": 1.2,
    },
}

WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    last_ids = torch.tensor([sequence.request.prompt_ids[-1] for sequence in sequences])
    return sampler.sample(logits, choose_greedily(logits), last_ids, sequences)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_marked(value: float) -> None:
    logits = torch.arange(12.0).view(3, 4)
    logits[1, 2] = value
    assert choose_greedily(logits).tolist() == [3, NOT_FINITE, 3]
    mixed = [sequence(temperature=0.0), sequence(temperature=1.0), sequence(temperature=0.0)]
    assert sample(logits, mixed).tolist() == [3, NOT_FINITE, 3]


def sequence(seed: int = 0, *, ids: tuple[int, ...] = PROMPT, **values: Any) -> Sequence:
    sampling = SamplingParams(**{"temperature": 1.0, "seed": seed} | values)
    return Sequence(Request(seed, ids, 1, sampling), list(ids), num_computed=len(ids))


def reference(logits: torch.Tensor, ids: tuple[int, ...], values: dict[str, Any]) -> torch.Tensor:
    """The distribution that `generate` of transformers draws from."""
    penalty = values.get("repetition_penalty", 1.0)
    processors: Any = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors.append(TemperatureLogitsWarper(values.get("temperature", 1.0)))
    for name, warper in WARPERS.items():
        if name in values:
            processors.append(warper(values[name]))
    scores: torch.Tensor = processors(torch.tensor([ids]), logits[None].clone())
    return scores[0].softmax(-1)


@pytest.mark.parametrize("values", PARAMS.values(), ids=PARAMS)
def test_distribution_is_that_of_transformers(values: dict[str, Any]) -> None:
    expected = reference(LOGITS, PROMPT, values)
    sequences = [sequence(seed, **values) for seed in range(NUM_DRAWS)]
    drawn = sample(LOGITS.expand(NUM_DRAWS, -1), sequences)
    counts = torch.bincount(drawn, minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0
    assert (counts[expected > 0.005] > 0).all()
    spread = (expected * (1 - expected) / NUM_DRAWS).sqrt()
    assert ((counts / NUM_DRAWS - expected).abs() <= 4 * spread + 1e-9).all()


def test_allowed_tokens_of_many_logits() -> None:
    """For one row of random logits and parameters after another: no token more, none less."""
    generator = torch.Generator().manual_seed(5)
    for trial in range(20):
        logits = torch.randn(40, generator=generator) * 2
        top_k, top_p, min_p, temperature = torch.rand(4, generator=generator).tolist()
        values: dict[str, Any] = {
            "temperature": 0.5 + temperature,
            "top_k": 1 + int(12 * top_k),
            "top_p": 0.3 + 0.7 * top_p,
            "min_p": 0.15 + 0.2 * min_p,
            "repetition_penalty": 1.3,
        }
        ids = tuple(torch.randint(40, (6,), generator=generator).tolist())
        expected = reference(logits, ids, values)
        sequences = [sequence(1000 * trial + i, ids=ids, **values) for i in range(800)]
        drawn = set(sample(logits.expand(800, -1), sequences).tolist())
        # At most 12 tokens are left, and each has 15 % of the likeliest one's probability.
        assert drawn == set(expected.nonzero().flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_likeliest_and_obeys_the_penalty(dtype: torch.dtype) -> None:
    logits = torch.stack([LOGITS, -LOGITS, LOGITS, LOGITS, LOGITS - 5]).to(dtype)
    greedy: dict[str, Any] = {"temperature": 0.0, "top_k": 3, "top_p": 0.1, "min_p": 0.9}
    sequences = [
        sequence(**greedy),
        sequence(**greedy),
        sequence(**greedy, repetition_penalty=1.5),
        sequence(**greedy, ids=(3, 8), repetition_penalty=1.5),
        sequence(**greedy, ids=(3, 8), repetition_penalty=1.5),  # logits below 0 are multiplied
    ]
    assert sample(logits, sequences).tolist() == [3, 6, 8, 2, 2]


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 4.0, 4.0]])
    assert sample(logits, [sequence(temperature=0.0)]).tolist() == [1]
    for top_k, allowed in ((1, {1}), (2, {1, 3})):
        sequences = [sequence(seed, top_k=top_k) for seed in range(60)]
        assert set(sample(logits.expand(60, -1), sequences).tolist()) == allowed


def test_a_stage_may_not_have_its_logits_changed() -> None:
    """They come out of inference mode, where writing to them is an error."""
    with torch.inference_mode():
        logits = LOGITS.expand(2, -1).clone()
    penalized = [sequence(i, repetition_penalty=1.5) for i in range(2)]
    sample(logits, penalized)
    assert torch.equal(logits, LOGITS.expand(2, -1))


def test_a_token_does_not_depend_on_its_row_or_the_other_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(30, 50, generator=generator) * 3
    kinds: list[dict[str, Any]] = [
        *PARAMS.values(),
        *({"temperature": 0.0, "repetition_penalty": p} for p in (1.0, 1.4)),
    ]
    sequences = [sequence(7, ids=tuple(range(i + 1)), **kinds[i % len(kinds)]) for i in range(30)]
    together = sample(logits, sequences).tolist()
    alone = [sample(logits[i : i + 1], sequences[i : i + 1]).item() for i in range(30)]
    assert together == alone
    turned = sample(logits.flip(0), sequences[::-1]).flip(0).tolist()
    assert together == turned


def test_every_position_and_seed_has_a_number_of_its_own() -> None:
    by_position = [uniform(11, position) for position in range(2000)]
    by_seed = [uniform(seed, 11) for seed in range(2000)]
    for numbers in (by_position, by_seed):
        assert len(set(numbers)) == 2000
        assert all(0 <= number < 1 for number in numbers)
        mean = sum(numbers) / 2000
        assert abs(mean - 0.5) < 4 / (12 * 2000) ** 0.5
        neighbours = sum(a * b for a, b in itertools.pairwise(numbers)) / 1999
        assert abs(neighbours - mean**2) < 0.01
    assert uniform(11, 5) == by_position[5]
    assert uniform(2**64 - 1, 5) != uniform(2**63 - 1, 5)


def test_the_same_logits_at_another_place_are_drawn_anew() -> None:
    logits = torch.zeros(1, 1000)
    places = [sample(logits, [sequence(3, ids=(0,) * n)]).item() for n in range(1, 40)]
    assert len(set(places)) > 30


def test_a_token_that_the_host_has_not_read_counts_as_the_others_do() -> None:
    values = {"repetition_penalty": 3.0, "top_k": 3}
    logits = torch.stack([LOGITS] * 40)
    known = [sequence(seed, ids=(1, 3, 8), **values) for seed in range(40)]
    ahead = [sequence(seed, ids=(1, 3), **values) for seed in range(40)]
    for one in ahead:
        one.num_unread, one.num_computed = 2, 3
    drawn = sampler.sample(logits, choose_greedily(logits), torch.full((40,), 8), ahead)
    assert drawn.tolist() == sample(logits, known).tolist()
    assert len(set(drawn.tolist())) == 3
