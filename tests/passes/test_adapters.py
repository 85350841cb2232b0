"""Adapters that peft made, on graphs of every format, against its own forward and merge; what does not fit is refused with both names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rewriter
from rewriter.backends.onnx.dynamic import Adapted
from rewriter.backends.onnx.run import Session
from rewriter.errors import RewriteError
from rewriter.report import validate
from rewriter.tolerances import EQUAL
from tests.files_zoo.zoo import SOURCES, ZOO, hugging

TARGETS = {"bert": ["query", "value", "dense"], "gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"query": 2, "c_attn": 3, "q_proj": 2},
        "alpha_pattern": {r".*\.(value|c_proj|v_proj)": 9},
    },
    "biases": {"lora_bias": True},
}


def tuned(name: str, folder: Path, **settings: Any) -> tuple[nn.Module, Any]:
    """The base, saved to folder/base, and peft's model, saved to folder/lora; adapters are no noise about zero."""
    model = hugging(*SOURCES[name][:2], **SOURCES[name][2])
    model.eval().save_pretrained(folder / "base")  # type: ignore[operator]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2", **settings}
    made = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings)).eval()
    made.save_pretrained(folder / "lora")
    return model, made


BD_LORA = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=["first", "head"], init_lora_weights=False,
    use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["fir"], target_modules_bd_b=["head"], nblocks=2),
)  # fmt: skip


@pytest.mark.parametrize("swapped", [False, True])
def test_block_diagonal_factors_are_read_whole(swapped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made: Any = peft.get_peft_model(Even(), BD_LORA).eval()
    made.base_model.model.head.lora_B["default"].weight.data.normal_()
    made.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        wanted = made(X)
        if swapped:
            spec = ("x:float32[batch,5,16]",)
            model, file = rewriter.dynamic_adapters(Even().eval(), [tmp_path / "lora"], tmp_path / "m.onnx", spec, samples=16)
            same(Adapted(Session(str(model), 1), file)({"x": X})["output"], wanted)
        else:
            given: dict[str, Any] = {"adapters": (str(tmp_path / "lora"),), "inputs": ("x:float32[batch,5,16]",)}
            result = rewriter.plan(Even().eval(), "merge-lora", samples=16, **given)
            same(outputs(result, {"x": X}), wanted)
            same(outputs(result, {"x": X}), made.merge_and_unload()(X))


def outputs(result: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The rewritten graph's first output."""
    found: Tensor = next(iter(result.graph.run(inputs).values()))
    return found


def same(found: Tensor, wanted: Tensor) -> None:
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol / 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TARGETS)
def test_merged_is_what_peft_merges(name: str, kind: str, tmp_path: Path) -> None:
    _, made = tuned(name, tmp_path, **KINDS[kind])
    result = rewriter.plan(tmp_path / "base", "merge-lora", adapters=(str(tmp_path / "lora"),), target="torch", samples=16)
    inputs = ZOO[name].inputs(ZOO[name].sizes | ({"past": 0} if "past" in ZOO[name].sizes else {}))
    plain = {key: value for key, value in inputs.items() if not key.startswith("past_")}
    with torch.no_grad():
        same(outputs(result, inputs), made(**plain)[0])
        if (name, kind) != ("llama", "biases"):  # where the linear has no bias peft cannot merge one; we can
            same(outputs(result, inputs), made.merge_and_unload()(**plain)[0])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.first(x))))
        return out


