"""From text and images to what the model reads, and back: the special tokens and `FlamingoProcessor`.

A prompt interleaves text and images (Alayrac et al. 2022, section 2.3). In the text each image, or video, is one
`<image>` token, and `<|endofchunk|>` closes what belongs to it:

    <image>An image of two cats.<|endofchunk|><image>An image of

The processor sees to what goes wrong silently elsewhere: prompts are padded on the left, so that generation continues
text and not padding, and a row that has not one image for each `<image>` token is refused.

Legend: B rows, T tokens, M images of the longest row, F frames, h and w pixels.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase

from flamingo_vlm.vision_towers import ImageTransform, image_transform

END_OF_CHUNK, IMAGE, PAD = "<|endofchunk|>", "<image>", "<PAD>"

Picture = Image.Image | Path
Medium = Picture | Sequence[Picture]  # a video is the sequence of its frames
Prompt = str | Sequence[str | Medium]


@dataclass(frozen=True)
class FlamingoTokens:
    """Ids of the tokens that the model gives a meaning to."""

    end_of_chunk: int
    image: int
    pad: int


def flamingo_tokens(tokenizer: PreTrainedTokenizerBase) -> FlamingoTokens:
    """Raises ValueError where the tokenizer lacks one of them."""
    # By name: what encode() ends with is the end-of-text token, in a tokenizer that appends one.
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (END_OF_CHUNK, IMAGE)}
    lacking = [token for token, index in ids.items() if index is None or index == tokenizer.unk_token_id]
    lacking += ["pad token"] if tokenizer.pad_token is None else []
    if lacking:
        raise ValueError(f"the tokenizer has no {', no '.join(lacking)}: call add_flamingo_tokens(tokenizer) first")
    return FlamingoTokens(ids[END_OF_CHUNK], ids[IMAGE], tokenizer.pad_token_id)


def add_flamingo_tokens(tokenizer: PreTrainedTokenizerBase) -> FlamingoTokens:
    """Adds `<|endofchunk|>`, `<image>` and, where the tokenizer has no pad token, `<PAD>`: in this order, in which the
    rows of OpenFlamingo's embeddings stand. What the tokenizer has already stays as it is."""
    tokenizer.add_special_tokens({"extra_special_tokens": [END_OF_CHUNK, IMAGE]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return flamingo_tokens(tokenizer)


class FlamingoProcessor:
    """Prompts in, `model.generate(**inputs)` out of its result; ids in, texts out.

    `image_processor` maps a PIL.Image to float[3, h, w]; `tokenizer` has the tokens of `add_flamingo_tokens`.
    """

    def __init__(self, image_processor: ImageTransform, tokenizer: PreTrainedTokenizerBase):
        """Raises ValueError where the tokenizer lacks a token."""
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.tokens = flamingo_tokens(tokenizer)

    def __call__(
        self, prompts: Prompt | Sequence[Prompt], images: Sequence[Sequence[Medium]] | None = None
    ) -> BatchFeature:
        """One prompt or a batch of them, in one of two notations:

            processor([cats, "An image of two cats.<|endofchunk|>", dog, "An image of"])
            processor("<image>An image of two cats.<|endofchunk|><image>An image of", images=[[cats, dog]])

        An image is a PIL image or a `pathlib.Path` (a str is text), a video a list of them. A list is a batch if its
        items are all texts or all lists, and one prompt otherwise. `images` holds one list for each prompt.

        Returns vision_x float[B, M, F, 3, h, w] (zeros behind the images of a shorter row), lang_x int64[B, T] and
        attention_mask int64[B, T], padded on the left. The tokenizer adds the special tokens that it adds to any text.

        Raises ValueError for a row whose images and `<image>` tokens differ in number, for media of different numbers
        of frames, an empty prompt, and an image that cannot be read.
        """
        texts, media = _interleaved(prompts) if images is None else _tagged(prompts, images)
        tokens = self.tokenizer(
            texts, padding=True, padding_side="left", return_tensors="pt", return_attention_mask=True
        )
        lang_x, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        self._check(lang_x, attention_mask, media)
        return BatchFeature({"vision_x": self._vision_x(media), "lang_x": lang_x, "attention_mask": attention_mask})

    def batch_decode(self, ids: Tensor) -> list[str]:
        """int64[B, T] -> B texts, without special tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the files of the tokenizer and of the image processor, each of them atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            self.tokenizer.save_pretrained(staging)
            self.image_processor.save_pretrained(staging)
            for file in [path for path in Path(staging).rglob("*") if path.is_file()]:
                target = folder / file.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, local_files_only: bool = False, cache_dir: str | Path | None = None
    ) -> "FlamingoProcessor":
        """From a folder that `save_pretrained` wrote, or a hub id with the same files. Raises ValueError where the
        image processor's settings or a token of the tokenizer are missing."""
        hub = {"local_files_only": local_files_only, "cache_dir": cache_dir}
        return cls(image_transform(path, **hub), AutoTokenizer.from_pretrained(path, **hub))

    def _check(self, lang_x: Tensor, attention_mask: Tensor, media: list[list[Medium]]) -> None:
        lengths, tags = attention_mask.sum(dim=1).tolist(), (lang_x == self.tokens.image).sum(dim=1).tolist()
        for row, images in enumerate(media):
            if lengths[row] == 0:
                raise ValueError(f"prompt {row} is empty")
            if tags[row] != len(images):
                raise ValueError(
                    f"prompt {row} has {tags[row]} {IMAGE} tokens, but {len(images)} images: give one image for each "
                    f"token (a list that holds the images themselves has no {IMAGE} in its texts)"
                )

    def _vision_x(self, media: list[list[Medium]]) -> Tensor:
        videos = [[_frames(row, medium) for medium in images] for row, images in enumerate(media)]
        lengths = {len(frames) for row in videos for frames in row}
        if len(lengths) > 1:
            raise ValueError(
                f"the images and videos of one call have {sorted(lengths)} frames: give all of them the same number "
                "(an image is one frame)"
            )
        # A batch without images has the size of an image all the same.
        blank = self.image_processor(Image.new("RGB", (1, 1)))
        most = max(len(row) for row in videos)
        vision_x = blank.new_zeros(len(videos), most, max(lengths, default=1), *blank.shape)
        for row, clips in enumerate(videos):
            for place, frames in enumerate(clips):
                vision_x[row, place] = torch.stack([self.image_processor(_opened(frame)) for frame in frames])
        return vision_x


def _interleaved(prompts: Prompt | Sequence[Prompt]) -> tuple[list[str], list[list[Medium]]]:
    """The text of each row, with a tag in place of each image, and its images."""
    batch = prompts if _all(prompts, str) or _all(prompts, list | tuple) else [prompts]
    if not batch:
        raise ValueError("prompts is an empty list: give at least one prompt")
    rows = [[prompt] if isinstance(prompt, str) else prompt for prompt in batch]
    for row, prompt in enumerate(rows):
        if not isinstance(prompt, list | tuple):
            raise ValueError(f"prompt {row} must be a text or a list of texts and images; got {type(prompt).__name__}")
    texts = ["".join(item if isinstance(item, str) else IMAGE for item in row) for row in rows]
    return texts, [[item for item in row if not isinstance(item, str)] for row in rows]


def _tagged(prompts: str | Sequence[str], images: Sequence[Sequence[Medium]]) -> tuple[list[str], list[list[Medium]]]:
    """The same of prompts whose texts hold the tags."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not texts or not _all(texts, str):
        raise ValueError(f"with images=, prompts must be a text or a list of texts that hold {IMAGE} tokens")
    if not _all(images, list | tuple) or len(images) != len(texts):
        raise ValueError(
            f"images must hold one list of images for each of the {len(texts)} prompts, an empty one where a prompt "
            f"has none; got {_described(images)}"
        )
    return list(texts), [list(row) for row in images]


def _all(items: object, kind: type) -> bool:
    return isinstance(items, list | tuple) and all(isinstance(item, kind) for item in items)


def _described(items: object) -> str:
    if not isinstance(items, list | tuple):
        return type(items).__name__
    return f"{len(items)} items: {', '.join(type(item).__name__ for item in items)}"


def _frames(row: int, medium: Medium) -> Sequence[Picture]:
    frames = medium if isinstance(medium, list | tuple) else [medium]
    if not frames or not _all(frames, Image.Image | Path):
        raise ValueError(
            f"prompt {row}: an image must be a PIL image or a pathlib.Path, and a video a list of them, its frames; "
            f"got {_described(medium)}"
        )
    return frames


def _opened(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    try:
        with Image.open(picture) as image:
            image.load()  # a damaged file opens, and fails here
            return image
    except Exception as error:  # the decoders of a damaged file raise what they like, SyntaxError included
        raise ValueError(f"{picture} cannot be read as an image: {error}") from error
