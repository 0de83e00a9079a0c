"""How a conversation becomes text: the templates of LLaVA-1.5's two stages."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from piip.errors import unknown
from piip_llava.errors import InputError
from piip_llava.tokens import IMAGE

Turn = tuple[str, str | None]
"""Role (`user` or `assistant`) and text; None for an answer that is still to come."""


@dataclass(frozen=True)
class Template:
    """How turns are put together.

    Attributes:
        system: Text in front of the first turn, with what separates it from it.
        user: Text in front of a question.
        between: Text between a question and its answer.
        assistant: Text in front of an answer.
        space: Text between `assistant` and the answer; part of what is learned.
        keep_question: Whether questions are part of the text; if not, only their images are.
        end: Text behind an answer, part of what is learned; None for the tokenizer's end-of-sequence token.
    """

    system: str = ""
    user: str = ""
    between: str = ""
    assistant: str = ""
    space: str = ""
    keep_question: bool = True
    end: str | None = None


TEMPLATES = {
    # Captions: the image, then its caption on a line.
    "plain": Template(keep_question=False, end="\n"),
    # Vicuna's, for conversations; training and the benchmarks use it.
    "v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user="USER: ",
        between=" ",
        assistant="ASSISTANT:",
        space=" ",
    ),
}


def find_template(name: str) -> Template:
    """Return a template by name.

    Raises:
        InputError: There is no such template.
    """
    if name not in TEMPLATES:
        raise InputError(unknown("template", name, TEMPLATES))
    return TEMPLATES[name]


def render(turns: Iterable[Turn], template: Template, eos: str) -> tuple[str, list[tuple[int, int]]]:
    """Put turns together.

    Args:
        turns: Questions and answers in turn, beginning with a question.
        template: The template.
        eos: The tokenizer's end-of-sequence token.

    Returns:
        The text, and `(start, stop)` of the characters of every answer.
    """
    text = template.system
    answers = []
    for role, value in turns:
        if role == "user":
            text += template.user
            text += (value or "") if template.keep_question else IMAGE * (value or "").count(IMAGE)
            text += template.between
        elif value is None:
            text += template.assistant
        else:
            text += template.assistant
            start = len(text)
            text += template.space + value + (eos if template.end is None else template.end)
            answers.append((start, len(text)))
    return text, answers


def chat_template(eos: str) -> str:
    """Return the `v1` template in the language of `apply_chat_template`."""
    template = TEMPLATES["v1"]
    return (
        "{{ " + repr(template.system) + " }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ " + repr(template.user) + " }}"
        "{% elif message['role'] == 'assistant' %}{{ " + repr(template.assistant + template.space) + " }}"
        "{% else %}{{ raise_exception('roles are user and assistant, got ' + message['role']) }}{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '" + IMAGE + "\\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ "
        + repr(template.between)
        + " }}{% else %}{{ "
        + repr(eos)
        + " }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ " + repr(template.assistant) + " }}{% endif %}"
    )


def read_turns(conversation: Sequence[dict[str, str]], images: int) -> list[Turn]:
    """Read a conversation in LLaVA's form: a list of `{"from": "human" or "gpt", "value": text}`.

    A leading answer is dropped. Placeholders of images go to the front of their turn, each on a line.

    Args:
        conversation: The conversation.
        images: Images that the sample has.

    Raises:
        InputError: Turns are not in order, or placeholders and images do not agree.
    """
    roles = {"human": "user", "gpt": "assistant"}
    for turn in conversation:
        if not isinstance(turn, dict) or turn.get("from") not in roles or not isinstance(turn.get("value"), str):
            raise InputError(f"a turn is {{'from': 'human' or 'gpt', 'value': text}}, got {turn!r:.100}")
    turns = [(roles[turn["from"]], turn["value"]) for turn in conversation]
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    if not turns or any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns)):
        raise InputError("human and gpt must take turns, beginning with human")
    found = sum(value.count(IMAGE) for _, value in turns)
    if found != images:
        raise InputError(f"there are {found} {IMAGE} placeholder(s) in the conversation and {images} image(s)")
    return [(role, _front(value) if IMAGE in value else value) for role, value in turns]


def _front(value: str) -> str:
    return f"{IMAGE}\n" * value.count(IMAGE) + value.replace(IMAGE, "").strip()
