"""Runs transformers' Mask2Former without its training loss, which cannot be built without scipy."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel


class Segmenter(Mask2FormerPreTrainedModel):
    """The forward of Mask2FormerForUniversalSegmentation, with the same names of weights."""

    _keys_to_ignore_on_load_unexpected = [r"^criterion\."]

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, len(config.id2label or ()) + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classes (n, queries, labels + 1) and the masks (n, queries, h / 4, w / 4).

        ``pixel_values`` is (n, 3, h, w), normalised.
        """
        output = self.model(pixel_values, output_hidden_states=True)
        queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), output.masks_queries_logits[-1]
