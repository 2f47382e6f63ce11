"""An OpenFlamingo release as one folder that `Flamingo.from_pretrained` and `python -m flamingo_vlm.generate` read:

    python -m flamingo_vlm.convert OpenFlamingo-3B-vitl-mpt1b models/3B

Vision tower, language model and tokenizer come from their own repositories, as the release names them, and what
OpenFlamingo trained from its checkpoint. A release of one's own names its parts: --lm, --every, --checkpoint.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download

from command_line import positive_int
from flamingo_vlm.checkpoints import load_openflamingo_checkpoint
from flamingo_vlm.factory import create_model_and_transforms
from flamingo_vlm.generate import DTYPES
from flamingo_vlm.processing import FlamingoProcessor


@dataclass(frozen=True)
class Release:
    """lang_encoder: repository of the language model and its tokenizer; every: cross_attn_every_n_layers."""

    lang_encoder: str
    every: int


RELEASES = {
    "OpenFlamingo-3B-vitl-mpt1b": Release("anas-awadalla/mpt-1b-redpajama-200b", 1),
    "OpenFlamingo-3B-vitl-mpt1b-langinstruct": Release("anas-awadalla/mpt-1b-redpajama-200b-dolly", 1),
    "OpenFlamingo-4B-vitl-rpj3b": Release("togethercomputer/RedPajama-INCITE-Base-3B-v1", 2),
    "OpenFlamingo-4B-vitl-rpj3b-langinstruct": Release("togethercomputer/RedPajama-INCITE-Instruct-3B-v1", 2),
    "OpenFlamingo-9B-vitl-mpt7b": Release("anas-awadalla/mpt-7b", 4),
}


def arguments_of(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_vlm.convert",
        description="Joins a vision tower, a language model and an OpenFlamingo checkpoint in one folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="releases: " + "\n          ".join(RELEASES),
    )
    parser.add_argument("release", help="one of those below, or any name together with --lm, --every and --checkpoint")
    parser.add_argument("folder", type=Path, help="where to save; the folder is made")
    parser.add_argument("--tower", default="ViT-L-14", help="open_clip name, hub id or folder (default ViT-L-14)")
    parser.add_argument("--tower-weights", default="openai", help="open_clip's name of them (default openai)")
    parser.add_argument("--lm", help="hub id or folder of language model and tokenizer (default: the release's)")
    parser.add_argument("--every", type=positive_int, help="a gated block before each N-th layer", metavar="N")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint.pt (default: downloaded from the release)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision to save in (default float32)")
    parser.add_argument("--local", action="store_true", help="use local files and what was downloaded before, only")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parser, arguments = arguments_of(argv)
    release = RELEASES.get(arguments.release)
    if release is None and not (arguments.lm and arguments.every and arguments.checkpoint):
        parser.error(
            f"{arguments.release} is no release known here ({', '.join(RELEASES)}): give --lm, --every and --checkpoint"
        )
    lang_encoder = arguments.lm or release.lang_encoder
    try:
        checkpoint = arguments.checkpoint or hf_hub_download(
            f"openflamingo/{arguments.release}", "checkpoint.pt", local_files_only=arguments.local
        )
        model, image_processor, tokenizer = create_model_and_transforms(
            arguments.tower,
            arguments.tower_weights,
            lang_encoder,
            lang_encoder,
            arguments.every or release.every,
            use_local_files=arguments.local,
            dtype=DTYPES[arguments.dtype],
        )
        print(load_openflamingo_checkpoint(model, checkpoint))
        model.save_pretrained(arguments.folder)
        FlamingoProcessor(image_processor, tokenizer).save_pretrained(arguments.folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Saved in {arguments.folder}: python -m flamingo_vlm.generate --model {arguments.folder} --prompt ...")


if __name__ == "__main__":
    main()
