"""A factory of the user's and weights of somebody's: what does not fit is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rewriter.backends.files.arch import build, load_safetensors
from rewriter.errors import RewriteError

SOURCE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

def tied():
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    module[1].weight = module[0].weight
    return module

def needs(size):
    return nn.Linear(size, size)

def breaks():
    raise KeyError("inside")

class Stubborn(nn.Linear):
    def _load_from_state_dict(self, *args):
        raise ValueError("first\\nsecond")

def stubborn():
    return Stubborn(2, 2)

number = 3
text = str
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"planted_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return name


def refused(arch: str, match: str, state: dict[str, torch.Tensor] | None = None) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        build(arch, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_loaded_whatever_wrapped_them(prefix: str, module: str) -> None:
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    built = build(f"{module}:make", {prefix + name: tensor for name, tensor in state.items()})
    assert not built.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.state_dict().items())


def test_tied_weights_may_be_stored_once_and_stay_tied(module: str) -> None:
    built = build(f"{module}:tied", {"0.weight": torch.ones(5, 3)})
    assert built.get_submodule("0").weight is built.get_submodule("1").weight
    assert torch.equal(built.get_submodule("1").weight, torch.ones(5, 3))


def test_weights_that_do_not_fit_are_named(module: str) -> None:
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    refused(f"{module}:make", "missing 1.bias", {name: tensor for name, tensor in state.items() if name != "1.bias"})
    refused(f"{module}:make", "unexpected extra", state | {"extra": torch.ones(1)})
    refused(f"{module}:make", "0.weight is", state | {"0.weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("factory", "match"),
    [("needs", "without arguments"), ("breaks", "inside"), ("number", "cannot be called"), ("text", "must return"), ("nothing", "has no")],
)
def test_factories_that_make_no_module_are_refused(factory: str, match: str, module: str) -> None:
    refused(f"{module}:{factory}", match)


def test_bad_names_are_refused(module: str) -> None:
    refused(module, "MODULE:FACTORY")
    refused("no_such_module_anywhere:make", "cannot be imported")


def test_safetensors_come_back(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.ones(2, dtype=torch.bfloat16), "d": torch.ones(0, 3)}
    save_file(state, tmp_path / "m.safetensors")
    loaded = load_safetensors(tmp_path / "m.safetensors")
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": [1 << 40]}, "does not fill"),
        ({"shape": [-1]}, "which are none"),
        ({"dtype": "X9"}, "which are none"),
        ({"dtype": ["F32"]}, "which are none"),
        ({"dtype": {"a": 1}}, "which are none"),
        ({"dtype": None}, "which are none"),
        ({"shape": [True]}, "which are none"),
        ({"shape": "2"}, "which are none"),
        ({"shape": [1] * 65}, "which are none"),
        ({"shape": [3]}, "does not fill"),
        ({"dtype": "F64"}, "does not fill"),
        ({"data_offsets": [0, 4000]}, "truncated"),
        ({"data_offsets": [8, 0]}, "truncated"),
        ({"data_offsets": "x"}, "no data_offsets"),
    ],
)
def test_headers_that_lie_are_refused(change: dict[str, object], match: str, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}).encode()
    (tmp_path / "m").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(RewriteError, match=match) as caught:
        load_safetensors(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match="cannot be read"):
        load_safetensors(tmp_path / "none")


def test_headers_that_only_the_library_refuses_are_one_line(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for table, body in (({"w": entry}, 16), ({"w": entry, "v": entry}, 8)):  # bytes of nobody; two tensors over the same bytes
        header = json.dumps(table).encode()
        (tmp_path / "m").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * body)
        with pytest.raises(RewriteError, match="not a readable safetensors file") as caught:
            load_safetensors(tmp_path / "m")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory", ["make", "breaks", "nothing"])
def test_the_path_of_modules_is_as_it_was(factory: str, module: str) -> None:
    before = list(sys.path)
    try:
        build(f"{module}:{factory}")
    except RewriteError:
        assert factory != "make"
    with pytest.raises(RewriteError):
        build("no_such_module_anywhere:make")
    assert sys.path == before


def test_weights_of_another_dtype_become_the_modules(module: str) -> None:
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double().state_dict()
    built = build(f"{module}:make", state)
    assert {tensor.dtype for tensor in built.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in built.state_dict().items())


def test_weights_of_the_modules_dtype_are_not_copied(module: str) -> None:
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    built = build(f"{module}:make", state)
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in built.state_dict().items())


def test_a_module_that_cannot_load_is_one_line(module: str) -> None:
    refused(f"{module}:stubborn", r"the weights cannot be loaded \(first\)", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
