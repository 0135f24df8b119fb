"""The tokenizer: text and back, whole characters as tokens come, what ends a text, chats, and errors."""

import json
import re
import shutil

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from texts import CHATML, byte_fallback, byte_level, write_folder, write_merges, write_sentencepiece

from fastgpt.text.streaming import IncrementalDetokenizer, StopStrings
from fastgpt.text.tokenizer import Tokenizer

CORPUS = "Hello, wörld!\n\r\n\t  日本 😀"


@pytest.mark.slow
@given(st.text(alphabet=sorted(set(CORPUS))))
def test_round_trip(text):
    tokenizer = Tokenizer.from_corpus(CORPUS)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


def test_ids_are_in_code_point_order():
    tokenizer = Tokenizer.from_corpus("cab")
    assert tokenizer.vocab_size == 3 and tokenizer.encode("abc") == [0, 1, 2]


def test_saving_and_loading(tmp_path):
    Tokenizer.from_corpus(CORPUS).save(tmp_path / "tokenizer.json")
    for loaded in (Tokenizer.load(tmp_path / "tokenizer.json"), Tokenizer.from_folder(tmp_path)):
        assert loaded.decode(loaded.encode(CORPUS)) == CORPUS
        assert loaded.eos == [] and loaded.chat_template is None


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"text: expected only the 3 characters .*, got '\?', 'é'$"):
        Tokenizer.from_corpus("abc").encode("aé?")
    with pytest.raises(ValueError, match="and more"):
        Tokenizer.from_corpus("abc").encode("0123456789")


def test_names_that_are_too_long(tmp_path):
    for read in (Tokenizer.load, Tokenizer.from_folder):
        with pytest.raises(FileNotFoundError, match="^tokenizer: expected the file .*x.*, which does not exist"):
            read(tmp_path / ("x" * 5000))


LINKED = [
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "config.json", "chat_template.jinja", "additional_chat_templates/a.jinja",
]  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_links_do_not_lead_out_of_the_folder(name, tmp_path):
    """Nor a folder that is a link; they may lead to another file there, or to the blobs of the Hub's cache."""
    folder = tmp_path / "models--x" / "snapshots" / "0123"
    outside, blobs = tmp_path / "outside", tmp_path / "models--x" / "blobs"
    for place in (folder, outside, blobs):
        place.mkdir(parents=True)
    write = write_merges if name in ("vocab.json", "merges.txt") else write_sentencepiece if name == "tokenizer.model" else None
    write(folder) if write else write_folder(folder, byte_level())
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("{}")
    expected = Tokenizer.from_folder(folder)
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)
    message = rf"tokenizer: .*{re.escape(name)}: expected a file in this folder, got a link to .*outside/{re.escape(path.name)}"
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder)
    if path.parent != folder:
        path.unlink()
        path.parent.rmdir()
        path.parent.symlink_to(outside)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(folder)
        path.parent.unlink()
        path.parent.mkdir()
        path.symlink_to(outside)
    for target in (folder / "inside", blobs / "4567"):
        shutil.copyfile(outside / path.name, target)
        path.unlink()
        path.symlink_to(target)
        loaded = Tokenizer.from_folder(folder)
        assert loaded.encode("the dog") == expected.encode("the dog") and loaded.chat_template == expected.chat_template


