"""What files of sentence-transformers may say, and what is refused by its name."""

import json

import pytest
from encoder_checkpoints import MODULES, write_json

from fastgpt.encoding.sentences import Sentences, read_sentences


def write(folder, modules=MODULES, pooling=None, **files):
    write_json(folder / "modules.json", modules)
    if pooling is not None:
        write_json(folder / "1_Pooling" / "config.json", pooling)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def test_of_the_first_and_of_the_present_version(tmp_path):
    old = write(tmp_path / "a", pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    assert read_sentences(old) == Sentences("first", True)
    types = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling")
    modules = [module | {"type": f"sentence_transformers.{type_}"} for module, type_ in zip(MODULES, types)]
    new = write(tmp_path / "b", modules, {"pooling_mode": "mean", "embedding_dimension": 64, "include_prompt": True})
    assert read_sentences(new) == Sentences("mean", False)
    several = write(tmp_path / "c", MODULES, {"pooling_mode": ["cls"]}, sentence_roberta_config={"max_seq_length": 9})
    assert read_sentences(several) == Sentences("first", True, max_tokens=9)
    assert read_sentences(tmp_path) == Sentences()


BAD = [
    ({"modules": {}}, "modules.json is damaged: expected a JSON list .got a dict"),
    ({"modules": [MODULES[0], 3]}, r"modules.json: modules\[1\]: expected a JSON object, got 3"),
    ({"modules": [{"path": ""}]}, r"modules.json: \[0\].type: expected a string, got nothing"),
    ({"modules": MODULES[:1]}, "modules.json: type: expected the modules Transformer, Pooling .*, got Transformer$"),
    (
        {"modules": [*MODULES[:2], {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]},
        "got Transformer, Pooling, Dense$",
    ),
    ({"modules": [MODULES[0] | {"path": "0_BERT"}, *MODULES[1:]]}, "path: expected a Transformer in this folder itself, got '0_BERT'"),
    ({"pooling": {"pooling_mode_max_tokens": True}}, "config.json: pooling_mode: expected one of mean, cls, got max"),
    ({"pooling": {"pooling_mode": ["mean", "cls"]}}, "pooling_mode: expected one of mean, cls, got mean, cls"),
    ({"pooling": {"pooling_mode": "median"}}, "pooling_mode: expected one of 'mean', 'cls', .*, got 'median'"),
    ({"pooling": {"include_prompt": False}}, "include_prompt: expected true, got false"),
    ({"pooling": {"pooling_mode_cls_token": 1}}, "pooling_mode_cls_token: expected"),
    ({"sentence_bert_config": {"max_seq_length": 0}}, "sentence_bert_config.json: max_seq_length: expected an integer >= 1"),
    ({"config_sentence_transformers": {"prompts": []}}, "config_sentence_transformers.json: prompts: expected a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize("files, message", BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_wrong_is_named(files, message, tmp_path):
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        read_sentences(write(tmp_path, **({"pooling": {}} | files)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model: expected the file .*1_Pooling/config.json, which modules.json names"):
        read_sentences(write(tmp_path))


def test_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps(MODULES))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").symlink_to(tmp_path / "modules.json")
    with pytest.raises(ValueError, match="expected a file in this folder, got a link to"):
        read_sentences(tmp_path / "model")
