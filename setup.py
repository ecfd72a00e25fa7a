"""Builds vitfast: the package mapping and its two extension libraries.

vitfast/_C.abi3.so       csrc/registration.cpp + csrc/cpu/*.cpp; always built, links libtorch_cpu only.
vitfast/_C_cuda.abi3.so  csrc/cuda/*.cu + csrc/cuda/*.cpp; built where a CUDA toolkit (not necessarily a GPU) is found.

Both use PyTorch's stable ABI and Python's limited API: one build serves every Python >= 3.10 and torch >= 2.10.

Environment:
  VITFAST_BUILD         0: install without building (`make` builds in place afterwards).
  VITFAST_BUILD_CUDA    0: never build _C_cuda; 1: build it or fail. Unset: build it if torch was built for CUDA and a
                        toolkit with include/cuda_runtime.h is found. A build that starts and fails stops the install.
  CUDA_HOME, CUDA_PATH  the CUDA toolkit, before any other guess.
  TORCH_CUDA_ARCH_LIST  GPU architectures. Unset: those of the GPUs here; without one "8.0+PTX", which newer GPUs compile
                        for themselves when first loaded. A release sets "8.0;9.0;10.0+PTX".
  MAX_JOBS              compiler processes at a time.
"""

import glob
import os
import re
import shutil
import subprocess
import sys

from setuptools import Extension, find_packages, setup


def nvcc_folder() -> str | None:
    """The toolkit of the nvcc on PATH. nvcc itself says where it lives: the one on PATH may be a wrapper script."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    here = re.search(r"^#\$ _HERE_=(.+)$", listing.stderr, re.MULTILINE)
    return os.path.dirname(here.group(1).strip() if here else os.path.dirname(os.path.realpath(nvcc)))


def find_cuda_toolkit() -> tuple[str | None, list[str]]:
    """The first folder with include/cuda_runtime.h and bin/nvcc, and the folders that were tried."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    default = ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    tried = [folder for folder in [*named, nvcc_folder(), *default] if folder]
    needed = (os.path.join("include", "cuda_runtime.h"), os.path.join("bin", "nvcc"))
    for folder in tried:
        if all(os.path.exists(os.path.join(folder, name)) for name in needed):
            return folder, tried
    return None, tried


def wanted_cuda_toolkit(has_sources: bool, torch_cuda: str | None) -> str | None:
    """The toolkit to build _C_cuda with; None leaves it out. Raises if VITFAST_BUILD_CUDA=1 cannot be met."""
    wish = os.environ.get("VITFAST_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"VITFAST_BUILD_CUDA is {wish!r}; allowed: 0, 1 or unset")
    if wish == "0":
        return None
    folder, tried = find_cuda_toolkit()
    reasons = []
    if not has_sources:
        reasons.append("csrc/cuda has no sources")
    if torch_cuda is None:
        reasons.append("this torch was built without CUDA")
    if folder is None:
        reasons.append(f"no CUDA toolkit with include/cuda_runtime.h and bin/nvcc in {tried or 'any known place'}")
    if not reasons:
        return folder
    if wish == "1":
        raise SystemExit("VITFAST_BUILD_CUDA=1, but " + " and ".join(reasons))
    print("vitfast: not building _C_cuda:", "; ".join(reasons), file=sys.stderr)
    return None


def files(*patterns: str) -> list[str]:
    return sorted(path for pattern in patterns for path in glob.glob(pattern))


CPU_SOURCES = ["csrc/registration.cpp", *files("csrc/cpu/*.cpp")]
CUDA_SOURCES = files("csrc/cuda/*.cu", "csrc/cuda/*.cpp")
HEADERS = files("csrc/*.h", "csrc/cpu/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh")


def extensions() -> tuple[list[Extension], dict[str, type]]:
    import torch

    toolkit = wanted_cuda_toolkit(bool(CUDA_SOURCES), torch.version.cuda)
    if toolkit is not None:
        os.environ["CUDA_HOME"] = toolkit  # read by cpp_extension when it is imported
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            compiler = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
            if shutil.which(compiler[0]) is None:
                raise SystemExit(f"vitfast needs a C++ compiler and found no {compiler[0]!r}: install g++, or set CXX")
            # Source suffix kept, so that layer_norm.cpp and layer_norm.cu do not share an object.
            self.compiler.object_filenames = lambda sources, strip_dir=0, output_dir="": [
                os.path.join(output_dir, source + ".o") for source in sources
            ]
            super().build_extensions()

    # No fast-math: inf and NaN keep their meaning. No contraction: kernels say fma where they want it, so that a
    # recomputed value has the same bits wherever it is recomputed.
    cxx = ["-O3", "-g0", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"]
    cxx += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]  # the last: GCC 12's own intrinsics set it off
    system = []  # as system headers, so that their own warnings stay out
    for folder in cpp_extension.include_paths("cuda" if toolkit else "cpu"):
        system += ["-isystem", folder]
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)]
    common = {"include_dirs": [os.path.abspath("csrc")], "depends": HEADERS, "py_limited_api": True, "language": "c++"}
    found = [
        Extension(
            "vitfast._C",
            CPU_SOURCES,
            define_macros=macros,
            extra_compile_args={"cxx": cxx + system},
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu"],
            **common,
        )
    ]
    if toolkit is not None:
        found.append(
            Extension(
                "vitfast._C_cuda",
                CUDA_SOURCES,
                define_macros=[*macros, ("USE_CUDA", None)],
                extra_compile_args={"cxx": cxx + system, "nvcc": ["-O3", "-lineinfo", *system]},
                library_dirs=cpp_extension.library_paths("cuda"),
                libraries=["torch_cpu", "torch_cuda", "cudart"],
                **common,
            )
        )
    return found, {"build_ext": BuildExtension}


ext_modules, cmdclass = ([], {}) if os.environ.get("VITFAST_BUILD") == "0" else extensions()
setup(
    packages=find_packages(include=["vitfast", "vitfast.*"]),
    package_dir={"vitfast.kernels": "kernels", "vitfast.benchmarks": "benchmarks"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
