# shellcheck shell=bash
# What the job scripts of this folder share; they source it and call `sedd_job`. It runs a command
# of sedd-scale on every task of the allocation, ends it in order when Slurm asks, and lets the job
# requeue itself until its work is done.
#
# Environment, all optional (sbatch hands on yours; or sbatch --export=ALL,NAME=value):
#   SEDD_HOME           the repository; where sbatch was called
#   SEDD_PYTHON         Python that has the package; $SEDD_HOME/.venv/bin/python, else python3
#   SEDD_SETUP          file to source first (modules, conda, proxies, NCCL settings)
#   SEDD_LAUNCHER       srun: one process a task (default); torchrun: one agent a node
#   SEDD_SRUN_FLAGS     more flags of srun, such as --cpu-bind=cores
#   SEDD_INTERFACE      network device of NCCL and gloo; default: by which this node reaches the
#                       others; none: leave it to them
#   SEDD_THREADS        OMP_NUM_THREADS of a process; default: its CPUs
#   SEDD_CACHE          node-local folder for compiled kernels; default: in TMPDIR
#   SEDD_MAX_RESTARTS   requeues of one job; 0: none (20)
#   SEDD_MAX_STALLED    give up after so many starts in a row without progress (3)
#   SEDD_LOST_SECONDS   after the first process has ended, the others get so long to end (60)
#   SEDD_HEALTH         0: no check of the nodes before work
#   SEDD_MIN_MEMORY_GB  memory that a node must have available (1)
#   SEDD_MIN_DISK_GB    disk that must be free where results go (5)
#   SEDD_MAX_SKEW       seconds that the clocks of two nodes may differ (2)
#   SEDD_HEALTH_SECONDS time for the check of all nodes (180)
#   MASTER_ADDR, MASTER_PORT   rendezvous; default: the first node, a port made of the job's number

# sedd_job STATE PROGRESS COMMAND [ARGUMENT...]: run `sedd-scale COMMAND` on all tasks, and end the
# script.
#   STATE     folder for what is known of the job's attempts; made if absent
#   PROGRESS  what grows as the work goes on: a run directory, or an output
# With SEDD_DONE set, a file or folder that appears when the work is done: a job that Slurm starts
# again although it is there does no more than sedd_after. With SEDD_STDOUT set, the command's standard output goes to that file, which appears when done. A
# function sedd_after is called once the command has ended well.
sedd_job() {
  local state=$1 progress=$2 command=$3
  shift 3
  sedd_environment
  SEDD_LEDGER=$state/attempts-$SLURM_JOB_ID.jsonl SEDD_PROGRESS=$progress
  if ! { mkdir -p "$state" && : >>"$SEDD_LEDGER"; }; then
    sedd_no_folder "$state"
  fi
  "$SEDD_PYTHON" -m sedd_scale.cluster.restarts begin "$SEDD_LEDGER" --progress "$progress" \
    --max-restarts "$SEDD_MAX_RESTARTS" --max-stalled "$SEDD_MAX_STALLED" || exit
  if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -n ${SEDD_DONE:-} && -e $SEDD_DONE ]]; then
    sedd_say "$SEDD_DONE is there: done before this start"
    SEDD_CODE=0
    ! declare -F sedd_after >/dev/null || sedd_after || SEDD_CODE=$?
    sedd_end "$SEDD_CODE" ''
  fi
  trap 'sedd_forward USR1' USR1
  trap 'sedd_forward' TERM
  if [[ $SEDD_HEALTH != 0 ]]; then
    sedd_health "$state"
  fi
  if [[ -n ${SEDD_STDOUT:-} ]]; then
    sedd_launch -m sedd_scale "$command" "$@" >"$SEDD_STDOUT.tmp"
  else
    sedd_launch -m sedd_scale "$command" "$@"
  fi
  if [[ $SEDD_CODE == 0 && -n ${SEDD_STDOUT:-} ]]; then
    mv "$SEDD_STDOUT.tmp" "$SEDD_STDOUT"
    cat "$SEDD_STDOUT"
  fi
  if [[ $SEDD_CODE == 0 ]] && declare -F sedd_after >/dev/null; then
    sedd_after || SEDD_CODE=$?
  fi
  sedd_end "$SEDD_CODE" ''
}

