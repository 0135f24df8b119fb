"""vLLM's side of the suite `throughput`, which runs this file with the Python that `make vllm` installs.

build/vllm/bin/python in_vllm.py FOLDER REQUESTS.json DTYPE

FOLDER: a model in transformers' format, which computes in DTYPE (vLLM would take bfloat16 for float32). REQUESTS.json: name ->
{"prompts": lists of ids, "new": numbers of tokens}. Of each name that comes in a line, all requests are answered greedily, and a
line of JSON goes out: {"answers": ids, "seconds": ...}. With FASTGPT_VLLM=1, attention is fastgpt's.
"""

import json
import os
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, path, dtype = sys.argv[1:]
    with open(path) as file:
        requests = json.load(file)
    longest = max(len(prompt) + n for of in requests.values() for prompt, n in zip(of["prompts"], of["new"]))
    model = LLM(
        folder, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, max_model_len=longest,
        disable_log_stats=True,
    )  # fmt: skip

    def answer(prompts: list[list[int]], new: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in new]
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    for line in sys.stdin:
        begin = time.perf_counter()
        answers = answer(**requests[line.strip()])
        print(json.dumps({"answers": answers, "seconds": time.perf_counter() - begin}), file=results, flush=True)


if __name__ == "__main__":
    results = os.fdopen(os.dup(1), "w")  # vLLM's messages go to stderr
    os.dup2(2, 1)
    main()
