#!/usr/bin/env bash
# Random kills of worker processes while a run goes on: SIGKILL, or SIGSTOP for longer than a lease and then SIGCONT. The
# final weights must be those of the undisturbed run. Prints a histogram, and how long a worker took to serve again.
#
# usage: scripts/kill-workers.sh PATH-TO-TEMPER KILLS [RECIPE]   (SEED=n, STOPS=percent of SIGSTOP, STEPS="--set ...",
#        RANKS=trainer ranks)
set -euo pipefail
temper=$(realpath "$1")
kills=$2
recipe=${3:-recipes/quickstart.toml}
read -r -a steps <<<"${STEPS:-}"
RANDOM=${SEED:-1}
dir=$(mktemp -d)
trap 'jobs -p | xargs -r kill 2>/dev/null || true; rm -rf "$dir"' EXIT
common=(--set checkpoint.every_steps=5 --set placement.trainer_ranks="${RANKS:-1}" "${steps[@]}")

weights() { find "$dir/$1/checkpoints" -name model.safetensors | sort -V | tail -n 1 | xargs cat | sha256sum; }
# NAME LIFE PID PHASE of every worker that serves.
ready() {
    "$temper" workers --run-dir "$dir/run" 2>/dev/null | awk '$3 == "ready" { print $1, $5, $7 }' || true
}
phase() { "$temper" status --run-dir "$dir/run" --json 2>/dev/null | sed -n 's/.*"phase": "\(.*\)".*/\1/p'; }
begin() {
    "$temper" train "$recipe" --run-dir "$dir/run" "${common[@]}" --set placement.mode=processes \
        --set placement.rollout_workers=2 --set placement.reward_workers=2 >"$dir/run.log" 2>&1 &
    run=$!
}
# The run is over: it must have come to the same weights.
check() {
    wait "$run" || { tail -n 20 "$dir/run.log"; echo "the run failed"; exit 1; }
    [ "$(weights run)" = "$reference" ] || { echo "the weights differ"; exit 1; }
    runs=$((runs + 1))
    rm -rf "$dir/run"
}

echo "reference: one process"
"$temper" train "$recipe" --run-dir "$dir/one" "${common[@]}" >"$dir/one.log" 2>&1 ||
    { tail -n 20 "$dir/one.log"; echo "the reference failed"; exit 1; }
reference=$(weights one)
runs=0 done=0
: >"$dir/kills" >"$dir/seconds"
begin
while [ "$done" -lt "$kills" ]; do
    if ! kill -0 "$run" 2>/dev/null; then
        check
        begin
    fi
    mapfile -t workers < <(ready)
    [ "${#workers[@]}" -gt 0 ] || { sleep 0.1; continue; }
    read -r name life pid <<<"${workers[RANDOM % ${#workers[@]}]}"
    sleep "0.$((RANDOM % 9))"
    at=$(phase)
    if [ $((RANDOM % 100)) -lt "${STOPS:-0}" ]; then
        kill -STOP "$pid" 2>/dev/null || continue
        (sleep 14; kill -CONT "$pid" 2>/dev/null || true) &
        how=stop
    else
        kill -KILL "$pid" 2>/dev/null || continue
        how=kill
    fi
    begun=$(date +%s.%N)
    done=$((done + 1))
    echo "$how ${name%-*} ${at:-start}" >>"$dir/kills"
    # Until it serves in a later life, or the run is over without it.
    while kill -0 "$run" 2>/dev/null; do
        again=$(ready | awk -v n="$name" -v l="$life" '$1 == n && $2 > l { print $2 }')
        [ -z "$again" ] || { echo "$how $(date +%s.%N) $begun" | awk '{ print $1, $2 - $3 }' >>"$dir/seconds"; break; }
        sleep 0.02
    done
done
check
sort "$dir/kills" | uniq -c
for how in kill stop; do
    awk -v h="$how" '$1 == h { print $2 }' "$dir/seconds" | sort -n |
        awk -v h="$how" '{ s[NR] = $1 } END { if (NR) printf "%s: %d times, serves again after p50 %.2f s, p99 %.2f s\n", h, NR, s[int((NR + 1) / 2)], s[int(NR * 0.99 + 0.5)] }'
done
echo "$done disturbances in $runs runs: every run came to the weights of the undisturbed one"
pgrep -f "serve (rollout|reward|trainer) --join" >/dev/null && echo "processes are left behind" || echo "no process is left behind"