class Even(nn.Module):
    """Sizes that two blocks divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.first(x)))
        return out


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"r": 2, "target_modules": ["first"], "modules_to_save": ["head", "norm"], "bias": "all"}


def small(folder: Path, **settings: Any) -> tuple[Small, Any]:
    """A base and peft's model on it, all that is trained moved away from where it started."""
    base = Small().eval()
    made = peft.get_peft_model(Small(), peft.LoraConfig(init_lora_weights=False, **{**SETTINGS, **settings})).eval()
    for number, parameter in enumerate(p for p in made.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    made.save_pretrained(folder)
    return base, made


def model(base: nn.Module, kind: str, folder: Path) -> Any:
    """The base as a user has it."""
    if kind == "module":
        return base
    program = torch.export.export(base, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    path = folder / f"base.{kind}"
    if kind == "pt2":
        torch.export.save(program, path)
    else:
        torch.onnx.export(program, dynamo=True, verbose=False).save(path)  # type: ignore[union-attr]
    return path


@pytest.mark.parametrize("passes", ["merge-lora", "merge-lora,quantize"])
@pytest.mark.parametrize("kind", ["module", "pt2", "onnx"])
def test_whole_modules_and_biases_on_every_format(kind: str, passes: str, tmp_path: Path) -> None:
    base, made = small(tmp_path / "lora")
    given: dict[str, Any] = {"inputs": ("x:float32[batch,5,16]",)} if kind == "module" else {}
    result = rewriter.plan(model(base, kind, tmp_path), passes, adapters=(str(tmp_path / "lora"),), samples=16, objective="nbytes", **given)
    (name,) = [spec.name for spec in result.graph.specs()]  # type: ignore[union-attr]
    found = outputs(result, {name: X})
    if "quantize" in passes:
        assert [row.structure for row in result.report.sites if row.name == "first"] != [None]
    else:
        same(found, made(X))
    assert any("in place of" in note for note in result.report.notes)
    (placed,) = result.report.adapters
    assert (placed["folder"], placed["scale"]) == (str(tmp_path / "lora"), 1.0)
    assert {"first", "first.bias", "head.weight", "head.bias", "norm.weight"} <= set(placed["placed"])
    assert set(placed["placed"].values()) <= set(result.graph.parameters()) or kind == "onnx"  # type: ignore[union-attr]
    validate(json.loads(result.report.to_json()))


def test_several_at_their_scales(tmp_path: Path) -> None:
    """By the sum of what each adds."""
    base, one = small(tmp_path / "one", modules_to_save=None, bias="none")
    _, two = small(tmp_path / "two", modules_to_save=None, bias="none", r=3)
    adapters = (str(tmp_path / "one"), f"{tmp_path / 'two'}=0.5")
    result = rewriter.plan(base, "merge-lora", adapters=adapters, inputs=("x:float32[batch,5,16]",), samples=16)
    weight = lambda tuned: tuned.merge_and_unload().first.weight.double()  # noqa: E731
    with torch.no_grad():
        base.first.weight += (weight(one) - base.first.weight + 0.5 * (weight(two) - base.first.weight)).float()
        same(outputs(result, {"x": X}), base(X))


def test_without_the_pass_the_branch_stays(tmp_path: Path) -> None:
    base, made = small(tmp_path / "lora")
    given: dict[str, Any] = {"inputs": ("x:float32[batch,5,16]",), "samples": 16}
    result = rewriter.plan(base, "fuse-attention", adapters=(str(tmp_path / "lora"),), **given)
    same(outputs(result, {"x": X}), made(X))
    assert "adapter" in [row.kind for row in result.report.sites]


KEY = "base_model.model.first.lora_{}.weight"
WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "another base": (
        {KEY.format("A"): torch.ones(2, 17), KEY.format("B"): torch.ones(16, 2)},
        "'first' maps 17 to 16 features, 'first' of the model 16 to 16",
    ),
    "another name": (
        {
            key.replace("first", "other.q"): value
            for key, value in ((KEY.format("A"), torch.ones(2, 16)), (KEY.format("B"), torch.ones(16, 2)))
        },
        "'other.q' is no linear of the model, which has first, head…",
    ),
    "a tensor of another shape": (
        {"base_model.model.head.weight": torch.ones(4, 16)},
        r"'head.weight' is \[4, 16\], 'head.weight' of the model \[3, 16\]",
    ),
    "a tensor of another name": ({"base_model.model.tail.weight": torch.ones(4)}, "'tail.weight' is no parameter of the model"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_with_both_names(what: str, tmp_path: Path) -> None:
    base, _ = small(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    changes, said = WRONG[what]
    save_file({**load_file(file), **{k: v for k, v in changes.items() if v is not None}}, file)
    with pytest.raises(RewriteError, match=said) as caught:
        rewriter.plan(base, "merge-lora", adapters=(str(tmp_path),), inputs=("x:float32[batch,5,16]",), samples=16)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_given_model_stays_as_it_was(tmp_path: Path) -> None:
    base, _ = small(tmp_path)
    program = torch.export.export(base, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    rewriter.plan(program, "merge-lora", adapters=(str(tmp_path),), samples=16)
    assert all(program.state_dict[name].equal(tensor) for name, tensor in before.items())
    same(program.module()(X), base(X))


def test_energy_puts_the_pass_in_front(tmp_path: Path) -> None:
    base, _ = small(tmp_path / "lora", modules_to_save=None, bias="none", r=4)
    given: dict[str, Any] = {"inputs": ("x:float32[batch,5,16]",), "samples": 16, "adapters": (str(tmp_path / "lora"),)}
    result = rewriter.plan(base, "merge-lora", energy=0.6, **given)
    row = next(row for row in result.report.sites if row.kind == "adapter")
    assert result.report.passes == ["block-lora:energy=0.6", "merge-lora"] and result.report.recipe["energy"] == 0.6
    assert row.status == "planned" and not row.exact and "instead of 4" in row.reason and "merged into its base" in row.reason
    assert result.report.output_error is not None and result.report.output_error.estimate > 1e-3
    with pytest.raises(RewriteError, match="there is no --adapter; give both, or neither"):
        rewriter.plan(base, "merge-lora", energy=0.6, **{**given, "adapters": ()})
    with pytest.raises(RewriteError, match=r"--energy 1\.5 is out of range"):
        rewriter.plan(base, "merge-lora", energy=1.5, **given)
