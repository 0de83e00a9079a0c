"""LLaVA's cases: preprocessing; tower and projector; the whole model with a language model."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from seeded import seeded_array, seeded_input
from test_reference import FLOOR, GRADIENT_NORM, OUTPUT, relative_error
from translate_llava import FULL, PYRAMID, llava_config

from piip.checkpoint import difference
from piip_llava import PiipLlavaForConditionalGeneration
from piip_llava.images import preprocess
from piip_llava.released import PROJECTOR, TOWER, NameMap
from piip_llava.tokens import IGNORE, expand_images


def check_llava(case: dict, stored: dict) -> dict[str, float]:
    if "processor" in case:
        return check_preprocess(case, stored)
    model, names = build(case)
    errors = check_full(model, case, stored) if case["class"] == FULL else check_tower(model, case, stored)
    if "grad_names" in case:
        errors["gradient_norm"] = compare_gradients(model, names, case, stored)
        assert errors["gradient_norm"] < GRADIENT_NORM
    assert errors["output"] < OUTPUT
    return errors


def check_preprocess(case: dict, stored: dict) -> dict[str, float]:
    about = case["processor"]
    assert case["pad_fill"] == [int(mean * 255) for mean in about["image_mean"]]
    error = 0.0
    for name in case["outputs"]:
        if name.startswith("out_"):
            _, number, aspect_ratio = name.split("_")
            image = Image.fromarray(stored[f"image_{number}"])
            result = preprocess(
                image, about["size"]["shortest_edge"], about["image_mean"], about["image_std"], aspect_ratio
            )
            error = max(error, relative_error(result[None], case, stored, name))
    assert error < OUTPUT
    return {"output": error}


def build(case: dict) -> tuple[PiipLlavaForConditionalGeneration, NameMap]:
    """Build the model and give it the case's tensors, through the map of released names."""
    config = llava_config(case)
    model = PiipLlavaForConditionalGeneration(config).eval()
    state = model.state_dict()
    if case["class"] != FULL:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("language_model.")}
    names = NameMap(model.vision_tower, config.projector, {name: tuple(tensor.shape) for name, tensor in state.items()})
    # timm's own name of a layer scale gives other seeded values than the released one.
    given = {name: torch.from_numpy(seeded_array(name, shape)) for name, shape in case["parameters"].items()}
    loaded = names.from_released(given.items())
    assert loaded.keys() == state.keys()
    model.load_state_dict({**model.state_dict(), **loaded})
    return model, names


def check_tower(model: PiipLlavaForConditionalGeneration, case: dict, stored: dict) -> dict[str, float]:
    (given,) = case["input"].values()
    images = torch.from_numpy(seeded_input(given["seed_name"], given["shape"]))
    features = model.vision_tower(images)
    out = model.projector(features)
    assert out.shape[1] == model.image_tokens
    error = relative_error(out.detach().numpy(), case, stored, "out0")
    for i, tokens in enumerate(features):
        prefix = () if tokens.prefix is None else (tokens.prefix,)
        feature = tokens.to_map() if case["class"] == PYRAMID else torch.cat([*prefix, tokens.x], dim=1)
        error = max(error, relative_error(feature.detach().numpy(), case, stored, f"feat{i + 1}"))
    if "grad_names" in case:
        (seed,) = case["loss_seed_names"]
        (out * torch.from_numpy(seeded_input(seed, out.shape))).sum().backward()
    return {"output": error}


def check_full(model: PiipLlavaForConditionalGeneration, case: dict, stored: dict) -> dict[str, float]:
    def expand(ids: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[int], int]:
        return expand_images(
            ids.tolist(),
            labels.tolist(),
            placeholder=case["image_token_index"],
            image_token_id=model.config.image_token_id,
            count=model.image_tokens,
            limit=model.config.sequence_length,
        )

    rows = [
        expand(ids[mask], labels[mask])
        for ids, labels, mask in zip(stored["input_ids"], stored["in_labels"], stored["in_mask"], strict=True)
    ]
    length = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _, _ in rows])
    labels = torch.tensor([row + [IGNORE] * (length - len(row)) for _, row, _ in rows])
    mask = torch.tensor([[i < len(row) for i in range(length)] for row, _, _ in rows])
    assert labels.tolist() == stored["labels"].tolist()
    assert mask.tolist() == stored["attention_mask"].tolist()
    (given,) = case["input"].values()
    images = torch.from_numpy(seeded_input(given["seed_name"], given["shape"]))
    out = model(input_ids=ids, pixel_values=images, attention_mask=mask, labels=labels)
    out.loss.backward()
    # At padding, which nothing attends to, the original has zeros and ours the embedding of a padding token.
    measured: dict[str, Any] = {"loss": out.loss.detach().double().numpy()}
    for name, value in (("logits", out.logits), ("inputs_embeds", model.embed(ids, images))):
        measured[name] = torch.where(mask[..., None], value.detach(), torch.from_numpy(stored[name])).numpy()
    error = max(relative_error(value, case, stored, name) for name, value in measured.items())

    prompt = expand(stored["input_ids"][0][:7], stored["in_labels"][0][:7])[0]
    generated = model.generate(
        input_ids=torch.tensor([prompt]), pixel_values=images[:1], max_new_tokens=8, do_sample=False
    )
    assert generated[0, len(prompt) :].tolist() == stored["generated"][0, 1:].tolist()

    long_ids, long_labels, kept = expand(stored["long_ids"][0], stored["long_ids"][0])
    assert long_labels == stored["long_labels"][0].tolist()
    assert (kept, len(long_ids)) == (1, stored["long_embeds_shape"][1])
    return {"output": error}


def compare_gradients(model: PiipLlavaForConditionalGeneration, names: NameMap, case: dict, stored: dict) -> float:
    gradients = names.to_released({name: p.grad for name, p in model.named_parameters()})
    gamma = {name: name.removesuffix("gamma") + "weight" for name in case["grad_names"] if name.endswith(".gamma")}
    without = set(case["params_without_grad"])
    expected = {gamma.get(n, n): v for n, v in zip(case["grad_names"], stored["grad_norms"], strict=True)}
    assert not difference(
        {n: torch.empty(0) for n in expected}, {n: (0,) for n in {**gradients, **names.unread_shapes()}}
    )
    # The original runs a plain CLIP under no_grad; ours computes the gradient, for those who want to train it.
    frozen = {n for n in without if case["class"] != PYRAMID and n.startswith(TOWER)}
    assert {n for n, g in gradients.items() if g is None} <= without
    floor = FLOOR * np.nanmax(stored["grad_norms"])
    compared = {n: v for n, v in expected.items() if n not in without and n in gradients}
    assert any(n.startswith(PROJECTOR) for n in compared) or not any(n.startswith(PROJECTOR) for n in expected)
    assert not {n for n in set(gradients) - set(compared) - frozen if gradients[n] is not None and gradients[n].any()}
    # A bias of k shifts all logits of a query alike: its gradient is zero but for rounding, on both sides.
    zero = {n for n, norm in compared.items() if n.endswith("k_proj.bias") and norm < floor}
    assert all(float(gradients[n].norm()) < floor for n in zero)
    return max(
        abs(float(gradients[n].double().norm()) - norm) / max(norm, floor)
        for n, norm in compared.items()
        if n not in zero
    )
