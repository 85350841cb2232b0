"""torch.save files: tensors load, wrappers open, and a pickled module runs nothing and names its ways on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewriter.backends.files import torch_zip
from rewriter.backends.files.torch_zip import load_torch
from rewriter.errors import RewriteError
from tests.files.payloads import Payload


class Mine(nn.Module):
    def __init__(self, marker: Path | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        if marker is not None:
            self.payload = Payload(marker)


def refused(path: Path, match: str) -> str:
    with pytest.raises(RewriteError, match=match) as caught:
        load_torch(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}, "lr": 0.1}])
def test_tables_of_tensors_load(wrap: Any, tmp_path: Path) -> None:
    state = nn.Linear(3, 2).bfloat16().state_dict()
    torch.save(wrap(state), tmp_path / "m.pt")
    loaded = load_torch(tmp_path / "m.pt")
    assert isinstance(loaded, dict)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_pickled_module_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save(Mine(marker), tmp_path / "m.pt")
    text = refused(tmp_path / "m.pt", "pickled module")
    assert not marker.exists()
    for part in ("mkdir", "Mine", "--arch", ".safetensors", "--trust-pickle"):
        assert part in text


def test_a_payload_beside_tensors_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Payload(marker)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "mkdir")
    torch.save({"w": torch.ones(2), "x": Payload(marker)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "before torch 1.6")
    assert not marker.exists()


def test_trust_is_explicit(tmp_path: Path) -> None:
    module = Mine()
    torch.save(module, tmp_path / "m.pt")
    loaded = load_torch(tmp_path / "m.pt", trust_pickle=True)
    assert isinstance(loaded, Mine)
    assert not loaded.training
    assert torch.equal(loaded.linear.weight, module.linear.weight)


def test_what_holds_no_table_is_refused(tmp_path: Path) -> None:
    for content in ([torch.ones(2)], {"lr": 0.1}, {}, torch.ones(2)):
        torch.save(content, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", "no table of tensors")


def test_a_huge_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    monkeypatch.setattr(torch_zip, "_MAX_PICKLE_NBYTES", 10)
    refused(tmp_path / "m.pt", "10 are allowed")


def test_other_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "script.pt"))
    refused(tmp_path / "script.pt", "TorchScript")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    import zipfile

    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    refused(tmp_path / "bomb.pt", "declare")


def _zip(path: Path, pickled: bytes) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"m/{name}", content)
    return path


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02", b"hello", b"\x80\x02}X"])
def test_a_damaged_pickle_is_one_line(pickled: bytes, tmp_path: Path) -> None:
    refused(_zip(tmp_path / "m.pt", pickled), "torch cannot read it|does more than hold tensors")


def test_what_torch_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("first\nsecond")

    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    monkeypatch.setattr(torch, "load", broken)
    assert "second" not in refused(tmp_path / "m.pt", r"torch cannot read it \(first\)")
    with pytest.raises(RewriteError, match=r"the trusted pickle cannot be read \(first\)"):
        load_torch(tmp_path / "m.pt", trust_pickle=True)


def test_tensors_are_asked_for_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = torch.load

    def spy(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return real(*args, **options)

    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    monkeypatch.setattr(torch, "load", spy)
    load_torch(tmp_path / "m.pt")
    assert seen["weights_only"] is True


def test_a_refusal_needs_no_list_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ValueError("no list")

    torch.save(Mine(), tmp_path / "m.pt")
    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", broken)
    text = refused(tmp_path / "m.pt", "does more than hold tensors")
    assert "--trust-pickle" in text


def test_a_trusted_pickle_of_unknown_classes_is_one_line(tmp_path: Path) -> None:
    path = _zip(tmp_path / "m.pt", b"cno_such_module_anywhere\nThing\n.")
    with pytest.raises(RewriteError, match=r"the trusted pickle cannot be read .*no_such_module_anywhere") as caught:
        load_torch(path, trust_pickle=True)
    assert "\n" not in str(caught.value)
