"""Builds and runs the C++ unit tests (csrc/*/*_test.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BUILD = REPO / "build" / "native-tests"  # kept between runs for incremental builds


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def test_unit_tests_of_csrc() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    ninja = shutil.which("ninja", path=path)
    assert cmake and ninja, "the tests of csrc/ need cmake and ninja: pip install cmake ninja"
    options = ["-DINTAGLIO_TESTS=ON", "-DINTAGLIO_OPTIMISE=-O0 -g1", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run(cmake, "-S", ".", "-B", str(BUILD), "-G", "Ninja", *options)
    run(cmake, "--build", str(BUILD))
    assert ", 0 failed" in run(str(BUILD / "native_tests"))
