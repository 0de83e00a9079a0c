"""The model behind lmms-eval's interface."""

import base64
import io
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from piip_llava.chat import load
from piip_llava.errors import InputError
from piip_llava.processing import open_image

# Options of generation that a task may set; everything else of a task's options is not for `generate`.
OPTIONS = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")


class PiipLlavaLmms(lmms):
    """Answers lmms-eval's requests in the training template, greedy unless a task says otherwise.

    Args:
        pretrained: Directory or hub repository of the model; or give `model` and `processor`.
        model: A loaded model.
        processor: Its processor.
        batch_size: Questions at once.
        device: See `piip_llava.chat.load`.
        dtype: See `piip_llava.chat.load`.
        vision_weights: See `piip_llava.chat.load`.
        **_: Further options of lmms-eval, not used.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        model: Any = None,
        processor: Any = None,
        batch_size: int | str | None = 1,
        device: str | None = None,
        dtype: str | None = None,
        vision_weights: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if model is None:
            if pretrained is None:
                raise InputError("name the model: pretrained=DIRECTORY")
            model, processor = load(pretrained, device, dtype, vision_weights)
        self.model, self.processor = model, processor
        self.batch_size = int(batch_size or 1)

    def clean(self) -> None:
        """Keep the model, which lmms-eval would drop after a run: the next benchmark asks it too."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the answer to every request, in the requests' order."""
        # Together go requests with the same options; long prompts first, so that memory runs out at once or never.
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), -len(requests[i].args[0])))
        answers: dict[int, str] = {}
        while order:
            options = requests[order[0]].args[1]
            group = [i for i in order[: self.batch_size] if requests[i].args[1] == options]
            order = order[len(group) :]
            for i, text in zip(group, self._answer([requests[i].args for i in group], options), strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", (requests[i].args[0], options), text)
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, group: list[tuple], options: dict[str, Any]) -> list[str]:
        prompts, images = [], []
        for context, _, doc_to_visual, doc_id, task, split, *_ in group:
            found = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            images += [open_image(image) for image in found]
            parts = [*({"type": "image"} for _ in found), {"type": "text", "text": context}]
            prompts.append(self.processor.apply_chat_template([{"role": "user", "content": parts}]))
        inputs = self.processor(images=images, text=prompts).to(self.model.device)
        chosen = {key: options[key] for key in OPTIONS if options.get(key) is not None}
        if not chosen.get("temperature"):  # 0 means greedy
            chosen = {key: value for key, value in chosen.items() if key not in ("temperature", "top_p")}
            chosen["do_sample"] = False
        out = self.model.generate(**inputs, **{"max_new_tokens": 1024, **chosen})
        texts = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :])
        until = options.get("until") or []
        return [_cut(text, [until] if isinstance(until, str) else until).strip() for text in texts]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of every request's continuation, and whether it is the greedy one."""
        results = []
        for request in requests:
            context, doc_to_target, doc_to_visual, doc_id, task, split, *_ = request.args
            doc = self.task_dict[task][split][doc_id]
            target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
            found = [open_image(image) for image in doc_to_visual(doc) or []]
            parts = [*({"type": "image"} for _ in found), {"type": "text", "text": context}]
            prompt = self.processor.apply_chat_template([{"role": "user", "content": parts}])
            results.append(self._likelihood(prompt, f" {target}", found))
        return results

    @torch.inference_mode()
    def _likelihood(self, prompt: str, target: str, images: list[Any]) -> tuple[float, bool]:
        inputs = self.processor(images=images, text=prompt + target).to(self.model.device)
        start = len(self.processor.encode(prompt))
        logits = self.model(**inputs).logits[0, start - 1 : -1].float().log_softmax(-1)
        wanted = inputs["input_ids"][0, start:]
        found = logits.gather(1, wanted[:, None]).sum()
        return float(found), bool((logits.argmax(-1) == wanted).all())

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse: none of the benchmarks here asks in rounds."""
        raise NotImplementedError("PIIP-LLaVA answers one question at a time; choose tasks of type generate_until")


def _cut(text: str, until: list[str]) -> str:
    for end in until:
        text = text.split(end)[0] if end else text
    return text


def row_image(row: dict[str, Any]) -> list[Any]:
    """Return the image of a benchmark's row; rows hold a path or base64 text."""
    given = row["image"]
    if given.startswith("base64:"):
        return [open_image(io.BytesIO(base64.b64decode(given.removeprefix("base64:"))))]
    return [open_image(given)]


manifest = ModelManifest(model_id="piip_llava", simple_class_path="piip_llava.evaluation.lmms.PiipLlavaLmms")
