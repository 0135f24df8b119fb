"""Chat templates: those of common models give what transformers gives; hostile ones end in one kind of error."""

import dataclasses
import re
from datetime import datetime

import jinja2
import numpy as np
import pytest
import transformers
from texts import CHATML, byte_fallback

from fastgpt.text import chat_template
from fastgpt.text.chat_template import ChatTemplate, ChatTemplateError, budget
from fastgpt.text.tokenizer import Tokenizer

# In the manner of the models' own.
LLAMA3 = r"""
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start|>system\n\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}{{- system_message }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '\n\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n\n' }}{%- endif %}
"""
QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{{- "<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and
            not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>{"name": "' ~ tool_call.name ~ '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}{{- content }}{{- '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
MISTRAL = r"""
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}{{- out[:-1] }}{{- ', "id": "' + tool_call.id[:9] + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}{{- '[TOOL_RESULTS] {"content": ' + message.content | string + "}[/TOOL_RESULTS]" }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}
{{- user_messages | length }}
"""
GEMMA = r"""
{{ bos_token }}
{%- macro text(content) -%}
    {%- if content is string -%}{{ content | trim }}
    {%- elif content is iterable -%}
        {%- for item in content -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
{%- endmacro -%}
{%- for message in messages if message['role'] != 'tool' -%}
    {%- set role = message['role'] -%}{%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' ~ text(message['content'] or '') }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] in ('user', 'tool') %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + (message['content'] or '') + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant<|im_end|>\n' }}{% endif %}{% generation %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{{ message['content'] }}{{ '<|im_end|>\n'}}{% endgeneration %}{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}"
)
DEEPSEEK = r"""
{% set ns = namespace(is_first=false, is_tool=false, system='') %}
{%- for message in messages %}{% if message.role == 'system' %}{% set ns.system = ns.system + message.content %}{% endif %}
{%- endfor %}{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% continue %}{% endif %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{ '<|User|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['tool_calls'] is defined %}
    {%- for tool in message['tool_calls'] %}
        {{- '<|call|>' + tool['function']['name'] + '\n' + (tool['function']['arguments'] | tojson(sort_keys=True)) }}
        {%- if loop.index > 7 %}{% break %}{% endif %}
    {%- endfor %}
{%- elif message['role'] == 'assistant' %}
    {%- set content = message['content'] -%}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
    {{- '<|Assistant|>' + content + '<|end|>' -}}
{%- endif %}
{%- endfor -%}
{{ '%s|%05.1f' | format(ns.is_tool, 2) }}{{ '{}-{:>3}'.format(1, 'é') }}
{%- if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|>' }}{% endif %}
"""
CORNERS = r"""
{%- set parts = ['a', 'b'] + ['c'] %}{{ parts | join('-') }}{{ parts[::-1] }}{{ (1, 2) + (3,) }}{{ {'k': parts, 2: none} }}
{{ messages | map(attribute='role') | join(', ') | upper | indent(2, true) }}{{ messages | tojson }}{{ none }}{{ undefined }}
{{ documents | default([], true) | length }}{{ 7 // 2 ~ 7 / 2 ~ 2 ** 10 ~ 7 % 4 ~ -3 ~ 1.5 * 2 }}{{ 'ab' * 3 }}{{ [0] * 3 }}
{{ 'x,y'.split(',') }}{{ 'Ab'.replace('A', 'C').upper().center(9) ~ 'a b' | title }}{{ 3 in [1, 3] and 1 < 2 <= 2 != 3 }}
{% for k, v in {'a': 1, 'b': 2} | dictsort %}{{ k }}{{ v }}{{ loop.cycle('x', 'y') }}{{ loop.length }}{% endfor %}
{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}{% else %}none{% endfor %}
{% set block %}{% for i in range(3) if i != 1 %}{{ i }}{% endfor %}{% endset %}{{ block }}{{ range(5) | batch(2, 0) | list }}
{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ caller() if caller else '' }}{% endmacro %}
{% call m(1, 2, 3) %}!{% endcall %}
{{ [3, 1, 2] | sort(reverse=true) | first }}{{ [1, 1, 2] | unique | list | last }}{{ [1, 2] | sum }}{{ 2.567 | round(1) }}
{% filter replace('b', 'c') %}abc{% endfilter %}{% with x = 5 %}{{ x }}{% endwith %}{{ dict(a=1).items() | list }}
{{ messages[0].get('role') ~ messages[0].get('x', 'y') }}{{ '<b>' | e }}{{ '%s' % 'a' ~ 'abcdef'[1:4] }}{{ 'a' is in 'abc' }}
{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b{{ [['a', 1]] | groupby(0) }}
{{ '5' | int + 1 }}{{ 'ab' | list }}{{ [1, 2] | max }}
{{ [1, 2] | reverse | join }}{{ none | select | list }}{{ ('<' | e) + '>' }}{{ messages | rejectattr('x') | list | length }}
{{ messages | selectattr('role', 'in', ['user']) | map(attribute='content') | join }}
"""
TEMPLATES = {
    "ChatML": CHATML, "Llama 3": LLAMA3, "Qwen 3": QWEN3, "Mistral": MISTRAL, "Gemma": GEMMA, "Phi": PHI, "SmolLM": SMOLLM,
    "DeepSeek": DEEPSEEK, "corners": CORNERS,
}  # fmt: skip
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"id": "123456789", "type": "function", "function": {"name": "look_up", "arguments": {"word": "é", "n": [1, 2.5]}}}
CHAT = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "What is <b>'é'</b>?"},
    {"role": "assistant", "content": "<think>\nHm\n</think>\n\n  A letter. "},
    {"role": "user", "content": "Thanks 😀"},
]
CALLS = [
    *CHAT,
    {"role": "assistant", "tool_calls": [CALL], "content": None, "reasoning": "I look."},
    {"role": "tool", "content": "[1]"},
]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "é": None}}}]


def both(template, messages, **variables):
    """The text by transformers, and ours; an exception where it raises one."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), chat_template=template, **SPECIALS)
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **variables)
    except Exception as error:
        expected = error
    return expected, Tokenizer(byte_fallback(), special_tokens=SPECIALS, chat_template=template)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CALLS], ids=["chat", "without system", "calls"])
def test_chat_templates_match_transformers(template, messages):
    for variables in ({}, {"tools": TOOLS, "enable_thinking": False}, {"documents": [{"title": "t", "text": "x"}]}):
        for add in (True, False):
            expected, tokenizer = both(template, messages, add_generation_prompt=add, **variables)
            if isinstance(expected, Exception):  # a content that is missing, which ChatML adds to a string
                assert messages is CALLS and template is CHATML
                continue
            assert tokenizer.chat_text(messages, add_generation_prompt=add, **variables) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, PHI], ids=["ChatML", "Llama 3", "Gemma", "Phi"])
@pytest.mark.parametrize("content", ["Sure", " Sure ", [{"type": "text", "text": "Sure "}]], ids=str)
def test_the_last_message_is_continued(template, content):
    messages = [*CHAT, {"role": "assistant", "content": content}]
    expected, tokenizer = both(template, messages, continue_final_message=True)
    if isinstance(content, list) and template is not GEMMA:  # which transformers prints as a list, or which fails there
        expected = tokenizer.chat_text([*CHAT, {"role": "assistant", "content": "Sure "}], continue_final_message=True)
    assert tokenizer.chat_text(messages, continue_final_message=True) == expected and expected.rstrip().endswith("Sure")


# Each method that a template may call, on the first content, and what formats, with keywords where Python takes them.
EXPRESSIONS = [
    f"c.{call}"
    for call in (
        "strip()", "lstrip(' H')", "rstrip('.')", "startswith('He')", "endswith(('.', '!'))", "removeprefix('H')",
        "removesuffix('.')", "find('l')", "rfind('l', 1, 9)", "index('e')", "rindex('e')", "count('l')", "upper()", "lower()",
        "capitalize()", "casefold()", "swapcase()", "isalnum()", "isalpha()", "isascii()", "isdecimal()", "isdigit()",
        "isidentifier()", "islower()", "isnumeric()", "isprintable()", "isspace()", "istitle()", "isupper()", "split()",
        "split(sep='l', maxsplit=1)", "rsplit('l', 1)", "splitlines(keepends=true)", "partition('l')", "rpartition('l')",
        "title()", "center(20)", "center(20, '*')", "ljust(20)", "rjust(20, '.')", "zfill(20)", "expandtabs()",
        "expandtabs(tabsize=3)", "replace('l', 'LL')", "replace('l', '', 1)", "join(['a', 'b'])",
        "join(m.keys())", "join(messages | map(attribute='role'))", "format(1)", "format(a=1)",
    )
] + [
    "m.get('role')", "m.get('x', 'none')", "m.keys() | list", "m.values() | list", "m.items() | list", "m.copy()",
    "[1, 2, 1].count(1)", "[1, 2].index(2)", "[1, 2].copy()", "(1, 2, 1).count(1)", "(1, 2).index(2)", "(5).bit_length()",
    "(1.5).is_integer()", "'{:>9}|{:.2f}|{!r:5}|{x:{w}}'.format(1, 2.5, 'a', x=3, w=4)", "'{role}'.format_map(m)",
    "'%5d %-5s|' % (1, 'a')", "'%05.1f' | format(2.5)", "('<{}>' | e).format('<')", "('<b>' | e).join(['<', 'a'])",
    "('<b>' | e).replace('b', '<')", "('<b>' | e).center(20)", "('<%s>' | e) % '<'", "range(3) | join", "dict(a=1)",
    "namespace(x=3).x", "cycler('a', 'b').next()", "joiner(', ')()",
]  # fmt: skip
PLACES = {
    "top": "{{ %s }}",
    "loop": "{%% for i in range(2) %%}{{ %s }}{%% endfor %%}",
    "loop with a condition": "{%% for i in range(3) if (%s) is defined %%}{{ i }}{%% endfor %%}",
    "loops": "{%% for i in [1] recursive %%}{%% for k in [1, 2] %%}{%% set x = %s %%}{{ x }}{%% endfor %%}{%% endfor %%}",
    "block": "{%% block a %%}{{ %s }}{%% endblock %%}",
    "block in a loop": "{%% for i in [1, 2] %%}{%% block a scoped %%}{{ %s }}{%% endblock %%}{%% endfor %%}",
    "loop in a block": "{%% block a %%}{%% set z = 1 %%}{%% for i in [1, 2] %%}{{ %s }}{%% endfor %%}{%% endblock %%}"
    "{{ self.a() }}",
    "macro": "{%% macro f(c, m) %%}{%% for i in [1] %%}{{ %s }}{%% endfor %%}{%% endmacro %%}"
    "{%% for i in [1, 2] %%}{{ f(c, m=m) }}{%% endfor %%}",
    "call": "{%% macro f() %%}{{ caller(2) }}{%% endmacro %%}"
    "{%% for i in [1] %%}{%% call(n) f() %%}{{ %s }}{%% endcall %%}{%% endfor %%}",
    "with": "{%% for i in [1] %%}{%% with y = %s %%}{%% if y is defined %%}{{ y }}{%% endif %%}{%% endwith %%}{%% endfor %%}",
    "set block": "{%% for i in [1] %%}{%% set y %%}{{ %s }}{%% endset %%}{{ y }}{%% endfor %%}",
    "filter": "{%% for i in [1] %%}{%% filter upper %%}{{ %s }}{%% endfilter %%}{%% endfor %%}",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_every_method_matches_jinja(place):
    """Jinja passes the variables of loops and blocks on to every call in them."""
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    messages = [{"role": "user", "content": "Hello {{}}{{a}},\tworld.\n"}, {"role": "assistant", "content": "x"}]
    for expression in EXPRESSIONS:
        source = "{% set m = messages[0] %}{% set c = m.content %}" + place % expression
        # A block does not see what is set outside.
        source = source.replace("{% block a %}", "{% block a %}{% set m = messages[0] %}{% set c = m.content %}")
        assert ChatTemplate(source).render(messages) == plain.from_string(source).render(messages=messages), source


def test_a_call_costs_the_same_whatever_is_set_around_it(monkeypatch):
    monkeypatch.setattr(budget, "WORK", 20_000)
    source = "{% set x = 'a' * 8000 %}{% for i in range(100) %}{% set y = x %}{{ range(1) and '' }}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user"}]) == ""


PRINTING = ["{{ messages[0].content }}", "{{ messages[0]['content'] | trim }}", "{{ '' + messages[0].content }}",
            "{{ '' ~ messages[0].content + '' }}"]  # fmt: skip


@pytest.mark.parametrize("template", PRINTING)
def test_no_content_prints_as_nothing_and_text_parts_as_their_text(template):
    tokenizer = Tokenizer(byte_fallback(), chat_template=template)
    assert tokenizer.chat_text([{"role": "assistant", "content": None}]) == ""
    assert tokenizer.chat_text([{"role": "assistant"}]) == ""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert tokenizer.chat_text([{"role": "user", "content": parts}]) == "ab"


def test_messages_are_plain_data_to_a_template():
    @dataclasses.dataclass
    class Message:
        role: str
        content: str

    class Text(str):
        secret = "no"

    given = [Message("user", "x"), {"role": Text("user"), "content": np.float32(1.5), 1: (np.bool_(True), 2)}]
    template = "{{ messages[0].content }}{{ messages[1].role }}{{ messages[1].role.secret }}{{ messages[1] | tojson }}"
    assert Tokenizer(byte_fallback(), chat_template=template).chat_text(given) == (
        'xuser{"role": "user", "content": 1.5, "1": [true, 2]}'
    )
    assert "content" in given[1]
    with pytest.raises(TypeError, match="messages: expected strings, numbers, lists and dicts, got bytes among them"):
        ChatTemplate("").render([{"role": "user", "content": b"x"}])
    with pytest.raises(TypeError, match="now: expected strings, numbers, lists and dicts, got datetime among them"):
        ChatTemplate("").render([{"role": "user"}], now=datetime.now())
    nested = []
    nested.append(nested)
    with pytest.raises(ChatTemplateError, match="messages: expected lists and dicts nested at most 100 deep"):
        ChatTemplate("").render([{"role": "user", "content": nested}])


def test_a_template_is_chosen_by_name():
    templates = {"default": "d", "tool_use": "t", "rag": "{{ documents[0].text }}"}
    tokenizer = Tokenizer(byte_fallback(), chat_template=templates)
    chats = [
        ({}, "d"), ({"tools": TOOLS}, "t"), ({"chat_template": "default", "tools": TOOLS}, "d"),
        ({"chat_template": "rag", "documents": [{"text": "r"}]}, "r"), ({"chat_template": "{{ 1 + 1 }}"}, "2"),
    ]  # fmt: skip
    for options, expected in chats:
        assert tokenizer.chat_text(CHAT, **options) == expected
    with pytest.raises(ValueError, match="chat_template: expected one of 'rag', got None"):
        Tokenizer(byte_fallback(), chat_template={"rag": "x"}).chat_text(CHAT)


OPTIONS = [
    ({"tools": "x"}, TypeError, "tools: expected a list of dicts or None, got 'x'"),
    ({"documents": [1]}, TypeError, r"documents: expected a list of dicts or None, got \[1\]"),
    ({"add_generation_prompt": "no"}, TypeError, "add_generation_prompt: expected a bool, got 'no'"),
    ({"continue_final_message": 1}, TypeError, "continue_final_message: expected a bool, got 1"),
    ({"continue_final_message": True, "add_generation_prompt": True}, ValueError, "add_generation_prompt: expected False with"),
    ({"chat_template": 3}, ValueError, "chat_template: expected a Jinja template as a str, got int"),
    ({"x": object()}, TypeError, "x: expected strings, numbers, lists and dicts, got object among them"),
]


@pytest.mark.parametrize("options, error, message", OPTIONS, ids=[entry[2][:40] for entry in OPTIONS])
def test_errors_of_options(options, error, message):
    with pytest.raises(error, match=message):
        Tokenizer(byte_fallback(), chat_template=CHATML).chat_text(CHAT, **options)


MESSAGES = [
    ([], ValueError, "messages: expected at least one, got an empty chat"),
    (None, TypeError, "messages: expected a list of dicts with role and content, got None"),
    ({"role": "user"}, TypeError, "messages: expected a list of dicts with role and content, got {'role'"),
    ([["user", "x"]], TypeError, "messages: expected a list of dicts with role and content, got "),
    ([{"role": "user", "content": "a\ud800"}], ValueError, r"messages: expected characters, got the lone surrogate '\\ud800'"),
    ([{"role": "user", "content": [{"type": "image"}]}], ChatTemplateError, "messages: the chat template does not accept them"),
]


@pytest.mark.parametrize("messages, error, message", MESSAGES, ids=[entry[2][:60] for entry in MESSAGES])
def test_errors_of_messages(messages, error, message):
    with pytest.raises(error, match=message):
        Tokenizer(byte_fallback(), chat_template=CHATML).chat_text(messages)
    with pytest.raises(ChatTemplateError, match="messages: expected text as the content of the last message"):
        Tokenizer(byte_fallback(), chat_template=CHATML).chat_text([{"role": "user"}], continue_final_message=True)


# Hostile templates. Each would take hours or all memory, or raises something.

BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10**(10**8) }}",
    "{{ 'a'*10**10 }}",
    "{{ 10**10*'a' }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'|center(1000000000) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ [1]*10**9 }}",
    '{{ "%1000000000d" % 1 }}',
    '{{ "%*d" % (1000000000, 1) }}',
    '{{ "%.1000000000f" % 1 }}',
    '{{ "%1000000000d"|format(1) }}',
    '{{ "{:1000000000}".format(1) }}',
    '{{ "{:{}}".format(1, 10**9) }}',
    # Python takes the digits of every script, and zeros before a number.
    '{{ "{:٩٩٩٩٩٩٩٩٩}".format(1) }}',
    '{{ "{:９９９９９９９９９}".format(1) }}',
    '{{ "{:1९९९९९९९९}".format(1) }}',
    '{{ "{:.٩٩٩٩٩٩٩٩٩f}".format(1.5) }}',
    '{{ ("{:٩٩٩٩٩٩٩٩٩}"|e).format(1) }}',
    '{{ "{:{}}".format(1, "٩٩٩٩٩٩٩٩٩") }}',
    '{{ "{x:٩٩٩٩٩٩٩٩٩}".format_map({"x": 1}) }}',
    '{{ "{:0000000000000999999999}".format(1) }}',
    '{{ "%0000000000000999999999d" % 1 }}',
    '{{ "{:' + "9" * 5000 + '}".format(1) }}',
    '{{ ("{0:3999999}" * 60).format(1) }}',
    '{{ ("{0:9999999}" * 60).format(1) }}',
    '{{ ("%3999999d" * 60) % ((1,) * 60) }}',
    '{{ "{0:.999999999f}".format(1.0) }}',
    "{{ ('a'*1000000)|replace('a', 'b'*1000000) }}",
    "{{ ('a'*1000000).replace('a', 'b'*1000000) }}",
    "{{ ('a'*1000000).replace('', 'b'*1000000) }}",
    "{{ range(99999)|join('b'*100000) }}",
    "{{ ('b'*100000).join(range(99999)|map('string')) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 1/0 }}",
    "{{ messages[0]['x']['y'] }}",
    "{{ messages[5].x }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ 2.0**10000 }}",
    "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ [[1,2]]|tojson(indent=10**9) }}",
    r"{{ 'a\nb'|indent(10**9) }}",
    "{{ 'a b'|wordwrap(10**9) }}",
    "{{ 1.5|round(10**9) }}",
    "{{ 1.5|round(10**9, 'ceil') }}",
    "{{ lipsum(n=10**9) }}",
    "{{ cycler(1)|list }}",
    "{{ range(10**9)|list }}",
    "{% set ns = namespace(a='aa') %}{% for i in range(99999) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a|length }}",
    "{% set ns = namespace(a='aa') %}{% for i in range(99999) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a|length }}",
    "{% set ns = namespace(a=['a']) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=('a',)) %}{% for i in range(99) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} }}",
    "{% set ns = namespace(a={}) %}{% for i in range(99) %}{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=9) %}{% for i in range(99999) %}{% set ns.a = ns.a * ns.a %}{% endfor %}{{ ns.a }}",
    "{% set r = range(99999)|list %}{% for a in r %}{% for x in r if false %}{% endfor %}{% endfor %}",
    "{% set r = range(90000)|list %}{% for a in r %}{{ r[1:]|length }}{% endfor %}",
    "{% set r = range(90000)|list %}{% for a in r %}{{ r == r[1:] }}{% endfor %}",
    "{% set r = range(90000)|list %}{% for a in r %}{{ a in r }}{{ -1 in r }}{% endfor %}",
    "{% set r = range(90000)|list %}{% for a in r %}{{ r|sort|first }}{% endfor %}",
    "{% set r = range(90000)|list %}{% for a in r %}{{ r|tojson|length }}{% endfor %}",
    "{% set r = 'a'*1000000 %}{% for a in range(90000) %}{{ r.upper()|length }}{% endfor %}",
    "{% set r = 'a'*1000000 %}{% for a in range(90000) %}{{ r.split('a')|length }}{% endfor %}",
    "{% set r = 'a'*1000000 %}{% for a in range(90000) %}{{ r }}{% endfor %}",
    "{% set r = 'a'*1000000 %}{% for a in range(90000) %}{{ r.find('aaaaaaaaaaab') }}{% endfor %}",
    "{% set r = 'a'*1000000 %}{% for a in range(90000) %}{{ r == 'b' + r[1:] }}{% endfor %}",
    "{{ ('a'*4000000)|list|length }}",
    "{{ ('f'*4000000)|int(base=16) }}",
    "{{ ('1'*4000)|int * ('1'*4000)|int }}",
    "{{ [[1]*1000]*1000|sum(start=[]) }}",
    "{{ ([[1]*1000]*1000)|sum(start=[]) }}",
    "{% for x in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "{{ self.x() }}{% block x %}{{ self.x() }}{% endblock %}",
    "{{ (1).to_bytes(10**9, 'little') }}",
    "{{ 'x'.encode().hex() }}",
    "{{ '%c'*100 % 1 }}",
    "{{ strftime_now('%c' * 1000000) }}",
    "{{ ('{0}'*100000).format('a'*100000) }}",
    "{{ ('%(a)s'*100000) % {'a': 'a'*100000} }}",
    r"{{ 'a'.expandtabs(10**9) }}{{ '\t'.expandtabs(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ 'a'.translate({97: 'b'*1000000}) }}",
    "{% call f() %}{% endcall %}",
    "{{ undefined_thing.x }}",
    "{{ {}.fromkeys(range(99999)) }}",
    "{{ dict(a=1).update(b=2) }}",
    "{{ messages.append(1) }}",
    "{{ [1,2,3].pop() }}",
    "{{ 'x'|nosuchfilter }}",
    "{{ 1 << 100000 }}",
    "{% filter center(1000000000) %}x{% endfilter %}",
    "{{ 'x'|center(width=1000000000) }}",
    "{{ 'x'|truncate(10, end='b'*10000000) }}",
    "{{ raise_exception('a'*1000000) }}",
    "{% for i in range(99999) %}{{ messages|tojson }}{{ messages|tojson }}{{ messages|tojson }}{% endfor %}",
    "{{ range(99999)|map('center', 100000)|join }}",
    "{{ range(99999)|map('center', 100000)|list|length }}",
    "{{ range(99999)|groupby('real')|length }}",
    "{% set x %}{% for i in range(99999) %}{{ 'a'*100000 }}{% endfor %}{% endset %}{{ x|length }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ ('x'|e).center(10**9) }}",
    "{{ ('x'|e) * 10**9 }}",
    "{{ ('%999999999d'|e) % 1 }}",
    "{{ ('{:999999999}'|safe).format(1) }}",
    "{% autoescape true %}{{ ('x' ~ 'y').ljust(10**9) }}{% endautoescape %}",
    "{% set r = range(99999)|list %}{% for a in r %}{{ r|select('none')|list }}{% endfor %}",
    "{% set r = range(99999)|list %}{% for a in r %}{{ r|rejectattr('x')|first }}{{ r|reject|list }}{% endfor %}",
    "{{ range(99999)|map(attribute='real' ~ '.real' * 9999)|list }}",
    "{{ range(9999)|sort(attribute='real' ~ '.real' * 9999)|list }}",
    "{% set d = dict(a='a' * 1000000) %}{% for a in range(99999) %}{{ d.keys().mapping.a.b }}{% endfor %}",
    "{% for a in range(99999) %}{{ ([1] * 99999)|reverse|list|length }}{% endfor %}",
]
LARGE = {
    "parentheses": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "ifs": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "loops": "{% for a in b %}" * 50 + "{% endfor %}" * 50,
    "digits": "{{ " + "9" * 10000 + " }}",
    "text": "a" * 10**7,
    "expressions": "{{a}}" * 19000,
    "sum": "{{ " + "1+" * 30000 + "1 }}",
    "signs": "{{ " + "-" * 30000 + "1 }}",
    "lists": "{{ " + "[1," * 30000,
    "comments": "{#" * 50000,
    "elifs": "{% if 1 %}" + "{% elif 2 %}" * 6000 + "{% endif %}",
    "surrogate": "{% set \ud800 = 1 %}",
}


