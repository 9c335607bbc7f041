"""How a conversation becomes text, and the same rule as a Jinja template.

Knows no tokenizer and no data set.
"""

from __future__ import annotations

from rlhf.settings import ChatFormat


def format_prompt(chat: ChatFormat, text: str) -> str:
    """A user's turn followed by what opens the answer."""
    return chat.human.replace("{text}", text) + chat.assistant


def format_answer(chat: ChatFormat, text: str) -> str:
    """An answer as it follows the opening: a space comes first where neither side brings one.

    DeepSpeed-Chat's ` Human: <question> Assistant:` + ` <answer>` is the case with the space.
    """
    separated = chat.assistant[-1:].isspace() or text[:1].isspace() or not chat.assistant
    return text if separated else " " + text


def jinja_template(chat: ChatFormat) -> str:
    """The chat format as a `chat_template` of transformers; the tokenizer's EOS must be the end-of-turn token.

    Rendering `[user, assistant]` gives `format_prompt(user) + format_answer(assistant) + end of turn`, and rendering `[user]` with
    `add_generation_prompt=True` gives `format_prompt(user)`. The format has no system turn, so that role raises.
    """
    before, after = chat.human.split("{text}", maxsplit=1)
    space = (
        "" if chat.assistant[-1:].isspace() or not chat.assistant else "{% if content[:1] not in [' ', '\\n', '\\t'] %}{{ ' ' }}{% endif %}"
    )
    return (
        "{% for message in messages %}{% set content = message['content'] %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {_quoted(before)} + content + {_quoted(after)} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {_quoted(chat.assistant)} }}}}{space}{{{{ content + eos_token }}}}"
        "{% else %}{{ raise_exception('this chat format knows the roles user and assistant only') }}{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_quoted(chat.assistant)} }}}}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    """A Jinja string literal; inside an expression, so that Jinja's whitespace control leaves it alone."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return f"'{escaped}'"
