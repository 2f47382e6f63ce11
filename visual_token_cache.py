"""Images that were seen before are not encoded again: a cache of visual tokens, addressed by content.

    fingerprint = LiveFingerprint(model.vision_encoder, model.resampler)
    cache = VisualTokenCache(max_bytes=2**30, fingerprint=fingerprint)
    encode_media = cache.wrap(model.encode_media)  # images [B, M, 3, h, w] -> visual tokens float[B, M, L, D]

A key is the SHA-256 of an image's bytes together with what they mean (pixels or a file; shape, dtype and mode), beside
the fingerprint of the weights and settings that made the tokens. So neither equal bytes of another shape nor tokens of
older weights are ever served. An entry is a tuple of tensors for one image: its tokens (`wrap`, `wrap_bytes`), or its
tokens and the keys and values of every cross-attention layer (`wrap_with_kv`). Recently used entries stay, within a
budget of bytes. Of a batch only the images that are missing are encoded, in one call.

What is served is, bit for bit, what the first encoding of that image gave. Whether that is also what encoding today's
batch would give is up to the encoder: some kernels round differently at another batch size. `one_by_one` removes even
that, at the price of batching: tokens then depend on their image alone.

Left out: gradients (`encode` runs under no_grad), near-duplicate images, entries on another device than the encoder's.

Legend: B rows, M images per row, N images, L visual tokens per image, D width, H heads, E width per head.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attention_layers import MediaKV
from content_keys import LiveFingerprint, bytes_key, fingerprint_of, pixels_keys, update_digest

__all__ = ["CacheStatistics", "LiveFingerprint", "VisualTokenCache", "bytes_key", "fingerprint_of", "pixels_keys"]

Entry = tuple[Tensor, ...]  # of one image
FORMAT = {"format": "visual token cache", "version": "1"}


@dataclass(frozen=True)
class CacheStatistics:
    """hits + misses are the images asked for; misses those that the call itself encoded, so that a duplicate within a
    batch, or an image that another thread was encoding, is a hit. bytes: of the tensors held."""

    hits: int
    misses: int
    evictions: int
    too_large: int  # entries that were not kept, being above the whole budget
    entries: int
    bytes: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class VisualTokenCache:
    """At most max_bytes of entries, for weights named by `fingerprint`: a text, or a function that tells it anew at
    each call (`LiveFingerprint`); entries of older weights are then never hit again and age out.

    Any number of threads may use it at once. `encode` runs outside the lock. Where two threads miss the same image, one
    encodes it and the other waits; if that one fails, its error is its own, and the other encodes for itself.
    """

    def __init__(self, max_bytes: int, fingerprint: str | Callable[[], str], one_by_one: bool = False):
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1; got {max_bytes}")
        if not (callable(fingerprint) or (isinstance(fingerprint, str) and fingerprint)):
            raise ValueError(
                f"fingerprint must name the weights that make the tokens; got {fingerprint!r}: use fingerprint_of"
            )
        self.max_bytes, self.one_by_one = max_bytes, one_by_one
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, str], Entry] = OrderedDict()  # (fingerprint, key), oldest first
        self._in_flight: dict[tuple[str, str], Future] = {}  # gives the entry, or None where encoding failed
        self._bytes = self._hits = self._misses = self._evictions = self._too_large = 0

    @property
    def fingerprint(self) -> str:
        return self._fingerprint() if callable(self._fingerprint) else self._fingerprint

    @property
    def statistics(self) -> CacheStatistics:
        with self._lock:
            return CacheStatistics(
                self._hits, self._misses, self._evictions, self._too_large, len(self._entries), self._bytes
            )

    def keys(self) -> list[str]:
        """Of the entries that can be hit, the least recently used first."""
        fingerprint = self.fingerprint
        with self._lock:
            return [key for made_by, key in self._entries if made_by == fingerprint]

    def clear(self) -> None:
        """Drops the entries; the counters go on."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    # ------------------------------------------------------------------------------------------------ use

    def wrap(self, encode: Callable[[Tensor], Tensor], mode: str = "RGB") -> Callable[[Tensor], Tensor]:
        """encode and the result: images [B, M, ...] (one image: all behind the first two axes) -> float[B, M, L, D].
        encode must treat every image by itself; it gets the missing ones as [N, 1, ...]."""

        def cached(images: Tensor) -> Tensor:
            flat = images.flatten(0, 1)
            (tokens,) = self.fetch(pixels_keys(flat, mode), lambda missing: (encode(flat[missing, None])[:, 0],))
            return tokens.unflatten(0, images.shape[:2])

        return cached

    def wrap_with_kv(
        self,
        encode: Callable[[Tensor], Tensor],
        project: Callable[[Tensor], list[MediaKV | None]],
        mode: str = "RGB",
    ) -> Callable[[Tensor], tuple[Tensor, list[MediaKV | None]]]:
        """Like `wrap`, and what `project` makes of the tokens float[B, M, L, D], too: each language-model layer's
        MediaKV, or None where a layer reads no images. The fingerprint must cover the gated layers as well."""

        def make(images: Tensor) -> Entry:
            tokens = encode(images)
            none = tokens.new_empty((len(tokens), 1, 0))  # stands for a layer without keys and values
            layers = [(kv.k, kv.v) if kv else (none, none) for kv in project(tokens)]
            return tuple(each[:, 0] for each in (tokens, *(part for pair in layers for part in pair)))

        def cached(images: Tensor) -> tuple[Tensor, list[MediaKV | None]]:
            flat = images.flatten(0, 1)
            keys = [f"{key}+kv" for key in pixels_keys(flat, mode)]
            entry = self.fetch(keys, lambda missing: make(flat[missing, None]))
            tokens, *parts = (each.unflatten(0, images.shape[:2]) for each in entry)
            pairs = zip(parts[::2], parts[1::2], strict=True)
            return tokens, [MediaKV(k, v) if k.dim() == 5 else None for k, v in pairs]

        return cached

    def wrap_bytes(self, encode: Callable[[list[bytes]], Tensor]) -> Callable[[Sequence[bytes]], Tensor]:
        """encode and the result: encoded images, as bytes -> float[N, L, D]. Only missing ones are decoded."""

        def cached(files: Sequence[bytes]) -> Tensor:
            keys = [bytes_key(data) for data in files]
            return self.fetch(keys, lambda missing: (encode([files[i] for i in missing]),))[0]

        return cached

    @torch.no_grad()
    def fetch(self, keys: Sequence[str], encode: Callable[[list[int]], Entry]) -> Entry:
        """The entries of N keys, each tensor stacked over them, [N, ...], as a copy. encode: positions in `keys` that
        are missing, in order and without duplicates -> their tensors [len(positions), ...]. Raises ValueError for
        another number of rows, and what `encode` raises."""
        if not keys:
            return encode([])  # its shapes are the encoder's to tell
        fingerprint = self.fingerprint
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        found: dict[str, Entry] = {}
        encoded = 0
        while missing := [key for key in dict.fromkeys(keys) if key not in found]:
            mine, theirs = self._claim(fingerprint, missing, found)
            if mine:  # before waiting for others, so that no two threads wait for each other
                found |= self._encode(fingerprint, mine, [first[key] for key in mine], encode)
                encoded += len(mine)
            found |= {key: entry for key, future in theirs.items() if (entry := future.result()) is not None}
        with self._lock:
            self._hits += len(keys) - encoded
            self._misses += encoded
        return tuple(torch.stack(column) for column in zip(*(found[key] for key in keys), strict=True))

    def _claim(
        self, fingerprint: str, keys: list[str], found: dict[str, Entry]
    ) -> tuple[dict[str, Future], dict[str, Future]]:
        """Puts what is there into `found`; -> what this thread now has to encode, and what other threads encode."""
        mine, theirs = {}, {}
        with self._lock:
            for key in keys:
                full = (fingerprint, key)
                if full in self._entries:
                    self._entries.move_to_end(full)
                    found[key] = self._entries[full]
                elif full in self._in_flight:
                    theirs[key] = self._in_flight[full]
                else:
                    mine[key] = self._in_flight[full] = Future()
        return mine, theirs

    def _encode(
        self,
        fingerprint: str,
        claimed: dict[str, Future],
        positions: list[int],
        encode: Callable[[list[int]], Entry],
    ) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        try:
            calls = [[i] for i in positions] if self.one_by_one else [positions]
            rows = [entry for call in calls for entry in _split(encode(call), len(call))]
            entries = dict(zip(claimed, rows, strict=True))
        finally:  # whatever happened, nobody may be left waiting
            with self._lock:
                for key, future in claimed.items():
                    if key in entries:
                        self._store((fingerprint, key), entries[key])
                    del self._in_flight[fingerprint, key]
                    future.set_result(entries.get(key))
        return entries

    def _store(self, full: tuple[str, str], entry: Entry) -> None:
        """The caller holds the lock. Makes room first: the budget is never exceeded, not even for a moment."""
        size = _num_bytes(entry)
        if size > self.max_bytes:
            self._too_large += 1
            return
        if full in self._entries:  # loading may bring what is there
            self._bytes -= _num_bytes(self._entries.pop(full))
        while self._bytes + size > self.max_bytes:
            self._bytes -= _num_bytes(self._entries.popitem(last=False)[1])
            self._evictions += 1
        self._entries[full] = entry
        self._bytes += size

    # ------------------------------------------------------------------------------------------------ persistence

    def save(self, path: Path | str) -> None:
        """Writes the entries of today's fingerprint as safetensors, with a checksum: beside its place first, then moved
        there, so that whatever happens the old file stands or the new one. Folders are made. Needs their bytes again
        in memory."""
        path, fingerprint = Path(path), self.fingerprint
        with self._lock:
            entries = {key: entry for (made_by, key), entry in self._entries.items() if made_by == fingerprint}
        metadata = {
            **FORMAT,
            "fingerprint": fingerprint,
            "entries": json.dumps([[key, len(entry)] for key, entry in entries.items()]),
            "checksum": _checksum(entries),
        }
        tensors = {f"{key}.{i}": each for key, entry in entries.items() for i, each in enumerate(entry)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            partial.write_bytes(save(tensors, metadata))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: Path | str, device: torch.device | str = "cpu") -> int:
        """Adds a saved file's entries as the most recently used, in their order -> how many fit. device: the encoder's.
        All or nothing: raises ValueError, and changes nothing, where the file is damaged, no visual token cache of this
        version, or made by other weights or settings. FileNotFoundError where there is none."""
        fingerprint = self.fingerprint
        read = VisualTokenCache(self.max_bytes, fingerprint)  # no more than the budget, the newest last
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if {name: metadata.get(name) for name in FORMAT} != FORMAT:
                    raise ValueError(f"{path} is no visual token cache of version {FORMAT['version']}")
                if metadata.get("fingerprint") != fingerprint:
                    raise ValueError(f"{path} was made by other weights or settings: its fingerprint is another one")
                digest = hashlib.sha256()
                for key, count in json.loads(metadata["entries"]):
                    entry = tuple(file.get_tensor(f"{key}.{i}") for i in range(count))
                    _add_entry(digest, key, entry)
                    # a copy, for on a CPU these are views of the file
                    read._store((fingerprint, key), tuple(each.to(device, copy=True) for each in entry))
                if digest.hexdigest() != metadata["checksum"]:
                    raise SafetensorError("its checksum is wrong")
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        with self._lock:
            for full, entry in read._entries.items():
                self._store(full, entry)
        return len(read._entries)


def _split(batched: Entry, count: int) -> list[Entry]:
    """One entry per row, each tensor a copy of its own: a view would keep the whole batch in memory."""
    if not isinstance(batched, tuple) or not all(isinstance(each, Tensor) for each in batched):
        raise ValueError(f"encode must return a tuple of tensors; got {type(batched).__name__}")
    if wrong := [list(each.shape) for each in batched if each.dim() < 1 or len(each) != count]:
        raise ValueError(f"encode was given {count} images and must return as many rows; got shape {wrong[0]}")
    return [tuple(each[i].clone(memory_format=torch.contiguous_format) for each in batched) for i in range(count)]


def _num_bytes(entry: Entry) -> int:
    return sum(each.nbytes for each in entry)


def _add_entry(digest: "hashlib._Hash", key: str, entry: Entry) -> None:
    for i, tensor in enumerate(entry):
        update_digest(digest, f"{key}.{i}", tensor)


def _checksum(entries: dict[str, Entry]) -> str:
    digest = hashlib.sha256()
    for key, entry in entries.items():
        _add_entry(digest, key, entry)
    return digest.hexdigest()
