"""A hash of what Python code computes: of the code itself, of what it calls, and of the values it is given.

Two things with the same fingerprint compute the same. It covers the loaded code, not files, which may have been edited
since. References of a function are followed: functions, kernels, classes with their bases, and constants. Python and
installed packages enter by their version, arrays by their bytes.

Does not follow what is only known while the code runs: a name that is assembled as text, or the content of a file.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import CodeType, FunctionType, GenericAlias, MethodType, ModuleType, UnionType
from typing import Any

import numpy as np

OURS = ("store", "workers", "analysis", "jobs")  # followed, even if they are installed
PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis)),
    *(np.dtype, GenericAlias, UnionType, typing.TypeVar),
)
UNSAID = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__"),
    *("__static_attributes__", "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__"),
}
"""Attributes of a class that do not affect what it computes."""


def fingerprint(*things: object) -> str:
    """A hash of code and values.

    Parameters
    ----------
    *things
        Functions, kernels, classes, instances whose attributes are such things, and plain values.

    Returns
    -------
    str
        SHA-256, hexadecimal; the same in every process with the same version of Python and of the packages.

    Raises
    ------
    ValueError
        When the behaviour of something among them cannot be determined: an open file, a random number generator, a
        kernel from a notebook cell (numba continues to use the compiled code).
    """
    reader = _Reader()
    reader.read(things)
    return reader.hash.hexdigest()


def frozen(names: Mapping[str, object], file: str) -> dict[str, object]:
    """The names of a module that numba compiles into its kernels, except for the kernels of the module's own file.

    Raises
    ------
    ValueError
        When a module among them is not installed: kernels may call any of its functions.
    """
    kept: dict[str, object] = {}
    for name, value in names.items():
        if isinstance(value, ModuleType) and not _installed(value.__name__):
            raise ValueError(f"{file} refers to the module {value.__name__}: import names from it")
        if loop := _loop(value):
            if loop.__code__.co_filename != file:
                kept[name] = value
        elif not name.startswith("__") and isinstance(value, bool | int | float | complex | str | tuple | np.ndarray):
            kept[name] = value
    return kept


class _Reader:
    """Follows references, each once, and hashes objects in the order in which they are found."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.met: dict[int, tuple[int, object]] = {}  # also the object, so that its id is not reused

    def say(self, *words: object) -> None:
        self.hash.update(repr(words).encode("utf-8", "surrogatepass"))

    def read(self, value: Any) -> None:
        """One value of any kind."""
        if isinstance(value, PLAIN):
            self.say(type(value).__name__, value)
        elif isinstance(value, np.generic | np.ndarray):
            self._array(np.asarray(value))
        elif isinstance(value, tuple | list):
            self._each("sequence", [type(value), *value])
        elif isinstance(value, set | frozenset):
            self._each("set", [type(value), *sorted(map(fingerprint, value))])
        elif isinstance(value, Mapping):
            self._each("mapping", [type(value), *(part for item in value.items() for part in item)])
        elif id(value) in self.met:
            self.say("met", self.met[id(value)][0])
        else:
            self.met[id(value)] = (len(self.met), value)
            self._read_once(value)

    def _each(self, kind: str, values: Iterable[object]) -> None:
        values = list(values)
        self.say(kind, len(values))
        for value in values:
            self.read(value)

    def _array(self, value: np.ndarray) -> None:
        if value.dtype.hasobject:
            self._each(f"objects {value.shape}", value.ravel().tolist())
        else:
            data = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            self.say("array", value.dtype.str, value.shape, data)

    def _read_once(self, value: Any) -> None:
        if loop := _loop(value):
            if not Path(loop.__code__.co_filename).is_file():
                raise ValueError(
                    f"the kernel {loop.__qualname__} is not in a file: its compiled code may be out of date"
                )
            self._each("kernel", [value.targetoptions, loop])
        elif found := _public(value):
            self.say("installed", found)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, ModuleType):
            self.say("module", value.__name__, _installed(value.__name__))
        elif isinstance(value, CodeType):
            self._code(value)
        elif parts := _parts(value):
            self._each(type(value).__name__, parts)
        elif _installed(type(value).__module__) or not hasattr(value, "__dict__"):
            raise ValueError(f"cannot determine what {value!r:.80} ({type(value).__qualname__}) computes")
        else:
            self._each("instance", [type(value), vars(value)])

    def _class(self, value: type) -> None:
        self.say("class", value.__qualname__)
        for base in value.__mro__[:0:-1]:
            self.read(base)
        own = vars(value)
        for name, member in own.items():
            if name not in UNSAID and not (name == "__init__" and "__dataclass_fields__" in own and _generated(member)):
                self._each(name, [member])

    def _function(self, value: FunctionType) -> None:
        self._each("function", [value.__code__, value.__defaults__, value.__kwdefaults__])
        self._each("closure", [cell.cell_contents for cell in value.__closure__ or ()])
        names = sorted(set(_names(value.__code__)))
        for name in names:
            if name in value.__globals__:
                found = value.__globals__[name]
                self._each(name, [found, *_members(found, names)])

    def _code(self, value: CodeType) -> None:
        self.say("code", sys.version_info[:2], value.co_code, value.co_names, value.co_varnames, value.co_freevars)
        self.say(value.co_argcount, value.co_kwonlyargcount, value.co_flags, getattr(value, "co_exceptiontable", b""))
        self._each("constants", value.co_consts)


def _loop(value: Any) -> FunctionType | None:
    """The Python function of a kernel of this package or of numba; None for anything else."""
    found = None if isinstance(value, type | ModuleType) else getattr(value, "py_func", None)
    return found if isinstance(found, FunctionType) else None


def _parts(value: Any) -> list[object]:
    """The parts of a wrapper from the standard library; empty for anything else."""
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, cached_property):
        return [value.func]
    if isinstance(value, staticmethod | classmethod) or type(value).__module__ == "functools":
        return [value.__wrapped__] if hasattr(value, "__wrapped__") else []
    return []


def _generated(member: object) -> bool:
    """Whether `dataclass` generated a class's `__init__`, which sets the values of the instance."""
    return isinstance(member, FunctionType) and member.__code__.co_filename == "<string>"


def _names(code: CodeType) -> Iterator[str]:
    """Names of globals and attributes that code uses, including those of nested functions."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _members(found: object, names: Iterable[str]) -> list[object]:
    """The members that code may use from a followed module, by the names that it contains."""
    if not isinstance(found, ModuleType) or _installed(found.__name__):
        return []
    members = [getattr(found, name) for name in names if hasattr(found, name)]
    return [*members, *(more for member in members for more in _members(member, names))]


def _public(value: Any) -> str:
    """The name and version of an object that an installed module holds under its name; "" for anything else."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", getattr(value, "__name__", None))
    if not (isinstance(module, str) and isinstance(name, str) and (version := _installed(module))):
        return ""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}.{name} of {version}" if found is value else ""


@cache
def _installed(module: str) -> str:
    """The version of Python, or of the installed package that a module belongs to; "" if its code is followed."""
    root = module.partition(".")[0]
    if root == "__main__":
        return ""
    if root in sys.stdlib_module_names:
        return "Python {}.{}.{}".format(*sys.version_info)
    file = getattr(sys.modules.get(module), "__file__", None)
    places = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    if root in OURS or file is None or not any(Path(file).is_relative_to(place) for place in places):
        return ""
    try:
        return f"{root} {version(root)}"
    except PackageNotFoundError:
        return " ".join(f"{name} {version(name)}" for name in packages_distributions().get(root, ()))