def test_how_texts_were_made_of_one_length_is_forgotten(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    text = "the quick brown fox and a token"
    assert Tokenizer.from_folder(write_folder(tmp_path, backend)).encode(text) == Tokenizer(byte_level()).encode(text)


TEXT_ERRORS = [
    (b"abc", TypeError, "text: expected a str, got bytes"),
    (None, TypeError, "text: expected a str, got NoneType"),
    (["a"], TypeError, "text: expected a str, got list"),
    ("a\udcff", ValueError, r"text: expected characters, got the lone surrogate '\\udcff' at position 1"),
]


@pytest.mark.parametrize("backend", [byte_level(), byte_fallback(), Tokenizer.from_corpus("abc").backend])
@pytest.mark.parametrize("text, error, message", TEXT_ERRORS, ids=[entry[2][:50] for entry in TEXT_ERRORS])
def test_encoding_anything_but_text_raises(backend, text, error, message):
    with pytest.raises(error, match=message):
        Tokenizer(backend).encode(text)
    with pytest.raises(error, match=message):
        Tokenizer.from_corpus(text)


ID_ERRORS = [
    ([-1], ValueError, "ids: expected an integer >= 0 and <= 4294967295, got -1"),
    ([2**32], ValueError, "ids: expected an integer >= 0 and <= 4294967295, got 4294967296"),
    (["a"], TypeError, "ids: expected an integer >= 0 and <= 4294967295, got 'a'"),
    ([1.5], TypeError, "ids: expected an integer >= 0 and <= 4294967295, got 1.5"),
    ([[1]], TypeError, r"ids: expected an integer >= 0 and <= 4294967295, got \[1\]"),
    (5, TypeError, "ids: expected an iterable of token ids, got 5"),
]


@pytest.mark.parametrize("ids, error, message", ID_ERRORS, ids=[entry[2][-20:] for entry in ID_ERRORS])
def test_decoding_invalid_ids_raises(ids, error, message):
    with pytest.raises(error, match=message):
        Tokenizer(byte_level()).decode(ids)


def test_ids_that_no_token_has_are_no_text():
    """A model's vocabulary may be filled up to a multiple of 64, say."""
    ids = BYTE_LEVEL.encode("the dog")
    assert BYTE_LEVEL.decode([*ids, BYTE_LEVEL.vocab_size, 2**32 - 1]) == "the dog"
    assert pieces(BYTE_LEVEL, [9999, *ids, 9999])[1] == BYTE_LEVEL.decode(ids[:1])


@pytest.mark.parametrize("pattern", ["(?<é", "\\p{日本}", "(?<日本", "[é", "é("])
def test_a_damaged_regular_expression(pattern, tmp_path):
    """Also one whose error message the library would cut amidst a character, which ends the process."""
    content = json.loads(byte_level().to_str())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    for ascii_only in (True, False):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=ascii_only), encoding="utf-8")
        with pytest.raises(ValueError, match="tokenizer: .*tokenizer.json is damaged: "):
            Tokenizer.from_folder(tmp_path)
    content["pre_tokenizer"]["pattern"]["Regex"] = r"[b-é]|日本|\\\p{L}+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).encode("é")


def test_a_prefix_that_cuts_characters(tmp_path):
    """The library would take its length in bytes from the second token of each merge, and end the process."""
    content = json.loads(byte_fallback().to_str())
    content["model"]["continuing_subword_prefix"] = "x"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer: .*tokenizer.json is damaged: expected merges whose second token"):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_of_the_library_is_a_value_error():
    """Its exception is no Exception, which would end a program that expects errors."""

    class Panic(BaseException):
        pass

    class Backend:
        model = None

        def panic(self, *arguments, **options):
            raise Panic("index out of bounds")

        encode = decode = panic

    with pytest.raises(ValueError, match="text: expected text that the tokenizer accepts; its error: index out of bounds"):
        Tokenizer(Backend()).encode("a")
    with pytest.raises(ValueError, match="ids: expected token ids that the tokenizer accepts; its error: index out of bounds"):
        Tokenizer(Backend()).decode([1])


# Streams

BYTE_LEVEL, BYTE_FALLBACK = Tokenizer(byte_level()), Tokenizer(byte_fallback())
TEXTS = st.text(alphabet=st.one_of(st.sampled_from("the quick brown\n😀👩‍👧é日ö "), st.characters(codec="utf-8")))


def pieces(tokenizer, ids, prompt=()):
    """What each token gave, and what was left."""
    decoder = IncrementalDetokenizer(tokenizer, prompt)
    return [decoder.push(token) for token in ids] + [decoder.finish()]


def test_a_character_of_several_tokens_is_yielded_with_the_last_one():
    ids = BYTE_LEVEL.encode("a😀é")
    assert len(ids) == 7 and pieces(BYTE_LEVEL, ids) == ["a", "", "", "", "😀", "", "é", ""]
    assert list(BYTE_LEVEL.decode_stream(ids)) == ["a", "😀", "é"]
    # Joined with a zero-width joiner: three characters, each whole.
    family = BYTE_LEVEL.encode("👩\u200d👧")
    assert [piece for piece in pieces(BYTE_LEVEL, family) if piece] == ["👩", "\u200d", "👧"]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
