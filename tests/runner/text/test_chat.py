import json
from datetime import datetime

import pytest
import transformers

from parallel.errors import ConfigError, IntegrityError
from runner.text.chat import ChatTemplate
from runner.text.tokenizer import Tokenizer

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# Each is our own, written to use what the templates of that family use.
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
<start_of_turn>{{ role }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}"""
MISTRAL = """\
{%- set ns = namespace(index=0, last=-1) -%}
{%- for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor -%}
{{ bos_token }}
{%- for message in messages -%}
    {%- if message.role == 'system' %}{% continue %}{% endif -%}
    {%- if message.role == 'user' -%}
        {{ '[INST] ' }}
        {%- if ns.index == ns.last and messages[0].role == 'system' -%}
            {{ messages[0].content + '\\n\\n' }}
        {%- endif -%}
        {{ message.content + ' [/INST]' }}
        {%- set ns.index = ns.index + 1 -%}
    {%- elif message.role == 'assistant' -%}
        {{ ' ' + message.content + eos_token }}
    {%- else -%}
        {{ raise_exception('Only user and assistant roles are supported!') }}
    {%- endif -%}
    {%- if ns.index > 99 %}{% break %}{% endif -%}
{%- endfor -%}
"""
PHI = """\
{% macro turn(role, text='') %}<|{{ role }}|>
{{ text }}<|end|>
{% endmacro %}
{% for message in messages %}{{ turn(message.role, text=message.content) }}{% endfor %}
{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{{ pad_token }}{% endif %}"""
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
           and not (message.content.startswith('<t>') and message.content.endswith('</t>')) %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ (' (last)' if loop.index0 == ns.last else '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n' ~ {"name": call.name, "args": call.args} | tojson(indent=2) }}
    {%- endfor %}
    {{- '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think></think>' }}
    {%- endif %}
{%- endif %}
"""
GENERATION = """\
{% set word = 'outer' %}
{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}
{% set word = 'inner' %}
{{ message.content }} {{ word }} {{ loop.index }}
{% endgeneration %}
{{ word }}
{% else %}
{{ message.content }} {{ word }}
{% endif %}
{% endfor %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA_3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi": PHI,
    "qwen": QWEN,
    "generation": GENERATION,
}

USER = {"role": "user", "content": "  Is 1 < 2 & \"x\" 'y'?\n\n"}
ASSISTANT = {"role": "assistant", "content": "<think>hm</think>\nOui, ça va 😀"}
SYSTEM = {"role": "system", "content": "Be kind."}
CONVERSATIONS = {
    "one turn": [USER],
    "three turns": [USER, ASSISTANT, {"role": "user", "content": "<t>数</t>"}],
    "system": [SYSTEM, USER, ASSISTANT, USER],
    "empty content": [{"role": "user", "content": ""}],
}
CASES = sorted({(name, turns) for name in TEMPLATES for turns in CONVERSATIONS})
CASES.remove(("gemma", "system"))  # refused, by a test below


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=SPECIAL_TOKENS, origin="test")


@pytest.fixture(scope="module")
def expected(backends):
    """Renders as transformers does."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backends["byte-level"], **SPECIAL_TOKENS
    )

    def render(source, messages, **options):
        return tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, **options
        )

    return render


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_renders_as_transformers_does(expected, name, conversation, prompt):
    messages, source = CONVERSATIONS[conversation], TEMPLATES[name]
    wanted = expected(source, messages, add_generation_prompt=prompt)
    assert compiled(source).render(messages, add_generation_prompt=prompt) == wanted


