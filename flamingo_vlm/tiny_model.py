"""A complete model of random weights, three megabytes, to try every command without a network:

    python -m flamingo_vlm.tiny_model models/tiny
    python -m flamingo_vlm.generate --model models/tiny --prompt "<image>An image of" --image photo.jpg

What it says is noise. It is made of the same parts as a real one: a CLIP tower, an OPT language model, a tokenizer
(each byte is a token), and the files that `save_pretrained` writes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, CLIPVisionConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from flamingo_vlm.model import Flamingo
from flamingo_vlm.processing import FlamingoProcessor, add_flamingo_tokens
from flamingo_vlm.vision_towers import VisionTower, image_transform

IMAGE_SIZE = 32
SPACE = "\u0120"  # how byte-level tokenizers write a space


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token; `</s>` ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def tiny_model(seed: int = 0) -> tuple[Flamingo, FlamingoProcessor]:
    """In eval mode, on the CPU, with open gates: what it says depends on the images."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    tokenizer = byte_tokenizer()
    tokens = add_flamingo_tokens(tokenizer)
    language = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        dropout=0.0,
        init_std=0.3,  # large enough for words to differ
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokens.pad,
    )
    model = Flamingo(
        VisionTower.from_config(vision),
        OPTForCausalLM(language),
        tokens.end_of_chunk,
        tokens.image,
        vision.hidden_size,
        cross_attn_every_n_layers=2,
        num_latents=8,
        resampler_depth=1,
    )
    with torch.no_grad():
        for block in model.gated_cross_attn_layers.values():
            block.attn_gate.fill_(1.0)
            block.ff_gate.fill_(1.0)
    unprintable = [i for token, i in tokenizer.get_vocab().items() if len(token) == 1 and not token.isascii()]
    model.generation_config.suppress_tokens = [i for i in unprintable if i != tokenizer.convert_tokens_to_ids(SPACE)]
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return model.eval(), FlamingoProcessor(image_transform(images), tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_vlm.tiny_model",
        description="Saves a complete model of random weights, to try the commands without a network. Its words are "
        "noise.",
    )
    parser.add_argument("folder", type=Path, help="where to save it; the folder is made")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    arguments = parser.parse_args(argv)
    model, processor = tiny_model(arguments.seed)
    try:
        model.save_pretrained(arguments.folder)
        processor.save_pretrained(arguments.folder)
    except OSError as error:
        parser.error(f"{arguments.folder} cannot be written: {error.strerror}")
    print(f"Saved a model of {model.num_parameters():,} random weights in {arguments.folder}: its words are noise.")
    print(f'Try it:  python -m flamingo_vlm.generate --model {arguments.folder} --prompt "Hello" --max-new-tokens 10')


if __name__ == "__main__":
    main()
