"""The page of all commands, made from their parsers while the documentation site is built.

python documentation/make_commands_page.py prints it.
"""

from __future__ import annotations

import argparse
import re

from nnunetv2_mstkd import cli

HEAD = """# Commands

Options may be spelled with one dash or two and with `_` or `-`: `-device` and `--device`, `--disable_tta` and
`--disable-tta`. `mstkd COMMAND --help` prints the same texts. Errors are one line with
[exit code](../unattended.md) 2.
"""

DEFAULT = re.compile(r" \(default: [^)]*\)")


def cell(text: str) -> str:
    """Escape what Markdown would take for markup in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def options(parser: argparse.ArgumentParser) -> list[tuple[str, str, str]]:
    """Group, option and help of each argument of a command."""
    formatter = parser._get_formatter()
    rows = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if (
                isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
                or action.help == argparse.SUPPRESS
            ):
                continue
            value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action)).strip()
            name = " ".join(part for part in (", ".join(action.option_strings), value) if part)
            text = formatter._expand_help(action) if action.help else ""
            required = " **Required.**" if action.option_strings and action.required else ""
            rows.append((group.title or "", f"`{name}`".replace("|", "\\|"), cell(text) + required))
    return rows


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Lines of a table with one row per argument, named groups as rows of their own."""
    lines = ["| argument | meaning |", "|---|---|"]
    title = None
    for group, name, text in rows:
        if group != title and group not in ("positional arguments", "options"):
            lines.append(f"| *{cell(group)}* | |")
        title = group
        lines.append(f"| {name} | {text} |")
    return [*lines, ""]


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The sub-commands of a command by name."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(groups[0].choices) if groups else {}


def command_lines(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """The section of a command: what its sub-commands share, then what only some of them have."""
    lines = [f"## {name}", "", cell(parser.description or ""), ""]
    children = {child: options(its_parser) for child, its_parser in subparsers(parser).items()}
    if not children:
        return lines + table(options(parser))
    texts: dict[tuple[str, str], list[str]] = {}
    for rows in children.values():
        for group, argument, text in rows:
            texts.setdefault((group, argument), []).append(text)
    shared = {key for key, found in texts.items() if len(found) == len(children)}
    rows = [(*key, found[0] if len(set(found)) == 1 else DEFAULT.sub("", found[0])) for key, found in texts.items()]
    lines += [f"All of {', '.join(f'`{child}`' for child in children)}:", ""]
    lines += table([row for row in rows if row[:2] in shared])
    special: dict[tuple, list[str]] = {}
    for child, its_rows in children.items():
        special.setdefault(tuple(row for row in its_rows if row[:2] not in shared), []).append(child)
    for own, names in special.items():
        if own:
            lines += [f"Only {', '.join(f'`{child}`' for child in names)}:", "", *table(list(own))]
    return lines


def page() -> str:
    """The whole page as text."""
    lines = [HEAD]
    for name in cli.COMMANDS:
        lines += command_lines(f"mstkd {name}", subparsers(cli._parser([name]))[name])
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
