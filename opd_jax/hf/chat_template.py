"""Renders conversations with a tokenizer's chat template, on the same day forever."""

import string
from datetime import datetime
from typing import Any

ROLES = {"s": "system", "u": "user", "a": "assistant"}

# Some templates write today's date into the prompt (Llama 3). A run resumed tomorrow would then
# train on other prompts. This is the date that Llama's own templates take where there is no clock.
CLOCK = datetime(2024, 7, 26)


def render(tokenizer: Any, roles: str) -> tuple[str, list[str]]:
    """Renders a conversation with thinking switched off, up to where the next response starts.

    Args:
      tokenizer: a `transformers` tokenizer.
      roles: a letter of `ROLES` for each message.

    Returns:
      (text, sentinels): the content of message n is sentinel n, a word that no template edits.

    Raises:
      Exception: whatever the template raises.
    """
    sentinels = [f"Sentinel{n}Content" for n in range(len(roles))]
    text = tokenizer.apply_chat_template(
        [{"role": ROLES[r], "content": s} for r, s in zip(roles, sentinels, strict=True)],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string=CLOCK.strftime("%d %b %Y"),
        chat_template=_without_a_clock(tokenizer.get_chat_template()),
    )
    return text, sentinels


def _without_a_clock(template: str) -> str:
    """The template with a `strftime_now` of its own, which formats `CLOCK`.

    It is a macro: `transformers` gives templates no functions of a caller's.
    """
    if "strftime_now" not in template:
        return template
    codes = [f"%{dash}{letter}" for letter in string.ascii_letters for dash in ("", "-")]
    said = {code: CLOCK.strftime(code) for code in [*codes, "%%"]}
    replaced = "".join(f"|replace({code!r}, {text!r})" for code, text in said.items())
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
    # The line end belongs to the tag before it, so the template still begins a line.
    return f"{macro}\n{template}"
