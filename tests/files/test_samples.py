"""Data files: arrays without pickles, text without bytes that are no text."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewriter.backends.files import samples
from rewriter.backends.files.samples import Array, load_lines, load_npz
from rewriter.errors import RewriteError
from tests.files.payloads import Payload

WIDER = [kind for kind in (np.longdouble, np.clongdouble) if np.dtype(kind) not in (np.float64, np.complex128)]  # none on some machines


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


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.array(["a", "bc"]), "x.npy holds str64; only bool, int8, .*float64"),
        (np.array([b"a"]), "holds bytes8"),
        (np.array(["2020-01-01"], "M8[D]"), r"holds datetime64\[D\]"),
        (np.array([3], "m8[s]"), r"holds timedelta64\[s\]"),
        (np.zeros(2, [("a", "f4"), ("b", "i8")]), "holds records of 2 fields"),
        (np.zeros(2, "V2"), "holds void16"),
        *[(np.zeros(2, kind), f"holds {np.dtype(kind).name}") for kind in WIDER],
    ],
)
def test_arrays_that_hold_no_plain_numbers_are_refused(array: Array, match: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=array)
    refused(tmp_path / "d.npz", match)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "i8", "u4", "c8"])
def test_either_byte_order_is_read(dtype: str, tmp_path: Path) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    np.savez(tmp_path / "d.npz", big=array.astype(">" + dtype), little=array.astype("<" + dtype))
    for loaded in load_npz(tmp_path / "d.npz").values():
        assert loaded.dtype == array.dtype
        assert loaded.dtype.isnative
        assert torch.as_tensor(loaded).tolist() == array.tolist()


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    refused(_npz(tmp_path / "a.npz", _header((-2, -2)), b"\0" * 16), "declares")


def test_a_header_may_not_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_array", None)  # refused before anything is read
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }" + b" " * 20_000
    header = b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text
    refused(_npz(tmp_path / "a.npz", header, b"\0" * 8), "damaged array")


def test_the_reader_itself_takes_no_pickle_and_no_long_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second lock: were the header's check wrong, numpy would still refuse."""
    marker = tmp_path / "ran"
    np.savez(tmp_path / "d.npz", x=np.array([Payload(marker)], dtype=object))
    monkeypatch.setattr(samples, "_check_header", lambda archive, name: None)
    refused(tmp_path / "d.npz", "damaged array")
    assert not marker.exists()
    monkeypatch.setattr(samples, "_MAX_HEADER_NBYTES", 10)
    np.savez(tmp_path / "e.npz", x=np.ones(2))
    refused(tmp_path / "e.npz", "damaged array")
