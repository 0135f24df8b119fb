"""Text in, text out: what a pipeline gives is what its decoder generates, up to where the text ends."""

import subprocess
import sys

import pytest
import torch
from models import random_model
from texts import CHATML, byte_fallback, byte_level, write_checkpoint

import fastgpt
from fastgpt import generate
from fastgpt.generation import request
from fastgpt.generation.scheduler import Scheduler
from fastgpt.text.tokenizer import Tokenizer

CONFIG = {"tokenizer_config": {"bos_token": "<|eos|>", "eos_token": "<|end|>", "chat_template": CHATML}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level(), **CONFIG)


@pytest.fixture(scope="module")
def pipe(folder):
    return fastgpt.pipeline(folder, device="cpu")


PROMPT = "the dog and é😀"


def generated(pipe, prompt, new, **options):
    """New ids, by the model itself."""
    ids = pipe.tokenizer.encode(prompt)
    return [row[len(ids) :].tolist() for row in generate(pipe.model, [ids], new, **options)]


def expected_text(pipe, prompt, new_ids):
    before = pipe.tokenizer.encode(prompt)
    return pipe.tokenizer.decode(before + new_ids)[len(prompt) :]


def test_a_single_prompt_returns_a_string(pipe):
    ids = generated(pipe, PROMPT, 40)[0]
    assert not set(ids) & set(pipe.tokenizer.eos)
    assert pipe(PROMPT, max_new_tokens=40) == expected_text(pipe, PROMPT, ids)
    assert pipe(PROMPT, 40) == pipe(PROMPT, 40, use_cache=False)


def test_the_default_checkpoint_is_the_one_of_the_package():
    pipe = fastgpt.pipeline(device="cpu")
    assert pipe("ROMEO:", 20) == fastgpt.pipeline(fastgpt.SHIPPED_MODEL, device="cpu")("ROMEO:", 20)
    assert pipe.model.config.vocab_size == 65


def test_prompts_give_texts_and_samples_lists_of_texts(pipe):
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5}
    a, b = pipe(PROMPT, **options), pipe("a token", **options)
    assert isinstance(a, str) and pipe([PROMPT, "a token"], **options) == [a, b] and pipe([PROMPT], **options) == [a]
    samples = pipe(PROMPT, num_samples=3, **options)
    assert len(samples) == len(set(samples)) == 3 and samples[0] == a
    assert pipe([PROMPT, "a token"], num_samples=3, **options) == [samples, pipe("a token", num_samples=3, **options)]


def test_stream_yields_complete_characters(pipe):
    for seed in range(5):
        options = {"max_new_tokens": 60, "temperature": 3.0, "seed": seed}  # any bytes, characters or not
        pieces = list(pipe.stream(PROMPT, **options))
        assert "".join(pieces) == pipe(PROMPT, **options) and all(pieces) and len(pieces) > 5


@pytest.mark.parametrize("backend", [byte_level, byte_fallback])
def test_streamed_pieces_are_complete_characters(backend, tmp_path, monkeypatch):
    """Of a model that says what it should: the bytes of characters one by one."""
    pipe = fastgpt.pipeline(write_checkpoint(tmp_path, backend()), device="cpu")
    text = " é日😀👩\u200d👧 done"
    ids = pipe.tokenizer.encode(text, special=False)

    def logits(hidden):
        result = torch.zeros(1, pipe.model.config.vocab_size)
        result[0, ids[len(said)]] = 1
        said.append(ids[len(said)])
        return result

    said = []
    monkeypatch.setattr(pipe.model, "logits", logits)
    pieces = list(pipe.stream("the dog", len(ids), use_cache=False))
    assert "".join(pieces).strip() == text.strip() and set("é日😀👩👧") < set(pieces)


# Ends