def test_a_rendering_written_out():
    assert compiled(GEMMA).render([{"role": "user", "content": "Hi"}]) == (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_variables_reach_the_template_as_in_transformers(expected):
    tool = {"name": "né <&> 'x'", "parameters": {"b": [1, None, True], "a": {}}}
    calls = [{"name": "f", "args": {"ż": 1}}]
    messages = [USER, {"role": "assistant", "tool_calls": calls, "content": None}, USER]
    options = {"tools": [tool], "enable_thinking": False}
    wanted = expected(QWEN, messages, add_generation_prompt=True, **options)
    assert compiled(QWEN).render(messages, **options) == wanted
    assert "né <&> 'x'" in wanted
    assert wanted.endswith("<think></think>")


def test_a_key_without_value_is_left_out(expected):
    source = "{{ 'content' in messages[0] }}{{ messages[0].name is defined }}"
    messages = [{"role": "user", "content": None, "name": "x"}]
    assert compiled(source).render(messages) == expected(source, messages) == "FalseTrue"
    assert messages == [{"role": "user", "content": None, "name": "x"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ {'b': 'é<', 'a': 1} | tojson }}",
        "{{ {'b': 'é<', 'a': 1} | tojson(indent=2, sort_keys=true) }}",
        "{{ ['é', 1] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
        "{{ 'none: ' ~ tools is none }}{{ documents is none }}{{ pad_token is defined }}",
        "{{ undefined_name }}|{{ messages[0].absent }}|{{ '<b>' | e }}",
        "{{ dict(a=1)['a'] }}{{ range(3) | list }}{{ messages | map(attribute='role') | join }}",
    ],
)
def test_filters_and_globals_as_in_transformers(expected, source):
    assert compiled(source).render([USER]) == expected(source, [USER])


def test_strftime_now_is_the_clock_of_this_host():
    before = datetime.now().strftime("%Y-%m-%d %H")
    rendered = compiled("{{ strftime_now('%Y-%m-%d %H') }}").render([USER])
    assert rendered in (before, datetime.now().strftime("%Y-%m-%d %H"))


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (GEMMA, [SYSTEM, USER], "System role not supported"),
        (GEMMA, [USER, USER], "Conversation roles must alternate"),
        ("{{ messages[0].absent.deeper }}", [USER], "has no attribute 'absent'"),
        ("{{ 'a' + 1 }}", [USER], "can only concatenate str"),
        ("{{ 1 // 0 }}", [USER], "integer division or modulo by zero"),
        ("{% include 'other' %}", [USER], "no loader"),
    ],
)
def test_a_template_that_raises_is_an_error_with_its_message(source, messages, reason):
    with pytest.raises(ConfigError, match=rf"chat template \(test.*{reason}"):
        compiled(source).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% for i in range(1000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source):
    with pytest.raises(ConfigError, match=r"unsafe|not safely|undefined|Range too big"):
        compiled(source).render([USER])


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a", "\n{% nope %}", "{% generation %}"])
def test_a_syntax_error_names_file_and_line(source):
    with pytest.raises(ConfigError, match=r"chat template \(test, line \d\): "):
        compiled(source)


def test_break_outside_a_loop_is_an_error():
    with pytest.raises(ConfigError, match="outside loop"):
        compiled("{% break %}")


def test_no_messages_are_refused():
    with pytest.raises(ConfigError, match="messages is empty"):
        compiled(CHATML).render([])


def write_config(path, template):
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def rendered_from(path):
    return ChatTemplate.load(path, special_tokens=SPECIAL_TOKENS).render([USER])


def test_the_template_of_a_folder_by_order_of_its_files(tmp_path):
    write_config(tmp_path, "config")
    assert rendered_from(tmp_path) == "config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert rendered_from(tmp_path) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja é {{ bos_token }}", encoding="utf-8")
    assert rendered_from(tmp_path) == "jinja é <s>"


def test_the_default_of_several_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_config(tmp_path, named)
    assert rendered_from(tmp_path) == "plain"
    write_config(tmp_path, named[:1])
    with pytest.raises(ConfigError, match=r'names the chat templates tool_use; .*"default"'):
        rendered_from(tmp_path)


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}])
def test_a_folder_without_a_template(tmp_path, config):
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"has no chat template .*send a plain prompt"):
        rendered_from(tmp_path)


@pytest.mark.parametrize("template", [5, {"default": "x"}, ["x"], [{"name": "default"}]])
def test_a_template_of_the_wrong_type(tmp_path, template):
    write_config(tmp_path, template)
    with pytest.raises(IntegrityError, match=r"chat_template of .*tokenizer_config\.json"):
        rendered_from(tmp_path)


def test_a_broken_template_of_a_folder_names_its_file(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja, line 1"):
        rendered_from(tmp_path)


def test_a_prompt_of_the_template_encodes_as_in_transformers(backends, tmp_path):
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backends["llama-2"], chat_template=MISTRAL, **SPECIAL_TOKENS
    )
    saved.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate.load(tmp_path, special_tokens=tokenizer.special_tokens)
    messages = CONVERSATIONS["three turns"]
    ids = tokenizer.encode(template.render(messages), add_special_tokens=False)
    wanted = saved.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == wanted
    assert ids.count(tokenizer.bos_id) == 1
