"""Rendered conversations of small chat templates, by transformers' own Jinja environment.

    python make_templates.py

The templates are ours, written in the manner of known families. Writes templates.json beside this file.
Needs: transformers, jinja2.
"""

import json
import pathlib

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

TEMPLATES = {
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined and false %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}

{#- The system turn is always written. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("Roles must alternate user/assistant, found " ~ message["role"] ~ " at " ~ ns.index) }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}""",
    "qwen3": """{%- if tools %}
    {{- 'tools ' ~ (tools | tojson) }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "zephyr_blocks": """{% for message in messages %}
  {% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
  {% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
  {% elif message['role'] == 'assistant' %}
    {% generation %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
    {%- endgeneration %}
  {% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}

""",
    "control": """{%- macro head(role, mark='#') -%}{{ mark }} {{ role | upper | replace('S', '$') }}:{%- endmacro -%}
{%- for message in messages if message.role != 'system' -%}
{%- if loop.index > 3 %}{% break %}{% endif -%}
{{ head(message.role) }} {{ message.content.strip() | default('none', true) }} {{ loop.index0 }}/{{ loop.length }} {{ loop.last }} {{ none }} {{ 7 // 2 }} {{ 7 / 2 }} {{ message.get('name', '-') }} {{ pad_token }}{{ ', '.join(['a', 'b']) }}
{{ message.content.split() | length }} {{ message.content[:3] }} {{ message.content.title() }} {{ message.content.removeprefix('He') }} {{ 'x' in message.content }}
{% endfor -%}
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}""",
    # Granite 3's and 4's manner: names that nobody defines, a namespace, contents in parts, an outline of today.
    "granite": """{%- if available_tools is defined and available_tools %}
    {%- set tools = available_tools %}
{%- endif %}
{%- set ns = namespace(system='You help.', tools='', parts=0) %}
{%- if tools and documents %}
    {%- set ns.system = ns.system + ' Use tools and documents.' %}
{%- elif thinking %}
    {%- set ns.system = ns.system + ' Think. Today: ' + strftime_now('%B %d, %Y') + '.' %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- if messages[0].content is string %}
        {%- set ns.system = messages[0].content %}
    {%- elif messages[0].content is iterable %}
        {%- for entry in messages[0].content %}
            {%- if entry.type == 'text' %}
                {%- set ns.system = (ns.system + '\n' if ns.parts else '') + entry.text %}
                {%- set ns.parts = ns.parts + 1 %}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + ns.system + '<|end_of_text|>\n' }}
{%- for message in rest %}
    {%- set content = namespace(val=message.content if message.content is string else '') %}
    {%- if message.role == 'assistant_tool_call' or (message.role == 'assistant' and message.tool_calls is defined and message.tool_calls) %}
        {%- for call in message.tool_calls %}
            {%- set content.val = content.val + '<tool_call>' + ({'name': call.function.name} | tojson) + '</tool_call>' %}
        {%- endfor %}
    {%- endif %}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + content.val.strip() + '<|end_of_text|>\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
        {%- if controls %}
            {{- ' ' + controls | tojson() }}
        {%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}""",
    "json": """{% for message in messages %}{{ message | tojson }}
{{ message | tojson(indent=2) }}
{{ {'a': [1, 2.5, true, none, 'é<>&"'], 'b': {}, 'c': []} | tojson }} {{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}
{% for key, value in message.items() %}{{ key }}={{ value }};{% endfor %}
{% endfor %}""",
}

CONVERSATIONS = [
    [{"role": "user", "content": "Hello there"}],
    [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": "  Héllo <b>&'\"</b>\n\tx  "}],
    [{"role": "user", "content": "Hi x"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHey "}, {"role": "user", "content": "日本語 😀 \\ /"}],
    [{"role": "assistant", "content": "first"}, {"role": "user", "content": "second", "name": "Ann"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>a</think>two"}],
]


def case(name, messages, generate):
    row = {"template": name, "messages": messages, "add_generation_prompt": generate}
    try:
        rendered, _ = render_jinja_template([messages], chat_template=TEMPLATES[name], add_generation_prompt=generate, **SPECIALS)
        row["rendered"] = rendered[0]
    except jinja2.exceptions.TemplateError as error:
        row["raised"] = str(error)
    return row


if __name__ == "__main__":
    cases = [case(n, m, g) for n in TEMPLATES for m in CONVERSATIONS for g in (True, False)]
    out = {"specials": SPECIALS, "templates": TEMPLATES, "cases": cases}
    (HERE / "templates.json").write_text(json.dumps(out, indent=1) + "\n")
