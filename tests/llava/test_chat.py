"""One question, conversations, the terminal and the page."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import picture, tiny_model

from piip_llava import InputError
from piip_llava.chat import Chat, answer

LLAVA = Path(__file__).parents[2] / "llava"


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for part in pair:
        part.save_pretrained(folder)
    picture().save(folder / "picture.png")
    return folder


def test_pieces_make_up_the_answer_that_generate_gives(pair):
    model, processor = pair
    chat = Chat(model, processor)
    pieces = list(chat.ask("What is it?", picture(), max_new_tokens=12))
    prompt = "".join(p for p in processor.apply_chat_template(chat.messages[:1]))
    given = processor(images=picture(), text=prompt)
    out = model.generate(**given, max_new_tokens=12, do_sample=False)
    assert "".join(pieces) == processor.tokenizer.decode(
        out[0, given["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_a_second_question_sees_the_first_and_a_new_image_begins_anew(pair):
    chat = Chat(*pair)
    list(chat.ask("What is it?", picture(), max_new_tokens=4))
    list(chat.ask("How many digits?", max_new_tokens=4))
    prompt = pair[1].apply_chat_template(chat.messages)
    assert prompt.count("<image>") == 1
    assert prompt.index("<image>") < prompt.index("What is it?") < prompt.index("How many digits?")
    list(chat.ask("And now?", picture(1), max_new_tokens=4))
    assert len(chat.messages) == 2


def test_an_error_while_answering_reaches_the_one_who_asked_and_leaves_no_trace(pair):
    chat = Chat(*pair)
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(chat.ask("What is it?", picture(), max_new_tokens=-1))
    assert chat.messages == []
    with pytest.raises(InputError, match="no question"):
        answer(*pair, " ")


def test_one_who_goes_away_stops_the_answer(pair):
    chat = Chat(*pair)
    pieces = chat.ask("What is it?", picture(), max_new_tokens=200, eos_token_id=None)
    next(pieces)
    pieces.close()  # waits for the thread
    assert chat.messages == []


def run(script: str, *arguments: object, text: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, LLAVA / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=120, check=False)


def test_inference_from_the_command_line(saved):
    result = run("inference.py", "--model_path", saved, "--img_path", saved / "picture.png", "--prompt", "What is it?")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.slow
def test_inference_says_what_is_wrong(saved):
    result = run("inference.py", "--model_path", saved, "--img_path", saved / "no.png", "--prompt", "What is it?")
    assert result.returncode == 2
    assert "no.png cannot be read" in result.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_terminal(saved):
    lines = f"What is it?\n/image {saved / 'no.png'}\nAnd this?\n/image {saved / 'picture.png'}\nAnd now?\n/quit\n"
    result = run("chat.py", "--model_path", saved, "--img_path", saved / "picture.png", text=lines)
    assert result.returncode == 0, result.stderr
    assert "no.png cannot be read" in result.stdout


def test_the_page_through_its_client(pair, tmp_path):
    pytest.importorskip("gradio", reason="needs the demo extra")
    from gradio_client import Client, handle_file

    from piip_llava.web import build

    page = build(*pair)
    _, url, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False, download_files=str(tmp_path))
        picture().save(tmp_path / "a.png")
        job = client.submit("What is it?", handle_file(str(tmp_path / "a.png")), [], 16, api_name="/ask")
        box, history = job.result(timeout=60)
        assert len(job.outputs()) > 2, "the answer is not streamed"
        assert box == ""
        assert [turn["role"] for turn in history] == ["user", "assistant"]
        plain = "".join(
            Chat(*pair).ask("What is it?", Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())), max_new_tokens=16)
        )
        shown = history[-1]["content"]
        shown = shown if isinstance(shown, str) else shown[0]["text"]
        assert shown.split() == plain.split()
        again = client.predict("How many digits?", handle_file(str(tmp_path / "a.png")), history, 16, api_name="/ask")[
            1
        ]
        assert [turn["role"] for turn in again] == ["user", "assistant"] * 2
        with pytest.raises(Exception, match="Type a question"):
            client.predict(" ", None, [], 16, api_name="/ask")
    finally:
        page.close()
