"""Command lines: from a typed dataclass to its options, with one-line errors."""

import difflib
import types
from collections.abc import Sequence, Set
from dataclasses import fields, replace
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jobs.console.starting import as_typed

Config = TypeVar("Config")
REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`int | None` is an option that takes an integer or is left out; None is not typed."""
    given = [kind for kind in get_args(info.type) if kind is not types.NoneType]
    if get_origin(info.type) not in (Union, types.UnionType) or len(given) != 1:
        return None
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(given[0], set(info.markers)))
    if not isinstance(inner, PrimitiveConstructorSpec):
        return None
    return replace(
        inner,
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: [] if value is None else inner.str_from_instance(value),
    )


def parse(config: type[Config], script: str, arguments: Sequence[str], *, default: Config | None = None) -> Config:
    """The options of a script, from its command line.

    Parameters
    ----------
    config
        A dataclass; each field is an option.
    script
        The script's name: "report".
    default
        Values of the options that are not given; default those of the dataclass.

    Raises
    ------
    ValueError
        When there is no such option (the message suggests the nearest), or there are too many values.
    SystemExit
        When a value is invalid, or a required one is missing.
    """
    names = [field.name for field in fields(config)]  # type: ignore[arg-type]
    options = {f"--{name}" for name in names} | {f"--no_{name}" for name in names} | {"--help"}
    for word in arguments:  # before tyro reports missing options
        name = word.partition("=")[0]
        if name.startswith("--") and name != "--" and _with_underscores(name) not in options:
            raise ValueError(f"unknown option {name}: {_meant(name, options)}{_all_options(script)}")
    parsed: Config
    parsed, unknown = tyro.cli(
        config,
        prog=as_typed(f"python jobs/{script}.py"),
        args=list(arguments),
        use_underscores=True,
        registry=REGISTRY,
        return_unknown_args=True,
        default=tyro.MISSING_NONPROP if default is None else default,
    )
    if unknown:
        what = f"unknown option {unknown[0]}" if unknown[0].startswith("-") else f"unexpected value {unknown[0]!r}"
        raise ValueError(f"{what}: {_all_options(script)}")
    return parsed


def _with_underscores(option: str) -> str:
    return "--" + option[2:].replace("-", "_")


def _meant(option: str, options: Set[str]) -> str:
    near = difflib.get_close_matches(_with_underscores(option), sorted(options), n=1)
    return f"did you mean {near[0]}? " if near else ""


def _all_options(script: str) -> str:
    return f"{as_typed(f'python jobs/{script}.py')} --help lists the options"
