#!/usr/bin/env bash
# A run on a Cloud TPU slice, on all its hosts, started again after a pre-emption.
#   PROJECT=my-project ZONE=us-east5-b TYPE=v6e-16 SPOT=1 QUEUED=1 WORKDIR=gs://my-bucket/run \
#     bash launch/tpu_vm.sh all --config configs/quickstart.py
# Its steps alone, with the same settings; --dry_run prints their commands and runs none:
#   create       the slice; SPOT=1 where it may be pre-empted, QUEUED=1 waits in the queue until there is one
#   install      the committed code and its packages, on all hosts
#   run FLAGS    the run in the background of all hosts, in place of one that is there; what it says is in run.log
#   watch FLAGS  follows the run to its end; a slice that was pre-empted is made anew, a run that died started again
#   fetch        the workdir into OUT (runs/NAME)
#   delete       the slice
#   all FLAGS    create, install, run, watch, delete, fetch
# Settings: PROJECT, ZONE, TYPE (v6e-16, v5litepod-16, v4-8 ...; newer than v6e: gke_jobset.yaml), WORKDIR (gs://, which
# all hosts see and a pre-emption leaves; their service account must write to it); NAME (drirl-jax), VERSION (the usual
# image of the TYPE), CREATE_FLAGS (more for gcloud's create, e.g. "--network=mine"), RESTARTS (10), POLL (30 seconds).
set -euo pipefail
cd "$(dirname "$0")/.."

exec 3>&1 4>&2  # a dry run's commands, and what is said, reach the terminal from within every redirection
say() { echo "tpu_vm.sh: $1" >&4; }
die() { say "$1"; exit 1; }

# ------------------------------------------------------------------------------------- settings, all before any call
dry='' flags=()
for flag in "$@"; do
  if [ "$flag" = --dry_run ]; then dry=1; else flags+=("$flag"); fi
done
step=${flags[0]:-} flags=("${flags[@]:1}")

declare -A example=([PROJECT]=my-project [ZONE]=us-east5-b [TYPE]=v6e-16 [WORKDIR]=gs://my-bucket/run)
need() {
  local setting
  for setting in "$@"; do
    [ -n "${!setting:-}" ] || die "$setting is not set, e.g. $setting=${example[$setting]}."
  done
}
case $step in
  create | install | delete) need PROJECT ZONE ;;
  run | watch | all) need PROJECT ZONE WORKDIR ;;
  fetch) need WORKDIR ;;
  *) die "the first argument is create, install, run, watch, fetch, delete or all, not '$step'." ;;
