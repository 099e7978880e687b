#!/usr/bin/env bash
# compute-sanitizer over every CUDA operator: one line for each tool, under it one for each kernel and kind of finding;
# exit code 1 on any finding that tests/sanitize_findings.py does not name as a known mistake of the tool.
#   tests/sanitize.sh [TOOL ...]         default: memcheck racecheck initcheck synccheck
# PYTHON: the interpreter; SANITIZE_LOGS: where the logs go; SANITIZE_SECONDS: limit for one tool;
# SANITIZE_JOBS: processes that share the calls of a tool (default: 2, of racecheck, the slow one, 6);
# SANITIZE_CALLS: calls whose name begins so, separated by ';' (python tests/sanitize.py --list).
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOGS=${SANITIZE_LOGS:-$(mktemp -d)}
LIMIT=${SANITIZE_SECONDS:-300}
IFS=';' read -ra CALLS <<<"${SANITIZE_CALLS:-}"
TOOLS=("$@")
[[ ${#TOOLS[@]} -gt 0 ]] || TOOLS=(memcheck racecheck initcheck synccheck)
# each tensor an allocation of its own: in torch's pool an access past the end of one would hit its neighbour
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_MODULE_LOADING=LAZY
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/python
SANITIZER=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [[ -z $SANITIZER ]]; then
  echo "sanitize: expected compute-sanitizer in PATH or CUDA_HOME/bin, found none" >&2
  exit 2
fi
mkdir -p "$LOGS"

# without a tool first: a failure there is no finding of the sanitizer
"$PYTHON" tests/sanitize.py "${CALLS[@]}" >"$LOGS/plain.log" 2>&1
code=$?
tail -n 1 "$LOGS/plain.log"
if [[ $code != 0 ]]; then
  grep -h '^failed' "$LOGS/plain.log"
  exit $code
fi
calls=$(grep -c '^call: ' "$LOGS/plain.log")

failed=0
for tool in "${TOOLS[@]}"; do
  begin=$SECONDS
  parts=${SANITIZE_JOBS:-2}
  [[ -n ${SANITIZE_JOBS:-} || $tool != racecheck ]] || parts=6
  ((parts <= calls)) || parts=$calls
  logs=() jobs=()
  for ((part = 0; part < parts; ++part)); do
    logs+=("$LOGS/$tool.$part.log")
    # the tool gives up on a program that takes longer to start, which importing torch under it does
    timeout "$LIMIT" "$SANITIZER" --tool "$tool" --launch-timeout 240 --print-limit 2000 --show-backtrace no \
      --report-api-errors no --target-processes application-only \
      "$PYTHON" tests/sanitize.py --part "$part/$parts" "${CALLS[@]}" >"${logs[part]}" 2>&1 &
    jobs+=($!)
  done
  # three things must hold: every program came to its end and was content, the tool too, and no finding is left
  outcome=ok note=
  for ((part = 0; part < parts; ++part)); do
    wait "${jobs[part]}"
    code=$?
    ((code == 0)) || outcome=FAILED note="; part $part/$parts ended with code $code"
    ((code != 124)) || note="; stopped after $LIMIT s"
    grep -q '^calls made' "${logs[part]}" || outcome=FAILED
  done
  found=$("$PYTHON" tests/sanitize_findings.py "$tool" "${logs[@]}") || outcome=FAILED
  [[ $outcome == ok ]] || failed=1
  made=$(cat "${logs[@]}" | awk '/^calls made: / { n += $3 } END { print n + 0 }')
  printf '%-10s %-6s %4d s  %d of %d calls%s (%s)\n' "$tool" "$outcome" $((SECONDS - begin)) "$made" "$calls" "$note" "$LOGS/$tool.*.log"
  [[ -z $found ]] || printf '%s\n' "$found"
done
exit $failed
