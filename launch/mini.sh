#!/bin/bash
# A 1.5B model (1.6B with its MTP layer) on one 80 GB GPU in a day (dsv3 plan mini). Texts: a folder, or NAME=WEIGHT:PATH.
#   TEXTS=my_texts/ OUT=runs/mini launch/mini.sh
set -euo pipefail
: "${TEXTS:?texts to learn from}" "${OUT:?a folder}"

[ -d "$OUT/tokenizer" ] || dsv3 tokenizer --data "$TEXTS" --vocab-size 32768 --out "$OUT/tokenizer"
[ -d "$OUT/shards" ] || dsv3 data --data "$TEXTS" --tokenizer "$OUT/tokenizer" --out "$OUT/shards"
python -m dsv3.cli.launch mini --shards "$OUT/shards" --tokenizer "$OUT/tokenizer" --out "$OUT" --device "${DEVICE:-cuda}"
