"""What the import of a SavedModel refuses; the conversion itself needs TensorFlow installed."""

import pytest

from parallel.errors import ConfigError, IntegrityError, PreflightError
from runner.importer.saved_model import import_saved_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "model"
    made.mkdir()
    (made / "saved_model.pb").touch()
    return made


def test_a_folder_that_is_no_saved_model_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match=r"holds no saved_model\.pb"):
        import_saved_model(tmp_path, tmp_path / "m.onnx")


def test_a_file_that_exists_is_kept(folder, tmp_path):
    out = tmp_path / "m.onnx"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"give a new \.onnx file"):
        import_saved_model(folder, out)
    assert out.read_text() == "mine"


def test_tensorflow_that_cannot_be_installed_is_a_matter_of_the_host(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", "/bin/false")
    with pytest.raises(PreflightError, match=r"tensorflow-cpu==.* could not be installed"):
        import_saved_model(folder, tmp_path / "m.onnx")


def test_a_converter_that_fails_leaves_no_file(folder, tmp_path):
    venv = tmp_path / "cache" / "shardline" / "tf2onnx"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/bin/false")
    script = import_saved_model.__globals__["_SCRIPT"].read_text()
    packages = script.split("packages=(")[1].split(")")[0].replace('"', "")
    (venv / "installed").write_text(packages + "\n")
    with pytest.raises(ConfigError, match="tf2onnx cannot convert it"):
        import_saved_model(folder, tmp_path / "m.onnx")
    assert not list(tmp_path.glob("*onnx*"))
