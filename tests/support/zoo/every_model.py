"""All models of the zoo, in the order of docs/models.md."""

from zoo import (
    decoders,
    encoder_decoders,
    encoders,
    of_ones_own,
    of_timm,
    speech,
    text_and_images,
    vision,
)
from zoo.entry import Entry

ZOO: dict[str, Entry] = {
    **decoders.MODELS,
    **encoders.MODELS,
    **encoder_decoders.MODELS,
    **speech.MODELS,
    **vision.MODELS,
    **text_and_images.MODELS,
    **of_timm.MODELS,
    **of_ones_own.MODELS,
}
