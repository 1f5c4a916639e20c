"""What captioner and selector are made of, as transformers saves and loads it."""

# No ``sub_configs``: by these transformers would write our choice of attention, none, into the models inside.

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, CLIPTextConfig, GPT2Config, PretrainedConfig


class CaptionerConfig(PretrainedConfig):  # type: ignore[misc]
    """What a captioner is made of; the defaults are the paper's.

    Attributes:
        language_model: the config of any causal LM of transformers, or its dictionary; GPT-2's if not said.
        feature_width: width of the visual tokens as the VLM's projector gives them.
        prefix: vectors that the mapper gives to the language model.
        layers: transformer layers of the mapper.
        heads: of their attention.
        mlp_ratio: width of their feed-forward part, in widths of the language model.
        max_new_tokens: of a caption, its end included.
        end: the token that ends a caption and belongs to it, such as "."; None = the tokenizer's end of text.
    """

    model_type = "accm_captioner"

    language_model: Any = None
    feature_width: int = 4096
    prefix: int = 20
    layers: int = 4
    heads: int = 8
    mlp_ratio: int = 2
    max_new_tokens: int = 67
    end: str | None = None

    def __post_init__(self, **settings: Any) -> None:
        """Make a config of what may be a dictionary, as it is in a file."""
        if self.language_model is None:
            self.language_model = GPT2Config()
        if isinstance(self.language_model, dict):
            self.language_model = AutoConfig.for_model(**self.language_model)
        super().__post_init__(**settings)


class SelectorConfig(PretrainedConfig):  # type: ignore[misc]
    """What a selector is made of; the defaults are the paper's, with CLIP's text encoder.

    Attributes:
        text_encoder: the config of any text encoder that ``AutoModel`` knows, or its dictionary; CLIP's if not said.
        layers: transformer layers over the candidates.
        heads: of their attention.
        mlp_ratio: width of their feed-forward part, in widths of the text encoder.
        dropout: in these layers, while training.
        train_text_encoder: whether its weights are trained too; else they are frozen.
    """

    model_type = "accm_selector"

    text_encoder: Any = None
    layers: int = 4
    heads: int = 8
    mlp_ratio: int = 2
    dropout: float = 0.1
    train_text_encoder: bool = False

    def __post_init__(self, **settings: Any) -> None:
        """Make a config of what may be a dictionary, as it is in a file."""
        if self.text_encoder is None:
            self.text_encoder = CLIPTextConfig()
        if isinstance(self.text_encoder, dict):
            self.text_encoder = AutoConfig.for_model(**self.text_encoder)
        super().__post_init__(**settings)
