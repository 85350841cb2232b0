"""English sentences from the text that every Python ships: the docstrings of its standard library and the topics of its help().

python tools/pytext.py calibration.txt --count 2048            # from seven files in eight
python tools/pytext.py judge.txt --count 600 --held-out        # from the eighth ones, no file in common
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HOLD_OUT = 8
_SPLIT = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n")


def files(held_out: bool) -> list[Path]:
    """The standard library's sources, a fixed eighth of them held out by the hash of the name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests", "idle_test"} & set(p.relative_to(root).parts))
    return [p for p in found if (_bucket(p.relative_to(root)) == 0) == held_out]


def _bucket(path: Path) -> int:
    return hashlib.sha256(path.as_posix().encode()).digest()[0] % HOLD_OUT


def sentences(path: Path) -> Iterator[str]:
    """Sentences of a file's string literals that stand as documentation."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 60:
            yield from filter(_is_prose, (" ".join(part.split()) for part in _SPLIT.split(node.value)))


def _is_prose(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    return 30 <= len(text) <= 400 and len(words) >= 6 and sum(map(len, words)) > 0.7 * len(text.replace(" ", ""))


def gather(count: int, held_out: bool = False) -> list[str]:
    """`count` distinct sentences, in an order that their text alone decides; fewer only where there are fewer."""
    every = list(dict.fromkeys(s for path in files(held_out) for s in sentences(path)))
    ordered = sorted(every, key=lambda s: hashlib.sha256(s.encode()).digest())
    return ordered[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--held-out", action="store_true", help="from the held-out files")
    given = parser.parse_args()
    lines = gather(given.count, given.held_out)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(lines)} sentences from {len(files(given.held_out))} files")


if __name__ == "__main__":
    main()
