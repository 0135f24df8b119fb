"""The build: what it reports about itself, which symbols it needs, and what it says when it cannot work."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import _C
from fastgpt.cli import info
from fastgpt.cli.main import main
from fastgpt.ops import library
from fastgpt.ops.kv_cache_update import operators, refusals

ROOT = Path(__file__).resolve().parents[1]
MODULE = Path(_C.__file__)
CUDA_LIBRARY = MODULE.parent / "libfastgpt_cuda.so"
TORCH = Path(torch.__file__).parent
LEVELS = ["baseline", "avx2", "avx512", "amx"]  # of x86-64

needs_cuda_library = pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="built without libfastgpt_cuda.so")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
needs_nm = pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="reads ELF symbols with nm")
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")


def run_python(*arguments, cwd=None, **environment):
    environment = {name: str(value) for name, value in environment.items()}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


# What the build reports


def test_build_info():
    info = _C.build_info()
    assert list(info) == ["compiler", "torch_target_version", "cpu_levels", "cpu_level", "cuda_archs", "cuda_version"]
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["torch_target_version"] == "2.10"
    assert info["cpu_levels"] in (LEVELS, LEVELS[:3], ["neon"], LEVELS[:1])  # an old compiler has no AMX
    assert info["cpu_level"] in info["cpu_levels"]
    assert all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch) for arch in info["cuda_archs"])


def test_cuda_library_is_there_exactly_when_reported():
    info = _C.build_info()
    assert CUDA_LIBRARY.exists() == bool(info["cuda_archs"])
    assert re.fullmatch(r"\d+\.\d+" if info["cuda_archs"] else "", info["cuda_version"])


PRINT_LEVEL = "import fastgpt; print(fastgpt._C.build_info()['cpu_level'])"


@pytest.mark.slow
def test_cpu_level_can_be_forced_downwards():
    # Of the levels up to the one that this CPU got by default, each is supported.
    info = _C.build_info()
    for level in info["cpu_levels"][: info["cpu_levels"].index(info["cpu_level"]) + 1]:
        result = run_python("-c", PRINT_LEVEL, FASTGPT_CPU_LEVEL=level)
        assert result.stdout.split() == [level], result.stderr


@pytest.mark.slow
def test_unknown_cpu_level_is_a_clear_error():
    result = run_python("-c", PRINT_LEVEL, FASTGPT_CPU_LEVEL="avx1024")
    assert result.returncode != 0
    error = r"ValueError: FASTGPT_CPU_LEVEL: expected one of (baseline|neon).* on this CPU, got 'avx1024'"
    assert re.search(error, result.stderr)


# Which symbols the libraries need


def undefined_symbols(library):
    """Names of undefined symbols, those of the C and C++ runtime libraries left out (they have a version)."""
    output = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in output.stdout.splitlines() if line.split()[-2] == "U"}
    return {name for name in names if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)}


def is_stable_shim(name):
    return re.fullmatch(r"(aoti_)?torch_\w+", name) is not None


@needs_nm
def test_module_needs_only_python_and_the_stable_abi():
    symbols = undefined_symbols(MODULE)
    assert [name for name in symbols if not is_stable_shim(name) and not re.match("_?Py", name)] == []
    assert any(map(is_stable_shim, symbols))


@needs_nm
@needs_cuda_library
def test_cuda_library_needs_only_the_stable_abi():
    symbols = undefined_symbols(CUDA_LIBRARY)
    assert [name for name in symbols if not is_stable_shim(name)] == []
    # A CPU build of torch has all but these: the current stream, and the text of CUDA errors.
    libtorch_cpu = ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"))
    assert {name for name in symbols if not hasattr(libtorch_cpu, name)} <= {
        "aoti_torch_get_current_cuda_stream",
        "torch_c10_cuda_check_msg",
        "torch_c10_cuda_free_error_msg",
    }


@needs_nm
def test_kernels_of_a_cpu_level_keep_their_code_to_themselves():
    # An inline function that an AVX-512 file shares with others would crash a CPU without AVX-512.
    objects = [path for level in LEVELS[1:] for path in ROOT.glob(f"build/ninja-*/*_kernels.cpp.{level}.o")]
    if not objects:
        pytest.skip("no *_kernels.cpp objects in build/")
    for path in objects:
        level = path.name.split(".")[-2]
        output = subprocess.run(["nm", "-C", "--defined-only", "--extern-only", path], capture_output=True, text=True)
        names = [line.split(maxsplit=2)[2] for line in output.stdout.splitlines()]
        assert names and [name for name in names if f"fastgpt::{level}::" not in name] == []


@needs_sources
@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90a", *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in ("80", "100"))])
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*/*.cu")), ids=lambda path: path.name)
def test_resources_of_cuda_kernels(source, arch, tmp_path):
    """Nothing spills, and a multiprocessor holds at least four blocks of 256 threads."""
    command = ["nvcc", "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    command += ["-isystem", TORCH / "include", "-I", ROOT / "csrc", "-Xptxas=-v", "-c", source, "-o", tmp_path / "out.o"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills and set(spills) == {("0", "0")}, result.stderr
    report = re.findall(rf"Compiling entry function '(\w+)' for 'sm_{arch}'.*?Used (\d+) registers", result.stderr, re.DOTALL)
    assert len(report) == len(spills)
    for name, registers in report:
        print(f"{registers:>3} registers  {name}")
        assert int(registers) <= 64, name


# Loading the CUDA library


@pytest.mark.parametrize("built, ours, loads", [("13.0", "12.8", False), ("12.4", "13.0", False), ("13.0", "13.2", True)])
def test_a_library_of_another_major_of_cuda_is_not_loaded(built, ours, loads, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(library, "CUDA_LIBRARY", tmp_path)
    monkeypatch.setattr(library, "build_info", lambda: {"cuda_version": built})
    monkeypatch.setattr(torch.version, "cuda", ours)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    missing = library._load_cuda_library()
    assert loaded == [str(tmp_path)] * loads
    assert (missing is None) == loads
    if not loads:
        expected = rf"its CUDA library was compiled by CUDA {built}, and this torch is for CUDA {ours}: .* of CUDA {ours[:2]}, "
        assert re.match(expected, missing)


def test_info_says_why_the_library_is_not_loaded(monkeypatch, capsys):
    monkeypatch.setattr(info, "CUDA_MISSING", "its CUDA library was compiled by another CUDA")
    monkeypatch.setattr(fastgpt, "build_info", lambda: _C.build_info() | {"cuda_archs": ["9.0"], "cuda_version": "13.0"})
    main(["info"])
    line = "CUDA library: built for 9.0 by CUDA 13.0; not loaded: its CUDA library was compiled by another CUDA\n"
    assert line in capsys.readouterr().out


def stores_nothing(*arguments):
    pass


def does_not_launch(*arguments):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")


@pytest.mark.parametrize(
    "kernel, reason", [(stores_nothing, r"\(\[0.0, 0.0\]\)"), (does_not_launch, r"\(CUDA error: no kernel .* device\)")]
)
def test_kernels_that_do_not_run_are_found_by_one_launch(kernel, reason, monkeypatch):
    """And the reference serves the call."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(operators, "DEFAULT", (kernel, None))
    expected = rf"its kernels do not run on cpu {reason}: build fastgpt again with TORCH_CUDA_ARCH_LIST=7.5, by an nvcc "
    assert re.match(expected, refusals._launch_fails.__wrapped__(torch.device("cpu")))


