#!/usr/bin/env bash
# benchmarks/gpu.sh FOLDER: on a machine with a GPU, nvcc, torch (CUDA 13), ninja and pytest, without
# a network: builds in place, proves the CUDA kernels, measures them, and leaves logs, gpu.json and
# gpu.md in FOLDER.
set -euo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

echo "== build"
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c '
import torch
print("%d.%d" % torch.cuda.get_device_capability())')} HESSKERN_CUDA=1 \
  "$python" setup.py build_ext --inplace >"$out/build.log" 2>&1 || { tail -n 40 "$out/build.log"; exit 1; }

echo "== tests"
"$python" -m pytest -p no:cacheprovider --noconftest -m cuda tests/test_devices.py 2>&1 | tee "$out/tests.log"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -p no:cacheprovider \
      --noconftest -m cuda tests/test_devices.py -k 'test_reference and float32' >"$out/$tool.log" 2>&1 ||
      { tail -n 40 "$out/$tool.log"; exit 1; }
    tail -n 3 "$out/$tool.log"
  done
fi

echo "== benchmark"
"$python" benchmarks/gpu.py --output "$out"
