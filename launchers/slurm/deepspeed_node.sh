#!/bin/bash
# One node's DeepSpeed launcher, started by srun: deepspeed_node.sh HOSTFILE ARGUMENTS-OF-PRETRAIN...
#
# SIGUSR1 would kill the launcher and orphan its ranks: it is made to ignore it, ranks get it from here. Slurm signals
# either this shell alone (proctrack/cgroup) or all that descends from it (proctrack/linuxproc); both are fine.
hostfile=$1
shift
trap 'pkill -USR1 --pgroup 0 --full -- --local_rank=' USR1
(
    trap '' USR1
    exec "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" launchers/pretrain.py "$@"
) &
child=$!
wait $child; code=$?
while ((code == 138)) && kill -0 $child 2>/dev/null; do wait $child; code=$?; done  # 138: the signal broke off a wait
if ((code == 138)); then wait $child; code=$?; fi  # it came as the launcher ended, whose code bash remembers
exit $code