# Defaults, rendezvous, threads, interfaces and caches; printed on a job's first start.
sedd_environment() {
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    sedd_exit 2 "this is a job script: start it with sbatch"
  fi
  # Of an array, this task alone: the number of its last task is that of the whole.
  SEDD_JOB=$SLURM_JOB_ID
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || SEDD_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  SEDD_HOME=$(cd "${SEDD_HOME:-$SLURM_SUBMIT_DIR}" && pwd)
  if [[ -n ${SEDD_SETUP:-} ]]; then
    # shellcheck source=/dev/null
    . "$SEDD_SETUP"
  fi
  if [[ -z ${SEDD_PYTHON:-} ]]; then
    SEDD_PYTHON=$SEDD_HOME/.venv/bin/python
    [[ -x $SEDD_PYTHON ]] || SEDD_PYTHON=python3
  fi
  : "${SEDD_LAUNCHER:=srun}" "${SEDD_SRUN_FLAGS:=}" "${SEDD_MAX_RESTARTS:=20}"
  : "${SEDD_MAX_STALLED:=3}" "${SEDD_LOST_SECONDS:=60}" "${SEDD_HEALTH:=1}"
  : "${SEDD_CACHE:=${TMPDIR:-/tmp}/sedd-scale-$UID}"
  export SEDD_MIN_MEMORY_GB SEDD_MIN_DISK_GB SEDD_MAX_SKEW SEDD_HEALTH_SECONDS
  case $SEDD_LAUNCHER in
    srun | torchrun) ;;
    *) sedd_exit 2 "SEDD_LAUNCHER=$SEDD_LAUNCHER is neither srun nor torchrun: set one of them" ;;
  esac
  # 4(x2): the same number on every node.
  SEDD_TASKS_PER_NODE=${SLURM_TASKS_PER_NODE%%(*}
  if [[ $SLURM_TASKS_PER_NODE == *,* ]]; then
    sedd_exit 2 "nodes with $SLURM_TASKS_PER_NODE tasks: give --ntasks-per-node for equal numbers"
  fi
  local nodes
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${MASTER_ADDR:-${nodes[0]}}
  # As sedd_scale/files/task_environment.py; this script runs on the first node: another job's
  # listener there is passed by.
  if [[ -z ${MASTER_PORT:-} ]]; then
    MASTER_PORT=$((15000 + 16 * SLURM_JOB_ID % 16000))
    while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
      MASTER_PORT=$((MASTER_PORT + 1))
    done
  fi
  export MASTER_PORT
  export OMP_NUM_THREADS=${SEDD_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # srun no longer takes this from the job by itself.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  if [[ -z ${SEDD_INTERFACE:-} ]]; then
    SEDD_INTERFACE=none
    if ((${#nodes[@]} > 1)) && command -v ip >/dev/null; then
      SEDD_INTERFACE=$(sedd_interface_to "${nodes[1]}")
    fi
  fi
  if [[ $SEDD_INTERFACE != none ]]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$SEDD_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$SEDD_INTERFACE}
  fi
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SEDD_CACHE/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SEDD_CACHE/inductor}
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$SEDD_CACHE/extensions}
  # Megatron-core overlaps its collectives with products only where both share one queue.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # Sizes change with the number of masked tokens: segments that grow do not fragment.
  export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
  # A rank's own compilations: its share of the node's cores, not all of them.
  export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-$OMP_NUM_THREADS}
  # No reduction whose shape is chosen by timing: ranks that share a tensor would part by a bit.
  export TORCHINDUCTOR_DETERMINISTIC=${TORCHINDUCTOR_DETERMINISTIC:-1}
  # What NCCL was doing, where a collective runs out of time.
  export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
  export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
  export PYTHONUNBUFFERED=1 PYTHONPATH=$SEDD_HOME${PYTHONPATH:+:$PYTHONPATH}
  sedd_say "start ${SLURM_RESTART_COUNT:-0} of job $SEDD_JOB on ${nodes[*]}"
  if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    local name
    for name in SEDD_HOME SEDD_PYTHON SEDD_LAUNCHER SEDD_TASKS_PER_NODE MASTER_ADDR MASTER_PORT \
      OMP_NUM_THREADS NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME TRITON_CACHE_DIR \
      SEDD_MAX_RESTARTS SEDD_MAX_STALLED SEDD_LOST_SECONDS SEDD_HEALTH; do
      sedd_say "  $name=${!name:-}"
    done
  fi
}

# The device by which this node reaches another, or none.
sedd_interface_to() {
  local address route
  address=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }')
  route=$(ip -o route get "${address:-$1}" 2>/dev/null) || route=
  if [[ $route =~ \ dev\ ([^ ]+) && ${BASH_REMATCH[1]} != lo ]]; then
    printf '%s\n' "${BASH_REMATCH[1]}"
  else
    printf 'none\n'
  fi
}

