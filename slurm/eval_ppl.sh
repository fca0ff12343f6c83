#!/usr/bin/env bash
# Bound the perplexity of a trained model, on all GPUs of one or more nodes.
#
#   SEDD_CHECKPOINT=runs/large sbatch slurm/eval_ppl.sh --data data/openwebtext
#   sbatch --nodes=2 slurm/eval_ppl.sh --data wikitext103.txt --protocol paper
#
# What stands after the script goes to `sedd-scale eval_ppl`.
#
#   SEDD_CHECKPOINT   a run directory or checkpoint (runs/large)
#   SEDD_OUTPUT       the line of JSON; made when the evaluation is done (eval-JOB.json)
# and those of slurm/launch.sh.
#
#SBATCH --job-name=sedd-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# shellcheck source=slurm/launch.sh
. "${SEDD_HOME:-$SLURM_SUBMIT_DIR}/slurm/launch.sh"
SEDD_STDOUT=${SEDD_OUTPUT:-eval-$SLURM_JOB_ID.json}
SEDD_DONE=$SEDD_STDOUT
sedd_job "$SEDD_STDOUT.slurm" "$SEDD_STDOUT" eval_ppl \
  --checkpoint "${SEDD_CHECKPOINT:-runs/large}" --json "$@"
