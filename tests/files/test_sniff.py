"""Content decides what a file is; the suffix is wrong on purpose, and what is damaged is said in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from rewriter.backends.files import sniff
from rewriter.backends.files.sniff import Kind, read_safetensors_header, recognise
from rewriter.errors import RewriteError
from tests.files.payloads import rebuild


def write(kind: Kind, folder: Path) -> Path:
    """A file of `kind` under a name that says nothing."""
    path = folder / "thing.bin"
    match kind:
        case Kind.PT2:
            rebuild(path)
        case Kind.ONNX:
            weight = helper.make_tensor("w", TensorProto.FLOAT, [400], np.zeros(400))
            node = helper.make_node("Add", ["x", "w"], ["y"])
            ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [400]) for name in ("x", "y")]
            onnx.save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weight])), path)
        case Kind.TORCH_ZIP:
            torch.save({"w": torch.ones(300)}, path)
        case Kind.TORCHSCRIPT:
            torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))
        case Kind.LEGACY_PICKLE:
            torch.save({"w": torch.ones(300)}, path, _use_new_zipfile_serialization=False)
        case Kind.SAFETENSORS:
            save_file({"w": torch.ones(300)}, path)
        case Kind.FOLDER:
            path.mkdir()
            (path / "config.json").write_text("{}")
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        recognise(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_is_recognised(kind: Kind, tmp_path: Path) -> None:
    assert recognise(write(kind, tmp_path)) is kind


@pytest.mark.parametrize("kind", [Kind.PT2, Kind.ONNX, Kind.TORCH_ZIP, Kind.TORCHSCRIPT, Kind.SAFETENSORS])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_files_are_refused(kind: Kind, keep: float, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(path, "truncated")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"hello, this is text\n", "neither"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x08\x0a", "neither"),
        (b"\x08", "neither"),
        (b"\xff" * 64, "neither"),
        ((1 << 40).to_bytes(8, "little") + b"{", "neither"),
        ((200).to_bytes(8, "little") + b"{}", "truncated safetensors"),
        ((2).to_bytes(8, "little") + b"{]", "not JSON"),
        ((10).to_bytes(8, "little") + b'{"a": [1]}', "names no tensors"),
    ],
)
def test_what_is_no_model_is_refused(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, match)


def test_paths_that_are_no_model_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.pt2", "no such file")
    refused(tmp_path, "without config.json")
    np.savez(tmp_path / "data.npz", x=np.ones(2))
    refused(tmp_path / "data.npz", "--data")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a/b.txt", "x")
    refused(tmp_path / "other.zip", "holds no model")


def test_members_are_not_read_to_recognise_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(Kind.TORCH_ZIP, tmp_path)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    assert recognise(path) is Kind.TORCH_ZIP


def test_huge_onnx_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    size = 5 << 30
    length, varint = size, b""
    while length >= 128:
        varint, length = varint + bytes([length & 127 | 128]), length >> 7
    with path.open("wb") as file:
        file.write(b"\x08\x0a\x3a" + varint + bytes([length]))
        file.truncate(file.tell() + size)
    assert recognise(path) is Kind.ONNX


def test_sniffing_imports_no_framework() -> None:
    code = "import sys, rewriter.backends.files.sniff; sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def _forged(path: Path, nbytes: int) -> Path:
    """A torch.save archive whose directory declares another size for its first member."""
    torch.save({"w": torch.ones(300)}, path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = nbytes.to_bytes(4, "little")
    path.write_bytes(content)
    return path


def test_a_zip_bomb_is_refused_and_a_compressed_archive_is_not(tmp_path: Path) -> None:
    refused(_forged(tmp_path / "bomb", 2_000_000_000), "do not use it")
    with zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(1_000_000))
        archive.writestr("m/version", "3")
    assert recognise(tmp_path / "small") is Kind.TORCH_ZIP


def _header_of(path: Path, size: int, text: bytes) -> Path:
    path.write_bytes(size.to_bytes(8, "little") + text)
    return path


def test_a_safetensors_header_may_not_be_huge_or_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = b'{"a":' + b"[" * 200_000
    refused(_header_of(tmp_path / "deep", len(deep), deep), "not JSON")
    path = _header_of(tmp_path / "m", 20, b"{}" + b" " * 18)
    assert recognise(path) is Kind.SAFETENSORS
    monkeypatch.setattr(sniff, "MAX_HEADER_NBYTES", 19)
    refused(path, "neither")
    with path.open("rb") as file, pytest.raises(RewriteError, match="truncated safetensors"):
        read_safetensors_header(path, file, path.stat().st_size)


def test_a_number_has_at_most_ten_bytes(tmp_path: Path) -> None:
    for zeros, match in ((8, None), (9, "neither")):
        (tmp_path / "m").write_bytes(b"\x08" + b"\x80" * (zeros + 1) + b"\x00" + b"\x3a\x02\x0a\x00")
        if match:
            refused(tmp_path / "m", match)
        else:
            assert recognise(tmp_path / "m") is Kind.ONNX


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    (tmp_path / "m").write_bytes(b"x" * 100)

    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root reads whatever its mode says
    refused(tmp_path / "m", "may not be read by this user")
