"""Lets a kernel run on the threads that torch's OpenMP already has, so that two pools do not fight over the cores.

torch itself calls GOMP_parallel of the first library in the process that has it; the same rule finds it here. GNU's
library has it, and so have LLVM's and Intel's on Linux. Where none is found, a kernel's own threads do the work.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PROCESS = os.getpid()


def share_threads(library: ctypes.CDLL) -> None:
    """Hand torch's OpenMP over to a library that splits its work; one that does not is left alone.

    A child of a fork keeps to threads of its own: OpenMP would wait there for those of the parent.
    """
    if hasattr(library, "kvcfg_share_threads") and os.getpid() == _PROCESS:
        library.kvcfg_share_threads(_gomp_parallel())


def _gomp_parallel() -> ctypes.c_void_p | None:
    """The address of the function that runs torch's parallel loops; None if there is none."""
    torch = sys.modules.get("torch")
    scopes = (None, torch._C.__file__) if torch else ()
    for scope in scopes:
        function = getattr(ctypes.CDLL(scope), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p)
    return None
