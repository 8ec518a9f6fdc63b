#!/bin/bash
# All that matters on one GPU, in under nine minutes and without a network, on whatever JAX and PyTorch the machine has:
#
#     benchmarks/gpu.sh                     results in ${OUT:-benchmarks/results}
#     GPU_TOY=1 benchmarks/gpu.sh           everything at toy size, on a CPU, in a few minutes
#     BUDGET=3000 benchmarks/gpu.sh         with more time
#     ONLY='B/16|loss' benchmarks/gpu.sh    the items whose name matches
#
# The items come in the order of what they are worth.  Each has a limit; what does not fit into the budget any more, fails or finds no
# library is named.  open_clip is measured where it is installed; PYTHONPATH may hold it, and whatever else is missing.
# What JAX compiles is kept until the end: the second item finds the step of the first, and a smaller batch what did fit.
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-benchmarks/results} python=${PYTHON:-python3} budget=${BUDGET:-530} only=${ONLY:-.}
began=$SECONDS failed=() left_out=()
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
JAX_COMPILATION_CACHE_DIR=$(mktemp -d) && trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
commit=$(git rev-parse HEAD 2>/dev/null) && export COMMIT=$commit

if [ -n "$GPU_TOY" ]; then
    export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
    [ -n "$OUT" ] || out=$(mktemp -d)
    b32=toy b16=toy l14=toy dtype=float32 budget=${BUDGET:-280}
    fast="--rounds=1 --turn=0 --product=128" sides=${SIDES:-ours,torch}
    batch() { echo "$3"; }
    loss() { echo 128; }
else
    b32=ViT-B/32 b16=ViT-B/16 l14=ViT-L/14 dtype=bfloat16
    fast="--rounds=4 --turn=1.0" sides=${SIDES:-ours,torch,torch.compile}
    batch() { echo "$1"; }
    loss() { echo "$1"; }
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "missing: nvidia-smi"
fi

$python - <<'PYTHON'
import importlib.util, sys
sys.path.insert(0, "benchmarks")
from records import version
print("Python", sys.version.split()[0])
OTHERWISE = {"orbax": "orbax-checkpoint", "tensorflow_datasets": "tensorflow-datasets", "open_clip": "open_clip_torch"}
for name in "jax flax optax jaxtyping ml_collections orbax grain tensorflow_datasets torch open_clip".split():
    package = OTHERWISE.get(name, name)
    if importlib.util.find_spec(name) is None:
        print("missing:", package)
    else:
        print(package, version(package) or "version unknown")
PYTHON

# item NAME LIMIT SCRIPT ARGUMENTS...
item() {
    local name=$1 limit=$2 left=$((budget - SECONDS + began)) status
    shift 2
    [[ $name =~ $only ]] || return
    if [ "$left" -lt $((limit / 3)) ]; then
        left_out+=("$name (needs up to $limit s, $left s left)")
        return
    fi
    { [ "$left" -lt "$limit" ] || [ -n "$GPU_TOY" ]; } && limit=$left
    echo "== $name, $((SECONDS - began)) s after the start"
    # In its own group of processes: what it started ends with it.
    timeout --kill-after=5 "$limit" "$python" "benchmarks/$1" "${@:2}" --output="$out"
    status=$?
    [ $status = 124 ] && failed+=("$name: stopped after $limit s; rounds that it had finished are written")
    [ $status != 0 ] && [ $status != 124 ] && failed+=("$name: status $status")
}

v() { echo "--variant=${GPU_TOY:+toy-}gpu-$1"; }
step="train_step.py --dtype=$dtype --captions=both --sides=$sides $fast"
embed="encode.py --dtype=$dtype --sides=$sides $fast --batches=2"
loss="kernels.py --what=loss --losses=softmax $fast"
# Of 141 GB ours has 56 beside the others.  The step keeps, by its activations, 32 GB of B/32 at 1,024, 40 of B/16 at 512 and 31 of L/14
# at 128, and the state takes 2.4, 2.4 and 7.  Ours alone comes first: what befalls the others, that number is there.
step32="$step --model=$b32 --batch=$(batch 1024,512,256 '' 8)"
[ "$sides" = ours ] || item "train step B/32, ours alone" 150 $step32 --sides=ours "$(v B32-alone)"
item "train step B/32" 200 $step32 "$(v B32)"
item "image embedding B/32" 75 $embed --what=image --model=$b32 --batch="$(batch 2048,1024,512 '' 8)" "$(v B32-image)"
item "attention" 60 kernels.py --what=attention $fast --batch="$(batch 512 '' 2)" --heads=12 "$(v attention)"
item "train step B/16" 130 $step --model=$b16 --batch="$(batch 512,256,128 '' 8)" "$(v B16)"
item "loss 32,768" 45 $loss --batch="$(loss 32768)" --width=512 "$(v 32768)"
item "train step L/14" 150 $step --model=$l14 --batch="$(batch 128,64,32 '' 8)" "$(v L14)"
item "loss 65,536, ring" 45 $loss "--sides=ours, ring" --batch="$(loss 65536)" --width=768 "$(v 65536)"
item "image embedding B/16" 60 $embed --what=image --model=$b16 --batch="$(batch 1024,512 '' 8)" "$(v B16-image)"
item "image embedding L/14" 75 $embed --what=image --model=$l14 --batch="$(batch 512,256 '' 8)" "$(v L14-image)"
item "text embedding B/32" 60 $embed --what=text --model=$b32 --batch="$(batch 2048,1024 '' 8)" "$(v B32-text)"
item "checkpoint" 60 checkpoint.py --model=$b32 --rounds=3 "$(v checkpoint)"

echo "== $((SECONDS - began)) s in all; results in $out"
for what in "${failed[@]}"; do echo "not whole: $what"; done
for what in "${left_out[@]}"; do echo "left out: $what"; done
true
