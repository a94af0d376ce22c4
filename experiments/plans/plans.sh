#!/bin/bash
# Plans of the models at full size, a JSON object a line into plans.jsonl: half a minute to ten minutes each.
#
#   experiments/plans/plans.sh > experiments/plans/plans.jsonl
set -uo pipefail
plan() {
  .venv/bin/scaling plan --config="configs/$1" --topology="$2" --mesh="$3" --global-batch="$4" --json "${@:5}" |
    python3 -c "import json, sys; print(json.dumps({'config': '$1', 'options': '${*:5}'} | json.load(sys.stdin)))"
}
dots=--config.model.remat=dots unrolled=--config.model.unroll=True

plan dit.py:S/2 v5e:2x4 fsdp=8 256 $dots
plan dit.py:B/2 v5e:2x4 fsdp=8 256 $dots
plan dit.py:L/2 v5e:4x4 fsdp=16 256 $dots
plan dit.py:XL/2 v5e:4x4 fsdp=16 256 $dots
plan dit.py:XL/2 v4:2x2x4 fsdp=16 256 $dots
plan dit.py:XL/2 v5p:2x2x4 fsdp=16 256 $dots
plan dit.py:XL/2 v6e:4x4 fsdp=16 256 $dots
plan dit.py:XL/2 v5e:16x16 data=8,fsdp=32 4096 $dots
plan dit.py:XL/2 v5e:16x16 data=8,fsdp=32 4096 $dots $unrolled
plan dit.py:XL/2 v5e:16x16 data=8,fsdp=32 8192 $dots $unrolled
plan dit.py:XL/2 v5p:4x8x8 data=4,fsdp=64 8192 $dots $unrolled
plan dit.py:XL/2 v4:4x4x4 data=4,fsdp=16 1024 $dots
plan dit.py:XL/2 v6e:16x16 data=8,fsdp=32 4096 $dots
plan dit.py:XL/2 v5p:2x2x4 fsdp=16 256 $dots --side=64 # 512 pixels
plan dit.py:XL/2 v5e:16x16 data=8,fsdp=32 1024 $dots --side=64
plan dit.py:L/2 v6e:8x8 data=2,fsdp=32 512 $dots --side=64
plan dit.py:B/2 v4:2x2x2 fsdp=8 64 $dots --side=64
plan dit.py:S/2 v5e:4x4 fsdp=16 256 $dots --side=64
plan vit.py:H/14 v5e:4x4 fsdp=16 512 $dots --examples=1281167
plan vit.py:L/16 v5p:2x2x2 fsdp=8 512 $dots --examples=1281167
plan clip.py:ViT-L/14 v5e:4x4 data=4,fsdp=4 4096 --config.model.remat=full --examples=400000000
plan vivit.py:L/16x2 v5p:2x2x2 fsdp=8 16 $dots --examples=240000
plan resnet.py:50 v5e:2x4 data=8 1024 --examples=1281167

plan dit.py:XL/2 h200:1 data=1 256 $dots
plan dit.py:XL/2 h200:1 data=1 256 $dots $unrolled
plan dit.py:XL/2 h200:8 fsdp=8 2048 $dots
plan dit.py:XL/2 a100:8 fsdp=8 512 $dots
plan dit.py:XL/2 h200:8 fsdp=8 1024 $dots --side=64 # 512 pixels
plan dit.py:XL/2 h200:1 data=1 50 --what=sample
plan vit.py:L/16 h200:1 data=1 512 $dots --examples=1281167
plan vit.py:H/14 h200:8 fsdp=8 2048 $dots --examples=1281167
plan clip.py:ViT-L/14 h200:8 fsdp=8 4096 $dots --examples=400000000
plan resnet.py:50 h200:8 data=8 2048 --examples=1281167
