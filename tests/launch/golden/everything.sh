#!/bin/bash

# Parameters
#SBATCH --account=abc
#SBATCH --chdir=/home/me/study
#SBATCH --comment=maehpc:TOKEN
#SBATCH --constraint='[rack1|rack2]'
#SBATCH --cpus-per-task=8
#SBATCH --dependency=afterok:12:13
#SBATCH --error=/shared/results/study/jobs/0001-pretrain/logs/%j_0_log.err
#SBATCH --exclude='n[1-3]'
#SBATCH --exclusive
#SBATCH --gres=gpu:a100:4
#SBATCH --hint=nomultithread
#SBATCH --job-name=maehpc-study-pretrain
#SBATCH --kill-on-invalid-dep=no
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=me@example.org
#SBATCH --mem-per-gpu=61952M
#SBATCH --nice=5
#SBATCH --no-requeue
#SBATCH --nodelist='n[4-9]'
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/shared/results/study/jobs/0001-pretrain/logs/%j_0_log.out
#SBATCH --overcommit
#SBATCH --partition=a,b
#SBATCH --qos=long
#SBATCH --reservation=course
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
module load python/3.11 cuda/12
source "$HOME/venv/bin/activate"
ulimit -c 0 # it's off
export A='it'"'"'s $HOME'
export B=''
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export TMPDIR="/local/$SLURM_JOB_ID"
export PYTHONPATH=/shared/results/.code/0123456789abcdef${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun no longer takes it from sbatch
trap : TERM USR1 USR2  # what is meant for the ranks must not end this shell before its last line

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/results/study/jobs/0001-pretrain/logs/%j_%t_log.out --error /shared/results/study/jobs/0001-pretrain/logs/%j_%t_log.err --open-mode=append --kill-on-bad-exit=1 --cpu-bind=cores /opt/py/bin/python -u -m maehpc.launch.worker /shared/results/study/jobs/0001-pretrain


# teardown
code=$?
trap '' TERM USR1 USR2  # the last line takes signals when it is ready to
exec /opt/py/bin/python -m maehpc.launch.after /shared/results/study/jobs/0001-pretrain "$code"