def test_eos_ends_a_text_and_is_not_part_of_it(pipe, folder, monkeypatch):
    ids = generated(pipe, PROMPT, 40)[0]
    eos = ids[11]
    monkeypatch.setattr(pipe.tokenizer, "eos", [eos, 10**9])  # the other one is not in the model's vocabulary
    run = pipe.start([PROMPT, "a token"], 40)
    first, second = run.finish()
    assert (first.finish_reason, first.tokens) == ("eos", ids[: ids.index(eos) + 1])
    assert first.text == expected_text(pipe, PROMPT, ids[: ids.index(eos)])
    assert second.finish_reason == ("eos" if eos in second.tokens else "length")
    assert pipe(PROMPT, 40, eos=None) == expected_text(pipe, PROMPT, ids)
    assert pipe(PROMPT, 40, eos=ids[3]) == expected_text(pipe, PROMPT, ids[: ids.index(ids[3])])


def test_eos_tokens_default_to_those_of_the_checkpoint(tmp_path):
    """Of its tokenizer and of the defaults of its model, as far as the vocabulary has them."""
    config = {"eos_token_id": [5, 9]}
    pipe = fastgpt.pipeline(write_checkpoint(tmp_path, byte_level(), generation_config=config), device="cpu")
    assert pipe.tokenizer.eos == [5, 9] and pipe.start([PROMPT], 40).eos == {5, 9}
    pipe.model.generation_defaults = {"eos": [5, 11, 10**6]}
    assert pipe.start([PROMPT], 40).eos == {5, 9, 11}
    assert pipe.start([PROMPT], 40, eos=None).eos == pipe.start([PROMPT], 40, eos=()).eos == set()
    assert pipe.start([PROMPT], 40, eos=7).eos == {7}


def test_options_that_are_not_given_are_the_checkpoints(pipe, monkeypatch):
    defaults = {"temperature": 2.0, "top_k": 3, "max_new_tokens": 9}
    monkeypatch.setattr(pipe.model, "generation_defaults", defaults, raising=False)
    run = pipe.start([PROMPT], seed=1)
    assert [len(row.tokens) for row in run.finish()] == [9]
    assert run.rows[0].text == pipe(PROMPT, seed=1) == "".join(pipe.stream(PROMPT, seed=1))
    assert (run.options.temperature, run.options.top_k, run.options.top_p) == (2.0, 3, None)
    told = pipe(PROMPT, 20, temperature=0)
    monkeypatch.setattr(pipe.model, "generation_defaults", {})
    assert told == pipe(PROMPT, 20) and run.rows[0].text == pipe(PROMPT, 9, temperature=2.0, top_k=3, seed=1)


def test_by_default_a_text_ends_where_the_context_does(pipe):
    prompt = pipe.tokenizer.encode(PROMPT)
    row = pipe.start([PROMPT], eos=()).finish()[0]
    assert len(row.tokens) == 160 - len(prompt) and row.finish_reason == "length"
    assert len("".join(pipe.stream(PROMPT))) > 100


def test_rules_and_processors(pipe):
    """Alone and side by side, with the tokens of each text."""
    ids, given = pipe.tokenizer.encode(PROMPT), []
    free = pipe.start([PROMPT], 12).finish()[0].tokens

    def forbid_the_first(tokens, logits):
        given.append(tokens.clone())
        logits[:, free[0]] = float("-inf")
        return logits

    options = {"logits_processors": forbid_the_first, "no_repeat_ngram_size": 2, "min_new_tokens": 4}
    rows = pipe.start([PROMPT, "a token"], 12, **options).finish()
    assert free[0] not in rows[0].tokens and rows[0].text == pipe(PROMPT, 12, **options)
    assert given[0].tolist() == [ids]


