"""mmdet 3's DINO on a pyramid, with the original's parameter names and numerics.

The original ran on mmdet 2, whose DINO keeps the transformer inside the head. Here `PIIPDINO`, `PIIPDecoder` and
`PIIPDINOHead` restore what mmdet 3 computes otherwise, and a table maps the names. Configs import this module, which
brings `piip.integrations.mmengine` along: `custom_imports = dict(imports=["piip.integrations.mmdet_dino"])`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import piip.integrations.mmengine  # noqa: F401  (stands in for mmcv's compiled ops, so it comes before mmdet)

# isort: split
from mmdet.models.dense_heads import DINOHead
from mmdet.models.detectors import DINO
from mmdet.models.layers import MLP, DinoTransformerDecoder, coordinate_to_encoding, inverse_sigmoid
from mmdet.registry import MODELS

from piip import checkpoint
from piip.checkpoint import Shapes, State, difference, rename
from piip.errors import CheckpointError
from piip.models import DensePyramid

# Ours on the left, released on the right, as in `piip.checkpoint`; the first rule that fits is taken.
RULES = (
    ("level_embed", "bbox_head.transformer.level_embeds"),
    ("query_embedding.*", "bbox_head.transformer.query_embed.*"),
    ("memory_trans_fc.*", "bbox_head.transformer.enc_output.*"),
    ("memory_trans_norm.*", "bbox_head.transformer.enc_output_norm.*"),
    ("encoder.layers.{k}.self_attn.*", "bbox_head.transformer.encoder.layers.{k}.attentions.0.*"),
    ("encoder.layers.{k}.ffn.*", "bbox_head.transformer.encoder.layers.{k}.ffns.0.*"),
    ("encoder.*", "bbox_head.transformer.encoder.*"),
    ("decoder.layers.{k}.self_attn.*", "bbox_head.transformer.decoder.layers.{k}.attentions.0.*"),
    ("decoder.layers.{k}.cross_attn.*", "bbox_head.transformer.decoder.layers.{k}.attentions.1.*"),
    ("decoder.layers.{k}.ffn.*", "bbox_head.transformer.decoder.layers.{k}.ffns.0.*"),
    ("decoder.ref_point_head.layers.0.*", "bbox_head.transformer.decoder.ref_point_head.0.*"),
    ("decoder.ref_point_head.layers.1.*", "bbox_head.transformer.decoder.ref_point_head.2.*"),
    ("decoder.*", "bbox_head.transformer.decoder.*"),
    ("dn_query_generator.label_embedding.*", "bbox_head.label_embedding.*"),
    ("bbox_head.*", "bbox_head.*"),
    ("neck.*", "neck.*"),
)
BACKBONE = "backbone."
# Released tensors with one row per class: a model that is trained on for other classes has its own.
PER_CLASS = ("bbox_head.cls_branches.", "bbox_head.label_embedding.")


# Distance from the borders of the image that the inverse sigmoid of a box keeps.
EPS = 1e-3


class PIIPDecoder(DinoTransformerDecoder):
    """mmdet's DINO decoder with half as many sines and cosines per coordinate as there are channels.

    So it was up to mmdet 3.3, and in the released models; onedl-mmdetection 3.5 takes as many as there are channels
    (its issue 25), with which no DINO trained before fits.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        self.ref_point_head = MLP(self.embed_dims * 2, self.embed_dims, self.embed_dims, 2)

    def forward(
        self, query: Tensor, reference_points: Tensor, valid_ratios: Tensor, reg_branches: nn.ModuleList, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refine the boxes layer by layer.

        Args:
            query: `(B, queries, C)`.
            reference_points: Boxes `(B, queries, 4)` to start from, as centre and size in 0 to 1.
            valid_ratios: Share of each level that is not padding, `(B, levels, 2)` as width and height.
            reg_branches: What refines the boxes after each layer.
            **inputs: Further inputs of every layer.

        Returns:
            The queries after every layer `(layers, B, queries, C)`, and the boxes before every layer and after the
            last `(layers + 1, B, queries, 4)`.
        """
        states, boxes = [], [reference_points]
        ratios = valid_ratios.repeat(1, 1, 2)[:, None]
        for layer, regress in zip(self.layers, reg_branches, strict=False):  # the encoder has a branch too, the last
            points = reference_points[:, :, None] * ratios
            position = self.ref_point_head(coordinate_to_encoding(points[:, :, 0], num_feats=self.embed_dims // 2))
            query = layer(query, query_pos=position, reference_points=points, valid_ratios=valid_ratios, **inputs)
            boxes.append((regress(query) + inverse_sigmoid(reference_points, eps=EPS)).sigmoid())
            states.append(self.norm(query))
            reference_points = boxes[-1].detach()
        return torch.stack(states), torch.stack(boxes)


@MODELS.register_module()
class PIIPDINO(DINO):
    """mmdet's DINO that takes released detector files as well as its own.

    A state that lacks a tensor, or holds a foreign one, raises `CheckpointError` also for a caller that is not strict.
    Another number of classes is left to the caller: to a strict one it is an error, and one that is not strict
    (mmengine's `load_from`) keeps those few tensors as they are, and says so.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_convert)

    def _init_layers(self) -> None:  # before it, `decoder` is the config of what it is after it
        decoder: dict[str, Any] = copy.deepcopy(self.__dict__["decoder"])
        super()._init_layers()
        self.decoder = PIIPDecoder(**decoder)


@MODELS.register_module()
class PIIPDINOHead(DINOHead):
    """mmdet's DINO head with the original's limit on reference points: 0.001 from the borders, not 0.00001."""

    def forward(self, hidden_states: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Predict classes and boxes after every decoder layer.

        Args:
            hidden_states: `(layers, B, queries, C)`.
            references: Per layer, the boxes `(B, queries, 4)` that it starts from, as centre and size in 0 to 1.

        Returns:
            Logits `(layers, B, queries, classes)` and boxes `(layers, B, queries, 4)`.
        """
        logits, boxes = [], []
        branches = zip(hidden_states, references, self.cls_branches, self.reg_branches, strict=False)
        for hidden, reference, classify, regress in branches:
            logits.append(classify(hidden))
            boxes.append((regress(hidden) + inverse_sigmoid(reference, eps=EPS)).sigmoid())
        return torch.stack(logits), torch.stack(boxes)


def released_names(model: DINO) -> dict[str, str]:
    """Return the released name of each parameter and buffer of a detector, by our name."""
    names = {}
    if isinstance(model.backbone, DensePyramid):
        pairs = checkpoint.released_names(model.backbone).items()
        names.update({BACKBONE + ours: BACKBONE + released for ours, released in pairs})
    return {**names, **_head_names(model)}


def released_shapes(model: DINO) -> Shapes:
    """Return name and shape of every tensor that a released file of this detector holds."""
    state = model.state_dict()
    shapes: Shapes = {}
    if isinstance(model.backbone, DensePyramid):
        shapes = {BACKBONE + name: shape for name, shape in checkpoint.released_shapes(model.backbone).items()}
    return shapes | {released: tuple(state[ours].shape) for ours, released in _head_names(model).items()}


def to_released(model: DINO, state: Mapping[str, Tensor] | None = None) -> State:
    """Bring a state to the released names.

    Args:
        model: The detector.
        state: Tensors by our names, for example gradients, some may be missing; the model's own state by default,
            see `piip.checkpoint.to_released`.
    """
    given = model.state_dict() if state is None else state
    names = _head_names(model)
    released = {names[name]: tensor for name, tensor in given.items() if not name.startswith(BACKBONE)}
    if not isinstance(model.backbone, DensePyramid):
        return released
    inner = {n.removeprefix(BACKBONE): t for n, t in given.items() if n.startswith(BACKBONE)}
    backbone = checkpoint.to_released(model.backbone, None if state is None else inner)
    return {**{BACKBONE + name: tensor for name, tensor in backbone.items()}, **released}


def _head_names(model: DINO) -> dict[str, str]:
    """Released names of all that is not backbone, which converts its own part."""
    names = {}
    for name in model.state_dict():
        if name.startswith(BACKBONE):
            continue
        released = rename(name, RULES)
        if released is None:
            raise CheckpointError(f"no released name is known for the parameter {name}")
        names[name] = released
    return names


def _convert(model: DINO, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Bring what is not backbone to our names in place, and check it; a hook of `load_state_dict`."""
    names = _head_names(model)
    given = {
        name[len(prefix) :]: state_dict.pop(name)
        for name in list(state_dict)
        if name.startswith(prefix) and not name.startswith(prefix + BACKBONE)
    }
    ours = {released: name for name, released in names.items()}
    if len(given.keys() & ours.keys()) > len(given.keys() & names.keys()):
        given = {ours.get(name, name): tensor for name, tensor in given.items()}
    _check(model, given, names)
    state_dict.update({prefix + name: tensor for name, tensor in given.items()})


def _check(model: DINO, given: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    own = model.state_dict()
    expected = {name: tuple(own[name].shape) for name in names}
    for name, released in names.items():
        if released.startswith(PER_CLASS) and name in given and given[name].shape[1:] == own[name].shape[1:]:
            expected[name] = tuple(given[name].shape)
    if differences := difference(given, expected):
        others = sorted({name.partition(".")[0] for name in given} - {name.partition(".")[0] for name in names})
        why = f"it holds {', '.join(others)}, so it is of another detector; " if others else ""
        raise CheckpointError(f"the checkpoint does not fit this DINO detector: {why}{differences}")
