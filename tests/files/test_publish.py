"""A published model is whole at every moment: data first, model last, and only the old model's own data goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.backends.files import atomic, onnx_file
from rewriter.backends.files.onnx_file import load_onnx, save_onnx
from rewriter.backends.files.publish import publish
from rewriter.errors import RewriteError
from tests.files.test_onnx_file import WEIGHT, model, weight_of


def emitted(folder: Path, weight: np.ndarray = WEIGHT, name: str = "m.onnx", data: bool = True) -> Path:
    """A model in a folder of its own, as the pipeline leaves it."""
    folder.mkdir(exist_ok=True)
    save_onnx(ir.from_proto(model(weight)), folder / name, external_above=0 if data else 1 << 30)
    assert (folder / f"{name}.data").exists() == data
    return folder / name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def final(tmp_path: Path) -> Path:
    (tmp_path / "final").mkdir()
    return tmp_path / "final"


@pytest.mark.parametrize("name", ["m.onnx", "m[1].onnx", "m*.onnx", "m?.onnx"])
@pytest.mark.parametrize("data", [True, False])
def test_a_model_takes_its_data_along(name: str, data: bool, tmp_path: Path, final: Path) -> None:
    source = emitted(tmp_path / "scratch", name=name, data=data)
    publish(source, final / name)
    assert names(final) == [name, *([f"{name}.data"] if data else [])]
    for path in source.parent.iterdir():
        path.unlink()
    assert np.array_equal(weight_of(load_onnx(final / name)), WEIGHT)


def test_data_of_a_name_that_a_pattern_would_match_stays_where_it_is(tmp_path: Path, final: Path) -> None:
    emitted(tmp_path / "scratch", name="m1.onnx")
    source = emitted(tmp_path / "scratch", WEIGHT + 1, name="m[1].onnx", data=False)
    publish(source, final / "m[1].onnx")
    assert names(final) == ["m[1].onnx"]
    assert (final / "m[1].onnx").read_bytes() == source.read_bytes()


def test_other_files_are_copied_as_they_are(tmp_path: Path, final: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"any")
    (final / "out.pt2").write_bytes(b"old")
    (final / "out.pt2.data").write_bytes(b"of somebody else")
    publish(tmp_path / "m.pt2", final / "out.pt2")
    assert (final / "out.pt2").read_bytes() == b"any"
    assert names(final) == ["out.pt2", "out.pt2.data"]


@pytest.mark.parametrize("data", [True, False])
def test_an_older_model_loses_its_own_data_and_no_other(data: bool, tmp_path: Path, final: Path) -> None:
    out = final / "m[3].onnx"
    publish(emitted(tmp_path / "old", name=out.name), out)
    others = ["m1.onnx.data", "m[3].onnx.bin", "m[3].onnx.7.data", "n.onnx.data"]
    for name in others:
        (final / name).write_bytes(b"of somebody else")
    publish(emitted(tmp_path / "new", WEIGHT + 1, out.name, data), out)
    assert names(final) == sorted([out.name, *others, *([f"{out.name}.2.data"] if data else [])])
    assert np.array_equal(weight_of(load_onnx(out)), WEIGHT + 1)


@pytest.mark.parametrize("data", [True, False])
def test_the_old_model_is_readable_until_the_new_one_takes_its_name(
    data: bool, tmp_path: Path, final: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash at the time of each rename would leave behind."""
    out = final / "m.onnx"
    publish(emitted(tmp_path / "old"), out)
    source = emitted(tmp_path / "new", WEIGHT + 1, data=data)
    renamed, real = [], atomic.publish

    def watched(scratch: Path, target: Path) -> None:
        assert np.array_equal(weight_of(load_onnx(out)), WEIGHT)
        assert (final / "m.onnx.data").exists()
        real(scratch, target)
        renamed.append(target.name)
        assert np.array_equal(weight_of(load_onnx(out)), WEIGHT + (target == out))
        assert (final / "m.onnx.data").exists()

    monkeypatch.setattr(atomic, "publish", watched)
    monkeypatch.setattr(onnx_file, "publish", watched)
    publish(source, out)
    assert renamed == (["m.onnx.2.data", "m.onnx"] if data else ["m.onnx"])
    assert not (final / "m.onnx.data").exists()


@pytest.mark.parametrize("data", [True, False])
def test_a_full_disk_leaves_the_old_pair(data: bool, tmp_path: Path, final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = final / "m.onnx"
    publish(emitted(tmp_path / "old"), out)
    source = emitted(tmp_path / "new", WEIGHT + 1, data=data)
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    real = atomic.publish

    def full(scratch: Path, target: Path) -> None:
        if target == out:
            raise OSError(28, "No space left on device")
        real(scratch, target)

    monkeypatch.setattr(atomic, "publish", full)
    monkeypatch.setattr(onnx_file, "publish", full)
    with pytest.raises(RewriteError, match="No space left"):
        publish(source, out)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
