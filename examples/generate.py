"""Generate with a model as it is and optimised, compare the tokens, and say what was done and gained.

    python examples/generate.py FOLDER [--html report.html] [--inner eager]

FOLDER holds a checkpoint that transformers can load; `fxfuse demo` writes one with random weights.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

import fxfuse  # adds optimize(), deoptimize() and optimization_report to the model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder")
parser.add_argument("--html", help="write the report as a page, too")
parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
prompt = torch.arange(1, 33)[None] % model.config.get_text_config().vocab_size
how = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "cache_implementation": "static"}

expected = model.generate(prompt, **how)
with fxfuse.optimized(model, inner=arguments.inner):
    tokens = model.generate(prompt, **how)
    report = model.optimization_report
    measured = report.benchmark({"input_ids": prompt})

print(report)
print("the same tokens:", torch.equal(tokens, expected))
print("the prompt,", measured)
if arguments.html:
    print("written:", report.to_html(arguments.html))
