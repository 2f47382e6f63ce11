"""Gated cross-attention inside any Hugging Face decoder, without touching its class or its parameter names.

A forward pre-hook on decoder layer i hands the layer's input through a gated block first (Alayrac et al. 2022, figure
3). The blocks stand where OpenFlamingo puts them: before layer i wherever (i + 1) % cross_attn_every_n_layers == 0.

What the blocks read (the projected images, and which of them each token sees) is not kept in the layers. It belongs to
one call of the language model, in one thread:

    with_media = Conditioning(gated_layers, media, layout)
    with_media.run(language_model, input_ids=...)  # inside: the blocks read; outside: the plain language model

(Under FSDP2 `project_media` needs `register_fsdp_forward_method`, for it is no block's forward.)

So an exception leaves nothing behind, and two threads never see each other's images. A thread-local variable carries it
rather than a context variable, because torch.compile traces the one and not the other.

Beams and several samples of one prompt are rows that share their images: R = B * K rows read the media of B. The K rows
are laid out behind each other as if they were K times as many tokens of one row, which cross-attention cannot tell from
them, and nothing is copied.

Legend: B rows of images, R rows of text, T text tokens, M images per row, L visual tokens per image, D width.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_layers import MediaKV
from gated_cross_attention import GatedCrossAttentionBlock
from media_masks import MediaLayout


@dataclass(frozen=True)
class ProjectedMedia:
    """The images of B rows as every gated block reads them: the block's name -> its keys and values [B, M, H, L, E]."""

    layers: dict[str, MediaKV]

    @property
    def rows(self) -> int:
        return next(iter(self.layers.values())).k.shape[0]

    @property
    def count(self) -> int:
        """Images per row, M."""
        return next(iter(self.layers.values())).k.shape[1]

    def select(self, image: Tensor) -> "ProjectedMedia":
        """Of each row the image int64[B] alone, so M = 1; a row without an image (-1) may keep any."""
        return ProjectedMedia({name: kv.select(image.to(kv.k.device)) for name, kv in self.layers.items()})

    @property
    def nbytes(self) -> int:
        return sum(kv.k.nbytes + kv.v.nbytes for kv in self.layers.values())


class GatedLayers(nn.ModuleDict):
    """The gated blocks of one language model, named by the index of the decoder layer each stands before."""

    def __init__(self, num_layers: int, every: int, dim: int, dim_visual: int):
        """Raises ValueError where `every` leaves no block at all."""
        if not 1 <= every <= num_layers:
            raise ValueError(
                f"cross_attn_every_n_layers must be between 1 and {num_layers}, the decoder's depth; got {every}"
            )
        places = [i for i in range(num_layers) if (i + 1) % every == 0]
        super().__init__({str(i): GatedCrossAttentionBlock(dim, dim_visual) for i in places})
        self.gradient_checkpointing = False

    def attach(self, decoder_layers: nn.ModuleList) -> None:
        """Hooks every block before its decoder layer."""
        for name in self:
            decoder_layers[int(name)].register_forward_pre_hook(_BeforeLayer(self, name), with_kwargs=True)

    def project(self, media: Tensor) -> ProjectedMedia:
        """media float[B, M, L, D] -> its keys and values for every block, each on its block's device."""
        layers = {name: block.project_media(beside(media, block.attn.to_kv.weight)) for name, block in self.items()}
        return ProjectedMedia(layers)

    def flops(self, tokens: int, latents: int, images: int) -> int:
        """Operations for one row of `tokens` text tokens; images=0 once they are projected."""
        return sum(block.flops(tokens, latents, images) for block in self.values())


class _Scope(threading.local):
    conditioning: "Conditioning | None" = None


_SCOPE = _Scope()


class _InScope:
    """with _InScope(conditioning): the hooks of this thread see it; then again what they saw before."""

    def __init__(self, conditioning: "Conditioning | None"):
        self.conditioning = conditioning

    def __enter__(self) -> None:
        self.outside, _SCOPE.conditioning = _SCOPE.conditioning, self.conditioning

    def __exit__(self, *exception) -> None:
        _SCOPE.conditioning = self.outside


