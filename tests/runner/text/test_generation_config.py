import json

import pytest

from parallel.errors import IntegrityError
from runner.text.generation_config import GenerationDefaults


def folder(tmp_path, *, generation=None, config=None):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_no_files_mean_greedy_and_no_stop_token(tmp_path):
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(
        stop_token_ids=frozenset(),
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
    )


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, None, {2}),
        (None, {"eos_token_id": 0}, {0}),
        ({"eos_token_id": [128001, 128009]}, {"eos_token_id": 128001}, {128001, 128009}),
        ({"eos_token_id": [1]}, {"eos_token_id": [2, 3]}, {1, 2, 3}),
        ({"eos_token_id": None}, {"eos_token_id": None}, set()),
    ],
)
def test_stop_tokens_are_those_of_both_files(tmp_path, generation, config, expected):
    defaults = GenerationDefaults.load(folder(tmp_path, generation=generation, config=config))
    assert defaults.stop_token_ids == expected


def test_sampling_values_count_where_do_sample_is_true(tmp_path):
    values = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    defaults = GenerationDefaults.load(folder(tmp_path, generation=values))
    assert defaults == GenerationDefaults(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1
    )


def test_sampling_without_values_is_unfiltered_at_temperature_1(tmp_path):
    defaults = GenerationDefaults.load(folder(tmp_path, generation={"do_sample": True}))
    assert defaults == GenerationDefaults(temperature=1.0)
    assert defaults.top_k == 0


@pytest.mark.parametrize("flag", [{}, {"do_sample": False}, {"do_sample": None}])
def test_without_do_sample_it_is_greedy_with_the_penalty_kept(tmp_path, flag):
    values = {"temperature": 0.6, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.05, **flag}
    defaults = GenerationDefaults.load(folder(tmp_path, generation=values))
    assert defaults == GenerationDefaults(temperature=0.0, repetition_penalty=1.05)


def test_top_k_of_minus_one_keeps_all(tmp_path):
    values = {"do_sample": True, "top_k": -1}
    assert GenerationDefaults.load(folder(tmp_path, generation=values)).top_k == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_k", -2),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, True]),
        ("eos_token_id", -1),
    ],
)
def test_a_value_out_of_range_names_file_key_and_value(tmp_path, key, value):
    path = folder(tmp_path, generation={"do_sample": True, key: value})
    with pytest.raises(IntegrityError, match=rf"generation_config\.json: {key}="):
        GenerationDefaults.load(path)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_corrupt_json_names_the_file(tmp_path, name):
    (tmp_path / name).write_text('{"eos_token_id": ')
    with pytest.raises(IntegrityError, match=rf"{name} is not valid JSON"):
        GenerationDefaults.load(tmp_path)
