"""The main job on real trained weights: all-MiniLM-L6-v2 to half of its encoder's linear parameters, for ONNX Runtime.

    python tools/demo.py        # the same as `make demo`

Calibration text is what Python itself ships; nothing is fetched. Everything lands in ./demo.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytext
from minilm import folder

WORK = Path("demo")


def main() -> int:
    WORK.mkdir(exist_ok=True)
    text = WORK / "calibration.txt"
    text.write_text("\n".join(pytext.gather(2048)) + "\n", encoding="utf-8")
    command = [
        *("rewrite", str(folder()), "--passes", "auto:params=0.5,pre-merge", "--include", "encoder.*", "--target", "onnxruntime"),
        *("--data", str(text), "-o", str(WORK / "minilm.onnx"), "--report", str(WORK / "report.json"), "--force"),
    ]
    print(f"$ {shlex.join(command).replace(str(folder()), 'all-MiniLM-L6-v2/')}\n", flush=True)
    return subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
