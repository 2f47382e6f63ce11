"""Flamingo: a pretrained vision encoder and a pretrained causal language model, joined by a Perceiver Resampler and
gated cross-attention (Alayrac et al. 2022, figure 3).

    patches = vision_encoder(images)              frozen: float[N, P, D]
    visual_tokens = perceiver(patches)            trained: L visual tokens per image
    media = gated_cross_attn_layers.project(...)  trained: keys and values of every gated block, once per image
    logits = lang_encoder(text), each gated block reading the image that a token sees

Arguments and meaning are OpenFlamingo's, parameter names too, so that its weights load (`checkpoints.py`). It is also a
Hugging Face model: `from_pretrained`, `save_pretrained`, `generate`.

What lies in front of the language model is `media.py`, what goes beyond one forward pass `decoding.py`.

Legend: B rows, T text tokens, M images per row, N images, F frames per image, P patches, L visual tokens, D width of
the vision encoder, V vocabulary.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo_vlm.checkpoint_files import in_our_names
from flamingo_vlm.conditioning import (
    Conditioning,
    GatedLayers,
    ProjectedMedia,
    checkpoint_contexts,
    find_decoder_layers,
    plain_language_model,
    position_limit,
)
from flamingo_vlm.configuration import FlamingoConfig
from flamingo_vlm.decoding import FlamingoDecoding, check_text
from flamingo_vlm.media import FlamingoMedia
from flamingo_vlm.vision_towers import VisionTower
from media_masks import MediaLayout
from perceiver_resampler import PerceiverResampler

NOT_OURS = {  # what callers of other models, or of OpenFlamingo, may pass -> what to do
    "input_ids": "the text is lang_x",
    "inputs_embeds": "the text is lang_x, whose tokens tell where the images are",
    "clear_conditioned_layers": "nothing is left behind; for several calls over the same images use cache_media",
}


class Flamingo(FlamingoMedia, FlamingoDecoding, PreTrainedModel, GenerationMixin):
    """Composed by hand: vision_encoder maps float[N, 3, h, w] (or what its domain has for images) to patch features
    float[N, P, vis_dim]; lang_encoder is any causal language model of transformers.

    `num_latents` and `resampler_depth` shape the resampler, `max_num_frames` gives it learned frame embeddings for
    videos. With a `FlamingoConfig` in place of vision_encoder both models are built from it, untrained: that is how
    `from_pretrained` makes one. Raises ValueError for a language model whose decoder layers cannot be found.
    """

    config_class = FlamingoConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ("GatedCrossAttentionBlock", "PerceiverResampler")
    _skip_keys_device_placement = ("past_key_values", "media", "layout")
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(
        self,
        vision_encoder: nn.Module | FlamingoConfig,
        lang_encoder: PreTrainedModel | None = None,
        eoc_token_id: int | None = None,
        media_token_id: int | None = None,
        vis_dim: int | None = None,
        cross_attn_every_n_layers: int = 1,
        gradient_checkpointing: bool = False,
        decoder_layers_attr_name: str | None = None,
        *,
        num_latents: int = 64,
        resampler_depth: int = 6,
        max_num_frames: int | None = None,
        own_vision_encoder: nn.Module | None = None,
    ):
        if isinstance(vision_encoder, FlamingoConfig):
            config = vision_encoder
            vision_encoder, lang_encoder = _from_config(config, own_vision_encoder)
        else:
            needed = {"lang_encoder": lang_encoder, "eoc_token_id": eoc_token_id, "media_token_id": media_token_id}
            needed["vis_dim"] = vis_dim
            if lacking := [name for name, part in needed.items() if part is None]:
                raise ValueError(f"a Flamingo composed by hand needs {', '.join(lacking)} too")
            config = FlamingoConfig(
                text_config=lang_encoder.config,
                vision_config=vision_encoder.config if isinstance(vision_encoder, VisionTower) else None,
                eoc_token_id=eoc_token_id,
                media_token_id=media_token_id,
                vis_dim=vis_dim,
                cross_attn_every_n_layers=cross_attn_every_n_layers,
                decoder_layers_attr_name=decoder_layers_attr_name,
                num_latents=num_latents,
                resampler_depth=resampler_depth,
                max_num_frames=max_num_frames,
            )
        super().__init__(config)
        self.vision_encoder, self.lang_encoder = vision_encoder, lang_encoder
        self.perceiver = PerceiverResampler(
            config.vis_dim, config.resampler_depth, num_latents=config.num_latents, max_num_frames=config.max_num_frames
        )
        self.decoder_layers_attr_name, layers = find_decoder_layers(lang_encoder, config.decoder_layers_attr_name)
        width = lang_encoder.config.get_text_config(decoder=True).hidden_size
        every = config.cross_attn_every_n_layers
        self.gated_cross_attn_layers = GatedLayers(len(layers), every, width, config.vis_dim)
        self.gated_cross_attn_layers.attach(layers)
        self.position_limit = position_limit(lang_encoder)
        self.num_latents = self.visual_token_cache = self._live_fingerprint = self._cached_media = None
        self._compiled: dict = {}  # what `generate` is given after `compile_decode`
        self._adopt_generation_config()
        self.post_init()
        if gradient_checkpointing:
            self.gradient_checkpointing_enable()

    def init_weights(self) -> None:
        """Nothing: every part was initialized, or loaded, where it was made, and may have been changed since."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing here either: `from_pretrained`, which would draw missing weights, wants all of them."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args, **kwargs) -> "Flamingo":
        """What `save_pretrained` wrote, or a hub repository of such files. own_vision_encoder: the module to fill where
        the model was saved with a vision encoder of one's own. Raises ValueError where weights are missing."""
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"{folder} lacks {len(missing)} of the model's weights, {', '.join(missing[:5])} among them"
            )
        return (model, report) if wants_report else model

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As any module's, and OpenFlamingo's own names too, which its README loads with strict=False. That hides
        whatever is wrong: `load_openflamingo_checkpoint` checks and tells."""
        if any("lang_encoder." in name and "gated_cross_attn_layer" in name for name in state_dict):
            _, state_dict, _ = in_our_names(state_dict, "the state dict")
            if hasattr(self.lang_encoder, "lm_head"):  # GPT-NeoX's embed_out, as it is called since transformers 5
                state_dict = {name.replace(".embed_out.", ".lm_head."): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def save_pretrained(self, folder: str | Path, **kwargs) -> None:
        """config.json, generation_config.json and the weights as safetensors, sharded (max_shard_size) where large.
        Raises ValueError for what could not be loaded again: a quantized language model, one with adapters, and a
        resampler that is not the plain one."""
        check_plain_resampler(self)
        if plain_language_model(self.lang_encoder) is not self.lang_encoder:
            raise ValueError("save the language model's adapters by themselves, or merge_and_unload() them first")
        if any(is_traceable_wrapper_subclass(parameter) for parameter in self.parameters()):
            raise ValueError("a quantized model cannot be saved: save it unquantized, and quantize where it is loaded")
        super().save_pretrained(folder, **kwargs)

    def forward(
        self,
        vision_x: Tensor | None = None,
        lang_x: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        *,
        media_features: Tensor | None = None,
        media: ProjectedMedia | None = None,
        layout: MediaLayout | None = None,
        copies: int = 1,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **lm_kwargs,
    ) -> CausalLMOutputWithPast:
        """lang_x int64[B, T], attention_mask [B, T] (of the whole text where past_key_values holds its beginning),
        labels int64[B, T] (-100: no loss) -> the language model's output: logits float[B, T, V], loss, past_key_values.

        Images: vision_x float[B, M, F, 3, h, w] or media_features (see `encode_media`); neither for text alone, or
        after `cache_media`. A token sees the last image at or before it; with past_key_values from an earlier call the
        count goes on. `generate` gives media that are projected already, the layout of which token sees which, and
        copies: how many equal rows each row stands for.

        Raises ValueError for more `<image>` tokens than images, and shapes that do not belong together.
        """
        if wrong := [name for name in NOT_OURS if lm_kwargs.pop(name, None) is not None]:
            raise ValueError(f"forward does not take {wrong[0]}: {NOT_OURS[wrong[0]]}")
        images_seen = None  # unknown to a later call, unless this one counted all of them
        if media is None:
            before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            check_text(lang_x, attention_mask, before)
            self.check_length(before + lang_x.shape[1])
            media, layout = self.prepare_media(lang_x, vision_x, media_features, past_key_values)
            images_seen = (layout.media_index[:, -1] + 1, before + lang_x.shape[1])
        output = Conditioning(self.gated_cross_attn_layers, media, layout).run(
            self.lang_encoder,
            input_ids=lang_x,
            attention_mask=attention_mask,
            labels=labels,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **self._positions(position_ids, attention_mask, lang_x.shape[1]),
            **(lm_kwargs | {"return_dict": True}),
        )
        if copies > 1:
            output.past_key_values.batch_repeat_interleave(copies)
            output.logits = output.logits.repeat_interleave(copies, dim=0)
        for cache in (past_key_values, output.past_key_values):  # it is written to in place, asked back or not
            if cache is not None:
                cache.images_seen = images_seen
        return output

    def _positions(self, position_ids: Tensor | None, attention_mask: Tensor | None, length: int) -> dict[str, Tensor]:
        """Padding on the left must not shift learned positions: the place of each token counts real tokens alone."""
        if "position_ids" not in inspect.signature(plain_language_model(self.lang_encoder).forward).parameters:
            return {}
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return {"position_ids": position_ids}

    # ------------------------------------------------------------------------------------------------ as a HF model

    def get_input_embeddings(self) -> nn.Module:
        return self.lang_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lang_encoder.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lang_encoder.set_output_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lang_encoder.get_output_embeddings()

    def freeze_pretrained(self, freeze_lm_embeddings: bool = False) -> None:
        """Leaves trainable what Flamingo adds, resampler and gated blocks, and (the new tokens' rows are there) the
        input embeddings, unless freeze_lm_embeddings."""
        self.requires_grad_(False)
        self.perceiver.requires_grad_(True)
        self.gated_cross_attn_layers.requires_grad_(True)
        self.get_input_embeddings().requires_grad_(not freeze_lm_embeddings)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Time for memory: resampler, gated blocks and decoder layers are computed again in the backward pass. Raises
        ValueError for use_reentrant, with which frozen layers would have no gradients."""
        asked = gradient_checkpointing_kwargs or {}
        if asked.get("use_reentrant"):
            raise ValueError("use_reentrant=True would lose the gradients behind frozen layers: leave it out")
        lm = self.lang_encoder
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)  # its new name
        enable({**asked, "use_reentrant": False, "context_fn": checkpoint_contexts})
        self.gated_cross_attn_layers.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        lm = self.lang_encoder
        getattr(lm, "activation_checkpointing_disable", lm.gradient_checkpointing_disable)()
        self.gated_cross_attn_layers.gradient_checkpointing = False

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None) -> None:
        """transformers' new name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    activation_checkpointing_disable = gradient_checkpointing_disable

    def __getstate__(self) -> dict:
        """Copies, and what is pickled, start without caches."""
        return self.__dict__ | {"visual_token_cache": None, "_live_fingerprint": None, "_cached_media": None}


def check_plain_resampler(model: Flamingo) -> None:
    """Raises ValueError for a resampler that was put in the place of the plain one, whose weights have other names."""
    if type(model.perceiver) is not PerceiverResampler:
        raise ValueError(
            f"model.perceiver is a {type(model.perceiver).__name__}: save with the PerceiverResampler that it wraps in "
            "its place"
        )


def _from_config(config: FlamingoConfig, own_vision_encoder: nn.Module | None) -> tuple[nn.Module, PreTrainedModel]:
    """Both models, untrained. Raises ValueError where the vision encoder is a module of one's own and was not given."""
    if config.text_config is None:
        raise ValueError("this is no Flamingo: its config.json has no text_config")
    if (config.vision_config is None) == (own_vision_encoder is None):
        raise ValueError(
            "this model was saved with a vision encoder of one's own, which no config can build: pass the module as "
            "own_vision_encoder"
            if own_vision_encoder is None
            else "own_vision_encoder was given, but this model has a vision tower of its own"
        )
    vision_encoder = own_vision_encoder or VisionTower.from_config(config.vision_config)
    return vision_encoder, AutoModelForCausalLM.from_config(config.text_config)
