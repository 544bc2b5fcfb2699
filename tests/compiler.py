"""Whether what has to be translated to machine code can be."""

from __future__ import annotations

import pytest
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler


def has_compiler() -> bool:
    """Whether torch finds a C++ compiler."""
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
