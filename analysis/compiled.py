"""Numpy loops that become machine code when they are first called.

numba takes a second to load, and an answer that is kept needs none of it.
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
_LOCK = RLock()  # of what is compiled: threads of a scan call a kernel for the first time at the same moment


class Kernel:
    """A loop, called as its function is; other kernels may call it."""

    targetoptions: ClassVar[dict[str, bool]] = {"nopython": True, "nogil": True}
    """As numba names them; a part of the fingerprint."""

    def __init__(self, function: FunctionType) -> None:
        update_wrapper(self, function)
        self.py_func = function
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """What the loop gives."""
        return (self._compiled or self.compiled)(*arguments)

    @property
    def compiled(self) -> Any:
        """numba's dispatcher."""
        with _LOCK:
            if self._compiled is None:
                self._compiled = _compile(self.py_func)
        return self._compiled


def kernel(function: _Function) -> _Function:
    """Compile a numpy loop to machine code that runs without the interpreter lock, when it is first called.

    It is kept for the next process where some folder can be written: beside the code, or in the user's cache. It is
    compiled anew when its file changes, or what the file takes from others by name: kernels that it may call, and
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
    except (RuntimeError, ValueError):  # no folder can be written, as in containers; no file, as in notebooks
        return compiled
    file = compiled._cache._cache_file  # numba compares only the function's own file with what it was compiled from
    file._source_stamp = (file._source_stamp, taken)
    return compiled


@cache
def _let_kernels_call_kernels() -> None:
    """Tell numba what a kernel is that another one refers to by its name."""
    from numba.extending import typeof_impl

    typeof_impl.register(Kernel, lambda value, context: typeof_impl(value.compiled, context))


def _taken(function: FunctionType) -> str:
    """A fingerprint of what a function's file has taken from others that machine code may hold.

    Raises
    ------
    ValueError
        When the function is in no file, or that cannot be told.
    """
    own = function.__code__.co_filename
    if not Path(own).is_file():
        raise ValueError(f"{own} is no file")
    return fingerprint(frozen(function.__globals__, own))
