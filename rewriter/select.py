"""Which sites a run may touch: --include and --exclude globs over their names; a glob that binds nothing is an error."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from rewriter.errors import RewriteError
from rewriter.graph import Site


def select(sites: Sequence[Site], include: Sequence[str], exclude: Sequence[str]) -> tuple[list[Site], list[tuple[Site, str]]]:
    """(the sites left, the sites left out with the reason)."""
    for option, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs:
            if not any(fnmatchcase(s.name, glob) for s in sites):
                near = ", ".join(s.name for s in sites[:3]) or "none"
                raise RewriteError(f"{option} '{glob}' matches no site; sites are named like {near} (see `rewrite plan`)")
    kept, out = [], []
    for site in sites:
        taken = not include or any(fnmatchcase(site.name, g) for g in include)
        dropped = next((g for g in exclude if fnmatchcase(site.name, g)), None)
        if taken and dropped is None:
            kept.append(site)
        else:
            out.append((site, f"left out by --exclude {dropped}" if dropped else "not named by --include"))
    return kept, out