# Run a Python program on all tasks, in the background of a shell that takes signals meanwhile;
# its exit code is in SEDD_CODE.
sedd_launch() {
  local -a flags words=()
  read -ra flags <<<"$SEDD_SRUN_FLAGS"
  flags+=(--export=ALL --kill-on-bad-exit=0 "--wait=$SEDD_LOST_SECONDS")
  if [[ $SEDD_LAUNCHER == torchrun && $SLURM_NTASKS -gt 1 ]]; then
    # One task with all CPUs of its node.
    flags+=("--ntasks=$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none)
    local -x SRUN_CPUS_PER_TASK
    unset SRUN_CPUS_PER_TASK
    words=(-m sedd_scale.cluster.node_agent "--nproc-per-node=$SEDD_TASKS_PER_NODE")
  fi
  srun "${flags[@]}" "$SEDD_PYTHON" "${words[@]}" "$@" &
  SEDD_PID=$!
  while :; do
    SEDD_CODE=0
    wait "$SEDD_PID" || SEDD_CODE=$?
    # A signal ends `wait` early; the next one goes on.
    kill -0 "$SEDD_PID" 2>/dev/null || break
  done
  SEDD_PID=
}

# A signal came to this shell (--signal=B:..., scancel -b). Nothing here may start a process: a
# second signal would break the handler.
sedd_forward() {
  [[ -z ${1:-} || -z ${SEDD_PID:-} ]] || kill -s "$1" "$SEDD_PID" 2>/dev/null || :
}

# Check every node; a bad one is named, and excluded from the job's next start.
sedd_health() {
  local found bad=''
  found=$(mktemp)
  # One process a task whatever the launcher, and a port that no other step uses.
  SEDD_LAUNCHER=srun MASTER_PORT=$((MASTER_PORT + 1)) sedd_launch -m sedd_scale.cluster.health \
    --folder "$1" >"$found"
  bad=$(tail -n 1 "$found")
  rm -f "$found"
  if [[ $SEDD_CODE != 0 ]]; then
    sedd_end "$SEDD_CODE" "$bad"
  fi
}

# Requeue this job or let it end: sedd_end EXIT_CODE BAD_NODES
sedd_end() {
  local code=$1 verdict
  verdict=$("$SEDD_PYTHON" -m sedd_scale.cluster.restarts end "$SEDD_LEDGER" --code "$code" \
    --progress "$SEDD_PROGRESS" --bad-nodes "$2" \
    --max-restarts "$SEDD_MAX_RESTARTS" --max-stalled "$SEDD_MAX_STALLED") || verdict=stop
  if [[ $verdict == requeue* ]]; then
    verdict=${verdict#requeue}
    sedd_requeue "$code" "${verdict// /}"
  fi
  exit "$code"
}

# The folder of the job's attempts cannot be written. On a later start that is this node's fault.
sedd_no_folder() {
  local node=${SLURMD_NODENAME:-$(hostname)} restarts=${SLURM_RESTART_COUNT:-0} before
  if ((restarts > 0 && restarts < SEDD_MAX_RESTARTS)); then
    sedd_say "$node cannot write $1, which could be written before: requeued without it"
    before=$(scontrol show job --oneliner "$SEDD_JOB")
    [[ $before =~ ExcNodeList=([^ ]*) ]] || :
    before=${BASH_REMATCH[1]:-(null)}
    [[ $before == '(null)' ]] && before='' || before=,$before
    sedd_requeue 3 "$node$before"
  fi
  sedd_exit 2 "$node cannot write $1: give another output, or sbatch --exclude=$node"
}

# Requeue this job or task, without some nodes, and end: sedd_requeue EXIT_CODE NODES
sedd_requeue() {
  # From here on Slurm ends this job's processes; what follows has KillWait to be done.
  trap '' TERM USR1
  local said end=$((SECONDS + 300))
  until said=$(scontrol requeue "$SEDD_JOB" 2>&1); do
    sedd_say "scontrol: $said" >&2
    # Where the controller is away for a moment, it comes back.
    if [[ $said =~ Invalid|denied|disabled|completing|'not found' ]] || ((SECONDS > end)); then
      sedd_exit "$1" "Slurm refuses to requeue the job"
    fi
    sleep 10
  done
  if [[ -n $2 ]]; then
    scontrol update "JobId=$SEDD_JOB" "ExcNodeList=$2" ||
      sedd_say "cannot exclude $2 from the next start"
  fi
  exit "$1"
}

sedd_exit() {
  sedd_say "$2" >&2
  exit "$1"
}

sedd_say() {
  printf 'launch.sh %(%FT%T)T %s\n' -1 "$*"
}
