"""What an image is, and what made its visual tokens, in a few bytes: SHA-256 keys of contents and of weights.

A key covers the bytes and what they mean (pixels or a file; shape, dtype and mode), so equal bytes of another shape are
another image. A fingerprint covers everything that decides what modules compute, so tokens of older weights are never
taken for today's.

Legend: N images.
"""

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------- content


def bytes_key(data: bytes) -> str:
    """The key of an encoded image, such as a JPEG file. Cheaper than its pixels' key, and needs no decoding."""
    return _digest("bytes", len(data), data)


def pixels_keys(images: Tensor, mode: str = "RGB") -> list[str]:
    """The key of each of N images, any dtype [N, ...]. mode: what the channels mean. The bytes are hashed where they
    lie; images on a GPU are copied to the host first, so keep a copy there, or use `bytes_key`, if that matters."""
    shape, dtype = list(images.shape[1:]), str(images.dtype)
    rows = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [_digest("pixels", [mode, dtype, shape], row) for row in rows]


def _digest(kind: str, meaning: object, data: object) -> str:
    digest = hashlib.sha256(json.dumps([kind, meaning]).encode() + b"\n")  # JSON: where it ends is unmistakable
    digest.update(data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- weights


def fingerprint_of(*modules: nn.Module, **settings: object) -> str:
    """SHA-256 of everything that decides what the modules compute: structure, numbers such as `heads`, all parameters
    and buffers. Say by name, as JSON values, what the modules do not hold: num_latents, depth, the preprocessing of
    encoded images. Raises ValueError for settings that are not JSON."""
    try:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    except TypeError as error:
        raise ValueError(f"settings must be JSON values (numbers, text, lists, dicts): {error}") from None
    for module in modules:
        # Printed, a module tells its parts and their options; numbers that ours keep as attributes are not in that.
        digest.update(json.dumps([repr(module), _plain_attributes(module)]).encode())
        for name, tensor in _weights(module):
            update_digest(digest, name, tensor)
    return digest.hexdigest()


def _plain_attributes(module: nn.Module) -> list:
    """Numbers, texts and sequences of them that a module and its parts keep as attributes."""

    def is_plain(value: object) -> bool:
        return type(value) in (bool, int, float, str) or (type(value) in (tuple, list) and all(map(is_plain, value)))

    return [
        [name, sorted((k, v) for k, v in vars(part).items() if k != "training" and is_plain(v))]
        for name, part in module.named_modules()
    ]


class LiveFingerprint:
    """`fingerprint_of` the modules as they are at each call: made anew once an attribute was changed, or a weight
    replaced or written to, which torch counts. (It does not count writes through `.data`: avoid those.) Looking costs
    about a millisecond; a server whose weights never change gives the cache the text of `fingerprint_of` instead."""

    def __init__(self, *modules: nn.Module, **settings: object):
        self.modules, self.settings = modules, settings
        self._known = (self._versions(), fingerprint_of(*modules, **settings))

    def __call__(self) -> str:
        versions, fingerprint = self._versions(), self._known[1]
        if versions != self._known[0]:
            fingerprint = fingerprint_of(*self.modules, **self.settings)
            self._known = (versions, fingerprint)
        return fingerprint

    def _versions(self) -> list:
        return [
            (tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version)
            for module in self.modules
            for _, tensor in _weights(module)
        ] + [_plain_attributes(module) for module in self.modules]


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield from _plain(name, tensor)


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A quantized weight is a subclass that holds several plain tensors: those."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner}", getattr(tensor, inner))


def update_digest(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Adds a tensor: its name, dtype, shape and bytes."""
    digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
