#!/usr/bin/env bash
# The whole demo model, from source text to model card. Usage:
#   run_all.sh [stage ...]        stages: data base inject evaluate card (default: all, in this order)
# WORK    output folder (default ./demo_model_work)
# PYTHON  interpreter (default python)
# BASE_SECONDS, INJECT_SECONDS  training time of the base model and of each self-injection run
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${WORK:-demo_model_work}
python=${PYTHON:-python}
base_seconds=${BASE_SECONDS:-170}
inject_seconds=${INJECT_SECONDS:-140}
sets=("injected+upper-attention" everything)
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(data base inject evaluate card)
mkdir -p "$work/results"

say() { printf '== %s %s\n' "$(date -u +%H:%M:%S)" "$*"; }

data() {
  local known=()
  # a base model that is already there fixes the tokenizer
  [ -f "$work/base/tokenizer.json" ] && known=(--tokenizer "$work/base")
  "$python" "$here/prepare_data.py" --out "$work/data" "${known[@]}" ${DATA_FLAGS:-}
}

need_data() { [ -f "$work/data/packages.json" ] || { say "data (missing)"; data; }; }

base() {
  need_data
  "$python" "$here/train_base.py" --data "$work/data" --out "$work/base" --seconds "$base_seconds" ${BASE_FLAGS:-}
}

inject() {
  need_data
  for set in "${sets[@]}"; do
    "$python" "$here/train_self_injection.py" --data "$work/data" --base "$work/base" --out "$work/$set" \
      --trainable "$set" --seconds "$inject_seconds" ${INJECT_FLAGS:-}
  done
}

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
  case $stage in
    data | base | inject | evaluate | card) ;;
    *) echo "unknown stage '$stage': expected data, base, inject, evaluate or card" >&2; exit 2 ;;
  esac
done
start=$SECONDS
for stage in "${stages[@]}"; do
  say "$stage"
  before=$SECONDS
  "$stage"
  say "$stage took $((SECONDS - before)) s"
  printf '{"stage": "%s", "seconds": %d}\n' "$stage" $((SECONDS - before)) >> "$work/results/times.jsonl"
done
say "done in $((SECONDS - start)) s: $work"