def test_logits_that_are_not_finite_are_an_error_wherever_one_looks(pipe, monkeypatch):
    """On a GPU one may not have looked when the text has ended."""
    capped, calls = pipe.model.softcap_logits, []

    def logits(scores):
        calls.append(1)
        return capped(scores) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(pipe.model, "softcap_logits", logits)
    for look in (1, 16):
        monkeypatch.setitem(request.EOS_POLL_INTERVAL, "cpu", look)
        calls.clear()
        run = pipe.start([PROMPT], 12, eos=None)
        run.eos = set(range(400)) if look == 16 else set()  # ends it at once
        with pytest.raises(ValueError, match="logits: expected finite ones"):
            calls.extend([1, 1] if look == 16 else [])
            run.finish()


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_stop_string_ends_its_row_wherever_tokens_are_cut(pipe, use_cache):
    texts = pipe([PROMPT, "a token"], 40)
    whole = texts[0]
    for begin, end in ((3, 5), (10, 16), (0, 4), (len(whole) - 3, len(whole))):
        stop = whole[begin:end]
        rows = pipe.start([PROMPT, "a token"], 40, stop=["never met", stop], use_cache=use_cache).finish()
        assert rows[0].text == whole[: whole.index(stop)] and rows[0].finish_reason == "stop"
        assert rows[1].text == texts[1].partition(stop)[0]
    assert pipe(PROMPT, 40, stop="never met") == whole
    assert pipe.start([PROMPT], 40, stop="never met").finish()[0].finish_reason == "length"


def test_a_possible_stop_string_is_held_back(pipe):
    whole = pipe(PROMPT, 40)
    stop = whole[9:17]
    pieces = list(pipe.stream(PROMPT, 40, stop=stop))
    assert "".join(pieces) == whole[: whole.index(stop)]
    almost = stop + "\x00"
    assert "".join(pipe.stream(PROMPT, 40, stop=almost)) == whole


def test_nothing_is_generated_after_the_last_row_has_ended(pipe, monkeypatch):
    run = pipe.start([PROMPT], 100, stop=pipe(PROMPT, 20)[5:7])
    run.finish()
    assert len(run.times) - 1 == len(run.rows[0].tokens) < 20 and next(run.steps, None) is None


def test_logprobs_of_a_run(pipe):
    ids = pipe.tokenizer.encode(PROMPT)
    _, expected = generate(pipe.model, [ids], 20, num_samples=2, temperature=1.0, seed=1, return_logprobs=True)
    rows = pipe.start([PROMPT], 20, num_samples=2, temperature=1.0, seed=1, return_logprobs=True).finish()
    assert [row.logprobs for row in rows] == [row[: len(r.tokens)].tolist() for row, r in zip(expected, rows)]


def says(pipe, monkeypatch, ids):
    """The model will say these ids."""
    said = iter(ids)

    def logits(hidden):
        result = torch.zeros(1, pipe.model.config.vocab_size)
        result[0, next(said)] = 1
        return result

    monkeypatch.setattr(pipe.model, "logits", logits)


def test_a_special_token_as_a_stop_string(pipe, monkeypatch):
    """It is no text of a row, but ends it."""
    start = pipe.tokenizer.backend.token_to_id("<|start|>")
    ids = [*pipe.tokenizer.encode("the dog"), start, *pipe.tokenizer.encode(" and more")]
    for stop, text, reason in [
        ("<|start|>", "the dog", "stop"), ("dog<|start|> and", "the ", "stop"), ("<|start|>x", "the dog and more", "length"),
        ([start], "the dog", "stop"), (["never", ids[-1]], pipe.tokenizer.decode(ids[:-1]), "stop"),
        ((), "the dog and more", "length"),
    ]:  # fmt: skip
        says(pipe, monkeypatch, ids)
        row = pipe.start(["a"], len(ids), stop=stop, use_cache=False, eos=None).finish()[0]
        assert (row.text, row.finish_reason) == (text, reason)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    folder = write_checkpoint(tmp_path, byte_level(), **CONFIG)
    size = byte_level().get_vocab_size()
    (folder / "added_tokens.json").write_text(f'{{"<new>": {size}}}')
    pipe = fastgpt.pipeline(folder, device="cpu")
    assert pipe(PROMPT, 5)
    with pytest.raises(ValueError, match=f"prompt: expected tokens of the model, which has {size}, got '<new>' with id {size}"):
        pipe("a<new>", 5)
    with pytest.raises(ValueError, match=f"messages: expected tokens of the model, which has {size}, got '<new>' with id"):
        pipe.chat("a<new>", 5)


# Chats


