"""Finds the sentence that is closest to a query in meaning: python search_by_meaning.py [FOLDER_OR_ID [QUERY]]

Without arguments it creates a tiny BERT with random weights in a temporary folder, and checks that its embeddings are the mean of
transformers' states."""

import sys
import tempfile
from pathlib import Path

import torch

import fastgpt

SENTENCES = ["a cat sat on the mat", "stocks fell on monday", "the train to rome is late", "she baked bread"]


def random_checkpoint(folder: str):
    """Saves a BERT with random weights and a vocabulary of words. Returns transformers' model."""
    import transformers

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in SENTENCES for word in text.split()})]
    Path(folder, "vocab.txt").write_text("\n".join(words))
    sizes = {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4)).eval()
    model.save_pretrained(folder)
    return model


if __name__ == "__main__":
    if sys.argv[1:]:
        pipe = fastgpt.pipeline(sys.argv[1])  # the model and its tokenizer
        query = sys.argv[2] if sys.argv[2:] else "How is the railway doing?"
        scores = pipe.embed(SENTENCES, normalize=True) @ pipe.embed(query, normalize=True)
        for score, sentence in sorted(zip(scores.tolist(), SENTENCES), reverse=True):
            print(f"{score:.3f}  {sentence}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            theirs, pipe = random_checkpoint(folder), fastgpt.pipeline(folder, device="cpu")
        embeddings = pipe.embed(SENTENCES)
        with torch.no_grad():
            states = [theirs(torch.tensor([pipe.encode(text)])).last_hidden_state[0] for text in SENTENCES]
        torch.testing.assert_close(embeddings, torch.stack([x.mean(0) for x in states]))
        print(f"{len(SENTENCES)} embeddings, the means of transformers' states: {tuple(embeddings.shape)}")
