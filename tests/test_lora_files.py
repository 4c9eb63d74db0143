"LoRA files and pipelines of other people: all of a file, with every scale, or a refusal; a style belongs to the base."

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import tiny_xl
from torch import nn

from draft_nb.adapters import (
    LORA_TARGETS,
    add_lora,
    base_adapters,
    base_of,
    fusable,
    lora_layers,
    lora_rows,
    plain_copy,
    recommend,
    recommended,
    trainable,
    tuned_adapters,
)
from draft_nb.export import export_lora
from draft_nb.models import asset, load
from draft_nb.pipelines import annealed
from draft_nb.sampler import sample
from draft_nb.sweep import lora_scale

PROMPTS = ["a fox", "a red rose"]


def opened():
    pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, steps=2):
    "By the stock pipeline alone."
    noise = torch.randn(2, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size, generator=torch.Generator().manual_seed(1))
    return pipe(PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=2.0, output_type="pt").images


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def differ(a, b):
    return (a - b).abs().max() > 1e-3


def filled(shape, k, std=0.2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(k)) * std


def moved(parameters, std=0.2):
    with torch.no_grad():
        for k, p in enumerate(parameters):
            p.copy_(filled(p.shape, k, std))


def styled(name="style", targets=("to_q", "to_v"), rank=2, std=0.3, pipe=None, **options):
    "A pipeline with a LoRA of its user."
    pipe = pipe or opened()
    before = {n for n, _ in pipe.unet.named_parameters()}
    active = pipe.unet.active_adapters() if lora_layers(pipe.unet) else []
    pipe.unet.add_adapter(LoraConfig(r=rank, target_modules=list(targets), **options), name)
    moved([p for n, p in pipe.unet.named_parameters() if n not in before and "lora_" in n], std)
    pipe.unet.set_adapters([*active, name])
    return pipe


def linears(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(LORA_TARGETS))}


def kohya(layers, alpha=lambda k: 1.0, rank=2):
    "A kohya file of some layers; layer k has its own alpha."
    tensors = {}
    for k, (name, m) in enumerate(layers.items()):
        root = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{root}.lora_down.weight"] = filled((rank, m.in_features), 2 * k)
        tensors[f"{root}.lora_up.weight"] = filled((m.out_features, rank), 2 * k + 1)
        if alpha(k) is not None:
            tensors[f"{root}.alpha"] = torch.tensor(alpha(k))
    return tensors


def by_hand(tensors):
    "A pipeline whose matrices hold what a kohya file says."
    pipe = opened()
    with torch.no_grad():
        for name, m in linears(pipe.unet).items():
            root = f"lora_unet_{name.replace('.', '_')}"
            if f"{root}.lora_down.weight" not in tensors:
                continue
            down, up = tensors[f"{root}.lora_down.weight"].float(), tensors[f"{root}.lora_up.weight"].float()
            m.weight += float(tensors.get(f"{root}.alpha", len(down))) / len(down) * up @ down
    return pipe


@pytest.fixture(scope="module")
def layers():
    return linears(opened().unet)


@pytest.fixture
def file(tmp_path):
    def write(tensors, metadata=None, name="lora.safetensors"):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return write


# kohya


@pytest.mark.parametrize(
    "alpha",
    [lambda k: 1.0, lambda k: float(1 + k % 3), lambda k: (k + 1) / 20, lambda k: None, lambda k: None if k % 2 else 0.5, lambda k: -1.0],
    ids=["one", "three", "each", "none", "half", "negative"],
)
def test_every_layer_has_the_alpha_of_its_file(file, layers, alpha, tmp_path):
    tensors = kohya(layers, alpha)
    model = load(opened(), adapter=file(tensors))
    for k, name in enumerate(layers):
        expected = 1.0 if alpha(k) is None else alpha(k) / 2
        assert model.network.get_submodule(name).scaling["default"] == pytest.approx(expected)
    assert len(lora_layers(model.network)) == len(layers) and len(model.parameters()) == 2 * len(layers)
    close(drawn(model.pipe), drawn(by_hand(tensors)))
    again = opened()  # and what we save of it is right in stock diffusers
    again.load_lora_weights(model.save(tmp_path / "saved").parent)
    close(drawn(again), drawn(model.pipe))
    for format in ("kohya", "diffusers"):
        close(drawn(load(opened(), adapter=export_lora(model, tmp_path / f"{format}.safetensors", format)).pipe), drawn(model.pipe))


def test_ranks_of_each_layer_and_convolutions(file, layers):
    some = dict(list(layers.items())[:6])
    tensors = {**kohya(dict(list(some.items())[:3]), lambda k: 3.0, rank=2), **kohya(dict(list(some.items())[3:]), lambda k: 1.0, rank=5)}
    root, m = "lora_unet_down_blocks_0_resnets_0_conv1", opened().unet.down_blocks[0].resnets[0].conv1
    tensors |= {
        f"{root}.lora_down.weight": filled((3, m.in_channels, 3, 3), 90),
        f"{root}.lora_up.weight": filled((m.out_channels, 3, 1, 1), 91),
        f"{root}.alpha": torch.tensor(6.0),
    }
    model = load(opened(), adapter=file(tensors))
    scales = [model.network.get_submodule(n).scaling["default"] for n in some] + [
        model.network.down_blocks[0].resnets[0].conv1.scaling["default"]
    ]
    assert scales == pytest.approx([1.5] * 3 + [0.2] * 3 + [2.0])
    by = by_hand(tensors)
    with torch.no_grad():
        by.unet.down_blocks[0].resnets[0].conv1.weight += 2 * torch.einsum(
            "orxy,rihw->oihw", tensors[f"{root}.lora_up.weight"], tensors[f"{root}.lora_down.weight"]
        )
    close(drawn(model.pipe), drawn(by))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_in_float32(file, layers, dtype):
    tensors = {k: v.to(dtype) for k, v in kohya(layers, lambda k: 2.0).items()}
    model = load(opened(), adapter=file(tensors))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())
    close(drawn(model.pipe), drawn(by_hand(tensors)))


def peft_names(tensors, layers, prefix, middle=""):
    "The same matrices under the names of peft."
    renamed = {}
    for name in layers:
        root = f"lora_unet_{name.replace('.', '_')}"
        renamed[f"{prefix}{name}.lora_A{middle}.weight"] = tensors[f"{root}.lora_down.weight"]
        renamed[f"{prefix}{name}.lora_B{middle}.weight"] = tensors[f"{root}.lora_up.weight"]
    return renamed


@pytest.mark.parametrize(
    "prefix, middle",
    [("unet.", ""), ("", ""), ("base_model.model.", ""), ("base_model.model.unet.", ""), ("", ".default"), ("unet.base_model.model.", "")],
)
def test_prefixes(file, layers, prefix, middle):
    tensors = kohya(layers, lambda k: None)
    model = load(opened(), adapter=file(peft_names(tensors, layers, prefix, middle)))
    close(drawn(model.pipe), drawn(by_hand(tensors)))


@pytest.mark.parametrize(
    "options",
    [dict(use_rslora=True), dict(rank_pattern={"to_q": 3}, alpha_pattern={"to_q": 5, "attn2.to_k": 0.5}), dict(use_dora=True)],
    ids=["rslora", "patterns", "dora"],
)
def test_what_metadata_say_of_scale_is_kept(options, tmp_path):
    pipe = styled(rank=4, targets=LORA_TARGETS, lora_alpha=3, std=0.1, **options)
    expected = drawn(pipe)
    pipe.unet.save_lora_adapter(tmp_path, adapter_name="style")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "whole",
        unet_lora_layers=load_file(tmp_path / "pytorch_lora_weights.safetensors"),
        unet_lora_adapter_metadata=json.loads(metadata(tmp_path / "pytorch_lora_weights.safetensors")["lora_adapter_metadata"]),
    )
    for folder in (tmp_path, tmp_path / "whole"):
        close(drawn(load(opened(), adapter=folder).pipe), expected)


def metadata(file):
    with safe_open(file, "pt") as f:
        return f.metadata() or {}


def test_a_folder_of_peft_brings_its_alpha(layers, tmp_path):
    tensors = kohya(layers, lambda k: 5.0)
    save_file(peft_names(tensors, layers, "base_model.model."), tmp_path / "adapter_model.safetensors")
    config = LoraConfig(r=2, lora_alpha=5, target_modules=LORA_TARGETS)
    config.save_pretrained(tmp_path)
    close(drawn(load(opened(), adapter=tmp_path).pipe), drawn(by_hand(tensors)))
    for wrong, told in (
        (dict(bias="all"), "bias='all'"),
        (dict(modules_to_save=["conv_out"]), "modules_to_save"),
        (dict(peft_type="LOHA"), "LOHA"),
        (dict(init_lora_weights="pissa"), "pissa"),
    ):
        said = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**said, **wrong}))
        with pytest.raises(ValueError, match=f"adapter must .*peft LoRA, {2 * len(layers)} tensors, first base_model.*{told}"):
            load(opened(), adapter=tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))


# refusals: kind, count and first key


def without(tensors, *ends):
    return {k: v for k, v in tensors.items() if not k.endswith(ends)}


def first(tensors, **changed):
    "The file with its first matrix changed."
    key = next(k for k in tensors if k.endswith(".lora_down.weight"))
    return {**tensors, key: changed["to"](tensors[key])}


BAD = dict(
    dora=(
        lambda t: t | {k.replace(".alpha", ".dora_scale"): torch.ones(4, 1) for k in t if k.endswith(".alpha")},
        r"kohya DoRA.*: 70 of 280 tensors, first lora_unet_.*dora_scale",
    ),
    blocks=(
        lambda t: t | {k.replace("down_blocks_", "down_blocks_7"): v.clone() for k, v in t.items() if "down_blocks_" in k},
        r"kohya LoRA.*: \d+ of \d+ tensors, first lora_unet_down_blocks_7",
    ),
    up_is_missing=(
        lambda t: without(t, "mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"),
        r"whole.*lora_B.*kohya LoRA.*: 1 of 70 layers",
    ),
    down_is_missing=(lambda t: without(t, "attn1_to_q.lora_down.weight"), r"whole.*lora_A.*kohya LoRA"),
    alone=(lambda t: without(t, "to_v.lora_down.weight", "to_v.lora_up.weight"), r"whole.*kohya LoRA"),
    nan=(lambda t: first(t, to=lambda v: v * math.nan), r"NaN or Inf.*kohya LoRA.*: 1 of 210 tensors, first lora_unet_"),
    inf=(lambda t: first(t, to=lambda v: v.index_fill(1, torch.tensor([0]), math.inf)), r"NaN or Inf.*kohya LoRA.*: 1 of 210"),
    alpha_nan=(lambda t: {k: v * math.nan if k.endswith("alpha") else v for k, v in t.items()}, r"NaN or Inf.*: 70 of 210"),
    alpha_zero=(lambda t: {k: v * 0 if k.endswith("alpha") else v for k, v in t.items()}, r"alpha.*: 70 of 210"),
    size=(lambda t: first(t, to=lambda v: v[:, 1:]), r"other sizes.*kohya LoRA.*: 1 of .* not \("),
    rank=(lambda t: first(t, to=lambda v: v[1:]), r"one rank.*kohya LoRA.*: 1 of 70 layers"),
    empty_matrices=(
        lambda t: {k: v[:0] if k.endswith("down.weight") else v[:, :0] if k.endswith("up.weight") else v for k, v in t.items()},
        r"one rank.*70 of 70",
    ),
    integers=(lambda t: {k: v if k.endswith("alpha") else v.to(torch.int8) for k, v in t.items()}, r"floating-point"),
    loha=(
        lambda t: {k.replace("lora_down.weight", "hada_w1_a").replace("lora_up.weight", "hada_w1_b"): v for k, v in t.items()},
        r"LyCORIS LoHa.*: 140 of 210 tensors, first lora_unet_.*hada_w1_",
    ),
    lokr=(
        lambda t: {k.replace("lora_down.weight", "lokr_w1").replace("lora_up.weight", "lokr_w2"): v for k, v in t.items()},
        r"LyCORIS LoKr.*: 140 of 210",
    ),
    tucker=(
        lambda t: t | {k.replace("alpha", "lora_mid.weight"): torch.ones(2, 2, 1, 1) for k in t if k.endswith("alpha")},
        r"LyCORIS LoCon.*: 70 of 280",
    ),
    difference=(
        lambda t: t | {"lora_unet_conv_in.diff": torch.ones(2)},
        r"LyCORIS difference.*: 1 of 211 tensors, first lora_unet_conv_in.diff",
    ),
    text_encoder=(
        lambda t: t | {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)},
        r"kohya LoRA.*text encoder too: 1 of 211 tensors, first lora_te_",
    ),
    flux=(
        lambda t: {k.replace("unet_down_blocks_", "unet_double_blocks_"): v for k, v in t.items()},
        r"kohya LoRA for FLUX.*: \d+ of 210 tensors, first lora_unet_double",
    ),
    checkpoint=(
        lambda t: {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)},
        r"file without LoRA names for SDXL|file without LoRA names.*: 1 of 1 tensors, first model.diffusion",
    ),
    peft_loha=(lambda t: {"base_model.model.conv_in.hada_w1_a": torch.ones(2)}, r"peft LoHa.*: 1 of 1 tensors"),
    bias=(lambda t: t | {"unet.conv_in.bias": torch.ones(2)}, r": 1 of 211 tensors, first unet.conv_in.bias"),
    twice=(lambda t: t | {k.replace("lora_unet_", "unet_"): v.clone() for k, v in t.items()}, r"\d+ of 420 tensors"),
    nothing=(lambda t: {}, r"holds no tensors"),
)


@pytest.fixture(scope="module")
def carrier():
    "A pipeline with a style, which a refusal must leave as it was."
    return styled()


def state_of(network):
    return (
        [n for n, _ in network.named_modules()],
        [(n, p.clone(), p.requires_grad) for n, p in network.named_parameters()],
        list(network.peft_config),
        [(l._disable_adapters, l.active_adapters) for l in lora_layers(network)],
        base_adapters(network),
    )


def unchanged(before, network):
    after = state_of(network)
    assert before[0] == after[0] and before[2:4] == after[2:4]
    assert all(m == n and torch.equal(p, q) for (m, p, _), (n, q, _) in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_kind_count_and_first_key(file, layers, carrier, case):
    change, message = BAD[case]
    before = state_of(carrier.unet)
    with pytest.raises(ValueError, match=f"adapter must .*{message}"):
        load(carrier, adapter=file(change(kohya(layers))))
    unchanged(before, carrier.unet)


@pytest.mark.parametrize("format, told", [("kohya", "kohya LoRA for SDXL"), ("diffusers", "diffusers LoRA for SDXL")])
@pytest.mark.parametrize("notes", [True, False])
def test_a_file_of_sdxl_on_sd(carrier, file, format, told, notes, tmp_path):
    xl = tiny_xl()
    add_lora(xl.unet, 2)
    path = export_lora(load(xl, adapter=None), tmp_path / "xl.safetensors", format)
    tensors, before = load_file(path), state_of(carrier.unet)
    with pytest.raises(ValueError, match=rf"adapter must .*{told}.*: \d+ of \d+ tensors, first (lora_unet|unet)"):
        load(carrier, adapter=path if notes else file(tensors))
    unchanged(before, carrier.unet)
    assert len(load(tiny_xl(), adapter=path if notes else file(tensors)).parameters()) == len(
        [k for k in tensors if not k.endswith("alpha")]
    )


def test_every_layer_of_an_sdxl_file_has_its_alpha(file, tmp_path):
    model = load(tiny_xl(), rank=2)
    tensors = load_file(export_lora(model, tmp_path / "xl.safetensors", "kohya"))
    alphas = sorted(k for k in tensors if k.endswith(".alpha"))
    tensors |= {k: torch.tensor(float(n % 5 + 1)) for n, k in enumerate(alphas)}
    again = load(tiny_xl(), adapter=file(tensors))
    scales = [m.scaling["default"] for m in lora_layers(again.network)]
    assert sorted(scales) == sorted(float(tensors[k]) / 2 for k in alphas)
    for k in alphas:
        published = k.removesuffix(".alpha")
        (layer,) = [
            m for m in lora_layers(again.network) if torch.equal(m.lora_A["default"].weight, tensors[f"{published}.lora_down.weight"])
        ]
        assert layer.scaling["default"] == float(tensors[k]) / 2


def test_a_layer_that_the_metadata_promise_must_be_there(tmp_path):
    model = load(opened(), rank=2)
    path = model.save(tmp_path)
    tensors, notes = load_file(path), metadata(path)
    gone = [k for k in tensors if "mid_block" in k and "attn1.to_q" in k]
    save_file({k: v for k, v in tensors.items() if k not in gone}, path, notes)
    pipe = opened()
    names = [n for n, _ in pipe.unet.named_modules()]
    with pytest.raises(ValueError, match=r"whole.*diffusers LoRA.*: 2 of \d+ tensors .*mid_block"):
        load(pipe, adapter=path)
    assert [n for n, _ in pipe.unet.named_modules()] == names and not lora_layers(pipe.unet)
    load(pipe, adapter=None)
    assert torch.equal(drawn(pipe), drawn(opened()))


def test_two_words_for_one_scale_are_refused(file, tmp_path):
    model = load(opened(), rank=2)
    path = model.save(tmp_path)
    tensors = load_file(path)
    tensors |= {k.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for k in tensors if "lora_A" in k}
    with pytest.raises(ValueError, match="one thing of its scale"):
        load(opened(), adapter=file(tensors, metadata(path)))
    tensors = {k: torch.tensor(2.0) if k.endswith("alpha") else v for k, v in tensors.items()}
    load(opened(), adapter=file(tensors, metadata(path)))


# a style belongs to the base


def ours(pipe, std=0.2, **options):
    model = load(pipe, rank=2, **options)
    moved(model.parameters(), std)
    return model


@pytest.mark.parametrize(
    "style",
    [dict(), dict(name="default"), dict(targets=["ff.net.2", "conv1"]), dict(use_dora=True), dict(lora_alpha=5, use_rslora=True)],
    ids=["some layers", "our name", "other layers", "dora", "scaled"],
)
def test_weight_0_is_the_styled_pipeline(style, tmp_path):
    styled_picture = drawn(styled(**style))
    model = ours(styled(**style))
    names = tuned_adapters(model.network)
    assert len(names) == 1 and base_adapters(model.network) == (style.get("name", "style"),)
    tuned = drawn(model.pipe)
    assert differ(tuned, styled_picture) and differ(styled_picture, drawn(opened()))
    for fused in (True, False):
        with annealed(model.pipe, "base", fused=fused):
            close(drawn(model.pipe), styled_picture)
        with annealed(model.pipe, "linear", fused=fused):
            mixed = drawn(model.pipe, 3)
        with annealed(model.pipe, "linear", fused=False):
            close(mixed, drawn(model.pipe, 3))
    assert torch.equal(drawn(model.pipe), tuned)
    assert torch.equal(
        sample(model, PROMPTS, weight="base", steps=2).images, sample(load(styled(**style), adapter=None), PROMPTS, steps=2).images
    )
    learns = {n for n, p in model.network.named_parameters() if p.requires_grad}
    assert learns and all(f".{names[0]}." in n for n in learns)
    path = model.save(tmp_path)  # ours alone, and again on the styled base
    assert len(load_file(path)) == len(model.parameters())
    close(drawn(load(styled(**style), adapter=path).pipe), tuned)
    alone = opened()
    alone.load_lora_weights(tmp_path)
    assert differ(drawn(alone), tuned)


def test_a_style_that_was_switched_off_stays_off():
    pipe = styled()
    pipe.disable_lora()
    model = ours(pipe)
    with annealed(model.pipe, "base"):
        close(drawn(model.pipe), drawn(opened()))
    assert differ(drawn(model.pipe), drawn(opened()))


def test_styles_keep_their_weights():
    def two():
        pipe = styled("b", targets=["ff.net.2"], pipe=styled("a"))
        pipe.set_adapters(["a", "b"], [0.5, 1.5])
        return pipe

    model = ours(two())
    with annealed(model.pipe, "base"):
        close(drawn(model.pipe), drawn(two()))
    assert base_adapters(model.network) == ("a", "b") and tuned_adapters(model.network) == ["default"]


def test_training_moves_ours_alone(tmp_path):
    from draft_nb.rewards import load_reward
    from draft_nb.train import DRaFTConfig, fit

    model = load(styled(), rank=2)
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    config = DRaFTConfig(
        max_steps=2,
        batch_size=2,
        num_inference_steps=2,
        grad_steps=1,
        kl_coeff=1.0,
        ema_decay=0.9,
        prefix="merged",
        seed=0,
        log_with=None,
        output_dir=str(tmp_path / "run"),
    )
    run = fit(model, load_reward("tiny"), PROMPTS, config, progress=False)
    changed = {n for n, p in model.network.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".default." in n for n in changed)
    assert run.history.kl.iloc[0] == pytest.approx(0, abs=1e-10)  # B = 0: base and tuned are both base + style
    assert not any("style" in k for k in load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors"))
    close(drawn(load(styled(), adapter=tmp_path / "run").pipe), drawn(model.pipe))


def test_rows_copies_scales_and_recommendations_with_a_style():
    model = ours(styled())
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, model.network.config.cross_attention_dim)

    def run(net, twice=False):
        return net(*(torch.cat([v, v]) if twice and v.ndim else v for v in (x, t, text)), return_dict=False)[0]

    with torch.no_grad():
        tuned = run(model.network)
        with base_of(model.network) as net:
            base = run(net)
        assert fusable(model.network)
        for on in ([0, 0, 1, 1], [1, 0, 0, 1]):
            with lora_rows(model.network, torch.tensor(on, dtype=torch.float)):
                both = run(model.network, True)
            close(both, torch.stack([(tuned if o else base)[k % 2] for k, o in enumerate(on)]))
        plain = plain_copy(model.network)
        close(run(plain), tuned)
        moved(model.parameters(), 0.1)
        model.update_prefix(plain)
        close(run(plain), run(model.network))
        with lora_scale(model.network, 0):
            close(run(model.network), base)
    recommend(model.network, "power_2")
    assert model.recommended == recommended(model.network) == "power_2" and not model.network.peft_config["style"].auto_mapping
    assert "48 layers" not in repr(model) and f"LoRA on {len(lora_layers(model.network, ['default']))} layers" in repr(model)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "merged"])
def test_export_with_a_style(format, tmp_path):
    model = ours(styled(), alpha=1)
    path = export_lora(model, tmp_path / "out", format)
    if format == "merged":
        pipe = StableDiffusionPipeline.from_pretrained(path)
        assert not lora_layers(pipe.unet)
        close(drawn(pipe), drawn(model.pipe))
    else:
        assert len([k for k in load_file(path) if not k.endswith("alpha")]) == len(model.parameters())
        close(drawn(load(styled(), adapter=path).pipe), drawn(model.pipe))
    assert tuned_adapters(model.network) == ["default"] and len(lora_layers(model.network, ["style"]))


def test_a_style_of_the_text_encoder_too(tmp_path):
    pipe = styled()
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "style")
    moved([p for n, p in pipe.text_encoder.named_parameters() if "lora_" in n])
    expected = drawn(pipe)
    assert differ(expected, drawn(styled()))
    model = ours(pipe)
    with annealed(pipe, "base"):
        close(drawn(pipe), expected)
    for format in ("diffusers", "merged"):
        path = export_lora(model, tmp_path / format, format)
    close(drawn(StableDiffusionPipeline.from_pretrained(path)), drawn(pipe))


def test_no_second_lora_of_ours_and_none_under_full_fine_tuning():
    model = load(opened(), rank=2)
    with pytest.raises(ValueError, match="already carries a LoRA"):
        load(model.pipe, rank=2)
    pipe = styled()
    before = state_of(pipe.unet)
    with pytest.raises(ValueError, match='"full" needs a pipeline without LoRA.* the unet carries style'):
        load(pipe, adapter="full")
    unchanged(before, pipe.unet)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="must not be fused"):
        load(pipe)
    pipe.unload_lora_weights()
    load(pipe, adapter="full")


@pytest.mark.parametrize(
    "options, told",
    [(dict(bias="all"), "bias='all'"), (dict(bias="lora_only"), "lora_only"), (dict(modules_to_save=["conv_out"]), "modules_to_save")],
)
def test_what_cannot_be_switched_off_is_refused(options, told):
    pipe = opened()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], **options), "style")
    with pytest.raises(ValueError, match=f"leave the base as it is.*{told}"):
        load(pipe)
    with pytest.raises(ValueError, match=f"leave the base as it is.*{told}"), annealed(pipe, "linear"):
        pass


def test_a_name_that_layers_have_is_refused():
    with pytest.raises(ValueError, match="must not be a part of the names of layers; got 'net'"):
        load(styled("net"))


# annealed on a pipeline of somebody else


def test_several_loras_of_a_stock_pipeline():
    def two():
        return styled("b", targets=["ff.net.2", "to_q"], pipe=styled("a", targets=["to_v"]))

    pipe, a, none = two(), drawn(styled("a", targets=["to_v"])), drawn(opened())
    both = drawn(pipe)
    with (
        pytest.raises(ValueError, match=r"adapter must name the tuned LoRA where a pipe carries several \(a, b\)"),
        annealed(pipe, "linear"),
    ):
        pass
    with pytest.raises(ValueError, match=r"adapter must name LoRAs that act .*\(a, b\); got 'c'"), annealed(pipe, "linear", adapter="c"):
        pass
    for fused in (True, False):
        for adapter, base in ("b", a), (["a", "b"], none):
            with annealed(pipe, "base", adapter=adapter, fused=fused):
                close(drawn(pipe), base)
            with annealed(pipe, "draft", adapter=adapter, fused=fused):
                close(drawn(pipe), both)
            with annealed(pipe, "constant_0.5", adapter=adapter, fused=fused):
                half = drawn(pipe)
            with annealed(pipe, "constant_0.5", adapter=adapter, fused=not fused):
                close(drawn(pipe), half)
            assert differ(half, base) and differ(half, both)
    assert base_adapters(pipe.unet) == () and torch.equal(drawn(pipe), both)
    with annealed(pipe, "linear", adapter="b"):
        with (
            pytest.raises(ValueError, match="same in all blocks that are open; b is switched already, got a"),
            annealed(pipe, "linear", adapter="a"),
        ):
            pass
    pipe.set_adapters(["b"])  # the other is there, but does not act
    with annealed(pipe, "base"):
        close(drawn(pipe), none)


def test_several_tuned_ones_keep_their_proportions():
    pipe = styled("b", targets=["ff.net.2"], pipe=styled("a", targets=["to_v"]))
    pipe.set_adapters(["a", "b"], [0.7, 0.3])
    expected = drawn(pipe)
    with annealed(pipe, "draft", adapter=["a", "b"]):
        close(drawn(pipe), expected)
    with lora_scale(pipe.unet, 0.5):
        halved = drawn(pipe)
    pipe.set_adapters(["a", "b"], [0.35, 0.15])
    close(halved, drawn(pipe))


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["to_q"]),
        LoKrConfig(r=2, target_modules=["to_q"]),
        OFTConfig(r=0, oft_block_size=4, target_modules=["to_q"]),
    ],
    ids=["loha", "lokr", "oft"],
)
def test_other_adapters_take_two_passes(config, tmp_path):
    def carrying():
        pipe = opened()
        pipe.unet.add_adapter(config, "style")
        moved([p for n, p in pipe.unet.named_parameters() if ".style" in n or "_style" in n], 0.3)
        return pipe

    pipe, none = carrying(), drawn(opened())
    tuned = drawn(pipe)
    assert differ(tuned, none) and not fusable(pipe.unet)
    with annealed(pipe, "base"):
        close(drawn(pipe), none)
    with annealed(pipe, "draft"):
        close(drawn(pipe), tuned)
    with annealed(pipe, "constant_0.5"):
        half = drawn(pipe)
    assert differ(half, tuned) and differ(half, none) and torch.equal(drawn(pipe), tuned)
    model = ours(pipe)  # as a style
    assert not fusable(model.network) and differ(drawn(pipe), tuned)
    with annealed(pipe, "base"):
        close(drawn(pipe), tuned)
    with pytest.raises(ValueError, match="prefix must be network"):
        plain_copy(model.network)
    close(drawn(load(carrying(), adapter=model.save(tmp_path)).pipe), drawn(pipe))


def test_the_tuned_lora_must_not_be_on_the_text_encoder():
    pipe = styled("fox")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "fox")
    with pytest.raises(ValueError, match="so that weight 0 is the base; fox is on the text_encoder too"), annealed(pipe, "linear"):
        pass


def test_adding_twice_and_a_style_under_a_bare_network():
    pipe = styled()
    add_lora(pipe.unet, 2)
    assert [n for n in tuned_adapters(pipe.unet)] == ["default"] and len(trainable(pipe.unet)) == 2 * len(
        lora_layers(pipe.unet, ["default"])
    )
    with pytest.raises(ValueError, match="already carries a LoRA"):
        add_lora(pipe.unet, 2)
