#!/bin/bash
# What a run was made with, on standard output. Only variables on this list: the others may hold secrets (SLURM_JWT).
variables='SLURM_(JOB_(ID|NAME|NUM_NODES|NODELIST|PARTITION|START_TIME|END_TIME)|ARRAY_(JOB|TASK)_ID|RESTART_COUNT|NNODES'
variables+='|NTASKS(_PER_NODE)?|(GPUS|CPUS|TASKS)_PER_(NODE|TASK)|CLUSTER_NAME|SUBMIT_DIR)'
variables+='|CUDA_VISIBLE_DEVICES|CUDA_HOME|NCCL_[A-Z0-9_]+|GLOO_[A-Z0-9_]+|OMP_NUM_THREADS|LAUNCHER|LOADEDMODULES'
variables+='|TORCH_EXTENSIONS_DIR|DS_ACCELERATOR|PYTORCH_[A-Z_]*ALLOC_CONF|PYTHONPATH|VIRTUAL_ENV|CONDA_DEFAULT_ENV'

echo "# $(date '+%F %T %z') on $(uname -nsrm)"
echo "## code"
"$PYTHON" -c 'import vmd_scale as v; print("vmd_scale", v.__version__, v.__path__[0])'
if commit=$(git rev-parse HEAD 2>/dev/null); then
    echo "commit $commit"
    git status --short --untracked-files=no
fi
echo "## variables"
env | grep -E "^($variables)=" | sort
if command -v module >/dev/null; then
    echo "## modules"
    module list
fi
if command -v nvidia-smi >/dev/null; then
    echo "## GPUs of the first node"
    nvidia-smi
fi
echo "## packages"
"$PYTHON" -VV
"$PYTHON" -m pip freeze --disable-pip-version-check | sed 's#//[^/@]*@#//#' # a link may hold a token
