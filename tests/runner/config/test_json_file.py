import pytest

from parallel.errors import IntegrityError
from runner.config.json_file import read_json_object


def test_an_absent_file_is_an_error_unless_optional(tmp_path):
    path = tmp_path / "config.json"
    assert read_json_object(path, optional=True) == {}
    with pytest.raises(IntegrityError, match=r"cannot read .*config\.json: No such file"):
        read_json_object(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1, 2]", "holds a JSON list; it must be an object"),
        (b'{"a": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_corrupt_file_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"config\.json {reason}"):
        read_json_object(path, optional=True)


def test_a_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(IntegrityError, match="Is a directory"):
        read_json_object(tmp_path, optional=True)
