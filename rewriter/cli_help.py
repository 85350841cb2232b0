"""Help as plain text: the options in their groups, then commands and examples. The same on a terminal and in a pipe."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from rewriter.cli_options import CHOICE, INPUTS, RUNNING

PASSES_TEXT = """\
  auto                           exact structure; with a budget or --max-error also approximations
  monarch:blocks=4:rank=2        options follow a colon each; what is left out is chosen
  low-rank:params=0.3,pre-merge  several passes, in order; params is the share of dense numbers to keep
  `rewrite passes` lists all, `rewrite passes monarch` explains one.
"""
EXAMPLES = """\
  rewrite model.onnx --passes auto:params=0.5,pre-merge -o small.onnx --report report.json
  rewrite plan model.pt2 --max-error 0.05 --data calibration.npz
  rewrite verify model.onnx small.onnx --max-error 0.1
"""
EXITS = "  0 done   1 nothing matched or was worth it   2 bad input or usage   3 a bound was exceeded, nothing written\n"


class Command(TyperCommand):
    """A command whose help lists its options by group; the default command's help is the program's."""

    siblings: dict[str, TyperCommand] = {}  # noqa: RUF012 - filled once by the program

    def get_help(self, ctx: Any) -> str:
        formatter = ctx.make_formatter()
        formatter.width = max(60, min(_columns(), 110))
        self.format_help(ctx, formatter)
        return str(formatter.getvalue()).rstrip("\n")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        words = [str(p.metavar) for p in self.get_params(ctx) if p.param_type_name == "argument"]
        formatter.write_usage(ctx.command_path, " ".join([*words, "[OPTIONS]"]))
        self.format_help_text(ctx, formatter)
        self.format_options(ctx, formatter)
        if self.name != "rewrite":
            return
        with formatter.section("Commands"):
            rows = [(name, command.get_short_help_str(200)) for name, command in self.siblings.items() if name != "rewrite"]
            formatter.write_dl(rows)
            formatter.write("  A file that is called like a command is given as ./plan. Each command has its --help.\n")
        for title, text in (("Passes", PASSES_TEXT), ("Examples", EXAMPLES), ("Exit codes", EXITS)):
            formatter.write(f"\n{title}:\n{text}")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], INPUTS: [], CHOICE: [], RUNNING: []}
        params: list[Any] = self.get_params(ctx)
        for param in params:
            argument = param.param_type_name == "argument"
            row = (param.metavar, param.help) if argument else param.get_help_record(ctx)
            groups["Arguments" if argument else getattr(param, "rich_help_panel", None) or "Options"].append(row)
        for title, rows in groups.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=34)


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns
