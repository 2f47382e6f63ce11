"""MosaicGPT against a plain reading of its formulas, and against itself: cached, padded, saved, compiled."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache

from flamingo_vlm.mosaic_gpt import MosaicGPTConfig, MosaicGPTForCausalLM, alibi_bias
from laws import assert_same, randomized, value_and_gradients

TINY = {"vocab_size": 23, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}

# The keys of the released config.json, with the sizes of the tiny model.
PUBLISHED = TINY | {
    "alibi": True,
    "alibi_bias_max": 8,
    "architectures": ["MosaicGPT"],
    "attn_clip_qkv": None,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": True,
    "attn_uses_sequence_id": False,
    "auto_map": {
        "AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig",
        "AutoModelForCausalLM": "mosaic_gpt.MosaicGPT",
    },
    "emb_init_std": None,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "init_device": "cpu",
    "init_std": 0.02,
    "logit_scale": None,
    "low_precision_layernorm": True,
    "mlp_ratio": 4,
    "model_type": "mosaic_gpt",
    "no_bias": True,
    "param_init_fn": "kaiming_normal_",
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "float32",
    "transformers_version": "4.27.4",
    "use_cache": False,
    "verbose": 0,
}

# One block of the released state dict.
BLOCK = [
    "ln_1.weight",
    "attn.Wqkv.weight",
    "attn.q_ln.weight",
    "attn.k_ln.weight",
    "attn.out_proj.weight",
    "ln_2.weight",
    "mlp.mlp_up.weight",
    "mlp.mlp_down.weight",
]

pytestmark = pytest.mark.usefixtures("float64")


def tiny_model(**changes) -> MosaicGPTForCausalLM:
    return randomized(MosaicGPTForCausalLM(MosaicGPTConfig(**TINY | changes))).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(TINY["vocab_size"], shape)


def left_padded(lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of those lengths, the same as one batch, and its mask; the padding holds tokens like any other."""
    rows = [tokens(1, length) for length in lengths]
    batch = torch.cat([torch.cat((tokens(1, max(lengths) - len(row[0])), row), dim=1) for row in rows])
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return rows, batch, mask.long()


def tokens_per_forward(model: MosaicGPTForCausalLM) -> list[int]:
    """Filled with the number of tokens that each later forward reads."""
    lengths = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    return lengths


