#!/usr/bin/env bash
# Caption a folder, then a list of paths from a pipe. Run it from anywhere; OUTPUT_FOLDER says where the file goes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
output_folder=${OUTPUT_FOLDER:-$(mktemp -d)}

# A folder into a file: it appears under its name when the run is over, one row for each image, in order.
idefics caption images --model demo -o "$output_folder/captions.jsonl"
echo "rows in the file: $(wc -l < "$output_folder/captions.jsonl")"

# Paths from a pipe to a pipe: rows come as they are ready, and nothing but rows is on stdout.
find images -name '*.png' -print0 | sort -z | idefics caption - --null --model demo | head -n 3