@pytest.mark.parametrize("work", [budget.WORK // 5, pytest.param(budget.WORK, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("template", [*BOMBS, *LARGE.values()], ids=[*BOMBS, *LARGE])
def test_what_a_template_may_not_do_ends_in_one_kind_of_error(template, work, monkeypatch):
    """Its work is counted, so it ends."""
    monkeypatch.setattr(budget, "WORK", work)
    with pytest.raises(ChatTemplateError, match="^(chat_template|messages): "):
        ChatTemplate(template).render(CHAT[1:2], add_generation_prompt=True)


def test_limits_grow_with_the_input():
    """What is long may take long: a chat of a thousand messages, one message of a million characters."""
    for messages in (CHAT * 250, [{"role": "user", "content": "word " * 200_000}]):
        for template in (QWEN3, GEMMA, PHI):
            text = ChatTemplate(template).render(messages, add_generation_prompt=True, bos_token="", eos_token="")
            assert len(text) > sum(len(message["content"]) for message in messages) - 30 * len(messages)


def test_the_work_of_a_template_does_not_depend_on_the_machine(monkeypatch):
    """The budget of a chat, to the step."""
    budgets = []

    class Recorded(chat_template.Budget):
        def __init__(self, *data):
            super().__init__(*data)
            budgets.append(self)

    template = ChatTemplate(QWEN3)
    monkeypatch.setattr(chat_template, "Budget", Recorded)
    for _ in range(2):
        template.render(CHAT, add_generation_prompt=True)
    assert budgets[0].work == budgets[1].work > 0.99 * budget.WORK


def test_one_template_serves_several_threads():
    """Each call has limits of its own."""
    from concurrent.futures import ThreadPoolExecutor

    good = ChatTemplate("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}")
    bad = ChatTemplate(BOMBS[0])

    def run(i):
        if i % 4 == 0:
            with pytest.raises(ChatTemplateError):
                bad.render(CHAT)
            return None
        return good.render([{"role": "user", "content": str(i)}]) == str(i) * 1000

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(run, range(16))) == {None, True}


def test_error_messages_are_short():
    with pytest.raises(ChatTemplateError) as error:
        ChatTemplate("{{ raise_exception('a' * 1000000) }}").render(CHAT)
    assert re.fullmatch("messages: the chat template does not accept them: a{500} ...", str(error.value))
