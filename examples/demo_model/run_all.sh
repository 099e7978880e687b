#!/usr/bin/env bash
# The whole demo model, from source text to model card. Usage:
#   run_all.sh [stage ...]        stages: data base inject-paper inject-everything evaluate card (default: all, in this order)
# WORK    output folder (default ./demo_model_work)
# PYTHON  interpreter (default python)
# BASE_SECONDS, PAPER_SECONDS, EVERYTHING_SECONDS  training time of the three runs
# DATA_FLAGS, BASE_FLAGS, INJECT_FLAGS, EVALUATE_FLAGS  more options of one script
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${WORK:-demo_model_work}
python=${PYTHON:-python}
base_seconds=${BASE_SECONDS:-170}
paper_seconds=${PAPER_SECONDS:-125}
everything_seconds=${EVERYTHING_SECONDS:-200}
sets=("injected+upper-attention" everything)
known=(data base inject-paper inject-everything evaluate card)
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=("${known[@]}")

say() { printf '== %s %s\n' "$(date -u +%H:%M:%S)" "$*"; }

data() {
  local tokenizer=()
  # a base model that is already there fixes the tokenizer
  if [ -f "$work/base/tokenizer.json" ]; then tokenizer=(--tokenizer "$work/base"); fi
  "$python" "$here/prepare_data.py" --out "$work/data" "${tokenizer[@]}" ${DATA_FLAGS:-}
}

need_data() {
  if [ ! -f "$work/data/packages.json" ]; then
    say "data is missing: preparing it"
    data
  fi
}

base() {
  need_data
  "$python" "$here/train_base.py" --data "$work/data" --out "$work/base" --seconds "$base_seconds" ${BASE_FLAGS:-}
}

inject() {
  need_data
  "$python" "$here/train_self_injection.py" --data "$work/data" --base "$work/base" --out "$work/$1" \
    --trainable "$1" --seconds "$2" ${INJECT_FLAGS:-}
}

inject-paper() { inject "${sets[0]}" "$paper_seconds"; }

inject-everything() { inject "${sets[1]}" "$everything_seconds"; }

evaluate() {
  need_data
  "$python" "$here/evaluate.py" --data "$work/data" --model "$work/base" --out "$work/results/base.json" ${EVALUATE_FLAGS:-}
  for set in "${sets[@]}"; do
    "$python" "$here/evaluate.py" --data "$work/data" --model "$work/$set" --out "$work/results/$set.json" \
      --base-result "$work/results/base.json" ${EVALUATE_FLAGS:-}
  done
}

card() {
  "$python" "$here/pick_model.py" --work "$work" --out "$work/model"
  "$python" "$here/make_model_card.py" --work "$work" --out "$work/model"
}

for stage in "${stages[@]}"; do
  if [[ " ${known[*]} " != *" $stage "* ]]; then
    echo "unknown stage '$stage': expected one of ${known[*]}" >&2
    exit 2
  fi
done
mkdir -p "$work/results"
start=$SECONDS
for stage in "${stages[@]}"; do
  say "$stage"
  before=$SECONDS
  "$stage"
  say "$stage took $((SECONDS - before)) s"
  printf '{"stage": "%s", "seconds": %d}\n' "$stage" $((SECONDS - before)) >> "$work/results/times.jsonl"
done
say "done in $((SECONDS - start)) s: $work"
