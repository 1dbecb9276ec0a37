#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me/study
#SBATCH --comment=maehpc:TOKEN
#SBATCH --cpus-per-task=1
#SBATCH --error=/shared/results/study/jobs/0003-explain/logs/%j_0_log.err
#SBATCH --gpus-per-node=2
#SBATCH --job-name=maehpc-study-explain
#SBATCH --mem=2048M
#SBATCH --no-kill
#SBATCH --nodes=3-4
#SBATCH --open-mode=append
#SBATCH --output=/shared/results/study/jobs/0003-explain/logs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@20
#SBATCH --time=60

# setup
export OMP_NUM_THREADS=1
export PYTHONPATH=/shared/results/.code/0123456789abcdef${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun no longer takes it from sbatch
trap : TERM USR1 USR2  # what is meant for the ranks must not end this shell before its last line

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/results/study/jobs/0003-explain/logs/%j_%t_log.out --error /shared/results/study/jobs/0003-explain/logs/%j_%t_log.err --open-mode=append --kill-on-bad-exit=0 --no-kill --ntasks-per-node=1 /shared/venv/bin/python -u -m maehpc.launch.worker /shared/results/study/jobs/0003-explain


# teardown
code=$?
trap '' TERM USR1 USR2  # the last line takes signals when it is ready to
exec /shared/venv/bin/python -m maehpc.launch.after /shared/results/study/jobs/0003-explain "$code"
