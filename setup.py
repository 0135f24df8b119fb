"""Builds fastgpt._C (CPU operations, pybind11 module) and, where nvcc is found, libfastgpt_cuda.so.

Everything else about the package is in pyproject.toml. Both libraries use PyTorch's stable ABI, so
a build serves every torch from 2.10 on. The work is one build.ninja under build/, kept between
builds. Settings, all environment variables:

    FASTGPT_BUILD_CUDA    1: the CUDA part is a must; 0: leave it out; unset: built if nvcc works
    TORCH_CUDA_ARCH_LIST  GPU architectures, like "8.0;9.0a+PTX"; default: DEFAULT_ARCHS
    MAX_JOBS              how many compilers run at once
    CXX                   the C++ compiler (also nvcc's host compiler)
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_LIBRARY = "fastgpt.libfastgpt_cuda"
# Multiply-adds fuse where the CPU level has them, but not here: results are the reference's, bit for bit.
UNFUSED = "csrc/kv_cache/kv_cache_update_kernels.cpp", "csrc/linear/quantize_kernels.cpp"
TARGET_VERSION = "2.10"  # the oldest torch that a build must load on
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")  # the last also as PTX, for GPUs newer than the compiler

# *_kernels.cpp is compiled once per level and csrc/common/cpu_level.h picks at run time. Without exceptions, whose tables would
# share a symbol between levels.
CPU_LEVELS = {"neon" if platform.machine() in ("aarch64", "arm64") else "baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_LEVELS["avx512"] = CPU_LEVELS["avx2"] + [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ]
    CPU_LEVELS["amx"] = CPU_LEVELS["avx512"] + ["-mamx-tile", "-mamx-bf16"]


def find_sources(pattern):
    """Paths in csrc and its folders."""
    return sorted(map(str, Path("csrc").rglob(pattern)))


def fail(sentence):
    raise SystemExit(f"fastgpt: {sentence}")


def require_tools(*names):
    """Fails with all that is missing of the build's tools, and how to install it, if one of these is."""
    missing = {}
    if int(re.match(r"\d+", setuptools.__version__)[0]) < 77:
        missing["setuptools"] = f'"setuptools>=77" (found {setuptools.__version__})', '"setuptools>=77"'
    if not importlib.util.find_spec("ninja") and not shutil.which("ninja"):
        missing["ninja"] = "ninja", "ninja"
    if not importlib.util.find_spec("pybind11"):
        missing["pybind11"] = "pybind11", '"pybind11>=2.12"'
    if missing.keys() & set(names):
        needed, wanted = zip(*missing.values())
        fail(f"building without isolation needs {', '.join(needed)}: pip install {' '.join(wanted)}")


def torch_paths():
    """(include folder, library folder) of the installed torch."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        fail(
            f"building needs PyTorch {TARGET_VERSION} or newer ({error}): pip install torch first, "
            "or build without --no-build-isolation."
        )
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < tuple(map(int, TARGET_VERSION.split("."))):
        fail(f"building needs PyTorch {TARGET_VERSION} or newer, found {torch.__version__}.")
    folder = Path(torch.__file__).parent
    return folder / "include", folder / "lib"


def find_cxx():
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for command in wanted:
        if shutil.which(shlex.split(command)[0]):
            return command
    fail(f"no C++ compiler found (looked for {', '.join(wanted)}): install g++ or set CXX.")


def find_python_headers(cxx):
    """The compiler's options for Python.h, which Debian has in a package of its own."""
    folders = sorted({sysconfig.get_path("include"), sysconfig.get_path("platinclude")})
    options = [word for folder in folders for word in ("-isystem", folder)]
    command = [*shlex.split(cxx), *options, "-E", "-x", "c++", "-include", "Python.h", os.devnull]
    if subprocess.run(command, capture_output=True).returncode != 0:
        fail(f"no Python.h found (looked in {', '.join(folders)}): install python3-dev, or what your system calls it.")
    return options


