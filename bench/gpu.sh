#!/usr/bin/env bash
# Everything that is measured on a GPU, in stages of under ten minutes each:
#
#   bench/gpu.sh STAGE DATA OUT      STAGE: tests, sanitizer, losses, loader, vid, five, together, batch, students, width, profile,
#                                    table
#
# DATA holds cifar-10-batches-py; everything is written into OUT. TEACHER=FILE: weights of a WRN-40-2, for profile. PYTHON=... and
# COMMIT=... where python3 is another one and git is not there. `table` trains the teacher and all methods on all fractions with one
# seed and the options of bench/results/cifar10-2pct-200; it stops after nine and a half minutes and goes on in the next call with the same OUT.
set -euo pipefail
stage=$1 data=$(realpath "$2")
mkdir -p "$3"
out=$(realpath "$3")
[ -z "${TEACHER:-}" ] || TEACHER=$(realpath "$TEACHER")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
commit=${COMMIT:-$(git describe --always --dirty --abbrev=12 --match= 2>/dev/null || echo unknown)}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv > "$out/device.csv" 2>/dev/null || true

bench() { timeout 590 "$python" -m pytest -q "bench/test_$1.py" --data "$data" --commit "$commit" --rows "$out/$1.jsonl" "${@:2}" 2>&1 | tee "$out/$stage.txt"; }

case $stage in
    tests)     timeout 580 "$python" -m pytest -q -m gpu tests 2>&1 | tee "$out/tests.txt" ;;
    sanitizer) timeout 580 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -m gpu tests/test_kernels_triton.py \
                   2>&1 | tee "$out/sanitizer.txt" ;;
    losses | loader) bench "$stage" ;;
    vid | five | together) bench step -k "$stage" ;;
    batch | students | width) bench step -k "cost and $stage" ;;
    profile)   for engine in eager graph; do
                   "$python" -m fastvid train --method vid --data "$data" --teacher "${TEACHER:?weights of a WRN-40-2}" --per-class 100 \
                       --epochs 2 --engine $engine --profile --out "$out/profile-$engine"
               done ;;
    table)     timeout --foreground --signal=TERM 570 "$python" -m fastvid reproduce --data "$data" --seeds 1 \
                   --methods student,kd,fitnet,at,vid,kd+at,kd+vid --kd-alpha 1 --kd-temperature 6 --fitnet-tap group3 --fitnet-weight 3 \
                   --out "$out/table" 2>&1 | tee -a "$out/table.txt" ;;
    *)         echo "unknown stage $stage" >&2; exit 2 ;;
esac
