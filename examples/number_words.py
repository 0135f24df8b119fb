"""Translates number words into digits, "three hundred forty two" into 342: python number_words.py ["WORDS"]

It trains the Transformer as it was published, an encoder and a decoder with the norms after each addition, on nine of ten numbers
below 1,000, and then reads the others, which takes seconds."""

import math
import sys

import torch

import fastgpt

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = ["<pad>", "<end>", *ONES.split(), *TENS.split(), "hundred", *"0123456789"]
PAD, END, STEPS, WIDTH = 0, 1, 300, 64


def words_of(number: int) -> str:
    if number >= 100:
        return f"{ONES.split()[number // 100]} hundred {words_of(number % 100) if number % 100 else ''}".strip()
    if number < 20:
        return ONES.split()[number]
    return f"{TENS.split()[number // 10 - 2]} {ONES.split()[number % 10] if number % 10 else ''}".strip()


def encode(words) -> list[int]:
    return [WORDS.index(word) for word in words]


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def new_model() -> fastgpt.EncoderDecoder:
    sizes = {"vocab_size": len(WORDS), "context_length": 16, "num_layers": 2, "num_heads": 4, "hidden_size": WIDTH}
    published = {"norm_first": False, "activation": "relu", "position": "sinusoidal", "embedding_scale": math.sqrt(WIDTH)}
    encoder = fastgpt.EncoderConfig(**sizes, **published, embedding_norm=False)
    decoder = fastgpt.GPTConfig(**sizes, **published, cross_attention=True)
    model = fastgpt.EncoderDecoder(fastgpt.EncoderDecoderConfig(encoder, decoder, start_token=PAD))
    for parameter in model.parameters():
        if parameter.dim() == 2:  # GPT-2's initial weights are those of a wider model
            torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    return model


def train(model: fastgpt.EncoderDecoder, numbers: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 30, 1 - step / STEPS)
        batch = numbers[torch.randint(len(numbers), (64,))].tolist()
        inputs = [encode(words_of(number).split()) for number in batch]
        outputs = [encode(str(number)) + [END] for number in batch]
        loss = model.loss(padded(inputs, PAD), padded(outputs, -100), [len(row) for row in inputs])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")


def translate(model: fastgpt.EncoderDecoder, texts: list[str]) -> list[str]:
    outputs = fastgpt.generate(model, [encode(text.split()) for text in texts], 5, eos=END)
    return ["".join(WORDS[token] for token in row[1:].tolist() if token != END) for row in outputs]


if __name__ == "__main__":
    torch.manual_seed(0)
    numbers = torch.randperm(1000)
    model = new_model()
    train(model, numbers[100:])
    if sys.argv[1:]:
        print(translate(model.eval(), sys.argv[1:2])[0])
    else:
        held_out = numbers[:100].tolist()
        found = translate(model.eval(), [words_of(number) for number in held_out])
        right = sum(digits == str(number) for digits, number in zip(found, held_out))
        print(f"{words_of(held_out[0])}: {found[0]}\n{right} of 100 numbers that it was not trained on are right")
