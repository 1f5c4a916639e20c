#!/usr/bin/env bash
# First light on a GPU: everything that can be learned in two calls of nine minutes, the most important first.
#
#   benchmarks/gpu_day/first_light.sh [--dry-run] [--list] [STAGE...]
#
# $OUT gets few files, brought up to date after every stage: summary.txt has one line a stage and the goals (met,
# missed, unmeasured), rows.csv the times, log.txt what every stage printed.
# The state is kept apart from them, in $STATE, so that the script can be called again until all is done: a stage that
# is done, failed or could not run is not started again unless it is named; one that was cut off is.
# No network, no installation: the package is imported from a plain copy in $STATE/site.
#
# OUT      where results go (default: benchmarks/results/first_light)
# STATE    what must last from call to call (default: build/first_light)
# PYTHON   the interpreter (default: python3)
# LIMIT    seconds for everything (default: 540)
# --dry-run tries every stage at a tiny size, on a CPU if there is no GPU.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
BENCHMARKS=$ROOT/benchmarks HERE=$ROOT/benchmarks/gpu_day
OUT=${OUT:-$BENCHMARKS/results/first_light}
STATE=${STATE:-$ROOT/build/first_light}
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
  local library=vlmprune/_C.abi3.so fresh=$STATE/site.new
  rm -rf "$fresh" && mkdir -p "$fresh" && cp -r "$ROOT/vlmprune" "$fresh/vlmprune" || return 1
  cp -r "$ROOT/triton_kernels" "$fresh/vlmprune/triton_kernels" || return 1
  if [[ -e $STATE/site/$library ]]; then cp "$STATE/site/$library" "$fresh/$library"; fi
  rm -rf "$STATE/site" && mv "$fresh" "$STATE/site"
}

