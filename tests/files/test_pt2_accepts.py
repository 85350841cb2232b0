"""Clean exports are accepted, compute the same bits after a round trip, and carry nothing of the user's."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewriter.backends.files import pt2
from rewriter.backends.files.pt2 import load_pt2, read_extra, save_pt2
from rewriter.backends.files.sniff import Kind, recognise
from rewriter.errors import RewriteError
from tests.files.corpus import PROGRAMS, program


def _tensors(tree: object) -> list[object]:
    return pytree.tree_leaves(tree)


@pytest.mark.parametrize("name", PROGRAMS)
def test_clean_exports_are_accepted_and_compute_the_same(name: str, tmp_path: Path) -> None:
    source = program(name)
    args, kwargs = source.example_inputs
    torch.export.save(source, tmp_path / "model.pt2")
    assert recognise(tmp_path / "model.pt2") is Kind.PT2
    loaded = load_pt2(tmp_path / "model.pt2")
    save_pt2(loaded, tmp_path / "again.pt2")
    again = load_pt2(tmp_path / "again.pt2")
    assert loaded.example_inputs is None
    assert str(again.range_constraints) == str(source.range_constraints)
    wanted = _tensors(source.module()(*args, **kwargs))
    for copy in (loaded, again):
        found = _tensors(copy.module()(*args, **kwargs))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_torch_alone_loads_what_is_saved(tmp_path: Path) -> None:
    source = program("dynamic")
    save_pt2(source, tmp_path / "model.pt2")
    x = torch.randn(7, 3)
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), source.module()(x))


def test_a_saved_file_exports_to_onnx(tmp_path: Path) -> None:
    save_pt2(program("dynamic"), tmp_path / "model.pt2")
    assert torch.onnx.export(load_pt2(tmp_path / "model.pt2"), verbose=False) is not None


def test_saving_leaves_out_inputs_and_build_paths(tmp_path: Path) -> None:
    source = program("static")
    before = source.example_inputs
    save_pt2(source, tmp_path / "model.pt2")
    assert source.example_inputs is before
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        samples = [info for info in archive.infolist() if "sample_inputs" in info.filename]
        assert [info.file_size for info in samples] == [0]
        assert not any(name.endswith(".pkl") for name in archive.namelist())
        assert b"stack_trace" not in archive.read("model/models/model.json")
    assert str(Path(__file__).parent).encode() not in (tmp_path / "model.pt2").read_bytes()


def test_same_program_same_bytes(tmp_path: Path) -> None:
    source = program("static")
    save_pt2(source, tmp_path / "a.pt2", {"report.json": "{}"})
    save_pt2(source, tmp_path / "b.pt2", {"report.json": "{}"})
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()


def test_extra_texts_come_back(tmp_path: Path) -> None:
    save_pt2(program("static"), tmp_path / "model.pt2", {"report.json": '{"a": "ü"}', "note": "x"})
    assert read_extra(tmp_path / "model.pt2") == {"report.json": '{"a": "ü"}', "note": "x"}
    with pytest.raises(RewriteError, match="extra file"):
        save_pt2(program("static"), tmp_path / "model.pt2", {"../evil": "x"})


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    save_pt2(program("tied"), tmp_path / "model.pt2")
    state = load_pt2(tmp_path / "model.pt2").state_dict
    assert state["embed.weight"].untyped_storage().data_ptr() == state["head.weight"].untyped_storage().data_ptr()


def test_weights_that_torch_pickles_are_not_written(tmp_path: Path) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.eye(4).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    try:
        source = torch.export.export(Sparse(), (torch.ones(2, 4),))
    except Exception:
        pytest.skip("this torch does not export sparse buffers")
    with pytest.raises(RewriteError):
        save_pt2(source, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["torch.export.save", "_copy_checked", "publish"])
def test_a_full_disk_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model.pt2"
    save_pt2(program("static"), target)
    old = target.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        for path in args:  # half-written, as a full disk leaves it
            if isinstance(path, Path) and path.parent != tmp_path:
                path.write_bytes(b"PK half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full) if step.startswith("torch") else monkeypatch.setattr(pt2, step, full)
    with pytest.raises(RewriteError, match="No space left"):
        save_pt2(program("dynamic"), target)
    assert target.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_a_disk_without_room_is_refused_before_torch_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(torch.export, "save", lambda *args, **kwargs: pytest.fail("torch would end the process"))
    with pytest.raises(RewriteError, match=r"writing failed \(No space left on device\).*free some space"):
        save_pt2(program("static"), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["static", "conv", "tied", "cond", "llama"])
def test_what_is_reserved_covers_both_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda handle, offset, nbytes: asked.append(nbytes), raising=False)
    monkeypatch.setattr(pt2, "_MARGIN_NBYTES", 0)
    source = program(name)
    source._example_inputs = None
    torch.export.save(source, tmp_path / "raw.pt2", extra_files={"note": "x" * 100_000})
    save_pt2(source, tmp_path / "model.pt2", {"note": "x" * 100_000})
    assert len(asked) == 2
    assert min(asked) >= (tmp_path / "raw.pt2").stat().st_size


def test_tied_weights_are_reserved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt2, "_MARGIN_NBYTES", 0)
    monkeypatch.setattr(pt2, "_NODE_NBYTES", 0)
    state = 11 * 4 * 4 + 4  # a table that two names share, and the buffer that is saved
    assert pt2._estimate(program("tied"), {}) == state + 4 + 8  # and the constants
