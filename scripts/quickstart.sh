#!/usr/bin/env bash
# Quantizes the model in examples/demo_model to 4 bits, prints its perplexity before and after, loads the result
# through Transformers and lets it write a few words. Needs no GPU and, once the environment is made, no network.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

output=tmp_autoround/demo

auto-round \
    --model examples/demo_model/model \
    --bits 4 \
    --group_size 128 \
    --iters 50 \
    --nsamples 64 \
    --seqlen 512 \
    --dataset examples/demo_model/calib.jsonl \
    --ppl examples/demo_model/eval.txt \
    --format auto_round \
    --output_dir "$output"

python - "$output" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype="auto")
inputs = tokenizer("The history of the city", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
print(f"{folder} continues: {tokenizer.decode(output[0], skip_special_tokens=True)}")
PYTHON
