#!/usr/bin/env bash
# Everything that is measured on a GPU, in under ten minutes: bash benchmarks/gpu.sh [DATA] [OUT]
# DATA holds cifar10/train_images.npy and so on; OUT takes the JSON files (benchmarks/results otherwise).
# Runs from the source tree with what the machine has, so nothing need be installed but the packages of pyproject.toml;
# WHEELS=DIR installs those in DIR first. Copies of the authors' code are timed as well: PROPOS_CODE=DIR, of
# github.com/Hzzone/ProPos, and KMEANS_CODE=DIR, of github.com/Hzzone/torch_clustering.
set -uo pipefail
cd "$(dirname "$0")/.."
export DEEPCLUST_DATA=$(realpath "${1:-data}")
out=${2:-benchmarks/results}
mkdir -p "$out"
[ -n "${WHEELS:-}" ] && python -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl

# A package whose configurations lie beside it, as an installation has them.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/deepclust"
for part in "$PWD"/deepclust/*; do ln -s "$part" "$site/deepclust/"; done
ln -s "$PWD/conf" "$site/deepclust/conf"
export PYTHONPATH=$site:$PWD/benchmarks

cifar='dataset=cifar10 hardware=gpu backbone=resnet18'
go() { # SECONDS NAME COMMAND...: one that fails or lasts too long leaves the others be
  local limit=$1 name=$2
  shift 2
  echo "== $name"
  timeout "$limit" python "$@" || echo "$name: no result (exit code $?)"
}
go 40 views benchmarks/views.py --images 1024 --rounds 5 --out "$out/views_gpu.json"
go 60 step benchmarks/step.py --methods propos --batches 20 --rounds 5 --out "$out/step_propos_gpu.json" $cifar batch_size=1024
go 60 "step, compiled" benchmarks/step.py --methods propos --batches 20 --rounds 5 --out "$out/step_propos_compiled_gpu.json" \
  $cifar batch_size=1024 hardware.compile=default
go 90 "step, all methods" benchmarks/step.py --batches 10 --rounds 3 --out "$out/step_gpu.json" $cifar
go 90 baseline benchmarks/baseline.py --batches 20 --rounds 3 --out "$out/baseline_gpu.json" \
  ${PROPOS_CODE:+--code "$PROPOS_CODE"} $cifar batch_size=512
go 60 estep benchmarks/estep.py --rounds 3 --threads 16 --out "$out/estep_gpu.json" ${KMEANS_CODE:+--code "$KMEANS_CODE"}
# One run of as many epochs as fit; the score of every epoch is in the JSON file.
go 150 "time to score" benchmarks/time_to_score.py --acc 0.85 --rule kmeans --out "$out/time_to_score_gpu.json" \
  experiment=propos_cifar10 hardware=gpu trainer.max_epochs=60 "+trainer.max_time='00:00:02:00'"
