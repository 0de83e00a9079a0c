"""A page to talk about an image, with gradio."""

from collections.abc import Iterator
from typing import Any

from piip_llava.chat import Chat
from piip_llava.errors import InputError
from piip_llava.modeling import PiipLlavaForConditionalGeneration
from piip_llava.processing import PiipLlavaProcessor


def text_of(content: Any) -> str:
    """Return the text of a message as gradio hands it back: text, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


def build(model: PiipLlavaForConditionalGeneration, processor: PiipLlavaProcessor, title: str = "PIIP-LLaVA") -> Any:
    """Return the page: an image beside a conversation about it. The page holds all state; nothing is kept here.

    Args:
        model: The model.
        processor: Its processor.
        title: Name on the page.
    """
    import gradio as gr

    def respond(question: str, image: Any, history: list[dict[str, Any]], limit: float) -> Iterator[tuple[str, list]]:
        if not question.strip():
            raise gr.Error("Type a question first.")
        turns = [{"role": turn["role"], "content": text_of(turn["content"])} for turn in history or []]
        chat = Chat(model, processor, image=image)
        chat.messages = list(turns)
        if image is not None and turns:  # the first question brought the image
            first = [{"type": "image"}, {"type": "text", "text": turns[0]["content"]}]
            chat.messages[0] = {"role": "user", "content": first}
        shown = [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        yield "", shown
        try:
            for piece in chat.ask(question, max_new_tokens=int(limit)):
                shown[-1] = {"role": "assistant", "content": shown[-1]["content"] + piece}
                yield "", shown
        except InputError as error:
            raise gr.Error(str(error)) from None

    with gr.Blocks(title=title) as page:
        gr.Markdown(
            f"## {title}\nAnswers come from the model alone and may be wrong. A new image begins a new conversation."
        )
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(type="pil", label="Image")
                limit = gr.Slider(16, 1024, value=512, step=16, label="Longest answer, tokens")
            with gr.Column(scale=3):
                conversation = gr.Chatbot(label="Conversation", height=480)
                question = gr.Textbox(label="Question", placeholder="What is in the image?", submit_btn=True)
                clear = gr.Button("Clear the conversation")
        question.submit(
            respond,
            [question, image, conversation, limit],
            [question, conversation],
            api_name="ask",
            concurrency_limit=1,
        )
        clear.click(list, None, conversation, api_name="clear")
        image.change(list, None, conversation, api_name=False)
    return page
