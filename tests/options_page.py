"""Writes docs/options.md from the options of all scripts: `python tests/options_page.py`. A test fails if this is
needed.

An option is a field of a script's dataclass. Its docstring is shown here as the only long explanation.
"""

import ast
import sys
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from importlib import import_module
from inspect import getsource
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "options.md"
CONFIGS = {"capture": "jobs.capturing.options", "importance": "jobs.capturing.importance_options"}
"""Modules of options, for scripts that have them in another module."""
METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}
BEGINNING = """# Options

All options of the scripts, including those that `--help` does not explain. An option is written with underscores or
with dashes; one that may be repeated is given once for each value. A place is `STORE/DATASET`, or `STORE` for all data
sets of a store.

This page is generated from the code by `python tests/options_page.py`.
"""


def config_of(script: str) -> type[Any]:
    """The dataclass of a script's options."""
    module = import_module(CONFIGS.get(script, f"jobs.{script}"))
    [found] = [
        each
        for name, each in vars(module).items()
        if name.endswith("Config") and each.__module__ == module.__name__ and isinstance(each, type)
    ]
    return found


def options(config: type[Any]) -> Iterator[tuple[Field[Any], Any, str]]:
    """Fields that can be given, with their types and descriptions; inherited fields come last."""
    hints, own = get_type_hints(config, include_extras=True), set(vars(config).get("__annotations__", {}))
    said = {name: text for base in config.__mro__[-2::-1] for name, text in _docstrings(base).items()}
    for field in sorted(fields(config), key=lambda each: each.name not in own):
        if tyro.conf.Suppress not in get_args(hints[field.name]):
            yield field, hints[field.name], said[field.name]


def _docstrings(config: type[Any]) -> dict[str, str]:
    """The docstring or help of each field."""
    [definition] = ast.parse(getsource(config)).body
    assert isinstance(definition, ast.ClassDef)
    said: dict[str, str] = {}
    hints = get_type_hints(config, include_extras=True)
    for node, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            helps = [getattr(each, "help", None) for each in get_args(hints[name])[1:]]
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                said[name] = " ".join(str(after.value.value).split())
            elif found := [each for each in helps if each]:
                said[name] = " ".join(found[0].split())
    return said


def written(field: Field[Any], hint: Any) -> str:
    """An option as typed: `--top N`."""
    positional = tyro.conf.Positional in get_args(hint)
    value = _value(hint)
    if positional:
        return field.name.upper()
    return f"--{field.name}{f' {value}' if value else ''}"


def _value(hint: Any) -> str:
    """The placeholder of an option's value; empty for a switch."""
    if get_origin(hint) is Annotated:
        return _value(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return _value(next(kind for kind in get_args(hint) if kind is not types.NoneType))
    if get_origin(hint) is tuple:
        return _value(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return "" if hint is bool else METAVARS[hint]


def section(script: str) -> str:
    """The section about one script's options."""
    config = config_of(script)
    about = " ".join((config.__doc__ or "").split())
    lines = [f"## {script}", "", about, ""]
    for field, hint, said in options(config):
        default = "" if field.default in (MISSING, None, (), False) else f" Default: {field.default}."
        known = default if "Default:" not in said else ""
        lines.append(f"- `{written(field, hint)}`: {said}{known}")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    from jobs.console.command import commands

    scripts = [name for name in commands() if name != "demo"]
    return "\n\n".join([BEGINNING.rstrip(), *map(section, scripts)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