@given(text=TEXTS)
def test_streaming_yields_the_text_in_complete_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40))
def test_streaming_matches_decoding_all_tokens_at_once(ids):
    """Also where their bytes are no characters."""
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
@given(prompt=TEXTS, text=TEXTS)
def test_streaming_after_a_prompt_yields_the_rest_of_the_text(tokenizer, prompt, text):
    """A space between them, say, which a text of its own would not begin with."""
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text, special=False)
    whole = tokenizer.decode(before + ids)
    assert "".join(pieces(tokenizer, ids, before)) == whole[len(tokenizer.decode(before)) :]


def test_a_prompt_of_characters_that_are_many_tokens():
    """Wherever in a character the last tokens of the prompt, which are looked at, begin."""
    characters = "😀日é" * 6
    ids = BYTE_FALLBACK.encode(characters)
    assert len(ids) == 2 + 6 * (4 + 3 + 2) and BYTE_FALLBACK.decode(ids) == characters
    for n in range(19):
        prompt = 2 + len(characters[:n].encode())
        assert "".join(pieces(BYTE_FALLBACK, ids[prompt:], ids[:prompt])) == characters[n:]


def test_an_incomplete_character_is_yielded_at_the_end():
    ids = BYTE_LEVEL.encode("a😀")[:-1]
    assert pieces(BYTE_LEVEL, ids) == ["a", "", "", "", "\ufffd"]
    assert list(BYTE_LEVEL.decode_stream(ids)) == ["a", "\ufffd"]


def test_special_tokens_are_not_text():
    end = BYTE_LEVEL.backend.token_to_id("<|end|>")
    assert pieces(BYTE_LEVEL, [end, *BYTE_LEVEL.encode("é"), end]) == ["", "", "é", "", ""]


# Stop strings


def cut(text, stop):
    """Before the stop string that is complete first, reading one character after the other."""
    for end in range(len(text) + 1):
        found = [text[:end].removesuffix(s) for s in stop if text[:end].endswith(s)]
        if found:
            return min(found, key=len), True
    return text, False


@given(
    parts=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_a_stop_string_whatever_the_pieces(parts, stop):
    stops, given = StopStrings(stop), ""
    for i, part in enumerate(parts):
        given += stops.push(part)
        so_far, found = cut("".join(parts[: i + 1]), stop)
        assert stops.found == found and so_far.startswith(given)
        # Held back is only what may become a stop string.
        held = so_far[len(given) :]
        assert not held or any(s.startswith(held) for s in stop)
    assert (given + stops.finish(), stops.found) == cut("".join(parts), stop)


def test_a_special_token_is_part_of_the_stop_string_that_it_is_in():
    for pieces_, expected in [
        ([("Hi", True), ("<|end|>", False), ("more", True)], "Hi"),
        ([("Hi\n", True), ("<|end|>", False), ("\nUser", True), (":", True)], "Hi"),
        ([("Hi", True), ("<|end|>", False), ("\nNo", True)], "Hi\nNo"),
        ([("Hi", True), ("<|other|>", False), ("STOP", True)], "Hi"),
        ([("ST", True), ("<|other|>", False), ("OP", True)], ""),
    ]:
        stops = StopStrings(["<|end|>m", "\n<|end|>\nUser:", "STOP"])
        assert "".join(stops.push(*piece) for piece in pieces_) + stops.finish() == expected
        assert stops.found == (expected != "Hi\nNo")


# Folders


def test_special_tokens_of_a_folder(tmp_path):
    config = {
        "bos_token": {"content": "<|start|>", "lstrip": False},
        "eos_token": "<|end|>",
        "add_bos_token": True,
        "pad_token": None,
    }
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_level(), tokenizer_config=config))
    assert tokenizer.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"} and tokenizer.eos == [2]


EOS = [
    ({}, []),
    ({"config": {"eos_token_id": 7}}, [7]),
    ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [8, 9]}}, [8, 9]),
    ({"config": {"eos_token_id": 7}, "generation_config": {"temperature": 0.6}}, [7]),
    ({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "<|eos|>"}}, [0]),
    ({"generation_config": {"eos_token_id": 8}, "tokenizer_config": {"eos_token": "<|end|>"}}, [8, 2]),
    ({"generation_config": {"eos_token_id": [2]}, "tokenizer_config": {"eos_token": "<|end|>"}}, [2]),
    ({"config": {"eos_token_id": 50256}}, []),  # transformers' default in the config of a model with fewer tokens
]


