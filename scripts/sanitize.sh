#!/usr/bin/env bash
# The native tests with csrc/ compiled under the address and undefined-behaviour sanitizers. Called by `make sanitize`,
# which sets .venv up; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
(($#)) || set -- tests/test_host*.py
at=$PWD/build/sanitize
export PATH="$PWD/.venv/bin:$PATH"
cmake -S . -B "$at/native" -G Ninja -Wno-dev -DCMAKE_BUILD_TYPE=None \
  -DPython_EXECUTABLE="$PWD/.venv/bin/python" -Dnanobind_DIR="$(.venv/bin/python -m nanobind --cmake_dir)" \
  -DINTAGLIO_OPTIMISE="-O1 -g1 -fno-omit-frame-pointer" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" \
  -DCMAKE_MODULE_LINKER_FLAGS="-fsanitize=address,undefined" >"$at.log" 2>&1 || { cat "$at.log"; exit 1; }
cmake --build "$at/native"

# An environment whose intaglio is that build's, and whose other packages are .venv's.
.venv/bin/python -m venv --without-pip "$at/venv"
mkdir -p "$at/package"
rm -rf "$at/package/intaglio"
cp -r src/intaglio "$at/package/"
cp "$at"/native/_native*.so "$at/package/intaglio/"
site=$("$at/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$at/package" "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >"$site/intaglio.pth"

LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" PYTHONMALLOC=malloc \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$at/venv/bin/python" -m pytest -n 2 -p no:cacheprovider "$@"
