"""The full-size model: a pretrained CLIP tower and a pretrained causal language model, joined as in Flamingo.

What OpenFlamingo does, on today's torch and transformers:

    from flamingo_vlm import create_model_and_transforms, load_openflamingo_checkpoint

Names are imported when they are first used, so that the package's commands start without one another.
"""

from importlib import import_module

from reduced_precision import quiet_torchao

with quiet_torchao():  # which transformers imports where it is installed
    import transformers.modeling_utils  # noqa: F401

_HOME = {
    "Flamingo": "model",
    "FlamingoConfig": "configuration",
    "FlamingoProcessor": "processing",
    "LoadReport": "checkpoints",
    "VisionTower": "vision_towers",
    "create_model_and_transforms": "factory",
    "load_openflamingo_checkpoint": "checkpoints",
    "save_openflamingo_checkpoint": "checkpoints",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