def test_variables_of_the_chat_template(pipe, monkeypatch):
    template = "{{ messages[0].content }}{% if enable_thinking is false %}!{% endif %}{{ tools[0].name if tools }}"
    monkeypatch.setattr(pipe.tokenizer, "chat_template", template)
    variables = {"enable_thinking": False, "tools": [{"name": "f"}]}
    for given, prompt in (({}, "the dog"), (variables, "the dog!f"), ({"enable_thinking": True}, "the dog")):
        assert pipe.chat("the dog", 9, template_variables=given) == pipe(prompt, 9)
        assert "".join(pipe.stream([{"role": "user", "content": "the dog"}], 9, template_variables=given)) == pipe(prompt, 9)


def test_variables_that_the_chat_template_does_not_read_are_noticed(pipe, monkeypatch):
    template = "{% set kept = kept if kept is defined else 1 %}{% macro f(x) %}{{ x ~ of_macro }}{% endmacro %}{{ f(kept) }}"
    template += "{{ messages[0].content }}"
    monkeypatch.setattr(pipe.tokenizer, "chat_template", template)
    assert pipe.tokenizer.unread_variables({"kept": 2, "of_macro": 3, "x": 4, "tools": [], "continue_final_message": True}) == [
        "x",
        "tools",
    ]
    for call in (pipe.chat, lambda text, _, **options: pipe.conversation(**options).say(text)):
        with pytest.warns(UserWarning, match="template_variables: the model's chat template reads none named 'thinknig'"):
            call("the dog", 5, template_variables={"thinknig": True})


def test_an_iterator_of_prompts_is_a_list_of_them(pipe):
    prompts, ids = ["the dog", "a fox"], [[1, 2, 3], [4]]
    assert pipe((prompt for prompt in prompts), 5) == pipe(prompts, 5) == pipe(iter(prompts), 5, max_batch=2)
    assert [row.text for row in pipe.start((prompt for prompt in prompts), 5).finish()] == pipe(prompts, 5)
    expected = fastgpt.generate(pipe.model, ids, 5)
    assert all(map(torch.equal, fastgpt.generate(pipe.model, (row for row in ids), 5), expected))
    assert len(list(fastgpt.stream(pipe.model, iter(ids), 5))) == len(list(fastgpt.stream(pipe.model, ids, 5)))
    assert {i for i, _ in fastgpt.generate_each(pipe.model, iter(ids), 5)} == {0, 1}
    with pytest.raises(TypeError, match=r"prompts: expected a str or a list of them, got {'a'}: pass list\(prompts\)"):
        pipe({"a"})
    with pytest.raises(TypeError, match=r"prompts: expected a str or a list of them, got \[1, 2\]$"):
        pipe(iter([1, 2]))
    with pytest.raises(TypeError, match=r"prompts: expected a str or a list of them, got GPT$"):
        pipe(pipe.model)
    with pytest.raises(TypeError, match=r"got \[1, [1, ]*\.\.\.$"):
        pipe([1] * 1000)
    with pytest.raises(TypeError, match=r"ids: expected a torch.Tensor or a list of prompts, got dict: pass list\(ids\)"):
        fastgpt.generate(pipe.model, {1: 2}, 5)


def test_streaming_text_keeps_log_probabilities(pipe):
    for call in (pipe, pipe.chat, pipe.stream):
        with pytest.raises(
            ValueError, match="^return_logprobs: expected False where the text is all that is returned, got True"
        ):
            call("the dog", 3, return_logprobs=True)
        call("the dog", 3, return_logprobs=False)
    (row,) = pipe.start(["the dog"], 3, return_logprobs=True).finish()
    assert len(row.logprobs) == len(row.tokens) == 3


CHAT_ERRORS = [
    ([], {}, ValueError, "messages: expected at least one, got an empty chat"),
    ([{"role": "user", "content": "\ud800"}], {}, ValueError, "messages: expected characters, got the lone surrogate"),
    ("x", {"template_variables": [1]}, TypeError, r"template_variables: expected a dict, got \[1\]"),
    ("x", {"template_variables": {"x": object()}}, TypeError, "x: expected strings, numbers, lists and dicts, got object"),
    ("x", {"template_variables": {"messages": []}}, ValueError, "template_variables: expected none named messages"),
    ("x", {"template_variables": {"self": 1}}, ValueError, "template_variables: expected none named self"),
    ("x", {"template_variables": {1: 2}}, TypeError, "template_variables: expected names that are strings, got 1"),
]


