#!/usr/bin/env bash
# All benchmarks on a GPU, in under ten minutes: bash benchmarks/gpu.sh [DATA] [OUT]
#
# DATA is the folder that holds cifar10/train_images.npy and the other arrays (default: data). The JSON files are
# written to the folder OUT (default: benchmarks/results).
#
# The source tree is used as it is, so deepclust need not be installed, only the packages that pyproject.toml lists.
# Environment variables:
#   WHEELS=DIR       also install the wheels in DIR, for this call only
#   PROPOS_CODE=DIR  also time the authors' step; DIR is a copy of github.com/Hzzone/ProPos
#   KMEANS_CODE=DIR  also time the authors' k-means; DIR is a copy of github.com/Hzzone/torch_clustering
#   REHEARSE=1       run the same commands on a CPU, with a small network, 512 images of each array and few batches
#                    (some minutes)
set -uo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "${1:-data}") out=$(realpath -m "${2:-benchmarks/results}")
mkdir -p "$out"

# A package deepclust that holds conf/ as deepclust.conf, as an installed one does.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/deepclust"
for part in "$PWD"/deepclust/*; do ln -s "$part" "$site/deepclust/"; done
ln -s "$PWD/conf" "$site/deepclust/conf"
[ -n "${WHEELS:-}" ] && python3 -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl
export PYTHONPATH=$site:$PWD/benchmarks DEEPCLUST_DATA=$data

images=1024 batches=20 batch_size=1024 baseline_batch_size=512 threads=16 rounds=3 time_factor=1
hardware='hardware=gpu' setup='dataset=cifar10 backbone=resnet18'
short_training='trainer.max_epochs=20 method.warmup_epochs=4'
if [ -n "${REHEARSE:-}" ]; then
  images=32 batches=2 batch_size=256 baseline_batch_size=128 threads=1 rounds=1 time_factor=6
  hardware='hardware=gpu hardware.accelerator=cpu' setup='dataset=cifar10 backbone=conv_small'
  short_training='trainer.max_epochs=2 method.warmup_epochs=1 backbone=conv_small'
  export DEEPCLUST_DATA=$site/data
  python3 - "$data/cifar10" "$DEEPCLUST_DATA/cifar10" <<'END'
import sys
from pathlib import Path

import numpy as np

whole, small = map(Path, sys.argv[1:])
small.mkdir(parents=True)
for file in whole.glob("*.npy"):
    np.save(small / file.name, np.load(file, mmap_mode="r")[:512])
END
fi

# run_benchmark SECONDS NAME SCRIPT [ARGUMENT]...
# A script that fails, or that is stopped after SECONDS, does not stop the others.
run_benchmark() {
  local limit=$(($1 * time_factor)) left=$((570 * time_factor - SECONDS)) name=$2 start=$SECONDS
  shift 2
  echo "== $name"
  ((left > 10)) || { echo "$name: no time left"; return; }
  ((limit < left)) || limit=$left
  timeout --kill-after=5 "$limit" python3 "$@" || echo "$name: no result, or part of it (exit code $?)"
  echo "   $((SECONDS - start)) of at most $limit s"
}

# The most important benchmarks come first, and everything ends 570 s after the start. The long ones save their figures
# as they go: step.py after each method, estep.py after each case. With hardware.compile, clean_batch_size divides the
# number of images, so that all clean batches have one shape and the E-step is compiled once.
run_benchmark 100 baseline benchmarks/baseline.py --batches $batches --rounds $rounds --out "$out/baseline_gpu.json" \
  ${PROPOS_CODE:+--code "$PROPOS_CODE"} $hardware $setup batch_size=$baseline_batch_size
run_benchmark 65 "kernels, compiled" benchmarks/kernels.py --batches $batches --out "$out/kernels_gpu.json" \
  $hardware $setup batch_size=$batch_size clean_batch_size=1000 hardware.compile=default
# One run of as many epochs as the time allows; the JSON file has the score of every epoch.
run_benchmark 100 "time to score" benchmarks/time_to_score.py --acc 0.85 --rule kmeans \
  --out "$out/time_to_score_gpu.json" experiment=propos_cifar10 $hardware $short_training \
  "+trainer.max_time='00:00:01:15'"
run_benchmark 50 estep benchmarks/estep.py --rounds 1 --threads $threads --out "$out/estep_gpu.json" \
  ${KMEANS_CODE:+--code "$KMEANS_CODE"}
run_benchmark 25 views benchmarks/views.py --images $images --rounds 3 --out "$out/views_gpu.json"
run_benchmark 150 "step, all methods" benchmarks/step.py --batches $batches --rounds $rounds \
  --out "$out/step_gpu.json" $hardware $setup
run_benchmark 80 "step, compiled" benchmarks/step.py --methods propos --batches $batches --rounds $rounds \
  --out "$out/step_propos_compiled_gpu.json" $hardware $setup batch_size=$batch_size clean_batch_size=1000 \
  hardware.compile=default
