"""CLIP as a classifier: its vision encoder, and its text encoder's class embeddings as the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPModel

#: The layers that Bella adapts: both linears of every MLP.
TARGETS = ("fc1", "fc2")
TEMPLATE = "a photo of a {}."
# Prompts that the text encoder reads at a time.
_PROMPTS = 256


class Classifier(nn.Module):
    """Logits exp(s) · cos(image, class_c), (B, C), as CLIP's zero-shot classification has them.

    `head` is a linear without bias whose rows are exp(s) · t_c / ‖t_c‖, the text encoder's
    embeddings of the classes. A particle model freezes it with the rest; only `modules_to_save`
    would train it.
    """

    def __init__(self, model: CLIPModel, classes: Tensor):
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection
        self.head = nn.Linear(classes.shape[1], classes.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(classes, requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        image = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        return self.head(image / image.norm(dim=-1, keepdim=True))


@torch.no_grad()
def classifier(
    model: CLIPModel | str | Path,
    class_names: Sequence[str],
    template: str = TEMPLATE,
    tokenizer: Any = None,
) -> Classifier:
    """A zero-shot classifier, in evaluation mode, for `get_particle_model`.

        base = clip.classifier("openai/clip-vit-base-patch32", ["cat", "dog"])
        config = peft.LoraConfig(r=4, target_modules=list(clip.TARGETS))
        model = ml.get_particle_model(base, config, num_particles=5)

    Args:
        model: a CLIPModel, whose vision encoder the classifier shares; or its name or folder.
        class_names: C names.
        template: the prompt of a class; {} stands for its name.
        tokenizer: the model's, which is needed beside a CLIPModel.

    Raises:
        TypeError: `model` is of another kind.
        ValueError: the tokenizer or {} is missing, there are fewer than two classes, or a prompt is
            longer than the text encoder reads.
    """
    from transformers import AutoTokenizer, CLIPModel

    if "{}" not in template:
        raise ValueError(f"template needs {{}} in the place of the class's name; got {template!r}")
    if isinstance(class_names, str) or len(class_names) < 2:
        raise ValueError(f"a classifier needs at least two class names; got {class_names!r}")
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        model = CLIPModel.from_pretrained(model)
    if not isinstance(model, CLIPModel):
        raise TypeError(
            f"model must be a CLIPModel, its name or folder; got {type(model).__name__}"
        )
    if tokenizer is None:
        raise ValueError("beside a CLIPModel its tokenizer is needed: classifier(tokenizer=...)")
    model.eval()
    prompts = [template.replace("{}", name) for name in class_names]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    longest, limit = tokens.input_ids.shape[1], model.config.text_config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"a prompt has {longest} tokens and the text encoder reads {limit}; the longest is "
            f"{max(prompts, key=len)!r}"
        )
    parts = zip(tokens.input_ids.split(_PROMPTS), tokens.attention_mask.split(_PROMPTS))
    read = [model.text_model(input_ids=i, attention_mask=m).pooler_output for i, m in parts]
    classes = model.text_projection(torch.cat(read))
    classes = classes / classes.norm(dim=-1, keepdim=True) * model.logit_scale.exp()
    return Classifier(model, classes).eval()
