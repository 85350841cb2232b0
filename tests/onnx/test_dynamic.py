"""Adapters that are swapped between runs: one session, any rank, what peft's own forward gives; what cannot be swapped is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import peft
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import cli
from rewriter.adapters import Update
from rewriter.backends.kernels.covering import DOMAIN, OP, cover
from rewriter.backends.kernels.session import trusted
from rewriter.backends.onnx import dynamic
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.slots import Part, Slot
from rewriter.errors import RewriteError
from rewriter.tolerances import EQUAL
from tests.files_zoo.zoo import ZOO
from tests.passes.test_adapters import TARGETS, tuned

SPEC = ("x:float32[batch,5,16]",)
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def halved(adapted: Any, *parts: str) -> Any:
    """peft's model with its adapter at half its strength."""
    for part in parts:
        getattr(adapted.base_model.model, part).scaling["default"] *= 0.5
    return adapted


def ran(session: Any, feeds: Mapping[str, Tensor], adapter: Path | None = None) -> Tensor:
    """The first output, with the adapter active."""
    held, options = ort.LoraAdapter(), ort.RunOptions()  # type: ignore[attr-defined]
    if adapter is not None:
        held.Load(str(adapter))
        options.add_active_adapter(held)
    names = {i.name for i in session.get_inputs()}
    return torch.from_numpy(session.run(None, {n: t.numpy() for n, t in feeds.items() if n in names}, options)[0])


def same(found: Tensor, wanted: Tensor) -> None:
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", TARGETS)
def test_ranks_are_swapped_on_one_session(name: str, tmp_path: Path) -> None:
    wanted, plain = {}, {}
    inputs = ZOO[name].inputs(ZOO[name].sizes | ({"past": 0} if "past" in ZOO[name].sizes else {}))
    feeds = {key: value for key, value in inputs.items() if not key.startswith("past_")}
    for rank in (4, 8, 16):
        torch.manual_seed(0)
        _, made = tuned(name, tmp_path / str(rank), r=rank)
        shutil.move(tmp_path / str(rank) / "lora", tmp_path / f"r{rank}")
        with torch.no_grad():
            wanted[rank] = made(**feeds)[0]
            with made.disable_adapter():
                plain[rank] = made(**feeds)[0]
    files = rewriter.dynamic_adapters(str(tmp_path / "4" / "base"), [tmp_path / f"r{r}" for r in wanted], tmp_path / "m.onnx", samples=16)
    assert [file.name for file in files] == ["m.onnx", *(f"m.r{rank}.onnx_adapter" for rank in wanted)]
    session = ort.InferenceSession(str(files[0]))  # type: ignore[attr-defined]
    for rank, file in [*zip(wanted, files[1:], strict=True), (8, files[2]), (4, files[1])]:
        same(ran(session, inputs, file), wanted[rank])
        same(ran(session, inputs), plain[4])
    assert (wanted[4] - plain[4]).abs().max() > 100 * EQUAL[torch.float32][1]


