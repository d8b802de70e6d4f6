"""Compiles the kernels into the wheel if a C++ compiler is at hand; all else is said in pyproject.toml.

Without a compiler the wheel is pure Python, and kernels are compiled where and when they are first used. So they
are in an editable install.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CPU = Path("kvcfg/kernels/cpu")


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self._compile(runpy.run_path(str(CPU / "build.py")))

    def _compile(self, build: dict) -> None:
        folder = Path(self.build_lib) / CPU
        for stale in folder.glob("*.so"):
            stale.unlink()
        try:
            for name in build["kernels"]():
                self.announce(f"compiling kernel {name}", level=2)
                build["compile_kernel"](name, folder)
        except build["BUILD_ERRORS"] as error:
            self.warn(f"the wheel lacks compiled kernels: {build['reason'](error)}")


class WheelWithKernels(bdist_wheel):
    def run(self) -> None:
        self.run_command("build_py")
        built = Path(self.get_finalized_command("build_py").build_lib) / CPU
        if any(built.glob("*.so")):
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        # The libraries are called through a plain C interface, so any Python 3 will do.
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
