"""What a `Flamingo` is made of, as Hugging Face keeps it: config.json beside the weights."""

from transformers import AutoConfig, PreTrainedConfig

from flamingo_vlm import mosaic_gpt  # noqa: F401 (makes the model type `mosaic_gpt` known to transformers)


class FlamingoConfig(PreTrainedConfig):
    """The configs of the two pretrained models, and how they are joined.

    eoc_token_id and media_token_id: of `<|endofchunk|>` and `<image>`; vis_dim: width of the vision encoder.
    vision_config is None where the vision encoder is a module of one's own, which no config can build.
    max_num_frames: learned frame embeddings for videos of at most so many frames; None has none.
    """

    model_type = "flamingo"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 (so in every config there)

    def __init__(
        self,
        text_config: PreTrainedConfig | dict | None = None,
        vision_config: PreTrainedConfig | dict | None = None,
        eoc_token_id: int | None = None,
        media_token_id: int | None = None,
        vis_dim: int | None = None,
        cross_attn_every_n_layers: int = 1,
        decoder_layers_attr_name: str | None = None,
        num_latents: int = 64,
        resampler_depth: int = 6,
        max_num_frames: int | None = None,
        **kwargs,
    ):
        text_config, vision_config = _built(text_config), _built(vision_config)
        tied = getattr(text_config, "tie_word_embeddings", False)
        super().__init__(
            **{"tie_word_embeddings": tied, **kwargs}
        )  # before there are configs inside, which it would reset
        self.text_config, self.vision_config = text_config, vision_config
        self.eoc_token_id, self.media_token_id = eoc_token_id, media_token_id
        self.vis_dim = vis_dim
        self.cross_attn_every_n_layers = cross_attn_every_n_layers
        self.decoder_layers_attr_name = decoder_layers_attr_name
        self.num_latents, self.resampler_depth, self.max_num_frames = num_latents, resampler_depth, max_num_frames


AutoConfig.register("flamingo", FlamingoConfig, exist_ok=True)


def _built(config: PreTrainedConfig | dict | None) -> PreTrainedConfig | None:
    """As read from JSON, a config is a dict that names its own class by its model_type."""
    return AutoConfig.for_model(**config) if isinstance(config, dict) else config
