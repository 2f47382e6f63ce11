"""A Flamingo from the names of a pretrained vision tower and a pretrained language model, as OpenFlamingo makes it.

    model, image_processor, tokenizer = create_model_and_transforms(
        clip_vision_encoder_path="ViT-L-14",
        clip_vision_encoder_pretrained="openai",
        lang_encoder_path="anas-awadalla/mpt-1b-redpajama-200b",
        tokenizer_path="anas-awadalla/mpt-1b-redpajama-200b",
        cross_attn_every_n_layers=1,
    )

What joins the two is new: train it, or load it (`load_openflamingo_checkpoint`). No code of a model repository is run:
MPT-1B, which needs its own, is `mosaic_gpt.py`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flamingo_vlm.model import Flamingo
from flamingo_vlm.processing import add_flamingo_tokens
from flamingo_vlm.vision_towers import VisionTower, image_transform, tower_name


def create_model_and_transforms(
    clip_vision_encoder_path: str | Path | nn.Module,
    clip_vision_encoder_pretrained: str | None,
    lang_encoder_path: str | Path,
    tokenizer_path: str | Path,
    cross_attn_every_n_layers: int = 1,
    use_local_files: bool = False,
    decoder_layers_attr_name: str | None = None,
    freeze_lm_embeddings: bool = False,
    cache_dir: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    quantization: object | None = None,
    vis_dim: int | None = None,
    image_processor: Callable[..., Tensor] | None = None,
    **flamingo_kwargs,
) -> tuple[Flamingo, Callable[..., Tensor], PreTrainedTokenizerBase]:
    """-> the model in eval mode, its image processor (PIL image -> float[3, h, w]) and its tokenizer, which has
    `<|endofchunk|>` and `<image>`. Trainable are the resampler, the gated blocks and, unless freeze_lm_embeddings, the
    input embeddings.

    clip_vision_encoder_path: a pair of open_clip's names, see `tower_name`; a hub id or a local folder; or a module of
        your own, with its vis_dim and image_processor.
    dtype: of all weights but those of a module of your own. float32, as OpenFlamingo's, is twice the bytes of most
        published ones.
    attn_implementation: of both pretrained models, as in transformers ("sdpa", "flash_attention_2", "eager").
    quantization: "int8" stores the language model's linear layers in 8 bits (torchao); or any quantization config of
        transformers. The embeddings, which checkpoints write to, are never quantized.
    flamingo_kwargs: gradient_checkpointing, num_latents, resampler_depth, max_num_frames.

    Raises ValueError for unknown names and what does not fit together, OSError where there is nothing to load.
    """
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype, such as torch.bfloat16; got {dtype!r}")
    hub = {"local_files_only": use_local_files, "cache_dir": cache_dir}
    if isinstance(clip_vision_encoder_path, nn.Module):
        vision_encoder = clip_vision_encoder_path
        if vis_dim is None or image_processor is None:
            raise ValueError("a vision encoder of your own needs its vis_dim and its image_processor")
    else:
        tower = tower_name(clip_vision_encoder_path, clip_vision_encoder_pretrained)
        vision_encoder = VisionTower.from_pretrained(tower, dtype=dtype, attn_implementation=attn_implementation, **hub)
        vis_dim = vision_encoder.width if vis_dim is None else vis_dim
        image_processor = image_processor or image_transform(tower, **hub)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, **hub)
    tokens = add_flamingo_tokens(tokenizer)
    lang_encoder = _language_model(lang_encoder_path, dtype, attn_implementation, quantization, hub)
    lang_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    model = Flamingo(
        vision_encoder,
        lang_encoder,
        tokens.end_of_chunk,
        tokens.image,
        vis_dim,
        cross_attn_every_n_layers,
        decoder_layers_attr_name=decoder_layers_attr_name,
        **flamingo_kwargs,
    )
    model.generation_config.pad_token_id = tokens.pad
    for part in (model.perceiver, model.gated_cross_attn_layers):
        part.to(dtype)
    model.freeze_pretrained(freeze_lm_embeddings)
    return model.to(device).eval(), image_processor, tokenizer


def _language_model(
    path: str | Path, dtype: torch.dtype, attn_implementation: str | None, quantization: object | None, hub: dict
) -> PreTrainedModel:
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        quantization = TorchAoConfig(Int8WeightOnlyConfig())
    elif isinstance(quantization, str):
        raise ValueError(f'quantization must be "int8" or a quantization config of transformers; got {quantization!r}')
    options = {"quantization_config": quantization} if quantization is not None else {}
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation, **options, **hub
    )
