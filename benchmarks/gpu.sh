#!/usr/bin/env bash
# benchmarks/gpu.sh FOLDER: on a machine with a GPU, nvcc, torch (CUDA 13), ninja and pytest, without
# a network: builds in place unless what is there is of these sources, proves the CUDA kernels and the
# public calls, measures them, and leaves logs, gpu.json, gpu.md, gpu_calls.json and gpu_calls.md in
# FOLDER. All of it ends within six minutes, what matters most first: a part runs, whatever became of
# those before it, as long as there is time; the exit status is 1 if any of them failed or did not run.
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh FOLDER}" && cd "$1" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
status=0

# part NAME SECONDS COMMAND...: its output into NAME.log, the end of it shown; at most so long, and no
# longer than to the end of all.
part() {
  local name=$1 seconds=$2 begin=$SECONDS left=$((355 - SECONDS))
  shift 2
  ((seconds = left < seconds ? left : seconds))
  if ((seconds <= 0)); then
    printf '== %s: no time left\n' "$name"
    status=1
    return 1
  fi
  printf '== %s\n' "$name"
  timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n "$([[ $code == 0 ]] && echo "${SHOWN:-3}" || echo 40)" "$out/$name.log"
  printf '== %s: status %d, %d s\n' "$name" "$code" "$((SECONDS - begin))"
  [[ $code == 0 ]] || status=1
  return "$code"
}

# Neither a machine's own plugins and warnings, nor TF32 in torch's convolutions, which the tests'
# float64 would not forgive; it does not reach the kernels here.
tests=(env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 NVIDIA_TF32_OVERRIDE=0 "$python" -m pytest
  -p no:cacheprovider --noconftest -W default -m cuda)
# In processes of their own where pytest-xdist is there.
jobs=()
"$python" -c 'import xdist' 2>/dev/null && jobs=(-p xdist -n 8)

architecture=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
# Of other sources it cannot be imported.
built='import hesskern; raise SystemExit(not hesskern.build_info()["cuda"])'
"$python" -c "$built" 2>/dev/null ||
  part build 150 env TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$architecture}" HESSKERN_CUDA=1 \
    "$python" setup.py build_ext --inplace || exit 1
part tests 110 "${tests[@]}" "${jobs[@]}" tests/test_devices.py tests/test_large_operators.py \
  tests/test_cuda_calls.py tests/operators
SHOWN=200 part benchmark 80 "$python" benchmarks/gpu.py --output "$out"
SHOWN=200 part calls 100 "$python" benchmarks/gpu_calls.py --rounds 3 --output "$out"

if command -v compute-sanitizer >/dev/null; then
  short='TestOperators and test_reference and dtype0 or TestStreams and queued'
  # Blocks of torch's own allocator hide what is read behind a tensor's end.
  part memcheck 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
    --error-exitcode 9 "${tests[@]}" tests/test_devices.py -k "$short"
  part racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 9 "${tests[@]}" \
    tests/test_devices.py -k "$short"
fi
exit "$status"