esac
case $step in create | watch | all) need TYPE ;; esac
case $step in
  run | watch | all)
    [[ " ${flags[*]}" == *" --config"[\ =]* ]] || die "$step needs flags, e.g. --config configs/quickstart.py."
    [[ " ${flags[*]}" != *" --workdir"* ]] || die "the workdir is the setting WORKDIR, not a flag."
    ;;
  *) [ ${#flags[@]} = 0 ] || die "$step takes no flags, not '${flags[*]}'." ;;
esac
[[ -z ${WORKDIR:-} || $WORKDIR == gs://* ]] || die "WORKDIR is $WORKDIR, but must be gs://..., which all hosts see."
[ -n "$dry" ] || command -v gcloud >/dev/null || die "no gcloud here: https://cloud.google.com/sdk/docs/install."

name=${NAME:-drirl-jax} out=${OUT:-runs/${NAME:-drirl-jax}}
spot=${SPOT:-0} queued=${QUEUED:-0} restarts=${RESTARTS:-10} poll=${POLL:-30}
place=("--project=${PROJECT:-}" "--zone=${ZONE:-}" --quiet)
read -ra create_flags <<<"${CREATE_FLAGS:-}"
[ "$spot" = 0 ] || create_flags+=(--spot)
case ${TYPE:-} in
  v6e-*) version=v2-alpha-tpuv6e ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  *) version=tpu-ubuntu2204-base ;;
esac
version=${VERSION:-$version}

# ---------------------------------------------------------------------------------------------------- calls of gcloud
scratch=$(mktemp -d)

quoted() {  # the arguments as a shell reads them
  local word words=()
  for word in "$@"; do
    if [[ -z $word || $word == *[!A-Za-z0-9_.,:/=@%+-]* ]]; then words+=("${word@Q}"); else words+=("$word"); fi
  done
  echo "${words[*]}"
}

call() {
  if [ -n "$dry" ]; then quoted "$@" >&3; else "$@" 3>&- 4>&-; fi
}

on() {  # all or a host's number, a command there
  call gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2" "${place[@]}" </dev/null
}

if [ "$queued" = 0 ]; then
  deletion=(gcloud compute tpus tpu-vm delete "$name" "${place[@]}")
else
  deletion=(gcloud compute tpus queued-resources delete "$name" --force "${place[@]}")
fi

field() {  # tpu-vm or queued-resources, a field of what describes it; MISSING, or UNKNOWN when nobody answers
  if call gcloud compute tpus "$1" describe "$name" --format="value($2)" "${place[@]}" 2>"$scratch/error"; then
    [ -z "$dry" ] || echo READY
  elif grep -q NOT_FOUND "$scratch/error"; then
    echo MISSING
  else
    cat "$scratch/error" >&2
    echo UNKNOWN
  fi
}

state() {
  local request
  if [ "$queued" != 0 ]; then
    request=$(field queued-resources state.state)
    # Of a request that is active, the slice may be lost already.
    [ "$request" = ACTIVE ] || [ -n "$dry" ] || { echo "$request"; return; }
  fi
  field tpu-vm state
}

lost() { [[ $1 =~ ^(PREEMPTED|TERMINATED|SUSPENDED|FAILED|MISSING)$ ]]; }

# What is left costs money, so no way out is silent about it.
left=''
leave() {
  rm -rf "$scratch"
  [ -z "$left" ] || [ -n "$dry" ] || say "$name may be there, and costs money until it is deleted: ${deletion[*]}"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# -------------------------------------------------------------------------------------------------------------- steps
create() {
  local now=''
  left=1
  if [ "$queued" = 0 ]; then
    call gcloud compute tpus tpu-vm create "$name" --accelerator-type="$TYPE" --version="$version" \
      "${create_flags[@]}" "${place[@]}"
    return
  fi
  call gcloud compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$TYPE" \
    --runtime-version="$version" "${create_flags[@]}" "${place[@]}" || return
  while [ "$now" != READY ]; do
    [ -z "$now" ] || sleep "$poll"
    now=$(state)
    ! lost "$now" || { say "$name is $now." && return 1; }
  done
}

install() {
  git diff --quiet HEAD || say "what is not committed is not installed."
  # The images have Python 3.10, which is too old; uv brings a newer one without root.
  call git archive --format=tar.gz --output="$scratch/drirl_jax.tar.gz" HEAD &&
    call gcloud compute tpus tpu-vm scp "$scratch/drirl_jax.tar.gz" "$name:" --worker=all "${place[@]}" &&
    on all "mkdir -p drirl_jax && cd drirl_jax && tar -xzf ../drirl_jax.tar.gz && \
python3 -m pip install --quiet --user uv && ~/.local/bin/uv python install --quiet 3.12 && \
PYTHON=\$(~/.local/bin/uv python find 3.12) bash launch/install.sh .venv '.[tpu]'"
}

run() {
  local command
  command=$(quoted .venv/bin/python -m drirl_jax.main "${flags[@]}" "--workdir=$WORKDIR" --config.distributed.auto=True)
  command="echo \$\$ >run.pid; $command; echo \$? >run.code"
  # Two runs would fight for the chips and the workdir; a session of its own outlives this connection.
  on all "cd drirl_jax && [ -x .venv/bin/python ] && { \
[ ! -f run.pid ] || { pkill -TERM -g \$(cat run.pid) && sleep 10; pkill -KILL -g \$(cat run.pid); }; \
rm -f run.pid run.code; setsid bash -c $(quoted "$command") >run.log 2>&1 </dev/null & \
until [ -f run.pid ]; do sleep 0.1; done; }"
}

remove() { call "${deletion[@]}" && left=''; }

fetch() { call mkdir -p "$out" && call gcloud storage rsync "$WORKDIR" "$out" --recursive; }

again() {  # the state that was found
  if lost "$1"; then
    { [ "$1" = MISSING ] || remove; } && create || return
  fi
  install && run
}

watch() {
  local now replies cause known='' restart=0 silent=0 printed=0
  [ "$step" = watch ] || known=1
  # Of each host. Whether the process lives is asked first: when it does not, its code has been written.
  local ask="cd drirl_jax; if kill -0 \$(cat run.pid); then echo run: running; \
elif [ ! -f run.code ]; then echo run: gone; \
else echo run: code \$(cat run.code); grep -qx 0 run.code || tail -n 20 run.log; fi"
  while :; do
    now=$(state) cause=''
    if [ "$now" = MISSING ] && [ -z "$known" ]; then  # a wrong NAME must not make a slice
      left=''
      die "there is no $name; the steps create and all make one."
    fi
    [ "$now" = UNKNOWN ] || known=1
    if lost "$now"; then
      cause="$name is $now"
    elif [ "$now" = READY ] && replies=$(on all "$ask" 2>/dev/null) && [ -n "$replies$dry" ] &&
      on 0 "tail -c +$((printed + 1)) drirl_jax/run.log" >"$scratch/new" 2>/dev/null; then
      [ -z "$dry" ] || return 0
      silent=0
      cat "$scratch/new"
      printed=$((printed + $(wc -c <"$scratch/new")))
      if grep '^drirl_jax: ' <<<"$replies"; then
        die "the run refuses its flags."
      elif grep -Eq '^run: (gone|code [1-9])' <<<"$replies"; then
        echo "$replies"
        cause="the run has died on a host"
      elif ! grep -q '^run: running' <<<"$replies"; then
        return 0
      fi
    else
      ((++silent < 40)) || die "$name, $now, has not answered 40 times; the step watch goes on from here."
    fi
    if [ -n "$cause" ]; then
      ((restart++ < restarts)) || die "$cause; given up after $restarts restarts."
      say "$cause; started again ($restart of $restarts)."
      again "$now" || say "that failed; $name is looked at again in $poll seconds."
      printed=0
    fi
    sleep "$poll"
  done
}

[ "$step" = fetch ] || left=1
case $step in
  create) create || die "$name was not created." ;;
  install) install || die "not installed." ;;
  run) run || die "not started: has the code been installed?" ;;
  watch) watch ;;
  fetch) fetch || die "not fetched." ;;
  delete) remove || die "not deleted." ;;
  all)
    create || die "$name was not created."
    { install && run; } || lost "$(state)" || die "not started."
    watch
    # The results are in the bucket: what costs money goes first.
    remove || die "not deleted."
    fetch || die "not fetched."
    ;;
esac
