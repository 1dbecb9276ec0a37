#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me/study
#SBATCH --comment=maehpc:TOKEN
#SBATCH --cpus-per-task=14
#SBATCH --error=/shared/results/study/jobs/0001-pretrain/logs/%j_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=h100:8
#SBATCH --job-name=maehpc-study-pretrain
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/results/study/jobs/0001-pretrain/logs/%j_0_log.out
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=720

# setup
export NCCL_DEBUG=WARN
export TMPDIR="/raid/$USER"
export PYTHONPATH=/shared/results/.code/0123456789abcdef${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun no longer takes it from sbatch
trap : TERM USR1 USR2  # what is meant for the ranks must not end this shell before its last line

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/results/study/jobs/0001-pretrain/logs/%j_%t_log.out --error /shared/results/study/jobs/0001-pretrain/logs/%j_%t_log.err --open-mode=append --kill-on-bad-exit=1 --container-image=/shared/images/maehpc.sqsh --container-mounts=/home/me/study:/home/me/study,/shared/results:/shared/results --container-workdir=/home/me/study --no-container-mount-home env PYTHONPATH=/shared/results/.code/0123456789abcdef PYTHONSAFEPATH=1 python3 -u -m maehpc.launch.worker /shared/results/study/jobs/0001-pretrain


# teardown
code=$?
trap '' TERM USR1 USR2  # the last line takes signals when it is ready to
exec /shared/venv/bin/python -m maehpc.launch.after /shared/results/study/jobs/0001-pretrain "$code"
