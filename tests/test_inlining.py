"""The promises of steps that kernels inline: results are the same, and Numba optimises them once."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numba import njit

from pipeline import inlining


def kernel_and_step() -> tuple[Any, Any]:
    @inlining.inlined(fastmath=True, forceinline=True)
    def add_square(values: Any, number: float) -> None:
        for place in range(len(values)):
            values[place] += number * number

    @njit
    def add_squares(values: Any) -> None:
        for number in range(3):
            add_square(values, float(number))

    return add_squares, add_square


@pytest.fixture(params=[True, False])
def has_classes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether Numba's classes are there."""
    if not request.param:
        monkeypatch.setitem(sys.modules, "numba.core.compiler", None)
    inlining._compiler_class.cache_clear()
    yield request.param
    inlining._compiler_class.cache_clear()


def test_a_step_is_optimised_within_its_callers_alone_where_numba_allows_it(
    has_classes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, step = kernel_and_step()
    monkeypatch.undo()  # Numba imports the module when it compiles
    values = np.arange(4.0)
    kernel(values)
    assert values.tolist() == [5, 6, 7, 8]
    (alone,), (whole,) = step.inspect_llvm().values(), kernel.inspect_llvm().values()
    assert "x double>" in whole  # a loop is vectorised where it is optimised
    assert ("x double>" in alone) != has_classes
