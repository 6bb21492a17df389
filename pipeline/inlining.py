"""A compiler for functions that are only called by compiled kernels.

Numba optimises every function alone, and again within each function that inlines it. Here the first is left out, which
takes a quarter off the time to compile the kernels (docs/performance.md).

Numba's classes for this are not public. Where they are absent, functions are optimised twice.
"""

import functools
from collections.abc import Callable
from typing import Any

from pipeline.kernel_cache import Function


def inlined(**options: Any) -> Callable[[Function], Function]:
    """A decorator: `numba.njit` with these options, for a function that is inlined wherever it is called."""
    from numba import njit

    compiler = _compiler_class()
    step: Callable[[Function], Function] = njit(**options, **({"pipeline_class": compiler} if compiler else {}))
    return step


@functools.cache
def _compiler_class() -> Any:
    """Numba's compiler, except that it does not optimise a function alone; None where there is no such class."""
    try:
        from numba.core.compiler import CompilerBase, DefaultPassBuilder
    except ImportError:
        return None
    passes: Any = DefaultPassBuilder

    class StepCompiler(CompilerBase):
        def define_pipelines(self) -> list[Any]:
            library = self.state.targetctx.codegen().create_library(self.state.func_id.func_qualname)
            library.enable_object_caching()
            library._optimize_final_module = lambda: None
            self.state.library = library
            return [passes.define_nopython_pipeline(self.state)]

    return StepCompiler
