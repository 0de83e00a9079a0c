"""What the demo's language model reads: pictures in words, whose digits change from step to step."""

import json
import random
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import demo_llava

    yield demo_llava
    for name in ("demo_llava", "make_mini_data", "pretrain_branches"):
        sys.modules.pop(name, None)


def test_texts_hold_the_picture_in_place_of_the_image(demo, tmp_path):
    ask = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "1"}]
    tell = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "From left to right: two."}]
    for name, turns in (("train", ask), ("pretrain", tell)):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": "a", "image": "a.jpg", "conversations": turns}]))
    (tmp_path / "in_words.json").write_text(json.dumps({"a": "none two"}))
    question, caption = demo.read_texts(tmp_path)
    assert "none two \nHow many? ASSISTANT: 1</s>" in question
    assert caption.startswith("none two From left to right: two.")
    assert "<image>" not in question + caption


def test_renamed_digits_stay_different_and_agree_with_the_answers(demo):
    text = "none two none seven two\nWhich digit is the leftmost? two</s>How many? 2"
    found = set()
    for seed in range(20):
        words = demo.rename(text, random.Random(seed)).replace("</s>How", " How").replace("\n", " ").split()
        assert words[0] == words[2] == "none" and words[-1] == "2"
        assert words[1] == words[4] == words[10] != words[3]
        assert {words[1], words[3]} <= {*demo.CLASSES}
        found.add(words[1])
    assert len(found) > 3
