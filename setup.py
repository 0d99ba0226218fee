"""Builds roll_ckpt.native._native and roll_ckpt.pth. Everything else about the package stands in pyproject.toml.

ROLL_CKPT_CUDA=auto (default) compiles the CUDA part if nvcc is found, 1 demands it, 0 leaves it out.
ROLL_CKPT_CXXFLAGS adds compiler and linker flags, such as -fsanitize=thread.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Real code from Turing to Hopper. Later devices compile PTX when it is first loaded; earlier ones do without.
CUDA_TARGETS = [
    "-gencode=arch=compute_75,code=sm_75",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]


def find_cuda() -> Path | None:
    """The CUDA toolkit's directory, or None if the extension is to be built without CUDA."""
    wish = os.environ.get("ROLL_CKPT_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"ROLL_CKPT_CUDA={wish!r}: must be auto, 0 or 1")
    if wish == "0":
        return None
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home).resolve()
    nvcc = shutil.which("nvcc")
    if nvcc:
        plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        for line in plan.splitlines():
            if line.startswith("#$ TOP="):
                return Path(line.removeprefix("#$ TOP=")).resolve()
        if wish == "auto":
            print(f"roll_ckpt: {nvcc} does not say where its toolkit lies; building without CUDA")
    if wish == "1":
        raise SystemExit("ROLL_CKPT_CUDA=1, but there is no CUDA toolkit: set CUDA_HOME")
    return None


class BuildNative(build_ext):
    """build_ext that compiles gather.cu too, and rebuilds when a header or the way to build changed."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        cuda = find_cuda()
        flags = shlex.split(os.environ.get("ROLL_CKPT_CXXFLAGS", ""))
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        ext.extra_compile_args += flags
        ext.extra_link_args += flags
        if cuda:
            ext.define_macros.append(("ROLL_CKPT_CUDA", "1"))
            ext.include_dirs.append(str(cuda / "include"))
            ext.library_dirs += [str(p) for p in (cuda / "lib64", cuda / "lib") if p.exists()]
            ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.depends.append(self.stamp(temp, f"cuda={cuda} flags={flags}"))
        if cuda and self.outdated(ext):
            ext.extra_objects.append(self.compile_cuda(cuda, temp))
        with ParallelCompile(default=os.cpu_count() or 1, max=8):
            super().build_extension(ext)

    def stamp(self, temp: Path, text: str) -> str:
        """A file that is newer than the extension if the way to build it has changed since."""
        path = temp / "how"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return str(path)

    def outdated(self, ext: Pybind11Extension) -> bool:
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [*ext.sources, *ext.depends]
        return (
            bool(self.force)
            or not target.exists()
            or any(Path(source).stat().st_mtime > target.stat().st_mtime for source in inputs)
        )

    def compile_cuda(self, cuda: Path, temp: Path) -> str:
        target = temp / "gather.o"
        nvcc = str(cuda / "bin" / "nvcc")
        command = [nvcc, "-c", "csrc/gather.cu", "-o", str(target), "-O3", "-std=c++17", *CUDA_TARGETS]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        print(shlex.join(command))
        if subprocess.run(command).returncode:
            raise SystemExit(
                f"roll_ckpt: {nvcc} cannot compile csrc/gather.cu, for the reason above. Set CUDA_HOME to another "
                "toolkit, or ROLL_CKPT_CUDA=0 to build without CUDA: then only tensors of the CPU can be saved"
            )
        return str(target)


class BuildPth(build_py):
    """build_py that also makes roll_ckpt.pth, which Python runs at its start if it lies right in site-packages.

    An editable wheel holds no modules, but it does hold what lies in the folder that `install` has for them.
    """

    def run(self) -> None:
        super().run()
        folder = Path(self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib)
        folder.mkdir(parents=True, exist_ok=True)
        source = Path("roll_ckpt/activation/startup.py").read_text(encoding="ascii")
        name = "roll_ckpt.activation.startup"  # the text goes to exec itself: compile() would load ast, for 2 ms
        line = f"import sys; exec({source!r}, {{'__name__': {name!r}}})\n"
        folder.joinpath("roll_ckpt.pth").write_text(line, encoding="ascii")


setup(
    packages=[*find_packages(include=["roll_ckpt*"]), "roll_ckpt_hub_dev"],
    package_dir={"roll_ckpt_hub_dev": "tests/hub_dev"},
    ext_modules=[
        Pybind11Extension(
            "roll_ckpt.native._native",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*.cu")),
            cxx_std=20,
            extra_compile_args=["-O3", "-g0", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPth},
)
