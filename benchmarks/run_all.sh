#!/usr/bin/env bash
# Every benchmark that writes a section, one after the other; rewrites docs/performance.md.
#   bash benchmarks/run_all.sh                     # after the quickstart, whose checkpoints two of them need
#   bash benchmarks/run_all.sh --fast /tmp/all.md  # the smallest size, one round: shows only that everything works
# A benchmark that fails loses its own section only; the end names it, and the exit status is 1. PYTHON names the
# interpreter, WEIGHTS a folder for the random weights of full size (17 GB), which a GPU needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  echo "usage: bash benchmarks/run_all.sh [--fast FILE.md]" >&2
  exit 2
}

fast=""
file=docs/performance.md
if [[ $# -gt 0 ]]; then
  [[ $# -eq 2 && $1 == --fast ]] || usage
  fast=yes
  file=$2
fi

python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

bench() { # bench NAME ARGUMENTS...
  echo "== $*" >&2
  if ! "$python" "benchmarks/$1.py" "${@:2}" --write "$file"; then
    failed+=("$1")
  fi
}

bench header
if [[ -n $fast ]]; then
  bench step --size tiny --batch-size 2 --captions long --repeats 1
  bench step --size tiny --batch-size 2 --captions short --repeats 1
  bench generate --size tiny --images 2 --tokens 2 4 --repeats 1
  bench generate --size tiny --images 2 --tokens 2 4 --repeats 1 --beams 2
  bench loader --sizes 320x240 --images 4 --batch-size 2 --repeats 1 --seconds 0.1
  bench batch_invariant --size tiny --images 2 --timed 2 --tokens 2 --repeats 1
  bench startup --size tiny --repeats 1
  bench memory --size tiny --batch-size 2
else
  compile=()
  ! command -v "${CXX:-g++}" >/dev/null || compile=(--compile)
  weights=()
  [[ -z ${WEIGHTS:-} ]] || weights=(--dir "$WEIGHTS")
  gpu=$("$python" -c 'import torch; print("yes" if torch.cuda.is_available() else "")')
  bench step --size mid --batch-size 16 --captions long "${compile[@]}"
  bench step --size mid --batch-size 16 --captions short
  bench generate --size mid "${compile[@]}"
  bench generate --size mid --beams 5
  bench batch_invariant --size tiny --default
  bench loader
  bench startup --size 1gb --repeats 3
  bench memory ${gpu:+--measure "${weights[@]}"}
  # The newest run of the quickstart's third recipe; without one the next two say what is missing.
  runs=(output/mini/flickr30k/*/)
  bench evaluate --cfg-path eval_configs/mini_flickr_eval.yaml --run "${runs[-1]}" --images 100 --metrics BLEU CIDEr ROUGE-L
  bench serve --images data/mini/flickr30k/flickr30k-images --repeats 3
fi

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "error: these failed, and their sections are those of an earlier run: ${failed[*]}" >&2
  exit 1
fi
echo "Wrote $file"
