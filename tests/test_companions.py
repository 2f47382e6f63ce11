"""What is shipped beside the model: every part is built from the config, saved, and filled again."""

from dataclasses import replace

import pytest
import torch

import companions
from companions import CHEAP_COUNTS, DRAFT_DEPTH, GRIDS
from laws import randomized
from mini_flamingo import MiniFlamingo, preset
from mini_flamingo_checkpoint import SHIPPED, save_weights
from shapes_curriculum import ShapesCurriculum
from tiny_flamingo import TINY

CONFIG = replace(TINY, image_size=80)
READING = ShapesCurriculum.reading
BUILDERS = {
    "coarse_to_fine": companions.coarse_to_fine,
    "exit_heads": companions.exit_heads,
    "count_head": companions.count_head,
    "draft": companions.draft,
    "text_draft": companions.text_draft,
    "token_reader": lambda config: companions.token_reader(config, READING),
}


def outputs(name, module, config):
    """What the module makes of fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(2, 100, config.vision_dim, generator=generator)
    if name == "exit_heads":
        return torch.cat([head(patches) for head in module], dim=1)
    if name == "token_reader":
        return torch.cat([each.flatten(1) for each in module(patches).values()], dim=1)
    if name.endswith("draft"):
        return module(torch.tensor([[1, 5, 6], [1, 7, 8]]), patches[:, None])
    return module(patches)


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_saved_is_loaded(name, tmp_path):
    """Frozen, in eval mode, with the same weights to the bit; the answers may differ by where kernels round, which
    depends on how memory happens to be aligned."""
    module = randomized(BUILDERS[name](CONFIG))
    save_weights(tmp_path / f"{name}.safetensors", module)
    loaded = companions.load(BUILDERS[name](CONFIG), name, tmp_path)
    weights, loaded_weights = module.state_dict(), loaded.state_dict()
    assert weights.keys() == loaded_weights.keys()
    assert all(torch.equal(weights[key], loaded_weights[key]) for key in weights)
    torch.testing.assert_close(outputs(name, loaded, CONFIG), outputs(name, module.eval(), CONFIG))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(part.training for part in loaded.modules())


@pytest.mark.parametrize("name", BUILDERS)
def test_missing_damaged_and_foreign_weights_are_errors(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is missing: python train_\w+\.py makes it"):
        companions.load(BUILDERS[name](CONFIG), name, tmp_path)
    save_weights(path, BUILDERS[name](CONFIG))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged"):
        companions.load(BUILDERS[name](CONFIG), name, tmp_path)
    for other in (
        BUILDERS[name](replace(CONFIG, vision_dim=96, dim=64)),
        BUILDERS["draft" if name == "count_head" else "count_head"](CONFIG),
    ):
        save_weights(path, other)
        with pytest.raises(ValueError, match=rf"{name}\.safetensors holds the weights of another model"):
            companions.load(BUILDERS[name](CONFIG), name, tmp_path)


@pytest.mark.parametrize("config", [CONFIG, preset("shapes")])
def test_the_drafts_are_two_layers_of_the_target_s_kind(config):
    """Their weights fit those of its first layers, name by name; the text draft has no way to an image."""
    target = MiniFlamingo(config).state_dict()
    draft, text_draft = companions.draft(config), companions.text_draft(config)
    assert len(text_draft.gated_layers) == 0 and len(draft.gated_layers) == DRAFT_DEPTH
    for module in (draft, text_draft):
        assert len(module.language_model.layers) == DRAFT_DEPTH
        for name, tensor in module.state_dict().items():
            assert tensor.shape == target[name].shape


def test_the_text_draft_says_the_same_whatever_the_image():
    text_draft = randomized(companions.text_draft(CONFIG)).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    one, other = torch.randn(2, 1, 1, 4, CONFIG.vision_dim)
    assert torch.equal(text_draft(ids, one), text_draft(ids, other))


@pytest.mark.parametrize("config", [CONFIG, preset("shapes")])
def test_the_coarse_to_fine_resampler_takes_the_plain_one_s_place(config):
    """Its weights fit where there are as many layers; its last grid is as fine as the patches."""
    config = replace(config, resampler_depth=len(GRIDS))
    resampler, plain = companions.coarse_to_fine(config), MiniFlamingo(config).resampler
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in resampler.state_dict().items()} == shapes
    assert resampler.grids == GRIDS and GRIDS[-1] == config.image_size // config.patch_size
    patches = torch.randn(2, GRIDS[-1] ** 2, config.vision_dim)
    assert resampler(patches).shape == plain(patches).shape


def test_heads_fit_what_they_judge():
    assert len(companions.exit_heads(CONFIG)) == len(GRIDS) - 1
    assert companions.count_head(CONFIG)(torch.randn(3, 100, CONFIG.vision_dim)).shape == (3, len(CHEAP_COUNTS))
    assert list(CHEAP_COUNTS) == sorted(CHEAP_COUNTS) and CHEAP_COUNTS[-1] < preset("shapes").num_latents


def test_the_shipped_reader_loads():
    reader = companions.load(companions.token_reader(preset("shapes"), READING), "token_reader")
    assert (SHIPPED / "token_reader.safetensors").exists() and not reader.training
