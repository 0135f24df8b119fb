"""Conversations: answers are those of a chat over the same messages, and each turn reads only what is new."""

import json
import re

import pytest
import torch
from models import random_model
from texts import CHATML, byte_level

from fastgpt.generation.conversation import OWN_EOS
from fastgpt.generation.pipeline import Pipeline, pipeline
from fastgpt.text.tokenizer import Tokenizer


def chat_pipe(context=400, template=CHATML):
    backend = byte_level()
    tokenizer = Tokenizer(backend, eos=[backend.token_to_id("<|end|>")], chat_template=template)
    return Pipeline(random_model(vocabulary=backend.get_vocab_size(), context=context), tokenizer)


OPTIONS = [{}, {"speculate": "prompt"}, {"cache": "paged", "window": 30}, {"cache": "sliding", "window": 16}]


@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 1.0, "seed": 3}, {"cache_dtype": torch.float8_e4m3fn}], ids=str)
def test_answers_are_those_of_a_chat(options):
    pipe, said = chat_pipe(), ["the quick fox", "and the dog", "another token", "Words"]
    chat = pipe.conversation("A new paragraph.", max_new_tokens=9, **options)
    for text in said:
        answer = chat.say(text)
        assert chat.messages[-2:] == [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        prompt = chat._held[: len(chat._held) - len(chat.tokens) + (chat.finish_reason == "eos")]
        assert pipe.tokenizer.decode(prompt) == pipe.tokenizer.decode(pipe.encode(chat.messages[:-1])) or "\ufffd" in str(
            chat.messages
        )
        (row,) = pipe.run([prompt], 9, (), OWN_EOS, options).finish()
        assert (row.text, row.tokens) == (answer, chat.tokens)


def test_a_turn_reads_what_is_new():
    pipe = chat_pipe()
    chat = pipe.conversation(max_new_tokens=6)
    chat.say("the quick fox")
    first = chat.read
    assert first == len(pipe.encode(chat.messages[:-1]))
    before = len(chat._held)
    chat.say("the dog")
    assert chat.read == len(chat._held) - len(chat.tokens) - before + 1 or chat.finish_reason == "eos"
    assert chat.read < first + 12


def test_the_cache_grows(monkeypatch):
    monkeypatch.setattr("fastgpt.generation.conversation.LEAST_CAPACITY", 16)
    pipe = chat_pipe()
    grown, whole = (pipe.conversation(max_new_tokens=12, speculate="prompt") for _ in range(2))
    answers = [grown.say(text) for text in ("the quick fox", "dog", "token")]
    monkeypatch.undo()
    assert [whole.say(text) for text in ("the quick fox", "dog", "token")] == answers
    assert grown.read < 40


def test_undo_and_reset():
    pipe = chat_pipe()
    chat = pipe.conversation("A token.", max_new_tokens=8)
    assert not chat.undo()
    first = chat.say("the fox")
    second = chat.say("the dog")
    assert chat.undo() and len(chat.messages) == 3
    assert chat.say("the dog") == second
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "A token."}]
    assert chat.say("the fox") == first


def test_the_oldest_turns_are_dropped():
    chat = chat_pipe(context=120).conversation("Words", max_new_tokens=20)
    for _ in range(6):
        chat.say("the quick brown fox jumps")
    assert chat.dropped > 0 and chat.messages[0]["role"] == "system" and chat.messages[1]["role"] == "user"
    count = len(chat.messages)
    with pytest.raises(ValueError, match="^text: expected fewer than 120 tokens with the system message, .*, got"):
        chat.say("lazy " * 100)
    assert len(chat.messages) == count  # as if it had not been said


def test_an_answer_may_be_stopped():
    pipe = chat_pipe()
    chat = pipe.conversation(max_new_tokens=50, eos=None)
    pieces = chat.stream("the quick fox")
    answer = next(pieces)
    chat.stop()
    answer += "".join(pieces)
    assert chat.finish_reason == "stopped" and chat.messages[-1]["content"] == answer and len(chat.tokens) < 50
    closed = chat.stream("the dog")
    answer = next(closed)
    closed.close()
    assert chat.messages[-1] == {"role": "assistant", "content": answer}
    chat.say("token")
    assert len(chat.messages) == 6
    chat.stream("nobody reads the answer")
    chat.say("token")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 4


