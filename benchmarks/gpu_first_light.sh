#!/usr/bin/env bash
# First light on a GPU: everything that can be learned in nine minutes, the most important first.
#
#   benchmarks/gpu_first_light.sh [--dry-run] [--list] [STAGE...]
#
# Each stage writes $OUT/STAGE.txt as it runs. A stage whose result is there is skipped, so the script can be called
# again until all are done; a stage that failed or was cut off by its time limit leaves STAGE.failed or STAGE.cut
# and runs again. A stage that cannot run on this machine says why in its result. $OUT/summary.txt has one line a stage.
# No network, no installation: the package is imported from a plain copy in $SITE.
#
# OUT      where results go (default: benchmarks/results/first_light)
# SITE     where the copy and the built extension lie (default: build/first_light)
# PYTHON   the interpreter (default: python3)
# LIMIT    seconds for everything (default: 540)
# --dry-run tries every stage at a tiny size, on a CPU if there is no GPU.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${OUT:-$ROOT/benchmarks/results/first_light}
SITE=${SITE:-$ROOT/build/first_light}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-540}
REFUSED=77 # the exit code of a stage that cannot run here

LIST=0 DRY=0 CHOSEN=()
for argument in "$@"; do
  case $argument in
    --list) LIST=1 ;;
    --dry-run) DRY=1 ;;
    -h | --help) sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' && exit 0 ;;
    -*) echo "unknown option $argument" >&2 && exit 2 ;;
    *) CHOSEN+=("$argument") ;;
  esac
done

full_or_tiny() { if ((DRY)); then echo "$2"; else echo "$1"; fi; }

# The package as a wheel would lay it out: triton_kernels/ becomes vlmprune.triton_kernels.
lay_out_package() {
  local library=vlmprune/_C.abi3.so fresh=$SITE.new
  rm -rf "$fresh" && mkdir -p "$fresh" && cp -r "$ROOT/vlmprune" "$fresh/vlmprune" || return 1
  cp -r "$ROOT/triton_kernels" "$fresh/vlmprune/triton_kernels" || return 1
  if [[ -e $SITE/$library ]]; then cp "$SITE/$library" "$fresh/$library"; fi
  rm -rf "$SITE" && mv "$fresh" "$SITE" || return 1
  # a result that came from another machine did not bring the library along
  if [[ ! -e $SITE/$library ]] && grep -qs '^exit 0' "$OUT/1_build.txt"; then rm "$OUT/1_build.txt"; fi
}

wanted() { # wanted STAGE: all stages if none was named
  ((${#CHOSEN[@]} == 0)) && return 0
  local name
  for name in "${CHOSEN[@]}"; do [[ $1 == "$name" || ${1%%_*} == "$name" ]] && return 0; done
  return 1
}

note() { echo "$1" | tee -a "$OUT/summary.txt"; }

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 code start left=$((LIMIT - SECONDS))
  shift 2
  wanted "$name" || return 0
  if ((LIST)); then echo "$name (at most $limit s)"; return 0; fi
  if [[ -e $OUT/$name.txt ]]; then echo "$name: already there"; return 0; fi
  ((DRY)) && limit=$((5 * limit)) left=$limit # a CPU takes its time
  if ((left < 2)); then note "$name: no time left"; return 0; fi
  ((limit > left)) && limit=$left
  rm -f "$OUT/$name".{failed,cut}
  start=$SECONDS
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.part" 2>&1
  code=$?
  case $code in
    0) mv "$OUT/$name.part" "$OUT/$name.txt" && note "$name: done in $((SECONDS - start)) s" ;;
    "$REFUSED")
      note "$name: cannot run here: $(tail -n 1 "$OUT/$name.part")"
      mv "$OUT/$name.part" "$OUT/$name.txt"
      ;;
    124 | 137) mv "$OUT/$name.part" "$OUT/$name.cut" && note "$name: cut off after $limit s" ;;
    *) mv "$OUT/$name.part" "$OUT/$name.failed" && note "$name: failed with exit code $code" ;;
  esac
}

