"""A cache of compiled kernels, one per user, that all copies of this program on a machine share.

Numba's own caches belong to one folder of code, so that every new clone compiles again. This one goes by content: the
name of a kernel's folder is a digest of its source and of what it is compiled with. Numba itself adds the CPU and the
argument types.

Numba's classes for this are not public. Where they are absent or have changed, Numba's own cache is used.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np

from shard_tools.system.library_caches import user_folder

Function = TypeVar("Function", bound=Callable[..., Any])
_INLINING = Path(__file__).with_name("inlining.py")
_CONSTANTS = (bool, int, float, complex, str, bytes, np.generic)  # what Numba compiles into a kernel


def kernel(**options: Any) -> Callable[[Function], Function]:
    """A decorator: `numba.njit` with these options, and the shared cache."""
    from numba import njit  # not at the top: compile_ahead.py is imported where Numba may be missing

    def compile_function(function: Function) -> Function:
        compiled: Function = njit(**options)(function)
        return share_cache(compiled)

    return compile_function


def share_cache(kernel: Function) -> Function:
    """Give a function from `numba.njit` the shared cache, if its folder is this user's alone, or else Numba's.

    NUMBA_CACHE_DIR and NUMBA_CACHE_LOCATOR_CLASSES, where the user has set them, come first.
    """
    compiled: Any = kernel
    if hasattr(compiled, "enable_caching"):  # with NUMBA_DISABLE_JIT it is the Python function itself
        try:
            compiled._cache = _cache_class()(compiled.py_func)
        except (ImportError, AttributeError, TypeError):
            compiled.enable_caching()
    return kernel


def cached_signatures(kernel: Callable[..., Any]) -> list[str] | None:
    """The types of arguments that the cache has a kernel for, for any CPU, as text; None where that cannot be told."""
    try:
        return [str(signature) for signature, *_ in cast(Any, kernel)._cache._cache_file._load_index()]
    except AttributeError:
        return None
    except Exception:  # whatever unpickling a damaged index raises: it will be written anew
        return []


def kernel_digest(function: Callable[..., Any]) -> str:
    """A digest of all that a kernel is compiled from: its file, the numbers that the file imports, and the compiler.

    Part of the compiler is inlining.py. Functions that the file imports are not in it: a kernel's steps are all in its
    own file.
    """
    constants = {name: repr(value) for name, value in function.__globals__.items() if _is_constant(name, value)}
    compiler = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    told = repr((sorted(constants.items()), compiler, platform.python_version(), function.__module__))
    sources = Path(inspect.getfile(function)).read_bytes() + _INLINING.read_bytes()
    return hashlib.sha256(sources + told.encode()).hexdigest()


def shared_folder() -> Path | None:
    """The user's folder for kernels, made if need be.

    None where that fails, or where others may write to it, since Numba runs the code in it.
    """
    above = user_folder("XDG_CACHE_HOME", ".cache") / "needlestream"
    for folder in (above, above / "kernels"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
        except OSError:
            return None
        if about.st_uid != os.getuid() or about.st_mode & 0o022:
            return None
    return folder


def _is_constant(name: str, value: object) -> bool:
    return not name.startswith("__") and isinstance(value, _CONSTANTS)


@functools.cache
def _cache_class() -> Any:
    """Numba's cache of a function, in the shared folder, and able to live with damage."""
    import numba.core.caching

    caching: Any = numba.core.caching  # its types cannot be relied upon either

    locator = _locator_class(caching)

    class SharedFiles(caching.CompileResultCacheImpl):  # type: ignore[misc]
        _first, *_others = caching.CacheImpl._locator_classes
        _locator_classes = (_first, locator, *_others)  # the first is that of NUMBA_CACHE_DIR

    class KernelCache(caching.FunctionCache):  # type: ignore[misc]
        """A cache in which damage costs a compilation, not the run."""

        _impl_class = SharedFiles

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except Exception:  # whatever unpickling a damaged file raises
                with contextlib.suppress(OSError):
                    self.flush()
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            with contextlib.suppress(Exception):  # a full disk, or a damaged index: the kernel is there all the same
                super().save_overload(sig, data)

    return KernelCache


def _locator_class(caching: Any) -> Any:
    """What tells Numba where the files of a kernel lie, for its module of caches."""

    class Locator(caching._CacheLocator):  # type: ignore[misc]
        """Where a kernel's files lie."""

        def __init__(self, py_func: Callable[..., Any], py_file: str, folder: Path) -> None:
            self._py_file, self._lineno = py_file, py_func.__code__.co_firstlineno
            self._stamp = kernel_digest(py_func)
            self._folder = folder / self._stamp[:16]

        @classmethod
        def from_function(cls, py_func: Callable[..., Any], py_file: str) -> Self | None:
            folder = shared_folder()
            try:
                if folder is not None:
                    locator = cls(py_func, py_file, folder)
                    locator.ensure_cache_path()
                    return locator
            except OSError:
                pass
            return None

        def get_cache_path(self) -> str:
            return str(self._folder)

        def get_source_stamp(self) -> str:
            return self._stamp

        def get_disambiguator(self) -> str:
            return str(self._lineno)

    return Locator
