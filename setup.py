"""Maps the root folders to moiety.* and builds the optional kernels; the rest is in pyproject.toml."""

import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDERS = ["compose", "routers", "experts", "analysis"]
KERNELS = "moiety.experts.kernels._cpu"
SOURCES = sorted(str(path) for path in Path("experts/kernels/cpu").glob("*.cpp"))
GATES = "moiety.routers._gates"
GATES_SOURCES = ["routers/kernel/gate.cpp"]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"]
OPENMP = "-fopenmp"
NOTICE = (
    "moiety: the compiled CPU kernels were not built ({reason}); "
    "everything works without them, slowly. Install g++ and moiety again to have them."
)


class BuildKernels(build_ext):
    """Builds the kernels as a plain C library, or says in one line why it does not."""

    def build_extension(self, ext):
        """Never fail: without a compiler moiety runs on PyTorch reference kernels."""
        compiler = (self.compiler.compiler_so or [""])[0]
        if platform.system() != "Linux":
            return self._notice(f"{platform.system()} is not supported yet")
        if shutil.which(compiler) is None:
            return self._notice(f"no compiler {compiler or 'found'}")
        try:
            super().build_extension(ext)
        except Exception as error:
            self._notice(str(error).splitlines()[0])

    def get_ext_filename(self, fullname):
        """No Python version in the name: the library is called through ctypes."""
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext):
        """It is no Python module, so it has no PyInit function."""
        return []

    def _notice(self, reason):
        sys.stderr.write(NOTICE.format(reason=reason) + "\n")

    def copy_extensions_to_source(self):
        """Editable installs copy what was built; what was not is no error."""
        built = [ext for ext in self.extensions if Path(self.get_ext_fullpath_built(ext)).is_file()]
        self.extensions, kept = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = kept

    def get_ext_fullpath_built(self, ext):
        """Where the library lies before it is copied."""
        return Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))


class Wheel(bdist_wheel):
    """One wheel for every Python version of a platform."""

    def get_tag(self):
        """The library depends on the platform only."""
        return "py3", "none", super().get_tag()[2]


mapped = find_packages(include=[glob for folder in FOLDERS for glob in (folder, f"{folder}.*")])

setup(
    include_package_data=False,
    packages=[
        *find_packages(include=["moiety", "moiety.*"]),
        *(f"moiety.{package}" for package in mapped),
    ],
    package_dir={"moiety": "moiety", **{f"moiety.{folder}": folder for folder in FOLDERS}},
    package_data={"moiety": ["py.typed"], "moiety.analysis": ["templates/*"]},
    ext_modules=[
        Extension(KERNELS, SOURCES, extra_compile_args=[*FLAGS, OPENMP], extra_link_args=[OPENMP]),
        Extension(GATES, GATES_SOURCES, extra_compile_args=FLAGS),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