def test_kernels_that_run_pass_the_launch():
    assert refusals._launch_fails.__wrapped__(torch.device("cpu")) is None


# Commands of the Makefile and the workflows


@needs_sources
def test_workflows_run_targets_of_the_makefile():
    yaml = pytest.importorskip("yaml")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert paths
    for path in paths:
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
        assert commands, path.name
        for command in commands:
            assert command.split()[0] == "make" and command.split()[1] in targets, f"{path.name}: {command}"


# What setup.py does, in a small copy of the project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with the real setup.py and the least of sources: a module, and one kernel per CPU level."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a source checkout")
    folder = tmp_path_factory.mktemp("project")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("README.md", "LICENSE"):
        (folder / name).touch()
    (folder / "fastgpt").mkdir()
    (folder / "fastgpt" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (folder / "csrc").mkdir()
    (folder / "csrc" / "twice.h").write_text("namespace fastgpt { int half(int x); }\n")
    (folder / "csrc" / "half.cpp").write_text('#include "twice.h"\nint fastgpt::half(int x) { return x / 2; }\n')
    (folder / "csrc" / "bindings.cpp").write_text('extern "C" void* PyInit__C() { return nullptr; }\n')
    (folder / "csrc" / "twice_kernels.cpp").write_text(
        "namespace fastgpt::FASTGPT_CPU_LEVEL { int twice(int x) { return 2 * x; } }\n"
    )
    return folder


def build(project, **environment):
    environment = {"FASTGPT_BUILD_CUDA": "0", "PYTHONPATH": "", "CXX": ""} | environment
    return run_python("setup.py", "-q", "build_ext", "--inplace", cwd=project, **environment)


def fake_torch(folder, code):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(code)
    return {"PYTHONPATH": folder}


def fake_nvcc(folder, code):
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\n{code}\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    return {"CUDA_HOME": folder}


def last_line(result):
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def test_missing_compiler_is_one_sentence(project):
    assert last_line(build(project, CXX="/nonexistent/g++")) == (
        "fastgpt: no C++ compiler found (looked for /nonexistent/g++): install g++ or set CXX."
    )


def test_missing_python_headers_are_one_sentence(project, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *Python.h*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    assert re.fullmatch(
        r"fastgpt: no Python.h found \(looked in /.*\): install python3-dev, or what your system calls it.",
        last_line(build(project, CXX=compiler)),
    )


@needs_sources
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_asks_for_a_compiler_before_it_downloads_anything(tmp_path):
    """Of a Python without packages, in which pip would be asked for PyTorch next."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ntest "$1" = -m && exit 9\nPATH=/nonexistent exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = ["make", "--directory", ROOT, "demo", f"VENV={python.parents[1]}"]
    result = subprocess.run(command, env=os.environ | {"CXX": ""}, capture_output=True, text=True)
    expected = "make: a C++ compiler and Python.h are needed to build; on Debian: apt install g++\n"
    assert result.returncode != 0 and expected in result.stderr and "pip" not in result.stdout


def test_missing_torch_is_one_sentence(project, tmp_path):
    code = "raise ModuleNotFoundError(\"No module named 'torch'\")"
    assert last_line(build(project, **fake_torch(tmp_path, code))) == (
        "fastgpt: building needs PyTorch 2.10 or newer (No module named 'torch'): pip install torch first, "
        "or build without --no-build-isolation."
    )


def test_old_torch_is_one_sentence(project, tmp_path):
    assert last_line(build(project, **fake_torch(tmp_path, "__version__ = '2.9.0'"))) == (
        "fastgpt: building needs PyTorch 2.10 or newer, found 2.9.0."
    )


@pytest.mark.slow
def test_wrong_settings_are_one_sentence(project, tmp_path):
    assert last_line(build(project, FASTGPT_BUILD_CUDA="yes")) == (
        "fastgpt: FASTGPT_BUILD_CUDA: expected 0, 1 or unset, got 'yes'."
    )
    nvcc = fake_nvcc(tmp_path, "exit 1")
    assert last_line(build(project, FASTGPT_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;Big", **nvcc)) == (
        'fastgpt: TORCH_CUDA_ARCH_LIST: expected entries like "8.0", "9.0a" or "10.0+PTX", got \'Big\'.'
    )


def nvcc_of(cuda):
    return f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {cuda}, V{cuda}.48"; else exit 1; fi'


def torch_of(cuda):
    """The real one's files, for another CUDA."""
    return f"__version__ = '2.13.0'; __file__ = {str(TORCH / '__init__.py')!r}\nclass version: cuda = {cuda!r}"


@pytest.mark.parametrize("nvcc_cuda, torch_cuda", [("13.0", "12.8"), ("12.9", "13.0"), ("11.8", "12.1")])
def test_another_major_of_cuda_is_one_sentence(nvcc_cuda, torch_cuda, project, tmp_path):
    """A library would load, and then none of its launches would run."""
    fakes = fake_torch(tmp_path, torch_of(torch_cuda)) | fake_nvcc(tmp_path, nvcc_of(nvcc_cuda))
    ours, theirs = nvcc_cuda.partition(".")[0], torch_cuda.partition(".")[0]
    assert last_line(build(project, FASTGPT_BUILD_CUDA="1", **fakes)) == (
        f"fastgpt: FASTGPT_BUILD_CUDA=1, but nvcc is of CUDA {nvcc_cuda} and torch {torch_cuda}, whose majors must be the same"
        f": set CUDA_HOME to a CUDA {theirs} or install a torch for CUDA {ours}."
    )


@pytest.mark.parametrize(
    "module, code, sentence",
    [
        ("setuptools", "__version__ = '65.5.0'; Extension = setup = object", '"setuptools>=77" (found 65.5.0): pip install "setuptools>=77"'),
        ("pybind11", None, 'pybind11: pip install "pybind11>=2.12"'),
    ],
)  # fmt: skip
def test_missing_tools_are_one_sentence(module, code, sentence, project, tmp_path):
    if module == "setuptools":
        package = tmp_path / "setuptools" / "command"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").write_text(code)
        (package / "__init__.py").touch()
        (package / "build_ext.py").write_text("build_ext = object")
        result = build(project, PYTHONPATH=tmp_path)
    else:
        hidden = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda name: name != 'pybind11' and find(name)"
        (tmp_path / "sitecustomize.py").write_text(hidden)
        result = build(project, PYTHONPATH=tmp_path)
    assert last_line(result) == f"fastgpt: building without isolation needs {sentence}"


def test_jobs_are_a_number(project):
    assert last_line(build(project, MAX_JOBS="many")) == "fastgpt: MAX_JOBS: expected an integer >= 1 or unset, got 'many'."


@pytest.mark.slow
@pytest.mark.parametrize(
    "library, sentence",
    [
        (
            None,
            "which has no compiled operations .* run Python in another folder; or build .*pip install --no-build-isolation -e",
        ),
        ("_C.cpython-32-none.so", r"are for another Python \(_C.cpython-32-none.so\). Rebuild them: pip install"),
        (MODULE.name, r"do not load with torch .*file too short.*Rebuild them: pip install"),
    ],
    ids=["sources", "another Python", "does not load"],
)
def test_import_without_compiled_operations(library, sentence, tmp_path):
    (tmp_path / "fastgpt").mkdir()
    for name in ("__init__.py", "startup.py"):
        shutil.copy(MODULE.parent / name, tmp_path / "fastgpt")
    if library:
        (tmp_path / "fastgpt" / library).touch()
    # Without the finder of an editable install, which would find the operations all the same.
    finders = "import sys; sys.meta_path = [f for f in sys.meta_path if getattr(f, '__module__', '').startswith('_frozen')]"
    result = run_python("-c", f"{finders}; import fastgpt", cwd=tmp_path, PYTHONPATH="")
    assert re.search(f"^ImportError: fastgpt cannot be imported: .*{sentence}", last_line(result))


def test_sdist_holds_the_sources(project):
    """And the package's data."""
    (project / "fastgpt" / "assets" / "model").mkdir(parents=True)
    (project / "fastgpt" / "assets" / "model" / "config.json").write_text("{}")
    result = run_python("setup.py", "-q", "sdist", cwd=project)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next((project / "dist").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"csrc/twice.h", "csrc/bindings.cpp", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert "fastgpt/assets/model/config.json" in names


def test_packages_hold_the_data_and_nothing_is_warned_of(project):
    folder = project / "fastgpt" / "assets" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    result = run_python("setup.py", "build_py", "--build-lib", "build/lib", cwd=project)
    assert result.returncode == 0 and "importable" not in result.stderr, result.stderr
    assert (project / "build" / "lib" / "fastgpt" / "assets" / "model" / "config.json").exists()


@pytest.mark.slow
def test_builds_are_incremental(project):
    result = build(project)
    assert result.returncode == 0, result.stdout + result.stderr
    for level in _C.build_info()["cpu_levels"]:
        assert f"twice_kernels.cpp.{level}.o" in result.stdout

    result = build(project)
    assert "no work to do" in result.stdout

    (project / "csrc" / "twice.h").touch()
    result = build(project)
    assert "half.cpp.o" in result.stdout and "twice_kernels" not in result.stdout


@pytest.mark.slow
def test_broken_nvcc_costs_the_cuda_library_only(project, tmp_path):
    (project / "csrc" / "empty.cu").touch()
    nvcc = fake_nvcc(tmp_path, "echo nvcc is broken >&2; exit 1")
    result = build(project, FASTGPT_BUILD_CUDA="", **nvcc)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nvcc is broken" in result.stdout
    assert "fastgpt: WARNING: the CUDA library was left out, because nvcc failed" in result.stderr
    assert list((project / "fastgpt").glob("_C.*")) and not (project / "fastgpt" / "libfastgpt_cuda.so").exists()

    result = build(project, FASTGPT_BUILD_CUDA="1", **nvcc)
    assert last_line(result) == "fastgpt: compilation failed; the compiler's message is above."


@pytest.mark.slow
@pytest.mark.parametrize("torch_cuda", ["12.8", "13.2", None], ids=str)
def test_another_major_of_cuda_costs_the_cuda_library_only(torch_cuda, project, tmp_path):
    """Minors may differ; and a CPU build of torch says nothing about where the library will be used."""
    (project / "csrc" / "empty.cu").touch()
    fakes = fake_torch(tmp_path, torch_of(torch_cuda)) | fake_nvcc(tmp_path, nvcc_of("13.0"))
    result = build(project, FASTGPT_BUILD_CUDA="", **fakes)
    assert result.returncode == 0, result.stdout + result.stderr
    left_out = "WARNING: the CUDA library was left out: nvcc is of CUDA 13.0 and torch 12.8, whose majors" in result.stderr
    assert left_out == (torch_cuda == "12.8") != ("because nvcc failed" in result.stderr)
    assert list((project / "fastgpt").glob("_C.*")) and not (project / "fastgpt" / "libfastgpt_cuda.so").exists()
