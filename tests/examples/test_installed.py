"""An installed package: its entry point in the group `rewriter.plugins` is all that the command line needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.conftest import EXAMPLES

METADATA = "Metadata-Version: 2.1\nName: our-structures\nVersion: 0.1.0\n"
ENTRIES = "[rewriter.plugins]\nkronecker = our_structures.kronecker\nkeep-small = our_structures.my_pass\n"


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """What pip leaves behind: the package and its dist-info."""
    package, info = tmp_path / "our_structures", tmp_path / "our_structures-0.1.0.dist-info"
    package.mkdir()
    info.mkdir()
    for name in ("kronecker.py", "my_pass.py"):
        shutil.copy(EXAMPLES / name, package / name)
    (package / "__init__.py").touch()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRIES)
    return tmp_path


def test_installed_structures_and_passes_are_listed(site_packages: Path) -> None:
    code = "from rewriter.cli import run; raise SystemExit(run(['passes']) or run(['passes', 'kronecker']))"
    environment = {**os.environ, "PYTHONPATH": str(site_packages), "COLUMNS": "110"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, module in (("kronecker", "kronecker"), ("keep-small", "my_pass")):
        line = done.stdout.index(f"\n  {name} ")
        assert f"[from our_structures.{module}]" in " ".join(done.stdout[line : line + 400].split())
    assert "kronecker (structure, a pass of its own)  [from our_structures.kronecker]" in done.stdout