def test_an_error_in_a_step_leaves_no_wrong_cache(monkeypatch):
    pipe = chat_pipe()
    chat, other = (pipe.conversation(max_new_tokens=12, eos=None) for _ in range(2))
    pieces = chat.stream("the quick fox")
    start = next(pieces)
    with monkeypatch.context() as patch:
        patch.setattr("fastgpt.generation.sampling.Sampler.__call__", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(pieces)
    assert chat.messages[-1]["content"].startswith(start)
    other.messages[:] = chat.messages
    assert chat.say("dog") == other.say("dog")


def test_templates_that_change_earlier_messages_are_read_again():
    last_only = "{% for message in messages[-1:] %}{{ message['content'] }}|{% endfor %}"
    chat = chat_pipe(template=last_only).conversation(max_new_tokens=6)
    assert [chat.say(text) for text in ("the fox", "dog", "the fox")][::2] == [chat.messages[1]["content"]] * 2


@pytest.mark.parametrize("then", ["say", "undo", "reset", "save"])
def test_an_answer_that_is_still_read_ends_at_the_next_call(then, tmp_path):
    chat = chat_pipe().conversation("Words", max_new_tokens=6)
    pieces = chat.stream("the fox")
    begun = {"role": "assistant", "content": next(pieces)}
    said = [{"role": "user", "content": "the fox"}, begun]
    result = {
        "say": lambda: chat.say("dog"),
        "undo": chat.undo,
        "reset": chat.reset,
        "save": lambda: chat.save(tmp_path / "a"),
    }[then]()
    assert list(pieces) == []
    kept = said if then in ("say", "save") else []
    answer = [{"role": "user", "content": "dog"}, {"role": "assistant", "content": result}] if then == "say" else []
    assert chat.messages == [{"role": "system", "content": "Words"}, *kept, *answer]


def test_load_takes_what_save_has_written_or_changes_nothing(tmp_path):
    pipe, path = chat_pipe(), tmp_path / "chat.json"
    chat, other = pipe.conversation("Words", max_new_tokens=6), pipe.conversation(max_new_tokens=6)
    chat.say("the fox")
    chat.save(path)
    other.load(path)
    assert other.messages == chat.messages
    (row,) = pipe.run([pipe.encode([*chat.messages, {"role": "user", "content": "the dog"}])], 6, (), OWN_EOS, {}).finish()
    assert other.say("the dog") == row.text
    other.reset()
    kept = [{"role": "system", "content": "Words"}]
    assert other.messages == kept
    for text, expected in (
        ("", "expected messages as JSON"),
        ("[" * 100_000, "expected messages as JSON"),
        ("{}", "expected a list of messages, got a dict"),
        ("[1]", "got 1 as message 0"),
        ('[{"role": "user", "content": null}]', "a text as content"),
        ('[{"role": "user"}]', "a text as content"),
        ('[{"role": "user", "content": "\\ud800"}]', "the lone surrogate"),
        ('[{"role": "user", "content": "a"}]', "expected an answer to the last message"),
        ('[{"role": "tool", "content": "a"}]', "expected the role user in message 0, got 'tool'"),
        ('[{"role": "system", "content": "a"}, {"role": "assistant", "content": "a"}]', "expected the role user in message 1"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]', "expected the role assistant in message 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"path: .*{re.escape(expected)}"):
            other.load(path)
        assert other.messages == kept
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="path: expected messages as JSON"):
        other.load(path)
    with pytest.raises(FileNotFoundError, match="path: expected a file of messages"):
        other.load(tmp_path / "missing")


def test_save(tmp_path):
    chat = chat_pipe().conversation("Words", max_new_tokens=5)
    chat.say("the fox")
    chat.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text()) == chat.messages
    with pytest.raises(OSError, match="^path: "):
        chat.save(tmp_path / "missing" / "chat.json")
    before = (tmp_path / "chat.json").read_text()
    chat.messages.append(
        {"role": "assistant", "content": "\ud800"}
    )  # which cannot be encoded, like what does not fit on a disk
    with pytest.raises((OSError, ValueError)):
        chat.save(tmp_path / "chat.json")
    assert (tmp_path / "chat.json").read_text() == before


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="^pipe: expected a model with a chat template, this one has none"):
        pipeline().conversation()
    pipe = chat_pipe()
    for options, error, message in (
        ({"num_samples": 2}, ValueError, "num_samples: expected 1 in a conversation, got 2"),
        ({"top_k": 0}, ValueError, "top_k: expected"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected"),
        ({"system": 3}, TypeError, "system: expected a str"),
        ({"stop": 3}, TypeError, "stop: expected"),
        ({"stop": [""]}, ValueError, "stop: expected"),
        ({"eos": "zzz"}, TypeError, "eos: expected"),
        ({"eos": [10**9]}, ValueError, "eos: expected"),
        ({"speculate": random_model(vocabulary=7)}, ValueError, "speculate: expected a model"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{message}"):
            pipe.conversation(**options)
    with pytest.raises(TypeError, match="^text: expected a str"):
        pipe.conversation().say(3)
