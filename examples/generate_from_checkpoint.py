"""Generates from a checkpoint in the format of transformers: python generate_from_checkpoint.py [FOLDER_OR_ID [PROMPT]]

Without arguments it creates a tiny Llama with random weights in a temporary folder, and checks that greedy tokens are the same as
with transformers."""

import sys
import tempfile

import torch

import fastgpt


def random_checkpoint(folder: str):
    """Saves a Llama with random weights and a vocabulary of 99 tokens. Returns transformers' model."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


if __name__ == "__main__":
    if sys.argv[1:]:
        pipe = fastgpt.pipeline(sys.argv[1])  # the model and its tokenizer
        for piece in pipe.stream(*sys.argv[2:] or ["Once upon a time"], max_new_tokens=100):
            print(piece, end="", flush=True)
        print()
    else:
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = random_checkpoint(folder), fastgpt.GPT.from_pretrained(folder)
        prompt = torch.tensor([[1, 5, 7, 42]])
        tokens = fastgpt.generate(ours, prompt, 20)[0].tolist()
        assert tokens == theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
        print("prompt and 20 tokens, as transformers generates them:", tokens)
