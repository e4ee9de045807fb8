#!/usr/bin/env bash
# A run over two network namespaces as two hosts, joined by a virtual cable: the controller and the trainer in one, two
# engines and a reward worker in the other. New weights take the cable too. The cable is cut for CUT seconds (default 20:
# longer than a lease) and healed while the run goes on. The final weights must be those of the run in one process.
#
# usage, as root: scripts/two-hosts.sh PATH-TO-TEMPER [RECIPE]     (CUT=seconds, STEPS="--set ..." to shorten it,
# RANKS=2 for a second trainer rank at the other end, TLS=1 for certificates)
set -euo pipefail
temper=$(realpath "$1")
recipe=${2:-recipes/quickstart.toml}
cut=${CUT:-20}
ranks=${RANKS:-1}
read -r -a steps <<<"${STEPS:-} --set placement.trainer_ranks=$ranks"
dir=$(mktemp -d)
a=temper-a-$$ b=temper-b-$$
cleanup() {
    jobs -p | xargs -r kill 2>/dev/null || true
    ip netns del "$a" 2>/dev/null || true
    ip netns del "$b" 2>/dev/null || true
    rm -rf "$dir"
}
trap cleanup EXIT

ip netns add "$a"
ip netns add "$b"
ip link add va$$ netns "$a" type veth peer name vb$$ netns "$b"
ip -n "$a" addr add 10.77.0.1/24 dev va$$
ip -n "$b" addr add 10.77.0.2/24 dev vb$$
for pair in "$a va$$" "$b vb$$"; do
    read -r ns dev <<<"$pair"
    ip -n "$ns" link set lo up
    ip -n "$ns" link set "$dev" up
done

echo "reference: one process"
"$temper" train "$recipe" --run-dir "$dir/one" "${steps[@]}" >"$dir/one.log" 2>&1

run_tls=() a_tls=() b_tls=()
if [ "${TLS:-0}" = 1 ]; then
    "$temper" certs "$dir/tls" 10.77.0.1 10.77.0.2 >/dev/null
    files() { echo "$dir/tls/ca.pem" "$dir/tls/10.77.0.$1.pem" "$dir/tls/10.77.0.$1-key.pem"; }
    read -r ca cert key <<<"$(files 1)"
    run_tls=(--set "placement.tls.ca=$ca" --set "placement.tls.cert=$cert" --set "placement.tls.key=$key")
    a_tls=(--tls-ca "$ca" --tls-cert "$cert" --tls-key "$key")
    read -r ca cert key <<<"$(files 2)"
    b_tls=(--tls-ca "$ca" --tls-cert "$cert" --tls-key "$key")
fi

echo "two hosts"
ip netns exec "$a" "$temper" train "$recipe" --run-dir "$dir/two" "${steps[@]}" \
    --set placement.mode=processes --set placement.spawn_workers=false --set placement.listen=10.77.0.1:7070 \
    --set placement.rollout_workers=2 --set placement.weight_transport=grpc "${run_tls[@]}" >"$dir/two.log" 2>&1 &
run=$!
ip netns exec "$a" "$temper" serve trainer --join 10.77.0.1:7070 --listen 10.77.0.1:0 "${a_tls[@]}" 2>"$dir/trainer.log" &
there=(rollout rollout reward)
for _ in $(seq 2 "$ranks"); do there+=(trainer); done
for role in "${there[@]}"; do
    ip netns exec "$b" "$temper" serve "$role" --join 10.77.0.1:7070 --listen 10.77.0.2:0 "${b_tls[@]}" \
        2>>"$dir/workers.log" &
done

steps_done() { cat "$dir/two/metrics.jsonl" 2>/dev/null | wc -l; }
while kill -0 $run 2>/dev/null && [ "$(steps_done)" -lt 105 ]; do sleep 0.2; done
echo "cutting the cable for $cut s after $(steps_done) steps"
ip -n "$b" link set vb$$ down
sleep "$cut"
ip -n "$b" link set vb$$ up
echo "healed after $(steps_done) steps"
status=0
wait $run || status=$?
tail -n 5 "$dir/two.log"
[ "$status" -eq 0 ] || { cat "$dir/workers.log"; exit "$status"; }
echo "$(grep -c "joining again" "$dir/workers.log" || true) lives began anew"
last() { find "$dir/$1/checkpoints" -name model.safetensors | sort -V | tail -n 1; }
one=$(sha256sum <"$(last one)")
two=$(sha256sum <"$(last two)")
echo "one process  $one"
echo "two hosts    $two"
[ "$one" = "$two" ] && echo "equal"
