#!/bin/bash
# The same without Slurm: run this on every node, with HEAD the name of one of them.
#   HEAD=node001 NODES=256 SHARDS=/data/shards OUT=/data/runs/v3 launch/torchrun.sh
set -euo pipefail
: "${HEAD:?name of the node where the processes meet}" "${SHARDS:?a folder that dsv3 data wrote}" "${OUT:?a folder that all nodes see}"

torchrun \
  --nnodes="${NODES:-256}" --nproc-per-node=8 --max-restarts=20 \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29400" --rdzv-id=dsv3-v3 \
  -m dsv3.cli.launch v3 --shards "$SHARDS" --tokenizer "${TOKENIZER:-official}" --out "$OUT" --device cuda
