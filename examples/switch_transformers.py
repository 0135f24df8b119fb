"""Switches a transformers model to fastgpt's attention and cache, and compares it with PyTorch's attention: a left-padded batch of
prompts gets the same tokens, and logits differ only by rounding."""

import inspect

import torch
import transformers

import fastgpt.integrations.transformers as ft

if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()  # or AutoModelForCausalLM.from_pretrained(...)
    ids = torch.tensor([[0, 0, 5, 7, 9], [1, 2, 3, 4, 5]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    options = {"max_new_tokens": 12, "do_sample": False}

    with torch.no_grad():
        logits = model(**batch).logits
        tokens = model.generate(**batch, **options)

        ft.register()
        model.set_attn_implementation("fastgpt")
        # Before transformers 5.24 the argument for the cache is called past_key_values.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        with ft.record() as calls:
            switched = model(**batch).logits
            switched_tokens = model.generate(**batch, **options, **{name: ft.Cache(config)})

    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(switched[attended], logits[attended])
    assert torch.equal(switched_tokens, tokens)
    print(f"same tokens; logits differ by at most {(switched - logits)[attended].abs().max():.1e}")
    print("served by:", dict(calls))
