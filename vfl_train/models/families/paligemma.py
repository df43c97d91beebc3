"""PaliGemma reads image and question as one bidirectional prefix and writes its answer causally behind it.

Its processor has no chat template: it is called with a question, puts the images before it and a newline
after it, and takes the answer apart, as `suffix`. One text would get that newline behind the answer. So, in
this process, chats are rendered as the tokens are, and the processor takes such texts as they are; with it a
template is saved that gives a question the form in which transformers' own processor takes it.

Source: big_vision's PaliGemma README and transformers' PaliGemmaProcessor (`<image>`s, begin of text,
question, newline; then answer and end of text). No turns: one question, one answer, no system text.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from vfl_train.models.families.family import Family

_REFUSED = (
    "{{ raise_exception('PaliGemma takes one question and its answer, no system text, no further turns') }}"
)
_QUESTION = (
    "{% for part in m['content'] if part['type'] == 'image' %}<image>{% endfor %}BOS"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
SAVED = (
    "{% if messages | length > 1 or messages[0]['role'] != 'user' %}" + _REFUSED + "{% endif %}"
    "{% for m in messages %}" + _QUESTION.replace("BOS", "") + "{% endfor %}"
)
WHOLE = (
    "{% if messages | length > 2 or messages[0]['role'] != 'user' %}" + _REFUSED + "{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    + _QUESTION.replace("BOS", "{{ bos_token }}")
    + "{{ '\n' }}{% else %}{{ m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)


def prepare(processor: Any) -> None:
    """Have a PaliGemmaProcessor render chats as `WHOLE` and take texts as they are; what it saves is its own
    and `SAVED`."""
    from transformers import ProcessorMixin

    processor.chat_template = SAVED
    processor.answer_token_type = 1  # 0 is the prefix, within which every token sees every other
    processor.apply_chat_template = partial(
        ProcessorMixin.apply_chat_template, processor, chat_template=WHOLE
    )
    for name in ("prepare_inputs_layout", "validate_inputs"):
        setattr(processor, name, MethodType(getattr(ProcessorMixin, name), processor))


PALIGEMMA = Family(prepare=prepare, reference_only="the image sees the question (bidirectional prefix)")
