"""Start-up, fitting time and memory on a model of GPT-2 small's size (12 layers, 768 wide, random weights).

    python tools/bench_scale.py [--passes low-rank:params=0.5]

Targets: `rewrite --help` under 0.5 s; all linears projected in under 60 s on 2 cores, calibration aside; peak memory above what imports
take under 2.5 times the model. The run reloads and certifies what it emits; one that does not end well prints no figure.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MODULE = "gpt2"


def build(path: Path) -> None:
    """GPT-2 small's shape with random weights, exported with dynamic batch and length."""
    import torch
    import transformers

    from rewriter.backends.files.export import export_module
    from rewriter.backends.files.pt2 import save_pt2
    from rewriter.inputs import parse_input

    torch.manual_seed(0)
    config = transformers.GPT2Config(attn_implementation="sdpa", use_cache=False, return_dict=True)

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2Model(config).eval()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.model(input_ids=ids).last_hidden_state
            return hidden

    save_pt2(export_module(Hidden().eval(), [parse_input("ids:int64[batch,seq]")], {}), path)


def resident() -> int:
    """Bytes resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Peak(threading.Thread):
    """Samples resident memory until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.running = resident(), True

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.01)


def measured(model: Path, passes: str) -> dict[str, float]:
    """One run in this fresh process: seconds of calibration and of fitting, peak bytes above imports."""
    import torch._dynamo  # noqa: F401 - what imports take is counted before the run

    from rewriter import calibrate, pipeline
    from rewriter.backends.files import load  # noqa: F401
    from rewriter.backends.fx import graph, target  # noqa: F401
    from rewriter.options import Options
    from rewriter.registry import passes as known

    known()
    spent = {"calibration": 0.0}
    inner = calibrate.Calibration._run

    def timed(self: calibrate.Calibration, taps: object) -> None:
        begin = time.perf_counter()
        inner(self, taps)  # type: ignore[arg-type]
        spent["calibration"] += time.perf_counter() - begin

    calibrate.Calibration._run = timed  # type: ignore[method-assign, assignment]
    decide = pipeline._decide

    def timed_decide(job: pipeline.Job) -> tuple[int, str] | None:
        begin = time.perf_counter()
        ended = decide(job)
        spent["deciding"] = time.perf_counter() - begin
        return ended

    pipeline._decide = timed_decide
    before = resident()
    watch = Peak()
    watch.start()
    with tempfile.TemporaryDirectory() as folder:
        options = Options(passes=passes, out=f"{folder}/out.pt2", cache=f"{folder}/cache", samples=32, timing=False, quiet=True)
        result = pipeline.rewrite(str(model), options)
    watch.running = False
    if result.exit_code:
        raise SystemExit(f"red: {result.message}")
    rewritten = result.report.matched["rewritten"]
    fitting = spent["deciding"] - spent["calibration"]
    return {"sites": rewritten, "calibration": spent["calibration"], "fitting": fitting, "peak": watch.peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", default="low-rank:params=0.5")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measured(given.child, given.passes)))
        return
    rewrite = str(Path(sys.executable).with_name("rewrite"))
    starts = []
    for _ in range(7):
        begin = time.perf_counter()
        subprocess.run([rewrite, "--help"], check=True, capture_output=True)
        starts.append(time.perf_counter() - begin)
    print(f"rewrite --help: {statistics.median(starts):.2f} s ({min(starts):.2f} to {max(starts):.2f}); target under 0.5 s")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"{MODULE}.pt2"
        build(model)
        nbytes = model.stat().st_size
        child = [sys.executable, __file__, "--child", str(model), "--passes", given.passes]
        found = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(
        f"{given.passes}: {found['sites']} linears of a {nbytes / 1e6:.0f} MB model fitted in {found['fitting']:.1f} s; target under 60 s"
    )
    print(f"calibration (32 samples of 128 tokens): {found['calibration']:.1f} s")
    print(f"peak memory above imports: {found['peak'] / 1e6:.0f} MB = {found['peak'] / nbytes:.2f} times the model; target under 2.5")


if __name__ == "__main__":
    main()
