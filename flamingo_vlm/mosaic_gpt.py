"""MosaicGPT, the 1B language model inside OpenFlamingo-3B, as a Hugging Face model that needs no remote code.

A pre-normed GPT that knows positions through ALiBi alone (Press et al. 2022, arXiv 2108.12409), layer-norms queries and
keys (Dehghani et al. 2023, arXiv 2302.05442) over the full width, before the split into heads, has no bias anywhere,
and uses the input embedding as its head. Importing this module makes AutoConfig and AutoModelForCausalLM know the model
type `mosaic_gpt`. Parameter names are those of the released weights, so they load without renaming.

Left out, and refused by the config: dropout, biases, learned positions, prefix attention, clipped or rescaled scores.

Legend: B batch, T new tokens, S keys (cached and new), H heads, E width per head, D width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

# Added to the scores of keys that a token may not see. Its exponential is 0 in every dtype; and as it is finite even in
# float16, the row of a padding token, which sees no key at all, is defined on every attention kernel.
UNSEEN = -30_000.0

# What the published config can say and this model does not do otherwise.
_ONLY = {
    "alibi": True,
    "attn_qk_ln": True,
    "no_bias": True,
    "tie_word_embeddings": True,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
    "attn_clip_qkv": None,
    "softmax_scale": None,
    "logit_scale": None,
    "embedding_fraction": 1,
    "attn_pdrop": 0,
    "resid_pdrop": 0,
    "emb_pdrop": 0,
}


class MosaicGPTConfig(PreTrainedConfig):
    """The published config.json, with the sizes of the 1B model as defaults.

    Raises ValueError for a published option that this model does not do, and for heads that do not divide the width.
    """

    model_type = "mosaic_gpt"
    attribute_map = {  # noqa: RUF012 (a class attribute in every config of transformers)
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    vocab_size: int = 50432
    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    mlp_ratio: int = 4
    max_seq_len: int = 2048  # the length it was trained on; ALiBi itself sets no limit
    alibi_bias_max: float = 8
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)  # names the remote code that this module replaces
        super().__post_init__(**kwargs)
        for name, only in _ONLY.items():
            value = getattr(self, name, only)
            if value != only:
                raise ValueError(
                    f"this MosaicGPT is written for {name}={only!r} alone, and the config says {name}={value!r}: "
                    "such weights need another implementation"
                )
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads; got d_model={self.d_model}, {self.n_heads} heads")


def alibi_bias(seen: Tensor, distance: Tensor, heads: int, alibi_bias_max: float, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, float[B or 1, H, T, S]: ALiBi where `seen` bool[B or 1, 1, T, S], UNSEEN elsewhere.

    `distance` int64[T, S] counts back from query to key. ALiBi may start anywhere, for softmax ignores what all keys of
    one query share; counted from the query itself, near keys keep their distances in half precision too.
    """
    head = torch.arange(1, heads + 1, device=distance.device, dtype=torch.promote_types(dtype, torch.float32))
    slopes = 2 ** (-alibi_bias_max / heads * head)
    return torch.where(seen, (-slopes[:, None, None] * distance).to(dtype), UNSEEN)


def seen_keys(causal: Tensor, attention_mask: Tensor | None, free_slots: bool) -> Tensor:
    """Which keys each query sees, bool[B or 1, 1, T, S], from causal bool[T, S] and the mask in Hugging Face's forms.

    attention_mask: None; or [B, S], 0 at padding (shorter where the cache has `free_slots`); or bool[B, 1, T, S], which
    speaks for itself. Raises ValueError for any other.
    """
    if attention_mask is None:
        return causal[None, None]
    if attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
        return attention_mask
    keys = causal.shape[-1]
    missing = keys - attention_mask.shape[-1]
    if attention_mask.dim() != 2 or missing < 0 or (missing > 0 and not free_slots):
        raise ValueError(
            f"attention_mask must be [B, {keys}] with 0 at padding, cached tokens included, or bool[B, 1, T, {keys}]; "
            f"got {attention_mask.dtype} of shape {list(attention_mask.shape)}"
        )
    return causal & F.pad(attention_mask.bool(), (0, missing))[:, None, None]


class MosaicGPTAttention(nn.Module):
    """Causal self-attention, x float[B, T, D] -> float[B, T, D]."""

    def __init__(self, config: MosaicGPTConfig, layer_idx: int):
        super().__init__()
        self.heads, self.layer_idx = config.n_heads, layer_idx
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.q_ln = nn.LayerNorm(config.d_model, bias=False)
        self.k_ln = nn.LayerNorm(config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, attention_bias: Tensor, past_key_values: Cache | None) -> Tensor:
        q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        q, k = self.q_ln(q), self.k_ln(k)
        q, k, v = (rearrange(each, "b t (h e) -> b h t e", h=self.heads) for each in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias)
        return self.out_proj(rearrange(out, "b h t e -> b t (h e)"))


