#!/bin/bash
# One run on a slice of TPUs, by a queued resource: the same command on every host, which find each other.
#
#   experiments/launch/tpu_pod.sh NAME ZONE v5litepod-64 --config=configs/dit.py:XL/2 --workdir=/mnt/runs/xl2
#
# The run folder must lie where all hosts see it (Filestore, or a bucket mounted with gcsfuse). Run again, the
# command goes on: after maintenance, or a slice that was taken back. Needs gcloud, logged in to a project.
set -euo pipefail
name=$1 zone=$2 slice=$3
shift 3
tpus=(gcloud compute tpus)

"${tpus[@]}" queued-resources describe "$name" --zone="$zone" >/dev/null 2>&1 ||
  "${tpus[@]}" queued-resources create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$slice" \
    --runtime-version=v2-alpha-tpuv5-lite
until [ "$("${tpus[@]}" queued-resources describe "$name" --zone="$zone" --format='value(state.state)')" = ACTIVE ]; do
  sleep 30
done

git ls-files -z | tar --null --create --gzip --file=/tmp/scaling.tar.gz --files-from=-
"${tpus[@]}" tpu-vm scp /tmp/scaling.tar.gz "$name:scaling.tar.gz" --zone="$zone" --worker=all
"${tpus[@]}" tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  mkdir -p scaling && tar --extract --gzip --file=scaling.tar.gz --directory=scaling && cd scaling &&
  { test -d .venv || { python3 -m venv .venv && .venv/bin/pip install --quiet -c constraints.txt '.[tpu]'; }; } &&
  .venv/bin/scaling train $(printf '%q ' "$@")"
