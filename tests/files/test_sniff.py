"""Content decides what a file is; the suffix is wrong on purpose, and what is damaged is said in one line."""

from __future__ import annotations

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

from rewriter.backends.files.sniff import Kind, recognise
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
