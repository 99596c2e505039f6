#!/usr/bin/env bash
# csrc/ compiled under sanitizers: its unit tests under address, undefined and thread, and the tests of the host device, by
# pytest, under address and undefined. Called by `make sanitize`, which sets .venv up; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
(($#)) || set -- tests/devices/test_host.py tests/devices/test_host_*.py
at=$PWD/build/sanitize
mkdir -p "$at"
export PATH="$PWD/.venv/bin:$PATH"

# build FOLDER SANITIZERS OPTIONS...: build csrc/ in $at/FOLDER with -fsanitize=SANITIZERS.
build() {
  local folder=$1 flags="-fsanitize=$2 -fno-sanitize-recover=undefined"
  shift 2
  cmake -S . -B "$at/$folder" -G Ninja -Wno-dev -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$flags" \
    -DINTAGLIO_OPTIMISE="-O1 -g1 -fno-omit-frame-pointer" "$@" >"$at/$folder.log" 2>&1 || { cat "$at/$folder.log"; exit 1; }
  cmake --build "$at/$folder"
}

for sanitizers in thread address,undefined; do
  build "units-$sanitizers" "$sanitizers" -DINTAGLIO_TESTS=ON
  UBSAN_OPTIONS=print_stacktrace=1 "$at/units-$sanitizers/native_tests"
done

build native address,undefined -DCMAKE_MODULE_LINKER_FLAGS="-fsanitize=address,undefined" \
  -DPython_EXECUTABLE="$PWD/.venv/bin/python" -Dnanobind_DIR="$(.venv/bin/python -m nanobind --cmake_dir)"

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
