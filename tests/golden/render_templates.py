"""Renders every chat template (*.jinja) of a folder with transformers, for conversations that have in them what templates
ask about, and prints a JSON row for each; where transformers fails, there is none. The date is the second argument.

Used by common/src/chat/published.rs."""

import datetime
import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import _compile_jinja_template

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
CITY = {"type": "string", "description": "City, e.g. Zürich"}
UNIT = {"type": "string", "enum": ["c", "f"]}
NEAR = {"type": "array", "items": {"type": "string"}}
WEATHER = {
    "name": "get_weather",
    "description": 'The "current" weather',
    "parameters": {
        "type": "object",
        "properties": {"city": CITY, "unit": UNIT, "days": {"type": "integer"}, "near": NEAR},
        "required": ["city"],
    },
}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}]}
ARGUMENTS = {"city": "Zürich", "days": 2, "share": 1.5, "now": True, "unit": None}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def user(content):
    return turn("user", content)


def assistant(content, **more):
    return turn("assistant", content, **more)


CALL = assistant("", tool_calls=[{"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}])
RESULT = turn("tool", '{"t": 21}', name="get_weather", tool_call_id="abcdef123")
BRIEF = turn("system", "Be brief.\n")
PARTS = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]

# Messages, and what else the template is given.
CONVERSATIONS = [
    ([user("Hello\n there ")], {}),
    ([BRIEF, user("Hello")], {}),
    ([user("  one\n"), assistant("two\n\n"), user("three é 🦙"), assistant("<think>\nhm\n</think>\n\nfour"), user("five")], {}),
    ([BRIEF, user("one"), assistant("two"), user("three")], {}),
    ([BRIEF, user("one"), assistant("two")], {}),
    ([user("Hi"), assistant("<think>a</think>b"), user("c")], {"enable_thinking": False}),
    ([user("Hi")], {"enable_thinking": True}),
    ([user("Hi")], {"reasoning_effort": "low"}),
    ([user("Hi"), assistant("Hello", reasoning_content="why"), user("x")], {}),
    ([BRIEF, user("Weather?")], TOOLS),
    ([user("Weather?"), CALL, RESULT], TOOLS),
    ([user("Weather?"), CALL, RESULT, assistant("21 degrees"), user("and tomorrow?")], TOOLS),
    ([turn("system", ""), user("")], {}),
    ([turn("developer", "D"), user("x")], {}),
    ([user("a"), user("b")], {}),
    ([user(PARTS)], {}),
]


def main(folder, date):
    now = datetime.datetime.strptime(date, "%Y-%m-%d")
    for path in sorted(Path(folder).glob("*.jinja")):
        template = _compile_jinja_template(path.read_text(encoding="utf-8"))
        for messages, more in CONVERSATIONS:
            for generation in (True, False):
                given = {"tools": None, "documents": None, "strftime_now": now.strftime, **SPECIALS, **more}
                try:
                    text = template.render(messages=messages, add_generation_prompt=generation, **given)
                except Exception:
                    continue
                row = {"messages": messages, "more": more, "add_generation_prompt": generation, "text": text}
                print(json.dumps({"template": path.name, **row}))


main(*sys.argv[1:])