wanted() { # wanted STAGE: all stages if none was named
  ((${#CHOSEN[@]} == 0)) && return 0
  named "$1"
}

named() {
  local name
  for name in ${CHOSEN[@]+"${CHOSEN[@]}"}; do [[ $1 == "$name" || ${1%%_*} == "$name" ]] && return 0; done
  return 1
}

note() { echo "$1" | tee -a "$STATE/summary.txt"; }

publish() { # bring $OUT up to date: a call that is killed has left what it knew
  cp "$STATE/summary.txt" "$OUT/summary.txt"
  tail -n +1 "$STATE"/stages/* >"$OUT/log.txt" 2>/dev/null
  if [[ -e $STATE/rows.csv ]]; then
    cp "$STATE/rows.csv" "$OUT/rows.csv"
    { echo && "$PYTHON" "$HERE/goals.py" "$STATE/rows.csv"; } >>"$OUT/summary.txt" 2>&1
  fi
}

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 code start left=$((LIMIT - SECONDS)) result=$STATE/stages/$1
  shift 2
  wanted "$name" || return 0
  if ((LIST)); then echo "$name (at most $limit s)"; return 0; fi
  if ! named "$name" && compgen -G "$result.[tf]*" >/dev/null; then echo "$name: already there"; return 0; fi
  ((DRY)) && limit=$((5 * limit)) left=$limit # a CPU takes its time
  if ((left < 5)); then note "$name: no time left"; return 0; fi
  ((limit > left)) && limit=$left
  rm -f "$result".*
  start=$SECONDS
  # interrupted rather than killed: pytest then says what failed so far
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$result.part" 2>&1
  code=$?
  case $code in
    0) mv "$result.part" "$result.txt" && note "$name: done in $((SECONDS - start)) s" ;;
    "$REFUSED")
      note "$name: cannot run here: $(tail -n 1 "$result.part")"
      mv "$result.part" "$result.txt"
      ;;
    124 | 137) mv "$result.part" "$result.cut" && note "$name: cut off after $limit s" ;;
    *) mv "$result.part" "$result.failed" && note "$name: failed with exit code $code after $((SECONDS - start)) s" ;;
  esac
  publish
}

run_tests() { # pytest on one list of arguments after the other; a failure does not keep the next from running
  local worst=0 code workers=() extra=()
  "$PYTHON" -c 'import pytest' || { echo "pytest is not installed" && return "$REFUSED"; }
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  ((DRY)) && extra=(--collect-only -qq)
  for what in "$@"; do
    echo "== pytest $what"
    # a test file whose imports are missing must not keep the others from running
    # shellcheck disable=SC2086 # several words are meant
    "$PYTHON" -m pytest -q --tb=short -p no:cacheprovider --maxfail=20 --continue-on-collection-errors \
      "${workers[@]}" "${extra[@]}" $what
    code=$?
    ((code != 5 && code > worst)) && worst=$code # 5: nothing collected
  done
  return "$worst"
}

run_sanitizer() { # memcheck, then racecheck; what a machine refuses is written down
  local tool worst=0 sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [[ -z $sanitizer ]]; then
    ((DRY)) && "$PYTHON" "$HERE/first_light.py" calls --tiny
    echo "compute-sanitizer is not installed" && return "$REFUSED"
  fi
  for tool in memcheck racecheck; do
    echo "== $tool"
    # without PyTorch's caching allocator, or an access beyond a tensor stays inside its pool
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" "$HERE/first_light.py" calls || worst=$?
  done
  return "$worst"
}

if ((!LIST)); then
  mkdir -p "$OUT" "$STATE/stages" && OUT=$(cd "$OUT" && pwd) && STATE=$(cd "$STATE" && pwd) || exit 1
  lay_out_package || exit 1
  cd "$ROOT" || exit 1
  note "== $(date -u +%FT%TZ) commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
fi
export PYTHONPATH=$STATE/site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHON HERE DRY REFUSED
export -f run_tests run_sanitizer

LIGHT=("$PYTHON" "$HERE/first_light.py")
MICRO=("$PYTHON" "$BENCHMARKS/microbench.py" --no-plots --csv "$STATE/rows.csv")
QUICK=(cuda triton plan torch "scores + topk" eager flash-colreduce "published loop") # torch.compile takes seconds a setting
GOALS=(prune_tokens received_attention "greedy_select maxmin")
SETS=(compact_kv greedy_select merge_tokens cluster_dpc match_bipartite)
read -ra TINY <<<"$(full_or_tiny "" --tiny)"
read -ra SHAPES <<<"$(full_or_tiny "" "--shapes tiny --seconds 0.01")"
read -ra SWEEP <<<"$(full_or_tiny "" --check)"
read -ra REPEAT <<<"$(full_or_tiny "" "--repeat 1")"
INTERPRET=$( ((DRY)) && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && echo 1 || echo 0)

stage 0_info 25 "${LIGHT[@]}" info "${TINY[@]}"
stage 0_ceilings 25 "${LIGHT[@]}" ceilings "${TINY[@]}"
stage 1_build 90 "${LIGHT[@]}" build "${TINY[@]}"
stage 1_check 150 "${LIGHT[@]}" check "${TINY[@]}"
stage 2_goals 120 "${MICRO[@]}" --cases "${GOALS[@]}" --rows 1 --providers "${QUICK[@]}" "${SHAPES[@]}"
stage 3_replays 40 "${LIGHT[@]}" replays "${TINY[@]}"
stage 3_tests 100 bash -c 'run_tests "-m gpu tests/ops tests/csrc tests/models" tests/ops'
stage 4_compiled 120 "${MICRO[@]}" --cases prune_tokens --rows 1 --providers torch.compile "${SHAPES[@]}"
stage 4_select 45 "${MICRO[@]}" --cases select_topk select_segments "${SHAPES[@]}"
stage 5_parts 90 "${MICRO[@]}" --cases received_attention row_lse gather_tokens --providers "${QUICK[@]}" "${SHAPES[@]}"
stage 6_sanitizer 125 bash -c run_sanitizer
stage 7_sweeps 60 env TRITON_INTERPRET="$INTERPRET" "$PYTHON" "$BENCHMARKS/tile_sweep.py" "${SWEEP[@]}"
stage 8_end_to_end 40 "$PYTHON" "$BENCHMARKS/end_to_end.py" "${REPEAT[@]}"
stage 9_sets 60 "${MICRO[@]}" --cases "${SETS[@]}" "${SHAPES[@]}"
stage 9_models 150 bash -c 'run_tests tests/models'
((LIST)) || echo "results in $OUT"