run_tests() { # pytest on the GPU tests, then on ops, then on models; a failure does not keep the next from running
  local worst=0 code workers=() extra=()
  "$PYTHON" -c 'import pytest' || { echo "pytest is not installed" && return "$REFUSED"; }
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 4)
  ((DRY)) && extra=(--collect-only)
  for what in "-m gpu tests" tests/ops tests/models; do
    echo "== pytest $what"
    # shellcheck disable=SC2086 # two words are meant
    "$PYTHON" -m pytest -q -p no:cacheprovider --maxfail=20 "${workers[@]}" "${extra[@]}" $what
    code=$?
    ((code != 5 && code > worst)) && worst=$code # 5: nothing collected
  done
  return "$worst"
}

run_sanitizer() { # memcheck, then racecheck; what a machine refuses is written down
  local tool worst=0 sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [[ -z $sanitizer ]]; then
    ((DRY)) && "$PYTHON" "$ROOT/benchmarks/first_light.py" calls --tiny
    echo "compute-sanitizer is not installed" && return "$REFUSED"
  fi
  for tool in memcheck racecheck; do
    echo "== $tool"
    # without PyTorch's caching allocator, or an access beyond a tensor stays inside its pool
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 40 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" "$ROOT/benchmarks/first_light.py" calls || worst=$?
  done
  return "$worst"
}

if ((!LIST)); then
  mkdir -p "$OUT" "$SITE" && OUT=$(cd "$OUT" && pwd) && SITE=$(cd "$SITE" && pwd) && lay_out_package || exit 1
  cd "$ROOT" || exit 1
  note "== $(date -u +%FT%TZ) commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
fi
export PYTHONPATH=$SITE PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export OUT PYTHON ROOT DRY REFUSED
export -f run_tests run_sanitizer

HERE=$ROOT/benchmarks
LIGHT=("$PYTHON" "$HERE/first_light.py")
MICRO=("$PYTHON" "$HERE/microbench.py" --no-plots --csv "$OUT/rows.csv")
QUICK=(cuda triton plan torch "scores + topk" eager flash-colreduce) # torch.compile takes seconds a setting
SETS=(compact_kv greedy_select merge_tokens cluster_dpc match_bipartite)
read -ra TINY <<<"$(full_or_tiny "" --tiny)"
read -ra SHAPES <<<"$(full_or_tiny "" "--shapes tiny --seconds 0.01")"
read -ra SWEEP <<<"$(full_or_tiny "" --check)"
read -ra REPEAT <<<"$(full_or_tiny "" "--repeat 1")"
INTERPRET=$( ((DRY)) && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && echo 1 || echo 0)

stage 0_info 25 "${LIGHT[@]}" info "${TINY[@]}"
stage 0_ceilings 25 "${LIGHT[@]}" ceilings "${TINY[@]}"
stage 1_build 60 "${LIGHT[@]}" build "${TINY[@]}"
stage 2_tests 150 bash -c run_tests
stage 3_select 45 "${MICRO[@]}" --cases select_topk select_segments "${SHAPES[@]}"
stage 4_prune 60 "${MICRO[@]}" --cases prune_tokens --rows 1 --providers "${QUICK[@]}" "${SHAPES[@]}"
stage 4_parts 60 "${MICRO[@]}" --cases received_attention row_lse gather_tokens --providers "${QUICK[@]}" "${SHAPES[@]}"
stage 5_replays 40 "${LIGHT[@]}" replays "${TINY[@]}"
stage 6_sanitizer 85 bash -c run_sanitizer
stage 7_sweeps 60 env TRITON_INTERPRET="$INTERPRET" "$PYTHON" "$HERE/tile_sweep.py" "${SWEEP[@]}"
stage 8_end_to_end 40 "$PYTHON" "$HERE/end_to_end.py" "${REPEAT[@]}"
stage 9_sets 60 "${MICRO[@]}" --cases "${SETS[@]}" "${SHAPES[@]}"
stage 9_compiled 120 "${MICRO[@]}" --cases prune_tokens received_attention --rows 1 --providers torch.compile "${SHAPES[@]}"
((LIST)) || echo "results in $OUT"
