"""Build entry point: pyproject.toml declares everything else, native_build.py compiles `csrc/`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build does not run in this folder

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402

import native_build  # noqa: E402

PACKAGE = "adajudge_kernels"
# Why the installed package has no compiled module; adajudge_kernels/compiled.py reads it.
REASON = "_native_missing.txt"

reason = native_build.reason_not_to_build()


class BuildModule(build_ext):
    """The compiled module, by ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Objects stay in build/, from where a second build goes on."""
        folder = Path(self.build_temp)
        if self.editable_mode:  # setuptools' folder is a temporary one then
            folder = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        native_build.build_module(folder, Path(self.get_ext_fullpath(ext.name)))

    def run(self) -> None:
        """An earlier installation's reason is no longer true."""
        super().run()
        if reason is not None and self.inplace:
            print(f"nothing was compiled, and what is there stays: {reason}")
        if self.extensions and self.inplace:
            (ROOT / PACKAGE / REASON).unlink(missing_ok=True)


class BuildPackage(build_py):
    """The Python files, and the reason why there is no compiled module."""

    def run(self) -> None:
        """Says it now, and in the package."""
        super().run()
        if reason is None:
            return
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE
        for module in package.glob("_native.*.so"):
            module.unlink()
        (package / REASON).write_text(reason + "\n")
        print(f"adajudge-kernels without its compiled kernels: {reason}")


setup(
    ext_modules=[]
    if reason
    else [
        Extension(f"{PACKAGE}._native", sorted(str(s.relative_to(ROOT)) for s in ROOT.glob("csrc/**/*.cpp")))
    ],
    cmdclass={"build_ext": BuildModule, "build_py": BuildPackage},
)