@dataclass(frozen=True)
class Conditioning:
    """What one call reads: media of B rows for the blocks of `gated_layers`, and a layout of R rows and T tokens, which
    is kept as one of B rows and K * T tokens. Raises ValueError where R is no multiple of B."""

    gated_layers: GatedLayers
    media: ProjectedMedia
    layout: MediaLayout

    def __post_init__(self):
        rows, length = self.layout.media_index.shape
        if rows % self.media.rows:
            raise ValueError(f"{rows} rows of text cannot share the images of {self.media.rows} rows")
        index = self.layout.media_index.reshape(self.media.rows, rows // self.media.rows * length)
        object.__setattr__(self, "layout", MediaLayout(index, self.layout.num_media))

    def run(self, function: Callable, *args, **kwargs):
        """Calls the function; the blocks of `gated_layers` read these media as long as it runs, in this thread."""
        with _InScope(self):
            return function(*args, **kwargs)

    def apply(self, name: str, x: Tensor) -> Tensor:
        """The gated block of that name over x float[R, T, D]."""
        block, media_kv = self.gated_layers[name], self.media.layers[name]
        layout = self.layout
        if layout.media_index.device != x.device:  # a model spread over several devices
            layout = MediaLayout(layout.media_index.to(x.device), layout.num_media)
        # The language model may run in a lower precision than the blocks that are trained.
        grouped = x.reshape(*layout.media_index.shape, x.shape[-1]).to(block.attn.to_q.weight.dtype)
        if self.gated_layers.gradient_checkpointing and torch.is_grad_enabled():
            out = checkpoint(block, grouped, media_kv, layout, use_reentrant=False)
        else:
            out = block(grouped, media_kv, layout)
        return out.view_as(x).to(x.dtype)


class _BeforeLayer:
    """The hook before one decoder layer. Hidden states come first, or by name, in every decoder of transformers."""

    def __init__(self, gated_layers: GatedLayers, name: str):
        self.gated_layers, self.name = gated_layers, name

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        conditioning = _SCOPE.conditioning
        if conditioning is None or conditioning.gated_layers is not self.gated_layers:
            return None
        if args:
            return (conditioning.apply(self.name, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": conditioning.apply(self.name, kwargs["hidden_states"])}


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch.utils.checkpoint: the recomputation, which runs when the call is long over and perhaps in
    another thread, reads what the call read."""
    return nullcontext(), _InScope(_SCOPE.conditioning)


def plain_language_model(language_model: nn.Module) -> nn.Module:
    """What a PEFT model, or a compiled one, is wrapped around."""
    language_model = getattr(language_model, "_orig_mod", language_model)
    return getattr(language_model, "get_base_model", lambda: language_model)()


def find_decoder_layers(language_model: nn.Module, attr_name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path in the plain language model, found by structure: the outermost
    nn.ModuleList with as many items as the config has layers. `attr_name` names it where that is ambiguous. Raises
    ValueError where there is none or several."""
    language_model = plain_language_model(language_model)
    if attr_name is not None:
        try:
            layers = language_model.get_submodule(attr_name)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"{type(language_model).__name__} has no nn.ModuleList at decoder_layers_attr_name={attr_name!r}"
            )
        return attr_name, layers
    count = getattr(language_model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {name: part for name, part in language_model.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = {name: part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    found = [name for name, part in outermost.items() if len(part) == count]
    if len(found) != 1:
        raise ValueError(
            f"cannot tell which list of {type(language_model).__name__} holds its {count} decoder layers: "
            f"{', '.join(found or outermost) or 'it has no nn.ModuleList'}. Name it with decoder_layers_attr_name"
        )
    return found[0], lists[found[0]]


def position_limit(language_model: nn.Module) -> int | None:
    """For how many tokens the language model has learned positions; None where positions have no end."""
    base = plain_language_model(language_model)
    limit = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = {part.num_embeddings for part in base.modules() if isinstance(part, nn.Embedding)}
    tables -= {base.get_input_embeddings().num_embeddings}
    return limit if limit is not None and tables & {limit, limit + 2} else None  # OPT's begins with two spare ones


def beside(x: Tensor, weight: Tensor) -> Tensor:
    """x in the weight's precision and on its device. Offloaded weights lie nowhere (meta) until they are used, and
    whoever offloaded them moves what they meet."""
    return x.to(weight.dtype) if weight.device.type == "meta" else x.to(weight.device, weight.dtype)
