"""Data files: arrays without pickles, text without bytes that are no text."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewriter.backends.files.samples import load_lines, load_npz
from rewriter.errors import RewriteError
from tests.files.payloads import Payload


def refused(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        load_npz(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(save: Any, tmp_path: Path) -> None:
    arrays = {"ids": np.arange(12).reshape(4, 3), "mask": np.ones((4, 3), np.float16), "a/b": np.zeros((4, 0))}
    save(tmp_path / "d.npz", **arrays)
    loaded = load_npz(tmp_path / "d.npz")
    assert loaded.keys() == arrays.keys()
    assert all(loaded[name].dtype == arrays[name].dtype and np.array_equal(loaded[name], arrays[name]) for name in arrays)


def test_pickles_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    np.savez(tmp_path / "d.npz", x=np.array([Payload(marker)], dtype=object))
    refused(tmp_path / "d.npz", "Python objects")
    assert not marker.exists()


def test_lengths_must_agree(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((3, 2)), y=np.ones((4, 2)))
    refused(tmp_path / "d.npz", "must agree")


def test_an_array_without_axes_is_the_same_for_all_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((3, 2)), scale=np.float32(3))
    assert {name: array.shape for name, array in load_npz(tmp_path / "d.npz").items()} == {"x": (3, 2), "scale": ()}


def _npz(path: Path, header: bytes, body: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header + body)
    return path


def _header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_sizes_are_judged_before_reading(tmp_path: Path) -> None:
    refused(_npz(tmp_path / "a.npz", _header((1 << 40,)), b"\0" * 64), "declares")
    refused(_npz(tmp_path / "b.npz", _header((4,)), b"\0" * 8), "declares")
    refused(_npz(tmp_path / "c.npz", b"nothing", b""), "damaged array")
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros(100_000))
    refused(tmp_path / "d.npz", "keep fewer samples", max_nbytes=1000)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.ones(100))
    content = path.read_bytes()
    path.write_bytes(content[:300])
    refused(path, "truncated or damaged")
    path.write_bytes(content[:200] + b"\1" + content[201:])
    refused(path, "damaged")
    refused(tmp_path / "none.npz", "no such file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    refused(path, "not an .npz")


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes("\ufeffone\n\n  zwei ü \r\n\t\nthree".encode())
    assert load_lines(path) == ["one", "zwei ü", "three"]


@pytest.mark.parametrize(("content", "match"), [(b"a\x00b", "binary"), (b"\xff\xfe", "UTF-8"), (b" \n\n", "no text")])
def test_what_is_no_text_is_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(content)
    with pytest.raises(RewriteError, match=match):
        load_lines(tmp_path / "d.txt")
    with pytest.raises(RewriteError, match="cannot be read"):
        load_lines(tmp_path / "none.txt")
