#!/usr/bin/env bash
# compute-sanitizer over every CUDA operator: one line for each tool, under it one for each kernel and kind of finding;
# exit code 1 on any finding that tests/sanitize_findings.py does not explain away.
#   tests/sanitize.sh [TOOL ...]         default: memcheck racecheck initcheck synccheck
# PYTHON: the interpreter; SANITIZE_LOGS: where the logs go; SANITIZE_SECONDS: limit for one tool;
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

failed=0
for tool in "${TOOLS[@]}"; do
  log=$LOGS/$tool.log
  begin=$SECONDS
  # the tool gives up on a program that takes longer to start, which importing torch under it does
  timeout "$LIMIT" "$SANITIZER" --tool "$tool" --launch-timeout 240 --print-limit 2000 --show-backtrace no --report-api-errors no \
    --target-processes application-only "$PYTHON" tests/sanitize.py "${CALLS[@]}" >"$log" 2>&1
  code=$?
  summary=$(grep -hE '(ERROR|RACECHECK) SUMMARY' "$log" | head -n 1 | sed 's/^=* *//')
  made=$(grep -h '^calls made' "$log" | tail -n 1)
  found=$("$PYTHON" tests/sanitize_findings.py "$tool" "$log")
  explained=$?
  outcome=ok
  # all three must hold: the exit code (the program's), no finding without an explanation, a program that came to its end
  if [[ $code != 0 || $explained != 0 || -z $made ]]; then
    outcome=FAILED failed=1
    [[ $code != 124 ]] || summary="stopped after $LIMIT s"
  fi
  printf '%-10s %-6s %4d s  %s; %s (%s)\n' "$tool" "$outcome" $((SECONDS - begin)) "${summary:-no summary, exit code $code}" "${made:-not finished}" "$log"
  [[ -z $found ]] || printf '%s\n' "$found"
done
exit $failed
