#!/bin/bash
# One run on a slice of TPUs, by a queued resource: the same command on every host; the hosts find each other.
#
#   experiments/launch/tpu_pod.sh NAME ZONE v5litepod-64 --config=configs/dit.py:XL/2 --workdir=/mnt/runs/xl2
#
# The run folder must lie where all hosts see it (Filestore, or a bucket mounted with gcsfuse). Rerun the command
# to resume, after maintenance or when the slice was taken back. Needs gcloud, logged in to a project.
set -euo pipefail
name=$1 zone=$2 slice=$3
shift 3
case $slice in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) echo "error: $slice: must be v4-N, v5litepod-N, v5p-N or v6e-N" >&2 && exit 2 ;;
esac
queued() { gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"; }
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone" --worker=all; }

until [ "${state:-}" = ACTIVE ]; do
  state=$(queued describe --format='value(state.state)' 2>&1) || true
  case $state in
    *NOT_FOUND*) queued create --node-id="$name" --accelerator-type="$slice" --runtime-version="$runtime" ;;
    SUSPENDED) queued delete --force --quiet ;; # taken back: asked for again
    FAILED) queued describe >&2 && exit 1 ;;    # which says why
    ACTIVE) ;;
    *ERROR*) echo "$state" >&2 && exit 1 ;;
    *) sleep 30 ;;
  esac
done

git ls-files -z | tar --null --create --gzip --file=/tmp/scaling.tar.gz --files-from=-
tpu scp /tmp/scaling.tar.gz "$name:scaling.tar.gz"
tpu ssh "$name" --command="
  set -e; mkdir -p scaling; tar --extract --gzip --file=scaling.tar.gz --directory=scaling; cd scaling
  python3 -m pip install --quiet --user uv # for a Python of 3.11 or later
  test -d .venv || ~/.local/bin/uv venv --quiet --python=3.12
  ~/.local/bin/uv pip install --quiet --constraints=constraints.txt --editable='.[tpu]'
  .venv/bin/scaling train $(printf '%q ' "$@")"
