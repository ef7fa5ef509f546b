#!/usr/bin/env bash
# See each image once, ask about it as often as you like. Run it from anywhere; OUTPUT_FOLDER says where files go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
output_folder=${OUTPUT_FOLDER:-$(mktemp -d)}

idefics embed images --model demo -o "$output_folder/embeddings.parquet"
idefics caption images --model demo --embeddings "$output_folder/embeddings.parquet" -o "$output_folder/captions.jsonl"
idefics vqa images --model demo --embeddings "$output_folder/embeddings.parquet" --limit 4 \
    -q "How many objects are there?" --choices "1,2,3"