def written_out(weights: dict[str, Tensor], ids: list[int], heads: int = 4, alibi_bias_max: float = 8) -> Tensor:
    """Logits float[T, V] of one text, query by query and head by head."""
    wte = weights["transformer.wte.weight"]
    width = wte.shape[1]
    size = width // heads

    def normed(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for t in range(len(ids)):
            parts = []
            for h in range(heads):
                slope = 2 ** (-alibi_bias_max * (h + 1) / heads)
                own = slice(h * size, (h + 1) * size)
                scores = [q[t, own] @ k[j, own] / size**0.5 - slope * (len(ids) - 1 - j) for j in range(t + 1)]
                shares = torch.stack(scores).exp()
                parts.append((shares / shares.sum()) @ v[: t + 1, own])
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    x = wte[ids]
    for i in range(TINY["n_layers"]):
        block = f"transformer.blocks.{i}"
        q, k, v = (normed(x, f"{block}.ln_1") @ weights[f"{block}.attn.Wqkv.weight"].T).split(width, dim=1)
        mixed = attended(normed(q, f"{block}.attn.q_ln"), normed(k, f"{block}.attn.k_ln"), v)
        x = x + mixed @ weights[f"{block}.attn.out_proj.weight"].T
        inner = normed(x, f"{block}.ln_2") @ weights[f"{block}.mlp.mlp_up.weight"].T
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        x = x + inner @ weights[f"{block}.mlp.mlp_down.weight"].T
    return normed(x, "transformer.ln_f") @ wte.T


@pytest.fixture
def published_folder(tmp_path):
    """A folder as it is released, weights in two pickled shards, and those weights."""
    weights = {name: each.float() for name, each in tiny_model().state_dict().items()}
    names = list(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, held in shards.items():
        torch.save({name: weights[name] for name in held}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    return tmp_path, weights


# The formulas


def test_logits_and_gradients_are_those_of_the_formulas():
    model, ids = tiny_model(), tokens(1, 9)
    weights = dict(model.named_parameters())
    ours = value_and_gradients(lambda: model(ids).logits[0], weights)
    assert_same(ours, value_and_gradients(lambda: written_out(weights, ids[0].tolist()), weights))


def test_alibi_bias_max_sets_the_slopes():
    model, ids = tiny_model(alibi_bias_max=5), tokens(1, 9)
    expected = written_out(model.state_dict(), ids[0].tolist(), alibi_bias_max=5)
    assert_same(model(ids).logits[0], expected)


def test_half_precision_rounds_alibi_once():
    distance = torch.arange(2048)[None]
    bias = alibi_bias(distance[None, None] >= 0, distance, heads=16, alibi_bias_max=8, dtype=torch.bfloat16)
    exact = -(2 ** (-torch.arange(1, 17) / 2))[None, :, None, None] * distance
    assert ((bias - exact).abs() <= 2**-8 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bias_of_unseen_keys_is_finite_and_hides_them(dtype):
    bias = alibi_bias(torch.tensor([[[[True, False]]]]), torch.tensor([[0, -1]]), 8, 8, dtype)
    assert bias.isfinite().all()
    assert bias.softmax(-1).equal(torch.tensor([1, 0], dtype=dtype).expand(1, 8, 1, 2))


def test_loss_is_that_of_the_next_label():
    model, ids = tiny_model(), tokens(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_logits_to_keep_keeps_those_positions():
    model, ids = tiny_model(), tokens(2, 6)
    logits = model(ids).logits
    assert_same(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert_same(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


def test_embeddings_may_be_given_instead_of_tokens():
    model, ids = tiny_model(), tokens(2, 6)
    embeddings = model.get_input_embeddings()(ids)
    assert_same(model(inputs_embeds=embeddings).logits, model(ids).logits)
    for neither_or_both in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**neither_or_both)


def test_hidden_states_go_from_the_embedding_to_the_final_norm():
    model, ids = tiny_model(), tokens(2, 6)
    out = model(ids, output_hidden_states=True)
    first, _, last = out.hidden_states
    assert_same(first, model.get_input_embeddings()(ids))
    assert_same(last @ model.get_input_embeddings().weight.T, out.logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # transformers 5.17 has no other
def test_checkpointed_gradients_are_the_gradients():
    model, ids = tiny_model().train(), tokens(2, 6)
    runs = []
    model.transformer.blocks[0].attn.register_forward_hook(lambda *_: runs.append(1))
    weights = dict(model.named_parameters())
    plain = value_and_gradients(lambda: model(ids).logits, weights)
    assert len(runs) == 1
    model.gradient_checkpointing_enable()
    assert_same(value_and_gradients(lambda: model(ids).logits, weights), plain)
    assert len(runs) == 3, "the backward pass runs each block again"
    assert model(ids, use_cache=True).past_key_values is None


# Padding


def test_left_padding_changes_nothing():
    model = tiny_model()
    rows, batch, mask = left_padded((7, 4, 1))
    logits = model(batch, attention_mask=mask).logits
    for row, together in zip(rows, logits, strict=True):
        assert_same(together[-row.shape[1] :], model(row).logits[0])


def test_right_padding_changes_nothing():
    model, ids = tiny_model(), tokens(2, 7)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    assert_same(model(ids, attention_mask=mask).logits[1, :4], model(ids[1:, :4]).logits[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_padding_rows_hold_no_nan(dtype):
    model = tiny_model().to(dtype)
    _, batch, mask = left_padded((7, 1))
    logits = model(batch, attention_mask=mask).logits
    assert logits.isfinite().all()
    logits[mask.bool()].float().logsumexp(-1).sum().backward()
    assert all(each.grad.isfinite().all() for each in model.parameters())


def test_a_boolean_mask_of_four_axes_speaks_for_itself():
    model = tiny_model()
    _, batch, mask = left_padded((6, 3))
    seen = torch.ones(6, 6, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    assert_same(model(batch, attention_mask=seen).logits, model(batch, attention_mask=mask).logits)


@pytest.mark.parametrize("mask", [torch.ones(2, 5), torch.ones(2, 7), torch.zeros(2, 1, 6, 6)], ids=lambda m: m.shape)
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, 6\]"):
        tiny_model()(tokens(2, 6), attention_mask=mask)


# The cache


def caches(model: MosaicGPTForCausalLM) -> list[DynamicCache | StaticCache]:
    return [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)]


def test_cached_steps_are_the_uncached_text():
    model = tiny_model()
    _, batch, mask = left_padded((9, 5))
    expected = model(batch, attention_mask=mask).logits
    for cache in caches(model):
        steps = [(0, 4), (4, 5), (5, 8), (8, 9)]
        out = [
            model(batch[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for start, end in steps
        ]
        real = mask.bool()
        assert_same(torch.cat(out, dim=1)[real], expected[real])


def test_a_mask_that_leaves_out_the_cached_tokens_is_refused():
    model, ids = tiny_model(), tokens(2, 6)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cached tokens included"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_a_forward_caches_when_the_config_or_the_caller_says_so():
    ids = tokens(1, 3)
    for default in (True, False):
        model = tiny_model(use_cache=default)
        assert (model(ids).past_key_values is not None) == default
        assert (model(ids, use_cache=not default).past_key_values is not None) != default


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_with_every_cache(beams):
    model = tiny_model()
    _, batch, mask = left_padded((6, 3))
    asked = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(batch, **asked)
    assert dynamic.equal(model.generate(batch, cache_implementation="static", **asked))
    assert dynamic.equal(model.generate(batch, use_cache=False, **asked))


def test_greedy_generation_takes_the_likeliest_token():
    model, ids = tiny_model(), tokens(1, 3)
    expected = ids[0].tolist()
    for _ in range(5):
        expected.append(int(written_out(model.state_dict(), expected)[-1].argmax()))
    assert model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist() == expected


@pytest.mark.parametrize("settings", [None, GenerationConfig(max_new_tokens=4)], ids=["no config", "a config"])
def test_the_published_folder_generates_with_the_cache(published_folder, settings):
    model = AutoModelForCausalLM.from_pretrained(published_folder[0])
    assert model.config.use_cache is False
    lengths = tokens_per_forward(model)
    model.generate(tokens(2, 5), generation_config=settings, max_new_tokens=4)
    assert lengths == [5, 1, 1, 1]


def test_generation_without_the_cache_is_there_for_who_asks():
    model = tiny_model()
    lengths = tokens_per_forward(model)
    model.generate(tokens(2, 5), max_new_tokens=2, use_cache=False)
    model.generate(tokens(2, 5), GenerationConfig(max_new_tokens=2, use_cache=False))
    assert lengths == [5, 6, 5, 6]


def test_a_decode_step_compiles_once_into_one_graph():
    model, ids = tiny_model(), tokens(2, 9)
    expected = model(ids).logits
    cache = caches(model)[1]
    torch.compiler.reset()
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
        step = torch.compile(model, fullgraph=True, backend="eager")
        for t in range(4, 9):
            with torch.compiler.set_stance("default" if t == 4 else "fail_on_recompile"):
                logits = step(ids[:, t : t + 1], past_key_values=cache).logits
            assert_same(logits[:, 0], expected[:, t])


# The folder


def test_parameters_are_the_released_ones():
    expected = {f"transformer.blocks.{i}.{name}" for i in range(TINY["n_layers"]) for name in BLOCK}
    assert set(tiny_model().state_dict()) == expected | {"transformer.wte.weight", "transformer.ln_f.weight"}


def test_the_defaults_are_the_1b_model():
    with torch.device("meta"):
        model = MosaicGPTForCausalLM(MosaicGPTConfig())
    width, inner, vocabulary, layers = 2048, 8192, 50432, 24
    norms = 4 * width
    matrices = width * 3 * width + width * width + width * inner + inner * width
    expected = vocabulary * width + layers * (norms + matrices) + width
    assert sum(each.numel() for each in model.parameters()) == expected == 1_311_442_944


def test_the_published_folder_loads_without_renaming(published_folder):
    folder, weights = published_folder
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, MosaicGPTForCausalLM)
    assert not any(report.values()), report
    assert model.state_dict().keys() == weights.keys()
    assert all(each.equal(weights[name]) for name, each in model.state_dict().items())


def test_hugging_face_names_mean_the_published_sizes(published_folder):
    config = AutoConfig.from_pretrained(published_folder[0])
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 4, 2)
    assert config.max_position_embeddings == 64


def test_a_saved_model_loads_again(tmp_path, published_folder):
    model = AutoModelForCausalLM.from_pretrained(published_folder[0])
    ids = tokens(2, 5)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again(ids).logits.equal(model(ids).logits)
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize("size", [19, 26])
def test_resized_embeddings_are_read_and_written(size):
    model = tiny_model()
    ids = tokens(2, 6) % 19
    before = model(ids).logits
    model.resize_token_embeddings(size)
    after = model(ids).logits
    kept = min(size, TINY["vocab_size"])
    assert after.shape[-1] == model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
    assert_same(after[..., :kept], before[..., :kept])


def test_the_embedding_is_the_head():
    model, ids = tiny_model(), tokens(2, 6)
    assert model.get_output_embeddings() is None
    before = model(ids).logits
    embedding = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach().flip(0))
    model.set_input_embeddings(embedding)
    assert_same(model(TINY["vocab_size"] - 1 - ids).logits, before.flip(-1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alibi", False),
        ("attn_qk_ln", False),
        ("no_bias", False),
        ("tie_word_embeddings", False),
        ("prefix_lm", True),
        ("attn_uses_sequence_id", True),
        ("attn_clip_qkv", 6.0),
        ("softmax_scale", 0.5),
        ("logit_scale", "inv_sqrt_d_model"),
        ("embedding_fraction", 0.5),
        ("attn_pdrop", 0.1),
        ("resid_pdrop", 0.1),
        ("emb_pdrop", 0.1),
    ],
)
def test_a_config_this_model_does_not_do_is_refused(tmp_path, name, value):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | {name: value}))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        AutoConfig.from_pretrained(tmp_path)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="multiple of n_heads"):
        MosaicGPTConfig(d_model=32, n_heads=5)


def test_another_attention_is_refused(published_folder):
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        AutoModelForCausalLM.from_pretrained(published_folder[0], attn_implementation="eager")