@pytest.mark.parametrize("messages, options, error, message", CHAT_ERRORS, ids=[entry[3][:40] for entry in CHAT_ERRORS])
def test_errors_of_chats(pipe, messages, options, error, message):
    with pytest.raises(error, match=message):
        pipe.chat(messages, 5, **options)


def test_a_chat(pipe):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is lazy?"}]
    prompt = "<|start|>system\nBe brief.<|end|>\n<|start|>user\nWho is lazy?<|end|>\n<|start|>assistant\n"
    answer = pipe.chat(messages, 30)
    assert answer == pipe(prompt, 30) == "".join(pipe.stream(messages, 30))
    assert pipe.chat("Who is lazy?", 30) == pipe.chat(messages[1:], 30)
    assert len(pipe.chat(messages, 5, num_samples=2)) == 2


# Loading, and errors


def test_dtype_and_device(folder):
    pipe = fastgpt.pipeline(str(folder), dtype=torch.bfloat16)
    assert pipe.model.token_embedding.weight.dtype == torch.bfloat16
    assert pipe.model.token_embedding.weight.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.slow
def test_pipeline_is_imported_lazily():
    program = (
        "import sys, fastgpt; before = 'tokenizers' in sys.modules; fastgpt.pipeline; fastgpt.pipeline; "
        "print(before, 'tokenizers' in sys.modules, callable(fastgpt.pipeline))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True", "True"]
    with pytest.raises(AttributeError, match="module 'fastgpt' has no attribute 'pipelin'"):
        fastgpt.pipelin  # noqa: B018


def test_a_folder_without_a_tokenizer(tmp_path):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer: expected the file .*tokenizer.json, which does not exist"):
        fastgpt.pipeline(tmp_path)


ERRORS = [
    (("", 5), {}, ValueError, "prompt: expected at least one token, got an empty prompt"),
    ((5, 5), {}, TypeError, "prompts: expected a str or a list of them, got 5"),
    (([PROMPT, 5], 5), {}, TypeError, r"prompts: expected a str or a list of them, got \['the dog and é😀', 5\]"),
    (([], 5), {}, ValueError, "prompts: expected at least one, got none"),
    ((PROMPT, 5.5), {}, TypeError, "max_new_tokens: expected an integer >= 0 or None, got 5.5"),
    ((PROMPT, 5), {"eos": 1.5}, TypeError, "eos: expected an integer or a list of integers, got 1.5"),
    ((PROMPT, 5), {"temperature": "a"}, TypeError, "temperature: expected a finite number >= 0, got 'a'"),
    ((PROMPT, 5), {"num_samples": "a"}, TypeError, "num_samples: expected an integer >= 1, got 'a'"),
    ((PROMPT, 5), {"return_logprobs": 1}, TypeError, "return_logprobs: expected a bool, got 1"),
    ((PROMPT, 5), {"stop": [""]}, ValueError, r"stop: expected strings that are not empty, got \[''\]"),
    ((PROMPT, 5), {"stop": 3}, TypeError, "stop: expected a string or a list of them, got 3"),
    ((PROMPT, 5), {"stop": ["a", 1.5]}, TypeError, r"stop: expected a string or a list of them, got \['a', 1.5\]"),
    ((PROMPT, 5), {"stop": [True]}, TypeError, r"stop: expected a string or a list of them, got \[True\]"),
    ((PROMPT, 5), {"stop": [10**6]}, ValueError, "stop: expected an integer >= 0 and <= 379, got 1000000"),
    ((PROMPT, 5), {"stop": "\udc00"}, ValueError, "stop: expected characters, got the lone surrogate"),
    (("\udc00", 5), {}, ValueError, "prompt: expected characters, got the lone surrogate"),
    ((PROMPT, 5), {"template_variables": {"x": 1}}, ValueError, "template_variables: expected none with a prompt that is not"),
    ((PROMPT * 20, 5), {}, ValueError, "prompt: expected a prompt of at most 160 tokens, .*, got .*longer context$"),
    ((PROMPT, 500), {}, ValueError, r"max_new_tokens: expected at most \d+ after .* context of 160, got 500"),
    ((PROMPT, 5), {"beams": 4}, TypeError, "unexpected keyword argument 'beams'"),
]


