#!/bin/bash
# One study as a Slurm job array: each task trains on one GPU until the study is done.
#
#   sbatch --array=0-7 slurm.sh my_study.toml my-study
#
# The study file and its name; task 0 begins the study, and the others join it. The folder that this is typed in, the
# password and [checkpoints] url of the study must be on a file system that all nodes see.

#SBATCH --job-name=hpo
#SBATCH --array=0-3
#SBATCH --output=hpo-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
# A worker saves its trial and leaves within 40 s of SIGTERM. Without "B:" the signal goes to the step, not to this shell.
#SBATCH --signal=TERM@60
#SBATCH --requeue

set -u
spec=${1:?the study file} study=${2:?the name of the study}
folder=$(dirname "$spec")/ # of the modules that the study names

export HPO_STORAGE=${HPO_STORAGE:-postgresql+psycopg://hpo@database.example/hpo}
export HPO_STORAGE_PASSWORD_FILE=${HPO_STORAGE_PASSWORD_FILE:-$HOME/.hpo_password} # chmod 600
export HPO_FILES=$PWD/hpo_files/task-$SLURM_ARRAY_TASK_ID                          # logs of this task's worker

# Once the study is there every task joins it, so that a task that comes back never undoes an `hpo stop`.
command=(hpo worker "$study" --allow "$folder")
until hpo status "$study"; do
    if [ "$SLURM_ARRAY_TASK_ID" -eq "$SLURM_ARRAY_TASK_MIN" ]; then
        command=(hpo run "$spec")
        break
    fi
    sleep 10
done

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "${command[@]}"
code=$?

# 1: the time limit or a preemption came first, or the study was stopped. A task that has left a study that goes on
# comes back, as the same task of the same array; not for ever, should its node be broken.
if [ "$code" -eq 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ] &&
    hpo status "$study" --json | grep --quiet '"stop": null'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