def cpu_levels(cxx):
    """Those of CPU_LEVELS that the compiler knows: GCC has AMX since version 11."""

    def compiles(flags):
        command = [*shlex.split(cxx), *flags, "-E", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    return {level: flags for level, flags in CPU_LEVELS.items() if compiles(flags)}


def find_ninja():
    try:
        path = shutil.which("ninja", path=importlib.import_module("ninja").BIN_DIR)
    except ImportError:
        path = None
    return path or shutil.which("ninja")


def find_nvcc():
    """Path of nvcc from CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel, or None."""
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    folders += [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    for site in (sysconfig.get_path("purelib"), *sys.path):
        folders += sorted(Path(site, "nvidia").glob("cu*/bin"))
    return next(filter(None, (shutil.which("nvcc", path=str(f)) for f in folders)), None)


def cuda_archs(nvcc):
    """Architectures to build for, like ["8.0", "9.0a", "10.0+PTX"]."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        archs = re.split(r"[;,\s]+", listed.strip(" ;,"))
        for arch in archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                fail(f'TORCH_CUDA_ARCH_LIST: expected entries like "8.0", "9.0a" or "10.0+PTX", got {arch!r}.')
        return archs
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in DEFAULT_ARCHS if "compute_" + arch.replace(".", "") in known]
    archs = archs or DEFAULT_ARCHS  # and nvcc will say what is wrong with it
    return [*archs[:-1], archs[-1] + "+PTX"]


def nvcc_version(nvcc):
    """Its CUDA version, like "13.0", or "" if it does not say."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else ""


def mismatch(nvcc_cuda):
    """Why libraries that an nvcc of this version compiles do not run beside the installed torch, and what to do; or None."""
    torch_cuda = getattr(getattr(importlib.import_module("torch"), "version", None), "cuda", None)
    if not nvcc_cuda or not torch_cuda:  # a CPU build of torch says nothing about where the library will be used
        return None
    ours, theirs = nvcc_cuda.partition(".")[0], torch_cuda.partition(".")[0]
    if ours == theirs:
        return None
    return (
        f"nvcc is of CUDA {nvcc_cuda} and torch {torch_cuda}, whose majors must be the same: set CUDA_HOME to a CUDA {theirs} "
        f"or install a torch for CUDA {ours}"
    )


def gencode(archs):
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    def get_ext_filename(self, fullname):
        # Not a Python module, so its name carries no Python version. (Called with and without package.)
        if fullname.split(".")[-1] == CUDA_LIBRARY.split(".")[-1]:
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self):
        if sys.platform == "win32":
            fail("Windows is not supported: build in WSL, on Linux or on macOS.")
        require_tools("ninja", "pybind11")
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not re.fullmatch("[1-9][0-9]*", jobs):
            fail(f"MAX_JOBS: expected an integer >= 1 or unset, got {jobs!r}.")
        self.cxx, self.ninja = find_cxx(), find_ninja()
        self.includes = ["-isystem", importlib.import_module("pybind11").get_include(), *find_python_headers(self.cxx)]
        self.torch_include, self.torch_lib = torch_paths()
        self.folder = Path("build", f"ninja-{sys.implementation.cache_tag}-{platform.machine()}")
        self.folder.mkdir(parents=True, exist_ok=True)

        wish = os.environ.get("FASTGPT_BUILD_CUDA", "")
        if wish not in ("", "0", "1"):
            fail(f"FASTGPT_BUILD_CUDA: expected 0, 1 or unset, got {wish!r}.")
        nvcc = None if wish == "0" else find_nvcc()
        if wish == "1" and nvcc is None:
            fail("FASTGPT_BUILD_CUDA=1, but nvcc is not in CUDA_HOME, PATH or an nvidia-cuda-nvcc wheel.")
        self.cuda_version = nvcc_version(nvcc) if nvcc else ""
        problem = mismatch(self.cuda_version)
        if problem and wish == "1":
            fail(f"FASTGPT_BUILD_CUDA=1, but {problem}.")
        if problem:
            print(f"fastgpt: WARNING: the CUDA library was left out: {problem}.", file=sys.stderr)
            nvcc = None
        archs = cuda_archs(nvcc) if nvcc else []

        failed = self.compile(nvcc, archs)
        if failed and archs and wish != "1":
            # A broken CUDA toolkit is no reason to go without the CPU operations.
            archs = []
            failed = self.compile(nvcc, archs)
            if not failed:
                print(
                    "fastgpt: WARNING: the CUDA library was left out, because nvcc failed (see above). "
                    "FASTGPT_BUILD_CUDA=1 makes that an error, FASTGPT_BUILD_CUDA=0 skips it.",
                    file=sys.stderr,
                )
        if failed:
            fail("compilation failed; the compiler's message is above.")

        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            if extension.name == CUDA_LIBRARY and not archs:
                target.unlink(missing_ok=True)  # an earlier build's
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(self.folder / target.name), str(target))

    def copy_extensions_to_source(self):
        # For --inplace and editable installs; a CUDA library of an earlier build must not stay.
        Path(self.get_ext_filename(CUDA_LIBRARY)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def compile(self, nvcc, archs):
        """Builds both libraries into self.folder, the CUDA one only for some archs; True if it failed."""
        (self.folder / "build.ninja").write_text(self.build_ninja(nvcc, archs))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [self.ninja, "-f", str(self.folder / "build.ninja"), *jobs]
        return subprocess.run(command).returncode != 0

    def build_ninja(self, nvcc, archs):
        lines = [f"builddir = {self.folder}"]

        def rule(name, command, depfile=False):
            lines.extend([f"rule {name}", f"  description = {name} $out", f"  command = {command}"])
            if depfile:
                lines.extend(["  depfile = $out.d", "  deps = gcc"])

        def compile_each(rule, sources, flags=(), suffix=".o"):
            objects = [str(self.folder / (Path(source).name + suffix)) for source in sources]
            for source, output in zip(sources, objects):
                contract = [f"-ffp-contract={'off' if source in UNFUSED else 'fast'}"] if rule == "cxx" else []
                lines.extend([f"build {output}: {rule} {source}", f"  flags = {join([*contract, *flags])}"])
            return objects

        def link(rule, name, objects):
            output = self.folder / Path(self.get_ext_filename(name)).name
            lines.append(f"build {output}: {rule} {' '.join(objects)}")

        major, minor = map(int, TARGET_VERSION.split("."))
        common = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", "-isystem", self.torch_include]
        common += [f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#018x}ULL"]
        levels = cpu_levels(self.cxx)
        cxxflags = [*common, "-fPIC", "-fvisibility=hidden", "-Wall"]
        cxxflags += ["-DFASTGPT_HAS_AMX"] if "amx" in levels else []
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        # libtorch_cpu exports some functions of libstdc++ too; the first library named is the one used.
        torch_cpu = [*(["-lstdc++"] if sys.platform == "linux" else []), f"-L{self.torch_lib}", "-ltorch_cpu"]
        rule("cxx", f"{self.cxx} $flags {join(cxxflags)} -MD -MF $out.d -c $in -o $out", depfile=True)
        # Before glibc 2.34, threads and dlopen are in libraries of their own.
        system = ["-pthread", "-ldl"] if sys.platform == "linux" else []
        rule("link", f"{self.cxx} {join(shared)} $in {join(torch_cpu + system)} -o $out")

        bindings, kernels = "csrc/bindings.cpp", find_sources("*_kernels.cpp")
        others = sorted(set(find_sources("*.cpp")) - {bindings, *kernels})
        facts = [*self.includes, f'-DFASTGPT_CUDA_ARCHS="{" ".join(archs)}"']
        facts += [f'-DFASTGPT_CUDA_VERSION="{self.cuda_version if archs else ""}"']
        facts += [f'-DFASTGPT_CPU_LEVELS="{" ".join(levels)}"']
        objects = compile_each("cxx", [bindings], facts) + compile_each("cxx", others)
        for level, flags in levels.items():
            flags = [f"-DFASTGPT_CPU_LEVEL={level}", "-fno-exceptions", *flags]
            objects += compile_each("cxx", kernels, flags, f".{level}.o")
        link("link", "fastgpt._C", objects)

        if archs:
            flags = [*common, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode(archs)]
            if os.environ.get("CXX"):
                flags += ["-ccbin", [w for w in shlex.split(self.cxx) if not w.startswith("-")][-1]]
            # libtorch.so is a shell around libtorch_cpu and, in a CUDA build of torch, libtorch_cuda:
            # the CUDA stream's functions are found through it, and it exists in every build.
            libraries = ["--cudart=static", "-Xlinker=--no-as-needed", *torch_cpu, "-ltorch"]
            # The wheels have lib/ where their nvcc looks for lib64/.
            libraries += [f"-L{Path(nvcc).resolve().parents[1] / 'lib'}"]
            nvcc = join([nvcc, *flags])
            rule("nvcc", f"{nvcc} -MD -MF $out.d -c $in -o $out", depfile=True)
            rule("nvlink", f"{nvcc} -shared $in {join(libraries)} -o $out")
            link("nvlink", CUDA_LIBRARY, compile_each("nvcc", find_sources("*.cu")))
        return "\n".join(lines) + "\n"


def join(words):
    """A command line for build.ninja: quoted for the shell, with ninja's $ escaped."""
    return shlex.join(map(str, words)).replace("$", "$$")


require_tools("setuptools")  # before an old one fails to read pyproject.toml, at length
setup(
    ext_modules=[
        Extension("fastgpt._C", find_sources("*.cpp")),
        Extension(CUDA_LIBRARY, find_sources("*.cu"), optional=True),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
