#!/usr/bin/env bash
# Ask about images, and say how right the answers are. Run it from anywhere; OUTPUT_FOLDER says where files go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
output_folder=${OUTPUT_FOLDER:-$(mktemp -d)}

# The same questions about every image of a folder; each image is encoded once.
idefics vqa images --model demo -q "How many objects are there?" -q "What color is the object on the far left?" --limit 2

# A manifest with questions of its own, scored at the end against its column of right answers.
idefics vqa questions.jsonl --model demo -o "$output_folder/answers.jsonl" --keep kind --answers-column answers

# The same after two examples, as Parquet; then scores by kind of question.
idefics vqa questions.jsonl --model demo -o "$output_folder/answers.parquet" --shots shots.jsonl --num-shots 2 --keep answers,kind
idefics score "$output_folder/answers.parquet" --by kind
