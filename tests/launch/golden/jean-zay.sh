#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me/study
#SBATCH --comment=maehpc:TOKEN
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=8
#SBATCH --error=/shared/results/study/jobs/0001-pretrain/logs/%j_0_log.err
#SBATCH --gres=gpu:8
#SBATCH --hint=nomultithread
#SBATCH --job-name=maehpc-study-pretrain
#SBATCH --mail-type=FAIL,REQUEUE
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/results/study/jobs/0001-pretrain/logs/%j_0_log.out
#SBATCH --qos=qos_gpu_a100-t3
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1200

# setup
module load arch/a100
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export PYTHONPATH=/shared/results/.code/0123456789abcdef${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun no longer takes it from sbatch
trap : TERM USR1 USR2  # what is meant for the ranks must not end this shell before its last line

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/results/study/jobs/0001-pretrain/logs/%j_%t_log.out --error /shared/results/study/jobs/0001-pretrain/logs/%j_%t_log.err --open-mode=append --kill-on-bad-exit=1 /shared/venv/bin/python -u -m maehpc.launch.worker /shared/results/study/jobs/0001-pretrain


# teardown
code=$?
trap '' TERM USR1 USR2  # the last line takes signals when it is ready to
exec /shared/venv/bin/python -m maehpc.launch.after /shared/results/study/jobs/0001-pretrain "$code"
