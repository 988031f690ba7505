#!/usr/bin/env bash
# One worker's part of a run; `launch/tpu` calls it over ssh.
#
#   launch/worker.sh run ID COMMAND...   starts it and follows it to its end
#   launch/worker.sh status | logs | stop
#
# The command is detached: a lost connection does not end it, and `run` again
# follows what is running, or tells how attempt ID ended. A lock tells whether
# it lives, since the number of a process may belong to another after a reboot.
set -euo pipefail

state=${ROCL_JAX_STATE:-$HOME/.rocl_jax_run}
mkdir -p "$state"

alive() { ! flock --nonblock "$state/lock" true; }

read_file() { cat "$state/$1" 2>/dev/null || true; }

# The command's exit status, or 137 if it was killed before it had one.
ended() { exit "$(read_file status | grep . || echo 137)"; }

follow() { # from this line of the log on
  tail --lines="$1" --pid="$(read_file pid)" --follow=name "$state/log" || true
  flock "$state/lock" true # free when the command has gone
  ended
}

launch() { # ID COMMAND...
  rm -f "$state"/{status,pid}
  echo "$1" >"$state/id"
  shift
  printf '%q ' "$@" >"$state/command"
  # Stale values of these hang the start of JAX: the log must have them.
  { env | grep --extended-regexp '^(TPU|MEGASCALE|JAX|SLURM)_' || true; } \
    >"$state/log"
  # shellcheck disable=SC2016  # the inner shell expands
  setsid flock --nonblock "$state/lock" bash -c '
    state=$1; shift
    "$@" &
    echo $! >"$state/pid"
    status=0; wait $! || status=$?
    echo "$status" >"$state/status"
  ' worker "$state" "$@" >>"$state/log" 2>&1 </dev/null &
  for _ in $(seq 100); do
    [[ -s $state/pid ]] && return
    sleep 0.1
  done
  echo "worker.sh: the command did not start: $state/log" >&2
  exit 1
}

case ${1:-} in
  run)
    id=$2
    shift 2
    if alive; then
      if [[ $(read_file command) != "$(printf '%q ' "$@")" ]]; then
        echo "worker.sh: another command runs here, stop it first:" \
          "$(read_file command)" >&2
        exit 2
      fi
      follow 20
    elif [[ $(read_file id) == "$id" && -s $state/status ]]; then
      tail --lines=20 "$state/log"
      ended
    fi
    launch "$id" "$@"
    follow +1
    ;;
  status)
    if alive; then
      echo "running: $(read_file command)"
    elif [[ -f $state/id ]]; then
      echo "ended with status $(read_file status | grep . || echo 137):" \
        "$(read_file command)"
    else
      echo 'nothing ran here'
    fi
    ;;
  logs) tail --lines="${2:-100}" --follow=name "$state/log" ;;
  stop)
    if alive; then
      kill -TERM "$(read_file pid)" # saves, and is gone within 28 seconds
      flock --timeout=40 "$state/lock" true || kill -KILL "$(read_file pid)"
    fi
    ;;
  *)
    echo "worker.sh: found ${1:-nothing}, wanted run, status, logs or stop" >&2
    exit 2
    ;;
esac
