#!/usr/bin/env bash
# Everything that is measured on a GPU, in under ten minutes: bash benchmarks/gpu.sh [DATA] [OUT]
# DATA holds cifar10/train_images.npy and so on; OUT takes the JSON files (benchmarks/results otherwise).
# Runs from the source tree with what the machine has, so nothing need be installed but the packages of pyproject.toml;
# WHEELS=DIR adds those in DIR. Copies of the authors' code are timed as well: PROPOS_CODE=DIR, of
# github.com/Hzzone/ProPos, and KMEANS_CODE=DIR, of github.com/Hzzone/torch_clustering.
# REHEARSE=1 runs the same commands on a CPU, on a small network, a thousand images and few batches (some minutes).
set -uo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "${1:-data}") out=$(realpath -m "${2:-benchmarks/results}")
mkdir -p "$out"

# A package whose configurations lie beside it, as an installation has them.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/deepclust"
for part in "$PWD"/deepclust/*; do ln -s "$part" "$site/deepclust/"; done
ln -s "$PWD/conf" "$site/deepclust/conf"
[ -n "${WHEELS:-}" ] && python3 -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl
export PYTHONPATH=$site:$PWD/benchmarks DEEPCLUST_DATA=$data

images=1024 batches=20 batch=1024 authors_batch=512 threads=16 rounds=3 times=1
on='hardware=gpu' cifar='dataset=cifar10 backbone=resnet18'
recipe='trainer.max_epochs=20 method.warmup_epochs=4'
if [ -n "${REHEARSE:-}" ]; then
  images=32 batches=2 batch=256 authors_batch=128 threads=1 rounds=1 times=6 # as long
  on='hardware=gpu hardware.accelerator=cpu' cifar='dataset=cifar10 backbone=conv_small'
  recipe='trainer.max_epochs=2 method.warmup_epochs=1 backbone=conv_small'
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

go() { # SECONDS NAME COMMAND...: one that fails or lasts too long leaves the others be
  local limit=$(($1 * times)) left=$((570 * times - SECONDS)) name=$2 began=$SECONDS
  shift 2
  echo "== $name"
  ((left > 10)) || { echo "$name: no time left"; return; }
  ((limit < left)) || limit=$left
  timeout --kill-after=5 "$limit" python3 "$@" || echo "$name: no result, or part of it (exit code $?)"
  echo "   $((SECONDS - began)) of at most $limit s"
}
# What matters most comes first, and nothing begins or goes on after 570 s. What lasts is saved as it comes: step.py
# method by method, estep.py case by case. Where compiled, clean batches are equal, so that the E-step is compiled once.
go 100 baseline benchmarks/baseline.py --batches $batches --rounds $rounds --out "$out/baseline_gpu.json" \
  ${PROPOS_CODE:+--code "$PROPOS_CODE"} $on $cifar batch_size=$authors_batch
go 65 "kernels, compiled" benchmarks/kernels.py --batches $batches --out "$out/kernels_gpu.json" \
  $on $cifar batch_size=$batch clean_batch_size=1000 hardware.compile=default
# One run of as many epochs as fit; the score of every epoch is in the JSON file.
go 100 "time to score" benchmarks/time_to_score.py --acc 0.85 --rule kmeans --out "$out/time_to_score_gpu.json" \
  experiment=propos_cifar10 $on $recipe "+trainer.max_time='00:00:01:15'"
go 50 estep benchmarks/estep.py --rounds 1 --threads $threads --out "$out/estep_gpu.json" \
  ${KMEANS_CODE:+--code "$KMEANS_CODE"}
go 25 views benchmarks/views.py --images $images --rounds 3 --out "$out/views_gpu.json"
go 150 "step, all methods" benchmarks/step.py --batches $batches --rounds $rounds --out "$out/step_gpu.json" $on $cifar
go 80 "step, compiled" benchmarks/step.py --methods propos --batches $batches --rounds $rounds \
  --out "$out/step_propos_compiled_gpu.json" $on $cifar batch_size=$batch clean_batch_size=1000 hardware.compile=default
