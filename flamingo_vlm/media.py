"""From images to what the gated blocks read: visual tokens, their keys and values, and which token sees which.

Only images that some token sees are encoded; without gradients equal ones are encoded once. Each is projected once for
every gated block, for as many forward passes as read it.

Legend: B rows, T text tokens, M images per row, N images, F frames per image, P patches, L visual tokens, D width of
the vision encoder.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from flamingo_vlm.conditioning import GatedLayers, ProjectedMedia, beside
from flamingo_vlm.configuration import FlamingoConfig
from flamingo_vlm.decoding import described
from flamingo_vlm.vision_towers import VisionTower
from media_masks import MediaLayout, media_index_from_locations
from visual_token_cache import LiveFingerprint, VisualTokenCache, pixels_keys


class FlamingoMedia:
    """The half of `Flamingo` in front of its language model."""

    config: FlamingoConfig
    vision_encoder: nn.Module
    perceiver: nn.Module
    gated_cross_attn_layers: GatedLayers
    num_latents: int | None  # the first so many visual tokens alone, of a resampler trained for it; None: all
    visual_token_cache: VisualTokenCache | None
    _live_fingerprint: LiveFingerprint | None
    _cached_media: tuple[ProjectedMedia, Tensor] | None  # and how many images each row's prompt holds, int64[B]

    def encode_media(
        self,
        vision_x: Tensor | None = None,
        media_features: Tensor | None = None,
        needed: Tensor | None = None,
    ) -> Tensor:
        """Pixels float[B, M, F, 3, h, w], or precomputed patch features float[B, M, F, P, D] -> visual tokens
        float[B, M, L, D]. needed bool[B, M]: the images any token sees; the others are zeros.

        Without gradients equal images are encoded once, and with `visual_token_cache` once and for all. Raises
        ValueError for both or neither, and for another rank or width.
        """
        if (vision_x is None) == (media_features is None):
            raise ValueError("give either vision_x (images) or media_features (their patch features)")
        if media_features is not None:
            images, expected = media_features, f"media_features must be float[B, M, F, P, {self.config.vis_dim}]"
            fits = is_tensor(images, 5) and images.shape[-1] == self.config.vis_dim
        elif isinstance(self.vision_encoder, VisionTower):
            images, expected = vision_x, "vision_x must be float[B, M, F, 3, h, w]"
            fits = is_tensor(images, 6) and images.is_floating_point()
        else:
            images, expected = vision_x, "vision_x must be [B, M, F, ...]"
            fits = isinstance(images, Tensor) and images.dim() > 3
        if not fits:
            raise ValueError(f"{expected}; got {described(images)}")
        leading, flat = images.shape[:2], images.flatten(0, 1)
        needed = images.new_ones(leading, dtype=torch.bool) if needed is None else needed.to(images.device)
        wanted = flat if bool(needed.all()) else flat[needed.flatten()]
        tokens = self._encode_images(wanted, is_pixels=media_features is None)
        if len(wanted) < len(flat):
            blank = tokens.new_zeros(len(flat), *tokens.shape[1:])
            tokens = blank.index_put((needed.flatten().to(tokens.device),), tokens)
        return tokens.unflatten(0, leading)

    def _encode_images(self, images: Tensor, is_pixels: bool) -> Tensor:
        """float[N, F, ...] -> float[N, L, D]"""
        if len(images) == 0:
            return torch.zeros(
                0, self.num_latents or self.config.num_latents, self.config.vis_dim, device=images.device
            )

        def encode(positions: list[int] | slice) -> Tensor:
            return self._resample(self._patch_features(images[positions]) if is_pixels else images[positions])

        if torch.is_grad_enabled():
            return encode(slice(None))
        if self.visual_token_cache is None and len(images) == 1:
            return encode(slice(None))
        cache = self.visual_token_cache or VisualTokenCache(max_bytes=1, fingerprint="one call")  # finds duplicates
        keys = pixels_keys(images, "pixels" if is_pixels else "features")
        return cache.fetch(keys, lambda missing: (encode(missing),))[0]

    def _patch_features(self, images: Tensor) -> Tensor:
        """float[N, F, 3, h, w] -> float[N, F, P, D]"""
        weight = next((each for each in self.vision_encoder.parameters() if each.is_floating_point()), images)
        frames = images.flatten(0, 1)
        features = self.vision_encoder(beside(frames, weight) if frames.is_floating_point() else frames)
        if not is_tensor(features, 3) or features.shape[::2] != (len(frames), self.config.vis_dim):
            raise ValueError(
                f"vision_encoder must return patch features [{len(frames)}, P, vis_dim={self.config.vis_dim}], as a "
                f"tower of transformers does in VisionTower(model); got {described(features)}"
            )
        return features.unflatten(0, images.shape[:2])

    def _resample(self, features: Tensor) -> Tensor:
        """float[N, F, P, D] -> float[N, L, D]"""
        features = beside(features[:, None], next(self.perceiver.parameters()))
        if self.gated_cross_attn_layers.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.perceiver, features, self.num_latents, use_reentrant=False)[:, 0]
        return self.perceiver(features, self.num_latents)[:, 0]

    def use_visual_token_cache(self, max_bytes: int) -> VisualTokenCache:
        """From now on images seen before, in any call, are not encoded again, unless vision encoder or resampler were
        changed since: a weight, or a number or text kept as an attribute. Copies of the model have no cache."""
        self.visual_token_cache = VisualTokenCache(max_bytes, self._fingerprint)
        return self.visual_token_cache

    def _fingerprint(self) -> str:
        """Of all that decides what the visual tokens of an image are."""
        live = self._live_fingerprint
        if live is None or live.modules != (self.vision_encoder, self.perceiver):
            live = self._live_fingerprint = LiveFingerprint(self.vision_encoder, self.perceiver)
        device = self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return f"{live()} {self.num_latents} {autocast}"

    def prepare_media(
        self,
        lang_x: Tensor,
        vision_x: Tensor | None = None,
        media_features: Tensor | None = None,
        past_key_values: Cache | None = None,
        for_later: bool = False,
    ) -> tuple[ProjectedMedia, MediaLayout]:
        """The images of B rows, encoded and projected for every gated block, and which of them each token of lang_x
        int64[B, T] sees. Without images those of `cache_media`, or none. Those that no token sees are left out, unless
        they are for_later. Raises ValueError as `forward` does."""
        given = next((each for each in (vision_x, media_features) if each is not None), None)
        if given is not None and self._cached_media is not None:
            raise ValueError("media are cached, and images were given: leave them out, or call uncache_media() first")
        if given is not None and not isinstance(given, Tensor):
            raise ValueError(f"images must be one tensor [B, M, F, ...]; got {described(given)}")
        if given is not None and len(given) != len(lang_x):
            raise ValueError(f"{len(given)} rows of images were given for {len(lang_x)} rows of text")
        index = media_index_from_locations(lang_x == self.config.media_token_id)
        index = index + self._images_before(index, past_key_values)[:, None]
        if given is None and self._cached_media is not None:
            media = self._cached_media[0]
            if media.rows != len(lang_x):
                raise ValueError(f"media are cached for {media.rows} rows of text; got {len(lang_x)} rows")
            return media, MediaLayout.from_index(index, media.count)
        layout = MediaLayout.from_index(index, 0 if given is None else given.shape[1])
        if given is None or given.shape[1] == 0:  # nobody reads this one
            blank = torch.zeros(len(lang_x), 1, 1, self.config.vis_dim, device=lang_x.device)
            return self.gated_cross_attn_layers.project(blank), MediaLayout(index, 1)
        number = torch.arange(layout.num_media, device=index.device)
        needed = (number >= index[:, :1]) & ((number <= index[:, -1:]) | for_later)
        tokens = self.encode_media(vision_x, media_features, needed)
        return self.gated_cross_attn_layers.project(tokens), layout

    def _images_before(self, index: Tensor, past_key_values: Cache | None) -> Tensor:
        """int64[B]: how many images each row's text held before this one, of which index int64[B, T] counts its own."""
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            seen, length = getattr(past_key_values, "images_seen", None) or (None, 0)
            if seen is None or len(seen) != len(index) or length != past_key_values.get_seq_length():
                raise ValueError(
                    "cannot tell how many images the text in past_key_values holds: use a cache that this model "
                    f"returned for these {len(index)} rows"
                )
            return seen.to(index.device)
        if self._cached_media is not None and len(self._cached_media[1]) == len(index):
            # Text without images of its own goes on behind the prompt whose media are cached, as in OpenFlamingo.
            return torch.where(index[:, -1] >= 0, 0, self._cached_media[1].to(index.device))
        return torch.zeros(len(index), dtype=torch.long, device=index.device)

    @torch.no_grad()
    def cache_media(self, input_ids: Tensor, vision_x: Tensor, media_features: Tensor | None = None) -> None:
        """Encodes and projects a prompt's images, given as to `forward`, once, for any number of calls without images:
        over the prompt input_ids int64[B, T] itself, or over text behind it, which sees the prompt's last image."""
        self.uncache_media()
        media, layout = self.prepare_media(input_ids, vision_x, media_features, for_later=True)
        self._cached_media = (media, layout.media_index[:, -1] + 1)

    def uncache_media(self) -> None:
        """Forgets what `cache_media` kept."""
        self._cached_media = None


def is_tensor(value: object, rank: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == rank
