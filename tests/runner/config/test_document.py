"""Reading YAML: the strict dialect, the place of everything, and files that cannot be read."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallel.errors import ConfigError
from runner.config.dialect import MAX_DEPTH
from runner.config.document import MAX_BYTES, parse, read
from runner.config.problems import Place


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("0", 0),
        ("0.5", 0.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        ("yes", "yes"),
        ("off", "off"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        (".inf", ".inf"),
        ("[1, [a], {b: null}]", [1, ["a"], {"b": None}]),
        ("9" * 19, int("9" * 19)),
        ("9" * 5000, float("inf")),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read_value = parse(text, "x").data
    assert read_value == value
    assert type(read_value) is type(value)


def test_every_key_and_value_has_its_place() -> None:
    document = parse("a: 1\nb:\n  c: [x, yy]\n  é: {d: 2}\n", "plan.yaml")
    assert document.keys == {
        ("a",): Place("plan.yaml", 1, 1),
        ("b",): Place("plan.yaml", 2, 1),
        ("b", "c"): Place("plan.yaml", 3, 3),
        ("b", "é"): Place("plan.yaml", 4, 3),
        ("b", "é", "d"): Place("plan.yaml", 4, 7),
    }
    assert document.values[("a",)] == Place("plan.yaml", 1, 4)
    assert document.values[("b", "c", 1)] == Place("plan.yaml", 3, 10)
    assert document.values[("b", "é", "d")] == Place("plan.yaml", 4, 10)


def test_a_key_given_twice_is_a_problem_and_the_first_one_stays() -> None:
    document = parse("a: 1\nb: {c: 1, c: 2}\na: 3\n", "plan.yaml")
    assert document.data == {"a": 1, "b": {"c": 1}}
    assert list(map(str, document.problems)) == [
        "plan.yaml:2:11: b.c: given before, in line 2; keep one",
        "plan.yaml:3:1: a: given before, in line 1; keep one",
    ]


@pytest.mark.parametrize("key", ["1", "null", "true", "? [a, b]\n", "? {a: 1}\n", "1.5"])
def test_a_key_must_be_text(key: str) -> None:
    document = parse(f"{key}: 2", "plan.yaml")
    assert document.data == {}
    assert [p.message for p in document.problems] == ["a key must be text; put it in quotes"]


BILLION_LAUGHS = "a: &a [x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION_LAUGHS, "plan.yaml:2:8: the alias *a is not read; write the value out"),
        ("a: &x 1\nb: *x\n", "plan.yaml:2:4: the alias *x is not read; write the value out"),
        ("a: &x {b: *x}\n", "plan.yaml:1:11: the alias *x is not read; write the value out"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "plan.yaml:2:9: the alias *x is not read"),
        (
            "a: !!python/object/apply:os.system [id]\n",
            "plan.yaml:1:4: the tag tag:yaml.org,2002:python/object/apply:os.system is not read",
        ),
        ("a: !!int '3'\n", "plan.yaml:1:4: the tag tag:yaml.org,2002:int is not read; remove it"),
        ("a: !secret b\n", "plan.yaml:1:4: the tag !secret is not read; remove it"),
        ("[" * 5000, f"plan.yaml:1:{MAX_DEPTH + 1}: nested deeper than {MAX_DEPTH} levels"),
        ("a:\n\tb: 1\n", "plan.yaml:2:1: bad YAML: a tab; indent with spaces"),
        ("a: b: c\n", "plan.yaml:1:5: bad YAML: mapping values are not allowed here"),
        ("a: [1, 2\n", "plan.yaml:2:1: bad YAML: expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", "plan.yaml:2:1: bad YAML: but found another document"),
        ("a: 1\nb: \x00\n", r"plan.yaml:2:4: the character '\x00' is not allowed in YAML"),
        ("a: [b.{0..3}]\n", "; put quotes around a pattern that holds braces"),
        ("- a\n", "plan.yaml:1:1: the file must be a mapping of keys"),
        ("text\n", "plan.yaml:1:1: the file must be a mapping of keys"),
        ("", "plan.yaml: empty; it needs at least version and model.path"),
        ("# only a comment\n", "plan.yaml: empty; it needs at least version and model.path"),
        ("a: 1\n" + "#" * MAX_BYTES, f"plan.yaml: longer than {MAX_BYTES} bytes"),
    ],
)
def test_refused_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read(Path("plan.yaml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"version: 1\nmodel: {path: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"plan.yaml: not UTF-8 \(byte 0xe9 in line 2\)"):
        read(path)
    path.write_bytes("version: 1\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"not UTF-8 \(byte 0xff in line 1\)"):
        read(path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\r\nmodel:\r\n  path: x\r\n")
    document = read(path)
    assert document.data == {"version": 1, "model": {"path": "x"}}
    assert document.keys[("version",)][1:] == (1, 1)
    assert document.values[("version",)][1:] == (1, 10)
    assert document.values[("model", "path")][1:] == (3, 9)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        read(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a directory; give a YAML file"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: "):
        read(tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match=r"cannot be read: .*null byte"):
        read(Path("a\0b"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("version: 1\n", encoding="utf-8")
    path.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        read(path)


def test_parse_leaves_syntax_errors_to_its_caller() -> None:
    with pytest.raises(yaml.YAMLError):
        parse("[", "--set")