class Small(nn.Module):
    """Three linears read one value; three stand behind each other with nothing between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 24)
        self.down, self.up = nn.Linear(24, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(self.v(x))) * torch.sigmoid(self.q(x)) + self.k(x)
        return out


def small(folder: Path, *targets: str, rank: int = 2, **settings: Any) -> Any:
    made = peft.get_peft_model(Small(), peft.LoraConfig(r=rank, init_lora_weights=False, target_modules=list(targets), **settings)).eval()
    made.save_pretrained(folder)
    return made


def test_linears_that_read_one_value_share_a_product(tmp_path: Path) -> None:
    """Adapters that have something for other linears go together; what one lacks is zero in its file."""
    one, two = small(tmp_path / "one", "q", "v", "down", "up", rank=3), small(tmp_path / "two", "q", "k", "v")
    files = rewriter.dynamic_adapters(Small().eval(), [tmp_path / "one", f"{tmp_path / 'two'}=0.5"], tmp_path / "m.onnx", SPEC, samples=16)
    model = ir.load(files[0])
    assert [v.name for v in model.graph.inputs if "lora_A" in str(v.name)] == ["v+q+k.lora_A", "down.lora_A", "up.lora_A"]
    assert [node.op_type for node in model.graph].count("Split") == 1
    placed = json.loads(model.metadata_props["rewriter.adapters"])
    assert placed == {name: [f"{'v+q+k' if name in 'vqk' else name}.lora_A", f"{name}.lora_B"] for name in ("v", "q", "k", "down", "up")}
    session = ort.InferenceSession(str(files[0]))  # type: ignore[attr-defined]
    with torch.no_grad():
        same(ran(session, {"x": X}, files[1]), one(X))
        same(ran(session, {"x": X}), Small()(X))
        same(ran(session, {"x": X}, files[2]), halved(two, "q", "k", "v")(X))


def test_biases_are_swapped_too(tmp_path: Path) -> None:
    """One adapter has them at linears that share A, the other has none there."""
    one, two = small(tmp_path / "one", "q", "v", "down", lora_bias=True), small(tmp_path / "two", "q", "up")
    for part in (one.base_model.model.q, one.base_model.model.v, one.base_model.model.down):
        part.lora_B["default"].bias.data.normal_()
    one.save_pretrained(tmp_path / "one")
    files = rewriter.dynamic_adapters(Small().eval(), [f"{tmp_path / 'one'}=0.5", tmp_path / "two"], tmp_path / "m.onnx", SPEC, samples=16)
    assert {v.name for v in ir.load(files[0]).graph.inputs if "bias" in str(v.name)} == {"q.lora_bias", "v.lora_bias", "down.lora_bias"}
    session = ort.InferenceSession(str(files[0]))  # type: ignore[attr-defined]
    with torch.no_grad():
        same(ran(session, {"x": X}, files[2]), two(X))
        same(ran(session, {"x": X}), Small()(X))
        same(ran(session, {"x": X}, files[1]), halved(one, "q", "v", "down")(X))


def test_linears_behind_each_other_see_what_the_other_gives_with_its_adapter(tmp_path: Path) -> None:
    made = small(tmp_path / "lora", "v", "down", "up")
    result = rewriter.plan(Small().eval(), "merge-lora", adapters=(str(tmp_path / "lora"),), inputs=SPEC, samples=16)
    with torch.no_grad():
        same(next(iter(result.graph.run({"x": X}).values())), made(X))  # type: ignore[union-attr]


@pytest.mark.parametrize("passes", ["low-rank:rank=6", "quantize"])
def test_a_rewritten_base_in_kernels(passes: str, tmp_path: Path) -> None:
    """What a run may override is no constant to the kernels."""
    small(tmp_path / "lora", "q", "v", "down", "up")
    base = tmp_path / "base.onnx"
    common = {"target": "onnxruntime", "timing": False, "objective": "params", "force": True, "samples": 16}
    assert rewriter.rewrite(Small().eval(), passes, SPEC, out=str(base), **common).exit_code == 0  # type: ignore[arg-type]
    files = rewriter.dynamic_adapters(str(base), [tmp_path / "lora"], tmp_path / "m.onnx", samples=16)
    stock, kernels = ort.InferenceSession(str(files[0])), rewriter.inference_session(files[0])  # type: ignore[attr-defined]
    model = ir.load(files[0])
    cover(model, trusted(), 1)
    assert [node.domain + node.op_type for node in model.graph].count(DOMAIN + OP) >= 4
    tolerance = EQUAL[torch.float32] if passes != "quantize" else (0.05, 0.05)  # stock operators round inputs in another way
    for adapter in (files[1], None):
        found, wanted = (ran(session, {"x": X}, adapter) for session in (kernels, stock))
        torch.testing.assert_close(found, wanted, rtol=tolerance[0], atol=tolerance[1])
    assert (ran(kernels, {"x": X}, files[1]) - ran(kernels, {"x": X})).abs().max() > 0.2


def test_a_bias_that_a_run_may_override_is_not_folded(tmp_path: Path) -> None:
    import onnx

    text = "<ir_version: 10, opset_import: ['' : 20]> g (float[B,4] x, float[4] b) => (float[B,4] y) { y = Add(x, b) }".replace("'", '"')
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(torch.zeros(4).numpy(), "b"))
    model = ir.from_proto(proto)
    from rewriter.backends.onnx.constants import Constants

    assert not Constants(20).is_const(model.graph.initializers["b"])
    assert OnnxGraph(model).is_const(OnnxGraph(model).model.graph.initializers["b"])  # which takes inputs' defaults for good


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_base_of_few_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """ONNX Runtime has no product in bfloat16: the room is as wide as what the target makes of the model."""
    made = peft.get_peft_model(Small().to(dtype), peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q", "v"]))
    made.save_pretrained(tmp_path / "lora")
    spec = (SPEC[0].replace("float32", str(dtype).removeprefix("torch.")),)
    files = rewriter.dynamic_adapters(Small().to(dtype).eval(), [tmp_path / "lora"], tmp_path / "m.onnx", spec, samples=16)
    assert len(files) == 2


def test_parts_are_as_wide_as_the_widest() -> None:
    slot = Slot("a", 3, {"q": Part("bq", 2), "k": Part("bk", 4), "v": Part("bv", 2)}, torch.float32)
    one, two = Update(torch.ones(1, 3), torch.ones(2, 1)), Update(2 * torch.ones(2, 3), torch.ones(2, 2))
    found = slot.filled({"q": one, "v": two})
    assert {name: tuple(t.shape) for name, t in found.items()} == {"a": (3, 6), "bq": (2, 2), "bk": (2, 4), "bv": (2, 2)}
    assert found["a"].sum(0).tolist() == [3, 0, 0, 0, 6, 6] and not found["bk"].any()


@pytest.mark.parametrize("energy", [0.7, 1.0])
def test_ranks_that_keep_a_share(energy: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a dense decomposition; a rank that is not used goes for nothing."""
    made = small(tmp_path / "lora", "q", "v", "down", rank=4)
    for part in (made.base_model.model.q, made.base_model.model.down):
        part.lora_A["default"].weight.data[2:] = part.lora_A["default"].weight.data[:2]
    made.save_pretrained(tmp_path / "lora")
    program = torch.export.export(Small().eval(), (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "m.pt2")
    given = ["--adapter", str(tmp_path / "lora"), "--energy", str(energy), "-o", str(tmp_path / "m.onnx"), "--samples", "16"]
    assert cli.run(["adapters", str(tmp_path / "m.pt2"), *given]) == 0
    said = " ".join(capsys.readouterr().out.split())
    ranks, gone, norm = 0, 0.0, 0.0
    with torch.no_grad():
        for part in (made.base_model.model.q, made.base_model.model.v, made.base_model.model.down):
            wanted = part.get_delta_weight("default").double()
            u, s, v = torch.linalg.svd(wanted)
            rank = 1 + int((s.square().cumsum(0) < (energy - 1e-10) * s.square().sum()).sum())
            part.base_layer.weight += (u[:, :rank] * s[:rank] @ v[:rank]).float()
            ranks, gone, norm = ranks + rank, gone + float(s[rank:].square().sum()), norm + float(s.square().sum())
        assert f"ranks 12 to {ranks} in all, {(gone / norm) ** 0.5:.2%} of its change lost" in said
        assert ranks == 8 if energy == 1 else ranks < 8
        session = ort.InferenceSession(str(tmp_path / "m.onnx"))  # type: ignore[attr-defined]
        with made.disable_adapter():
            same(ran(session, {"x": X}, tmp_path / "m.lora.onnx_adapter"), made(X))


def test_factors_that_are_no_numbers_have_no_rank(tmp_path: Path) -> None:
    made = small(tmp_path / "lora", "q")
    made.base_model.model.q.lora_A["default"].weight.data[0, 0] = torch.nan
    made.save_pretrained(tmp_path / "lora")
    with pytest.raises(RewriteError, match="the factors of 'q' hold NaN or inf"):
        rewriter.dynamic_adapters(Small().eval(), [tmp_path / "lora"], tmp_path / "m.onnx", SPEC, samples=16, energy=0.9)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA's lengths, which cannot be swapped at run time; merge it instead: --passes merge-lora"),
    "modules": ({"modules_to_save": ["up"]}, "whole tensors, which cannot be swapped"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_swapped_is_refused(what: str, tmp_path: Path) -> None:
    settings, said = WRONG[what]
    small(tmp_path / "lora", "q", **settings)
    with pytest.raises(RewriteError, match=said):
        rewriter.dynamic_adapters(Small().eval(), [tmp_path / "lora"], tmp_path / "m.onnx", SPEC, samples=16)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q(x)
        return out


def _halved(values: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    return lambda *given: {name: t / 2 for name, t in values(*given).items()}


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path / "lora", "q")
    lora, out = tmp_path / "lora", tmp_path / "m.onnx"
    with pytest.raises(RewriteError, match="'q' maps 16 to 16 features, 'q' of the model 16 to 8"):
        rewriter.dynamic_adapters(Other().eval(), [lora], out, SPEC, samples=16)
    with pytest.raises(RewriteError, match="there is no adapter to make room for; give --adapter DIR"):
        rewriter.dynamic_adapters(Small().eval(), [], out, SPEC)
    with pytest.raises(RewriteError, match=r"m\.pt2: .*; give -o a name that ends in \.onnx"):
        rewriter.dynamic_adapters(Small().eval(), [lora], tmp_path / "m.pt2", SPEC, samples=16)
    with monkeypatch.context() as patched:
        patched.setattr(dynamic, "_values", _halved(dynamic._values))
        with pytest.raises(RewriteError, match=r"the session is off from the model by .*; nothing was written"):
            rewriter.dynamic_adapters(Small().eval(), [lora], out, SPEC, samples=16)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
    (tmp_path / "m.lora.onnx_adapter").write_text("mine")
    with pytest.raises(RewriteError, match=r"m\.lora\.onnx_adapter exists; give --force to replace it"):
        rewriter.dynamic_adapters(Small().eval(), [lora], out, SPEC, samples=16)
    rewriter.dynamic_adapters(Small().eval(), [lora], out, SPEC, samples=16, force=True)
    with pytest.raises(RewriteError, match=r"m\.onnx exists"):
        rewriter.dynamic_adapters(Small().eval(), [lora], out, SPEC, samples=16)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two adapters of one name; what is said of each file; a later run says that the room is lost."""
    for folder in ("a", "b"):
        small(tmp_path / folder / "lora", "q", "v", rank=2 if folder == "a" else 4)
    program = torch.export.export(Small().eval(), (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "m.pt2")
    given = ["--adapter", str(tmp_path / "a" / "lora"), "--adapter", f"{tmp_path / 'b' / 'lora'}=0.5", "-o", str(tmp_path / "m.onnx")]
    assert cli.run(["adapters", str(tmp_path / "m.pt2"), *given, "--samples", "16"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "room for adapters at 2 linears, 3 inputs that default to rank zero; without one it is the base; off by",
        "at scale 0.5, rank 4, 288 numbers; ",
        "q in v+q.lora_A, q.lora_B; v in v+q.lora_A, v.lora_B; off by",
        "m.onnx with 2 adapters beside it, each run and compared",
    ):
        assert text in said
    assert sorted(p.name for p in tmp_path.glob("m.*")) == ["m.lora-2.onnx_adapter", "m.lora.onnx_adapter", "m.onnx", "m.pt2"]
    assert cli.run(["plan", str(tmp_path / "m.onnx"), "--samples", "16"]) in (0, 1)
    assert "room for adapters is lost: 3 inputs are taken at their defaults" in " ".join(capsys.readouterr().out.split())
