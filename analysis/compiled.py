"""Numpy loops that are compiled to machine code when they are first called.

Loading numba takes a second, and a kept answer does not need it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, update_wrapper
from pathlib import Path
from threading import RLock
from types import FunctionType
from typing import Any, ClassVar, TypeVar, cast

from analysis.fingerprint import fingerprint, frozen

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LOCK = RLock()  # guards compilation: threads of a scan may call a kernel for the first time simultaneously


class Kernel:
    """A loop, called like its function; other kernels may call it."""

    targetoptions: ClassVar[dict[str, bool]] = {"nopython": True, "nogil": True}
    """Options of numba; a part of the fingerprint."""

    def __init__(self, function: FunctionType) -> None:
        update_wrapper(self, function)
        self.py_func = function
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """The result of the loop."""
        return (self._compiled or self.compiled)(*arguments)

    @property
    def compiled(self) -> Any:
        """The numba dispatcher."""
        with _LOCK:
            if self._compiled is None:
                self._compiled = _compile(self.py_func)
        return self._compiled


def kernel(function: _Function) -> _Function:
    """Compile a numpy loop to machine code that runs without the interpreter lock, when it is first called.

    It is cached for the next process if a folder is writable: next to the code, or in the user's cache. It is compiled
    again when its file changes, or when something that the file imports by name changes: kernels that it may call, and
    constants.
    """
    return cast(_Function, Kernel(cast(FunctionType, function)))


def _compile(function: FunctionType) -> Any:
    import numba

    _let_kernels_call_kernels()
    compiled = numba.njit(nogil=True)(function)
    try:
        taken = _taken(function)
        compiled.enable_caching()
    except (RuntimeError, ValueError):  # no writable folder, as in containers; no file, as in notebooks
        return compiled
    file = compiled._cache._cache_file  # numba only checks the function's own file for changes
    file._source_stamp = (file._source_stamp, taken)
    return compiled


@cache
def _let_kernels_call_kernels() -> None:
    """Teach numba to resolve a kernel that another kernel refers to by name."""
    from numba.extending import typeof_impl

    typeof_impl.register(Kernel, lambda value, context: typeof_impl(value.compiled, context))


def _taken(function: FunctionType) -> str:
    """A fingerprint of what a function's file imports and machine code may contain.

    Raises
    ------
    ValueError
        When the function is not in a file, or the imports cannot be fingerprinted.
    """
    own = function.__code__.co_filename
    if not Path(own).is_file():
        raise ValueError(f"{own} is not a file")
    return fingerprint(frozen(function.__globals__, own))
