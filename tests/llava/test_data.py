"""Conversations to tokens and labels, batches, order, and bad data."""

import json

import pytest
import torch
from tiny import picture, tiny_model, tiny_tokenizer, write_data
from torch.utils.data import DataLoader

from piip_llava import InputError
from piip_llava.conversation import TEMPLATES, read_turns, render
from piip_llava.data import Collator, ConversationDataset, ModalityLengthSampler
from piip_llava.images import preprocess
from piip_llava.tokens import IGNORE, PLACEHOLDER, expand_images, tokenize

TURNS = [
    {"from": "human", "value": "What is it?\n<image>"},
    {"from": "gpt", "value": "It is red."},
    {"from": "human", "value": "How many digits?"},
    {"from": "gpt", "value": "two"},
]


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


def learned(tokenizer, turns, template):
    text, answers = render(read_turns(turns, 1), TEMPLATES[template], "</s>")
    ids, labels = tokenize(tokenizer, text, answers)
    parts, current = [], []
    for label in [*labels, IGNORE]:
        if label == IGNORE and current:
            parts.append(tokenizer.decode(current))
            current = []
        elif label != IGNORE:
            current.append(label)
    return text, ids, labels, parts


def test_v1_learns_answers_and_their_ends_alone():
    tokenizer = tiny_tokenizer()
    text, ids, labels, parts = learned(tokenizer, TURNS, "v1")
    assert text.endswith(
        "questions. USER: <image>\nWhat is it? ASSISTANT: It is red.</s>USER: How many digits? ASSISTANT: two</s>"
    )
    assert [part.strip() for part in parts] == ["It is red.</s>", "two</s>"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(PLACEHOLDER) == 1
    assert len(ids) == len(labels)


def test_plain_learns_the_caption_and_its_line_end():
    text, ids, _, parts = learned(tiny_tokenizer(), TURNS[:2], "plain")
    assert text == "<image>It is red.\n"
    assert parts == ["It is red.\n"]
    assert ids[1] == PLACEHOLDER


def test_text_behind_an_image_is_tokenised_as_a_piece_of_its_own():
    tokenizer = tiny_tokenizer()
    ids, _ = tokenize(tokenizer, "USER: <image>\nWhat")
    place = ids.index(PLACEHOLDER)
    assert ids[place + 1 :] == tokenizer("\nWhat", add_special_tokens=False)["input_ids"]


def test_the_chat_template_is_the_training_template(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "It is red."},
        {"role": "user", "content": "How many digits?"},
    ]
    turns = read_turns(TURNS, 1)[:3]
    expected, _ = render([*turns, ("assistant", None)], TEMPLATES["v1"], "</s>")
    assert processor.apply_chat_template(messages) == expected


def test_a_sequence_is_cut_behind_the_image_and_never_inside():
    options = {"image_token_id": 9, "count": 4}
    ids, labels, images = expand_images([1, PLACEHOLDER, 2, 3], [1, 1, 2, 3], **options, limit=6)
    assert (ids, labels, images) == ([1, 9, 9, 9, 9, 2], [1, *[IGNORE] * 4, 2], 1)
    assert expand_images([1, PLACEHOLDER, 2], None, **options, limit=4) == ([1], [IGNORE], 0)


@pytest.mark.parametrize(
    ("turns", "images", "says"),
    [
        (TURNS, 0, r"1 <image> placeholder.s. in the conversation and 0 image"),
        (TURNS[2:], 1, r"0 <image> placeholder.s. in the conversation and 1 image"),
        ([TURNS[0], TURNS[2]], 1, "must take turns"),
        ([], 0, "must take turns"),
        ([{"from": "bot", "value": ""}], 0, "a turn is .*got .*bot"),
    ],
)
def test_conversations_that_cannot_be_read(turns, images, says):
    with pytest.raises(InputError, match=says):
        read_turns(turns, images)


def test_batches_pad_on_the_right_and_keep_images_in_order(processor, tmp_path):
    data = ConversationDataset(write_data(tmp_path), tmp_path, processor, limit=128)
    samples = [data[3], data[0], data[1]]
    batch = Collator(0)(samples)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    for i, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == sample["input_ids"]
        assert batch["attention_mask"][i].sum() == length
        assert (batch["labels"][i, length:] == IGNORE).all()
    about = processor.image_processor
    expected = preprocess(picture(1), 64, about.image_mean, about.image_std, "pad")
    assert torch.equal(batch["pixel_values"][1], torch.from_numpy(expected))
    assert "pixel_values" not in Collator(0)([data[3], data[7]])


def test_an_unreadable_image_costs_its_own_sample_alone(processor, tmp_path):
    path = write_data(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "1.png").unlink()
    data = ConversationDataset(path, tmp_path, processor, limit=128)
    batch = Collator(0)([data[0], data[1], data[2]])
    assert (batch["labels"][:2] == IGNORE).all()
    assert (batch["labels"][2] != IGNORE).any()
    assert batch["pixel_values"].shape[0] == 3
    assert not batch["pixel_values"][:2].any()
    assert [(s.sample, s.kind) for s in batch["skipped"]] == [("sample0", "unreadable"), ("sample1", "unreadable")]
    assert "0.png cannot be read" in batch["skipped"][0].reason
    assert "skipped" not in Collator(0)([data[2], data[3]])
    strict = ConversationDataset(path, tmp_path, processor, limit=128, bad_images="error")
    with pytest.raises(InputError, match=r"sample sample0: the image .*0.png cannot be read"):
        strict[0]


def test_an_error_of_a_data_worker_is_one_line(processor, tmp_path):
    path = write_data(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no image")
    strict = ConversationDataset(path, tmp_path, processor, limit=128, bad_images="error")
    loader = DataLoader(strict, num_workers=1, collate_fn=Collator(0))
    with pytest.raises(InputError, match=r"^sample sample0: the image .*0.png cannot be read: .*$") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_a_sample_whose_answer_is_cut_off_says_so(processor, tmp_path):
    path = write_data(tmp_path)
    short = ConversationDataset(path, tmp_path, processor, limit=20)
    assert short[0]["skipped"] == ("sample0", "cut", "no answer begins within 20 tokens")
    assert ConversationDataset(path, tmp_path, processor, limit=128)[0]["skipped"] is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "no list of samples"),
        ('[{"id": 7}]', "sample 0: it has no 'conversations'"),
        (json.dumps([{"id": 7, "conversations": TURNS}]), r"sample 7: there are 1 <image> placeholder"),
    ],
)
def test_data_files_that_cannot_be_used(processor, tmp_path, text, says):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError, match=says):
        ConversationDataset(tmp_path / "data.json", tmp_path, processor)
    with pytest.raises(InputError, match=r"unknown template 'v2'.*plain, v1"):
        ConversationDataset(tmp_path / "data.json", tmp_path, processor, template="v2")


def test_batches_are_of_one_kind_and_of_similar_length():
    lengths = [100 + i for i in range(43)] + [-1 - i for i in range(29)]
    sampler = ModalityLengthSampler(lengths, 4, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(72))
    batches = [[lengths[i] for i in order[k : k + 4]] for k in range(0, 68, 4)]
    whole = [b for b in batches if all(x > 0 for x in b) or all(x < 0 for x in b)]
    assert len(whole) >= 17
    assert sum(max(b) - min(b) for b in whole) / len(whole) < 6
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert [x > 0 for x in (b[0] for b in whole)] != sorted((b[0] > 0 for b in whole), reverse=True)