class MosaicGPTMLP(nn.Module):
    """Two matrices with an exact GELU between them."""

    def __init__(self, config: MosaicGPTConfig):
        super().__init__()
        self.mlp_up = nn.Linear(config.d_model, config.mlp_ratio * config.d_model, bias=False)
        self.mlp_down = nn.Linear(config.mlp_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_down(F.gelu(self.mlp_up(x)))


class MosaicGPTBlock(GradientCheckpointingLayer):
    """One decoder layer, hidden_states float[B, T, D] -> float[B, T, D]; attention_bias float[B or 1, H, T, S]."""

    def __init__(self, config: MosaicGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, bias=False)
        self.attn = MosaicGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.d_model, bias=False)
        self.mlp = MosaicGPTMLP(config)

    def forward(self, hidden_states: Tensor, attention_bias: Tensor, past_key_values: Cache | None = None) -> Tensor:
        x = hidden_states + self.attn(self.ln_1(hidden_states), attention_bias, past_key_values)
        return x + self.mlp(self.ln_2(x))


class MosaicGPTPreTrainedModel(PreTrainedModel):
    """What Hugging Face needs to know to load, place, checkpoint and compile the model."""

    config_class = MosaicGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules = ("MosaicGPTBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MosaicGPTBlock}  # noqa: RUF012


class MosaicGPTModel(MosaicGPTPreTrainedModel):
    """Token ids -> hidden states. Raises ValueError for any attention implementation but "sdpa", the default."""

    def __init__(self, config: MosaicGPTConfig):
        super().__init__(config)
        if config._attn_implementation != "sdpa":
            raise ValueError(
                f"MosaicGPT attends with torch's fused kernel alone; got attn_implementation="
                f"{config._attn_implementation!r}: leave it out (the attention weights cannot be returned)"
            )
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(MosaicGPTBlock(config, i) for i in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """input_ids int64[B, T], or inputs_embeds float[B, T, D] -> last_hidden_state float[B, T, D], final norm done.

        attention_mask is described at `seen_keys`. Raises ValueError for another one, and for both inputs or none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        bias = self._attention_bias(x, attention_mask, past_key_values)
        for block in self.blocks:
            x = block(x, attention_bias=bias, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), past_key_values=past_key_values)

    def _attention_bias(self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """float[B or 1, H, T, S], the same for all layers."""
        tokens = x.shape[1]
        past, keys, free_slots = 0, tokens, False
        if cache is not None:
            past = cache.get_seq_length()  # of a static cache, a tensor
            keys, _ = cache.get_mask_sizes(tokens, 0)
            free_slots = cache.is_compileable
        query = torch.arange(tokens, device=x.device) + past
        distance = query[:, None] - torch.arange(keys, device=x.device)
        seen = seen_keys(distance >= 0, attention_mask, free_slots)
        return alibi_bias(seen, distance, self.config.n_heads, self.config.alibi_bias_max, x.dtype)


class MosaicGPTForCausalLM(MosaicGPTPreTrainedModel, GenerationMixin):
    """The language model. It has no head of its own, so `get_output_embeddings` is None: the embedding is the head."""

    def __init__(self, config: MosaicGPTConfig):
        super().__init__(config)
        self.transformer = MosaicGPTModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """input_ids int64[B, T] -> logits float[B, T, vocab_size], or of the last `logits_to_keep` positions (a tensor
        names them; 0 keeps all).

        labels int64[B, T], -100 where nothing is to be predicted, are shifted here: the loss of position t is that of
        the label at t + 1. The other arguments are `MosaicGPTModel.forward`'s; kwargs are Hugging Face's own
        (`output_hidden_states`, `num_items_in_batch`). Raises ValueError as that does.
        """
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden, embedding = outputs.last_hidden_state[:, kept], self.transformer.wte.weight
        logits = F.linear(hidden.to(embedding.device), embedding)  # a model spread over devices ends on another one
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ) -> Tensor:
        """`GenerationMixin.generate`, with the cache unless the caller says otherwise: the published folder's
        `use_cache: false` was meant for training, and would make every token pay for the whole text again."""
        if generation_config is None or generation_config.use_cache is None:
            kwargs.setdefault("use_cache", True)
        return super().generate(inputs, generation_config, **kwargs)


AutoConfig.register(MosaicGPTConfig.model_type, MosaicGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(MosaicGPTConfig, MosaicGPTForCausalLM, exist_ok=True)