@pytest.mark.parametrize("arguments, options, error, message", ERRORS, ids=[entry[3][:40] for entry in ERRORS])
def test_errors(pipe, arguments, options, error, message):
    with pytest.raises(error, match=message):
        pipe(*arguments, **options)


def test_errors_of_streams_come_at_once(pipe):
    with pytest.raises(ValueError, match="num_samples: expected 1 for a stream, got 2"):
        pipe.stream(PROMPT, num_samples=2)
    with pytest.raises(ValueError, match="stop: expected strings"):
        pipe.stream(PROMPT, stop=[""])
    assert isinstance(pipe.tokenizer, Tokenizer)


def test_many_prompts_give_the_texts_that_each_gives_alone(pipe):
    prompts = [PROMPT[: 3 + i % 9] for i in range(7)]
    new, stops = [9, 30, 4, 12, 20, 1, 16], [["e"], [], ["\n", "a"], [], ["é"], [], [5, 9]]
    seeds = list(range(7))
    options = {"temperature": 1.2}
    expected = [pipe(prompt, n, stop=stop, seed=seed, **options) for prompt, n, stop, seed in zip(prompts, new, stops, seeds)]
    assert pipe(prompts, new, stop=stops, seed=seeds, max_batch=3, **options) == expected
    run = pipe.start(prompts, new, stop=stops, seed=seeds, max_batch=3, return_logprobs=True, **options)
    rows = run.finish()
    alone = [
        pipe.start([prompt], n, stop=stop, seed=seed, return_logprobs=True, **options).finish()[0]
        for prompt, n, stop, seed in zip(prompts, new, stops, seeds)
    ]
    assert [(row.text, row.tokens, row.finish_reason) for row in rows] == [
        (row.text, row.tokens, row.finish_reason) for row in alone
    ]
    assert {"stop", "length"} <= {row.finish_reason for row in rows}
    for row, other in zip(rows, alone):
        assert row.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert run.tokens_per_second == sum(len(row.tokens) for row in rows) / run.seconds


def test_samples_of_many_prompts_are_lists(pipe):
    options = {"temperature": 1.0, "seed": 4, "num_samples": 2}
    assert pipe([PROMPT, "the"], 9, max_batch=3, **options) == pipe([PROMPT, "the"], 9, **options)


def test_ctrl_c_among_many_prompts_keeps_the_texts_that_are_done(pipe, monkeypatch):
    prompts, new = ["the", "dog", "and", PROMPT], [3, 30, 5, 30]
    expected, steps = pipe(prompts, new), []

    def interrupted(self, step=Scheduler.step):
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Scheduler, "step", interrupted)
    with pytest.raises(fastgpt.Interrupted) as caught:
        pipe(prompts, new, max_batch=4)
    assert caught.value.results == [expected[0], None, expected[2], None]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pipe: pipe(["a", "b"], 3, stop=[["x"]], max_batch=1), "stop: expected a list for each of 2 prompts, got 1"),
        (lambda pipe: pipe(["a", "b"], 3, stop=[["x"], [""]]), "stop: expected strings that are not empty"),
        (lambda pipe: pipe.stream("a", 3, max_batch=1), "max_batch, max_new_tokens: expected None and an integer for a stream"),
        (lambda pipe: pipe.conversation(max_batch=1), "max_batch: expected None in a conversation, got 1"),
        (lambda pipe: pipe(["a"], 3, return_logprobs=True, max_batch=1), "return_logprobs: expected False"),
    ],
)
def test_bad_arguments_of_many_prompts(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe)
