#!/usr/bin/env bash
# tests/fuzz_operators.py with the CPU operators built under AddressSanitizer and UndefinedBehaviorSanitizer; exit code 1
# on the first finding. Arguments go to fuzz_operators.py.
#   tests/fuzz_operators.sh [--calls N] [--seed N] [--operator NAME ...]
# PYTHON: an interpreter with torch, cmake, ninja and pybind11 in which the package is built in place; FUZZ_FOLDER: where
# the build goes, kept for the next run; CXX: the compiler, GCC.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
CXX=${CXX:-g++}
FOLDER=${FUZZ_FOLDER:-$(mktemp -d)}
FLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH

mkdir -p "$FOLDER/python"
cp -r python/sharedllm_ext "$FOLDER/python/"
cmake -S . -B "$FOLDER/build" -G Ninja -DCMAKE_CXX_COMPILER="$CXX" -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_CXX_FLAGS_DEBUG="$FLAGS" -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -DSHAREDLLM_TORCH_DIR="$("$PYTHON" -c 'import importlib.util as i; print(i.find_spec("torch").submodule_search_locations[0])')" \
  >"$FOLDER/configure.log"
cmake --build "$FOLDER/build" --target sharedllm_cpu -j "${MAX_JOBS:-$(nproc)}"
cp "$FOLDER/build/libsharedllm_cpu.so" "$FOLDER/python/sharedllm_ext/lib/"

# the C++ library too: the sanitizer looks for the real functions that throw when it starts
libraries=
for name in libasan.so libubsan.so libstdc++.so.6; do libraries+="$("$CXX" -print-file-name=$name) "; done
# Python keeps memory to its end, and an allocation that nobody could fulfil must fail as it would without a sanitizer
LD_PRELOAD=$libraries PYTHONPATH=$FOLDER/python:. OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  "$PYTHON" tests/fuzz_operators.py "$@"
