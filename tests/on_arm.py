"""Builds fastgpt for 64-bit Arm and runs tests of it under QEMU, on x86-64 Debian: `make arm`.

python tests/on_arm.py                        a case of every quick test of the operations and caches
python tests/on_arm.py tests/ops -k linear    what pytest is told

Downloads go to build/arm: Python of Debian's arm64, PyTorch's wheel for aarch64, and what the tests import. The compiler is a
cross compiler and runs as fast as any; what is compiled, PyTorch and Python are emulated, which takes many times as long. The
emulated CPU is a Neoverse N1 (Armv8.2), since PyTorch's wheel needs more than Armv8.0. Memory is as strictly ordered as on
x86-64, so threads prove less than they would on Arm.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARM = ROOT / "build" / "arm"
SYSTEM = ARM / "system"  # Debian's arm64 packages, unpacked
PACKAGES = SYSTEM / "usr" / "lib" / "python3" / "dist-packages"  # where Debian's Python looks
PYTHON = ARM / "python"  # runs the emulated one
PROJECT = ARM / "fastgpt"  # a copy of this project, built for Arm

TORCH = "torch==2.10.0"  # later ones on PyPI need CUDA, on Arm, too
# PyTorch's own requirements are listed, since pip would take those of x86-64.
REQUIREMENTS = ["numpy", "sympy", "networkx", "jinja2", "fsspec", "filelock", "typing-extensions", "setuptools>=77", "pybind11"]
REQUIREMENTS += ["pytest", "pytest-xdist", "hypothesis", "safetensors", "tokenizers", "huggingface_hub", "tqdm"]
TESTS = ["-m", "not slow and not exhaustive", "--cases", "1", "tests/ops", "tests/cache"]


def run(*command, **options):
    if subprocess.run([str(word) for word in command], **options).returncode != 0:
        raise SystemExit(f"make arm: this failed: {shlex.join(map(str, command))}")


def require_tools() -> tuple[str, str]:
    """Paths of QEMU and the cross compiler; says what is missing."""
    if sys.platform != "linux" or not shutil.which("dpkg-deb") or not shutil.which("apt-get"):
        raise SystemExit("make arm: expected Debian, whose arm64 packages are unpacked.")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    compiler = shutil.which("aarch64-linux-gnu-g++")
    missing = [name for name, path in (("qemu-user", qemu), ("g++-aarch64-linux-gnu", compiler)) if path is None]
    if missing:
        raise SystemExit(f"make arm: expected {' and '.join(missing)}: apt install {' '.join(missing)}")
    return qemu, compiler


def unpack_system() -> None:
    """Debian's Python for arm64 and what it needs, of the release and from the mirror that this machine has."""
    apt = ARM / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "state" / "status").touch()  # nothing is installed
    options = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": apt / "state", "Dir::Cache": apt / "cache",
        "Dir::State::status": apt / "state" / "status", "APT::Sandbox::User": "root",
    }  # fmt: skip
    command = ["apt-get", "--quiet=2", *(f"--option={name}={value}" for name, value in options.items())]
    run(*command, "update")
    run(*command, "install", "--yes", "--download-only", "--no-install-recommends", "python3", "libpython3-dev", "libstdc++6")
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run("dpkg-deb", "--extract", package, SYSTEM)


def install_packages() -> None:
    version = next(SYSTEM.glob("usr/bin/python3.*[0-9]")).name.removeprefix("python")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", PACKAGES, "--upgrade", "--no-warn-conflicts"]
    command += ["--only-binary=:all:", "--python-version", version, "--implementation", "cp"]
    for platform in ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"):
        command += ["--platform", platform]
    run(*command, "--no-deps", TORCH)
    run(*command, *REQUIREMENTS)


def write_python(qemu: str) -> None:
    """The emulated Python, which starts itself through QEMU, too: an Arm program alone would not start."""
    python = next(SYSTEM.glob("usr/bin/python3.*[0-9]"))
    command = shlex.join([qemu, "-cpu", "neoverse-n1", "-L", str(SYSTEM), str(python)])
    PYTHON.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    PYTHON.chmod(0o755)
    (PACKAGES / "executable.pth").write_text(f"import sys; sys.executable = {str(PYTHON)!r}\n")


def copy_project() -> None:
    for name in ("csrc", "fastgpt", "tests"):
        shutil.rmtree(PROJECT / name, ignore_errors=True)  # what was moved or removed
        shutil.copytree(ROOT / name, PROJECT / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, PROJECT)


def main(arguments: list[str]) -> None:
    qemu, compiler = require_tools()
    ready = ARM / "ready"
    if not ready.exists() or ready.read_text() != TORCH:
        unpack_system()
        install_packages()
        ready.write_text(TORCH)
    write_python(qemu)
    copy_project()
    environment = os.environ | {
        "CXX": f"{compiler} -isystem {SYSTEM / 'usr' / 'include'}",
        "FASTGPT_BUILD_CUDA": "0",
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",  # ninja
        "PYTHONPATH": "",
        "OMP_WAIT_POLICY": "passive",
    }
    run(PYTHON, "setup.py", "-q", "build_ext", "--inplace", cwd=PROJECT, env=environment)
    run(PYTHON, "-m", "fastgpt", "info", cwd=PROJECT, env=environment)
    run(PYTHON, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or TESTS), cwd=PROJECT, env=environment)


if __name__ == "__main__":
    main(sys.argv[1:])
