#!/usr/bin/env bash
# A run in N processes on this machine; when one dies, all are started again and go on where the run was.
#   bash launch/multiprocess.sh N --config configs/quickstart.py --workdir runs/x     --dry_run prints the commands
# Process 0's output is on the terminal, all output in the folder LOGS; of another process that dies, the last lines.
# Settings: RESTARTS (3), GRACE (10 seconds from SIGTERM to SIGKILL), LOGS (a new folder), PYTHON (.venv/bin/python).
# The environment is passed on, XLA_FLAGS among it. On GPUs, process I has GPU I.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "multiprocess.sh: $1" >&2; }
die() { say "$1"; exit 1; }

dry='' flags=()
for flag in "$@"; do
  if [ "$flag" = --dry_run ]; then dry=1; else flags+=("$flag"); fi
done
n=${flags[0]:-} flags=("${flags[@]:1}")
[[ $n =~ ^[1-9][0-9]*$ ]] || die "the first argument is the number of processes, not '$n'."
restarts=${RESTARTS:-3} grace=${GRACE:-10} python=${PYTHON:-.venv/bin/python}
[ -n "$dry" ] || command -v "$python" >/dev/null ||
  die "no $python here: bash launch/install.sh .venv . makes one, or PYTHON names another."

free_port() {
  local port
  # Below the ports that the kernel gives to connections, so that none of them takes it first.
  while port=$((20000 + RANDOM % 10000)); (: <>"/dev/tcp/localhost/$port") 2>/dev/null; do :; done
  echo "$port"
}

command_of() {  # process, port: the command in the array `command`
  command=(
    "$python" -m drirl_jax.main "${flags[@]}" "--config.distributed.coordinator=localhost:$2"
    "--config.distributed.processes=$n" "--config.distributed.process=$1"
  )
}

if [ -n "$dry" ]; then
  port=$(free_port)
  for ((i = 0; i < n; i++)); do
    command_of "$i" "$port"
    echo "JAX_LOCAL_DEVICE_IDS=$i$(printf ' %q' "${command[@]}")"
  done
  exit
fi

pids=() shown=''
alive() { kill -0 -- "$@" 2>/dev/null; }  # any of them

stop() {  # all processes, and what they have started
  local groups=("${pids[@]/#/-}") waited
  ((${#pids[@]})) || return 0
  kill -TERM -- "${groups[@]}" "${pids[@]}" 2>/dev/null || true
  for ((waited = 0; waited < grace * 10; waited++)); do
    alive "${groups[@]}" "${pids[@]}" || break
    sleep 0.1
  done
  kill -KILL -- "${groups[@]}" "${pids[@]}" 2>/dev/null || true
  # Without the shell's word on each; what is shown ends with process 0, once all of it is on the terminal.
  wait "${pids[@]}" "$shown" 2>/dev/null || true
}
trap 'trap "" INT TERM HUP; stop' EXIT
# Only noted here, and heeded where all processes that were started are in `pids`.
signalled=''
trap 'signalled=130' INT
trap 'signalled=143' TERM HUP

logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
say "$n processes; their output is in $logs"

for ((attempt = 0; ; attempt++)); do
  port=$(free_port) pids=()
  for ((i = 0; i < n; i++)); do
    command_of "$i" "$port"
    # A session each: a signal reaches all that the process has started, and Ctrl-C reaches this script alone.
    JAX_LOCAL_DEVICE_IDS=$i setsid "${command[@]}" >"$logs/$i.$attempt" 2>&1 </dev/null &
    pids[i]=$!
  done
  touch "$logs/0.$attempt"
  # A progress bar ends no line, and would be kept until the end.
  tail -n +1 -f -s 0.1 --pid="${pids[0]}" "$logs/0.$attempt" | stdbuf -o0 tr '\r' '\n' | sed -u 's/^/[0] /' &
  shown=$!

  first='' codes=()
  while [ -z "$first" ] && ((${#codes[@]} < n)); do
    sleep 0.2
    [ -z "$signalled" ] || { say "stopped."; exit "$signalled"; }
    for ((i = 0; i < n; i++)); do
      if [ -n "${codes[i]:-}" ] || alive "${pids[i]}"; then continue; fi
      codes[i]=0 && wait "${pids[i]}" || codes[i]=$?
      ((codes[i] == 0)) || first=${first:-$i}
    done
  done
  stop
  [ -n "$first" ] || exit 0

  for ((i = 0; i < n; i++)); do
    ((${codes[i]:-0})) || continue  # it had ended well, or was stopped with the others
    ((i == 0)) || tail -n 20 "$logs/$i.$attempt" | sed "s/^/[$i] /"
    # What the user has to change stays wrong however often it is tried.
    ((codes[i] != 1)) || ! grep -q '^drirl_jax: ' "$logs/$i.$attempt" || exit 1
  done
  say "process $first ended with exit code ${codes[first]}, the others were stopped."
  ((attempt < restarts)) || break
  say "all are started again ($((attempt + 1)) of $restarts)."
done
say "given up after $restarts restarts."
exit "${codes[first]}"