@pytest.mark.parametrize("files, eos", EOS, ids=str)
def test_end_of_sequence_tokens(files, eos, tmp_path):
    assert Tokenizer.from_folder(write_folder(tmp_path, byte_level(), **files)).eos == eos


def test_missing_and_damaged_files(tmp_path):
    for load in (Tokenizer.from_folder, lambda folder: Tokenizer.load(folder / "tokenizer.json")):
        with pytest.raises(FileNotFoundError, match="tokenizer: expected the file .*tokenizer.json, which does not exist"):
            load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer: .*tokenizer.json is damaged"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="tokenizer: .*generation_config.json is damaged"):
        Tokenizer.from_folder(tmp_path)


# Chats

MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "What is <b>'é'</b>?"},
    {"role": "assistant", "content": "  A letter. "},
    {"role": "user", "content": "Thanks"},
]
TEMPLATES = {
    "ChatML": CHATML,
    "bos and blocks": (
        "{{ bos_token }}\n    {% for message in messages %}\n  {% if loop.first and message.role == 'system' %}\n"
        "[SYS]{{ message.content | trim }}[/SYS]\n  {% else %}\n{{ message.role }}: {{ message.content }}{{ eos_token }}\n"
        "  {% endif %}\n{% endfor %}\n"
    ),
    "tools and JSON": (
        "{% if tools is not none %}TOOLS{% endif %}{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ m | tojson }} "
        "{{ {'é': [1, 2]} | tojson(indent=2) }}{% endfor %}{{ ns.n }}{{ documents is none }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}|{% endif %}{% endfor %}{{ add_generation_prompt }}{{ strftime_now('%Y') }}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("add", [True, False])
def test_chats_are_those_of_transformers(template, add):
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = Tokenizer(byte_fallback(), special_tokens=specials, chat_template=template)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), chat_template=template, **specials)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add)
    assert ours.chat_text(MESSAGES, add_generation_prompt=add) == expected
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=add, return_dict=False)
    assert ours.encode_chat(MESSAGES, add_generation_prompt=add) == ids


def test_a_chat_has_one_bos_and_a_text_has_one():
    tokenizer = Tokenizer(
        byte_fallback(), special_tokens={"bos_token": "<s>"}, chat_template="{{ bos_token }}{{ messages[0].content }}"
    )
    assert tokenizer.encode_chat([{"role": "user", "content": "the dog"}]).count(1) == 1
    assert tokenizer.encode("the dog")[0] == 1 and tokenizer.encode("the dog").count(1) == 1
    assert 1 not in tokenizer.encode("the dog", special=False)


def test_templates_of_a_folder(tmp_path):
    message = [{"role": "user", "content": "x"}]
    write_folder(tmp_path, byte_level(), tokenizer_config={"chat_template": "one {{ thinking }}"})
    assert Tokenizer.from_folder(tmp_path).chat_text(message, thinking=False) == "one False"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    write_folder(tmp_path, byte_level(), tokenizer_config={"chat_template": several})
    assert Tokenizer.from_folder(tmp_path).chat_text(message) == "two"
    (tmp_path / "chat_template.jinja").write_text("three é", encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).chat_text(message) == "three é"


CHAT_ERRORS = [
    (None, [], ValueError, "messages: expected a model with a chat template, this one has none"),
    (CHATML, "x", TypeError, "messages: expected a list of dicts with role and content, got 'x'"),
    (CHATML, [{"content": "x"}], TypeError, "messages: expected a list of dicts with role and content, got [{'conte"),
    ("{{ raise_exception('no') }}", [], ValueError, "messages: the chat template does not accept them: no"),
    (CHATML, [{"role": "user", "content": [1]}], ValueError, "messages: the chat template does not accept them: "),
    ("{% if %}", [], ValueError, "chat_template: expected a Jinja template, but "),
    ("{{ messages.append(1) }}", [], ValueError, "messages: the chat template does not accept them: "),
    ("{{ ''.__class__.__mro__ }}", [], ValueError, "messages: the chat template does not accept them: "),
]


@pytest.mark.parametrize("template, messages, error, message", CHAT_ERRORS, ids=[entry[3][:50] for entry in CHAT_ERRORS])
def test_chat_errors(template, messages, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Tokenizer(byte_level(), chat_template=template).encode_chat(messages)
