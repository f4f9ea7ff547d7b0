"""The parts of docs/commands.md that the commands themselves say. `python -m tests.cli.reference` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

import click

from millstream.cli.main import EXIT_CODES, millstream

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
WIDTH = 80


def tree() -> str:
    """All commands with their arguments, one line for each word behind `millstream`."""
    lines = ["millstream"]
    for name, command in _commands(millstream, _root()).items():
        words = _words(command) if not isinstance(command, click.Group) else _branches(command)
        lines.append(f"  {name:<9} {words}".rstrip())
    return "\n".join(lines)


def helps() -> dict[str, str]:
    """What `--help` prints, by the command's full name."""
    root = _root()
    found = {"millstream": millstream.get_help(root)}
    for name, command in _commands(millstream, root).items():
        context = click.Context(command, info_name=name, parent=root)
        found[context.command_path] = command.get_help(context)
        if isinstance(command, click.Group):
            for inner, leaf in _commands(command, context).items():
                below = click.Context(leaf, info_name=inner, parent=context)
                found[below.command_path] = leaf.get_help(below)
    return found


def codes() -> str:
    """The table of exit codes."""
    return "\n".join(
        ["| code | meaning |", "|---|---|", *(f"| {code} | {text} |" for code, text in EXIT_CODES.items())]
    )


def parts() -> dict[str, str]:
    """Each part of the page that is compared, by its name there."""
    return {
        "tree": f"```text\n{tree()}\n```",
        "codes": codes(),
        **{name: f"```text\n$ {name} --help\n{text}\n```" for name, text in helps().items()},
    }


def written(page: str) -> dict[str, str]:
    """The same parts as they stand on the page: between `<!-- name -->` and `<!-- end -->`."""
    return dict(re.findall(r"<!-- ([a-z ]+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))


def _root() -> click.Context:
    return click.Context(millstream, info_name="millstream", terminal_width=WIDTH)


def _commands(group: click.Group, context: click.Context) -> dict[str, click.Command]:
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def _branches(group: click.Group) -> str:
    return " | ".join(f"{name} {_words(command)}".rstrip() for name, command in _commands(group, _root()).items())


def _words(command: click.Command) -> str:
    return " ".join(str(param.metavar) for param in command.params if isinstance(param, click.Argument))


def _write() -> None:
    page = PAGE.read_text("utf-8")
    for name, text in parts().items():
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise SystemExit(f"{PAGE.name} has no place <!-- {name} --> … <!-- end -->")
        page = f"{before}{start}{text}\n{end}{after}"
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    _write()
