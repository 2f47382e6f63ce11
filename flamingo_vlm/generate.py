"""What a model says to a prompt of text and images:

    python -m flamingo_vlm.generate --model models/3B --prompt "<image>An image of" --image photo.jpg

The folder holds what `save_pretrained` of model and processor wrote: `python -m flamingo_vlm.convert` makes one of an
OpenFlamingo release, `python -m flamingo_vlm.tiny_model` one of random weights.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from benchmarking import choose_device
from command_line import positive_int
from flamingo_vlm.model import Flamingo
from flamingo_vlm.processing import END_OF_CHUNK, FlamingoProcessor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def seed(text: str) -> int:
    """An argparse type: what torch takes for a seed."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1; got {text!r}")
    return int(text)


def arguments_of(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_vlm.generate",
        description="Prints what a model says to a prompt. <image> in the prompt stands for the next --image.",
        epilog='Few-shot: give examples in the prompt, each closed by <|endofchunk|>. --prompt "<image>An image of two '
        'cats.<|endofchunk|><image>An image of" --image cats.jpg --image photo.jpg',
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of model and processor")
    parser.add_argument("--prompt", required=True, help="text with one <image> for each --image")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--max-new-tokens", type=positive_int, default=20, metavar="N", help="default 20")
    parser.add_argument("--beams", type=positive_int, default=1, metavar="N", help="beam search with N beams")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample with this temperature (default: greedy)")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (default 0)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights (default float32)")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parser, arguments = arguments_of(argv)
    try:
        if not (arguments.model / "config.json").is_file():
            raise ValueError(
                f"--model {arguments.model} is no folder of a saved model: python -m flamingo_vlm.convert makes one of "
                "an OpenFlamingo release, python -m flamingo_vlm.tiny_model one of random weights"
            )
        device = choose_device(arguments.device)
        processor = FlamingoProcessor.from_pretrained(arguments.model, local_files_only=True)
        inputs = processor(arguments.prompt, images=[arguments.image]).to(device)
        model = Flamingo.from_pretrained(arguments.model, dtype=DTYPES[arguments.dtype], local_files_only=True)
        model.to(device)
        sampling = {"do_sample": False}
        if arguments.temperature is not None:
            sampling = {"do_sample": True, "temperature": arguments.temperature}
        torch.manual_seed(arguments.seed)
        start = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=arguments.max_new_tokens, num_beams=arguments.beams, **sampling
        )
        seconds = time.perf_counter() - start
    except (ValueError, OSError, SafetensorError) as error:
        parser.error(f"{arguments.model}: {error}")
    new = output[0, inputs["lang_x"].shape[1] :]
    print(processor.tokenizer.decode(new, skip_special_tokens=False).split(END_OF_CHUNK)[0].strip())
    print(f"[{len(new)} tokens, {len(arguments.image)} images, {seconds:.2f} s on {device}]")


if __name__ == "__main__":
    main()
