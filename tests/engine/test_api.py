"""The Python API: the same job on models in memory, and passes alone on graphs that the caller holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import rewriter
from rewriter import pipeline
from rewriter.backends.files.export import export_module
from rewriter.backends.fx.graph import FxGraph
from rewriter.errors import RewriteError
from rewriter.inputs import parse_input
from rewriter.options import Options
from rewriter.tolerances import EQUAL
from tests.engine.nets import WIDE, Mlp, WideMlp, normal


def run(model: Any, publish: bool = True) -> pipeline.Result:
    return pipeline.rewrite(model, Options(quiet=True), publish_to_out=publish)


def test_bad_models_in_memory_are_refused() -> None:
    with pytest.raises(RewriteError, match="cannot rewrite a int; give a path"):
        run(3, publish=False)
    with pytest.raises(RewriteError, match=r"give out=, or use result\.save"):
        run(Mlp())
    with pytest.raises(RewriteError, match="a module does not say what it takes"):
        run(Mlp(), publish=False)


def test_the_api_has_the_same_job(tmp_path: Path) -> None:
    result = rewriter.rewrite(WideMlp(), passes=["low-rank:rank=6"], inputs=[WIDE], timing=False, samples=32, objective="params")
    path = result.save(tmp_path / "o.pt2")
    with pytest.raises(RewriteError, match="exists; give --force"):
        result.save(path)
    module = result.module
    x = normal(2, 3, 96, seed=8)
    torch.testing.assert_close(module(x)["y"], torch.export.load(path).module()(x=x)["y"])
    before = [p.detach().clone() for p in module.parameters()]
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    (module(x)["y"] ** 2).mean().backward()
    optimiser.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    nothing = rewriter.rewrite(WideMlp(), passes="auto", inputs=[WIDE], timing=False, samples=32, objective="params")
    assert nothing.exit_code == 1
    with pytest.raises(RewriteError, match="there is nothing to save: nothing was rewritten"):
        nothing.save(tmp_path / "none.pt2")
    with pytest.raises(RewriteError, match="there is no rewritten model"):
        _ = nothing.module
    with pytest.raises(RewriteError, match=r"the options are the fields of rewriter\.Options"):
        rewriter.rewrite(WideMlp(), inputs=[WIDE], speed="high")
    with pytest.raises(RewriteError, match="--tokens 1,0 cannot be read; give whole numbers of at least 1"):
        rewriter.rewrite(WideMlp(), inputs=[WIDE], tokens=[1, 0])


@pytest.mark.parametrize("kind", ["module", "program", "onnx"])
def test_passes_alone_give_back_what_they_were_given(kind: str) -> None:
    program = export_module(WideMlp().eval(), [parse_input(WIDE)], {})
    model: Any = {"module": WideMlp().eval(), "program": program}.get(kind) or FxGraph.of(program).to_onnx(20)
    inputs = [WIDE] if kind == "module" else None
    out = rewriter.apply("low-rank:rank=6", model, inputs=inputs, samples=32, objective="params")
    x = normal(2, 3, 96, seed=8)
    expected = rewriter.rewrite(program, "low-rank:rank=6", samples=32, timing=False, objective="params").module(x)["y"]
    if kind == "onnx":
        import onnx_ir as ir

        session = onnxruntime.InferenceSession(ir.to_proto(out).SerializeToString(), providers=["CPUExecutionProvider"])
        got = torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))
    else:
        got = (out if kind == "module" else out.module())(x=x)["y"]
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
