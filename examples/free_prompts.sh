#!/usr/bin/env bash
# Continue free prompts of texts and images, a row of the manifest each. Run it from anywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

idefics generate prompts.jsonl --model demo --max-new-tokens 20
