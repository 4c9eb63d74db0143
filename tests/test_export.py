"Files for elsewhere: stock diffusers draws the same picture from each of them."
import hashlib
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from draft_nb import export
from draft_nb.adapters import LORA_TARGETS, add_lora, lora_layers
from draft_nb.export import export_lora, kohya_state, original_block, push_to_hub, trained
from draft_nb.models import asset, load
from draft_nb.sampler import sample
from draft_nb.train import Run

PROMPTS = ["a fox", "a red rose"]


def tiny_xl():
    "SDXL's layout at a hundredth of the width: three levels, attention on two, two layers a block."
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=2, attention_head_dim=(1, 2, 2), cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    tokenizer = CLIPTokenizer.from_pretrained(asset("tiny/tokenizer"))
    text = CLIPTextConfig(vocab_size=3072, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
                          projection_dim=16, bos_token_id=3070, eos_token_id=3071, pad_token_id=3071)
    return StableDiffusionXLPipeline(vae, CLIPTextModel(text), CLIPTextModelWithProjection(text), tokenizer, tokenizer, unet,
                                     EulerDiscreteScheduler(), add_watermarker=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Folders of untouched pipelines."
    folder = tmp_path_factory.mktemp("xl")
    tiny_xl().save_pretrained(folder)
    return {"sd": (StableDiffusionPipeline, str(asset("tiny"))), "sdxl": (StableDiffusionXLPipeline, str(folder))}


def opened(base):
    kind, folder = base
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tuned(base, rank=4, alpha=2, std=.2, config=None, **options):
    "A model whose LoRA does something, and whose alpha is not its rank."
    model = load(opened(base), adapter=None)
    if config is None:
        add_lora(model.network, rank, alpha=alpha, **options)
    else:
        model.network.add_adapter(config)
    for k, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(k))
    return model


def drawn(pipe):
    "By the stock pipeline alone."
    noise = torch.randn(2, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size, generator=torch.Generator().manual_seed(1))
    return pipe(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=2., output_type="pt").images


def header(file):
    with safe_open(file, "pt") as f:
        return f.metadata()


def same(a, b, tolerance=1e-4):
    return (a - b).abs().max() < tolerance


@pytest.mark.parametrize("format", ["diffusers", "kohya", "merged"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_stock_diffusers_draws_the_same_picture(bases, kind, format, tmp_path):
    model = tuned(bases[kind])
    ours, untouched = drawn(model.pipe), drawn(opened(bases[kind]))
    assert not same(ours, untouched, 1e-2)
    path = export_lora(model, tmp_path / "out", format)
    if format == "merged":
        pipe = opened((bases[kind][0], path))
        assert not lora_layers(pipe.unet)
    else:
        pipe = opened(bases[kind])
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    assert same(drawn(pipe), ours)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_and_load_takes_it_back(bases, kind, format, tmp_path):
    model = tuned(bases[kind])
    file = export_lora(model, tmp_path / "named.safetensors", format)
    assert file == tmp_path / "named.safetensors"
    again = load(opened(bases[kind]), adapter=file)
    assert same(drawn(again.pipe), drawn(model.pipe)) and len(again.parameters()) == len(model.parameters())


@pytest.mark.parametrize("options", [dict(use_rslora=True), dict(rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 5})], ids=["rslora", "patterns"])
def test_a_scale_of_each_layer_is_kept(bases, options, tmp_path):
    model = tuned(bases["sd"], config=LoraConfig(r=4, lora_alpha=3, target_modules=LORA_TARGETS, **options))
    pipe = opened(bases["sd"])
    file = export_lora(model, tmp_path, "kohya")
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    assert same(drawn(pipe), drawn(model.pipe))


# the published names, written down from the format and not from the code

def unet(**config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def targets(network):
    return [n for n, _ in network.named_modules() if n.endswith(tuple(LORA_TARGETS))]


PARTS = [f"{a}_{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out_0")] + ["ff_net_0_proj", "ff_net_2"]


def test_names_of_a_whole_sdxl():
    network = unet(sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
                   down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                   transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                   projection_class_embeddings_input_dim=2816)
    depth = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10, "middle_block_1": 10,
             "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10, "output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2}
    published = {f"{block}_transformer_blocks_{k}_{part}" for block, n in depth.items() for k in range(n) for part in PARTS}
    ours = [original_block(n, network.config.layers_per_block).replace(".", "_") for n in targets(network)]
    assert len(ours) == len(published) == 700 and set(ours) == published


def test_names_in_a_file(bases):
    blocks = [f"{side}_blocks_{b}_attentions_{k}" for side, n in (("down", 2), ("up", 3)) for b in range(3) for k in range(n)] + ["mid_block_attentions_0"]
    for kind in bases:
        model = tuned(bases[kind])
        state = kohya_state(model)
        roots = {k.partition(".")[0] for k in state}
        assert set(state) == {f"{r}.{e}" for r in roots for e in ("lora_down.weight", "lora_up.weight", "alpha")}
        assert len(roots) == len(lora_layers(model.network))
        if kind == "sd":
            assert roots <= {f"lora_unet_{b}_transformer_blocks_0_{p}" for b in blocks for p in PARTS}
        else:
            assert all(re.match("lora_unet_((in|out)put_blocks_[0-9]_1|middle_block_1)_transformer_blocks_[0-9]_", r) for r in roots)
        for root in roots:
            down, up, alpha = (state[f"{root}.{e}"] for e in ("lora_down.weight", "lora_up.weight", "alpha"))
            assert down.shape[0] == up.shape[1] == 4 and alpha.shape == () and alpha == 2


def test_a_kohya_file_from_elsewhere(bases, tmp_path):
    "Made by hand from the published names: one layer, fp16, a plain number as alpha."
    down, up = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    pipe = opened(bases["sd"])
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    down, up = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).half(), torch.randn(layer.out_features, 2, generator=torch.Generator().manual_seed(1)).half()
    root = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{root}.lora_down.weight": down, f"{root}.lora_up.weight": up, f"{root}.alpha": torch.tensor(1.)}, tmp_path / "k.safetensors")
    with torch.no_grad():
        layer.weight += 1 / 2 * up.float() @ down.float()
    theirs = load(opened(bases["sd"]), adapter=tmp_path / "k.safetensors")
    assert same(drawn(theirs.pipe), drawn(pipe)) and not same(drawn(pipe), drawn(opened(bases["sd"])), 1e-3)
    assert same(sample(theirs, PROMPTS, weight="base", steps=2).images, sample(load(opened(bases["sd"]), adapter=None), PROMPTS, steps=2).images)


def test_peft_names_and_older_diffusers_names_come_in(bases, tmp_path):
    model = tuned(bases["sd"], alpha=4, targets=["to_q", "to_k", "to_v", "to_out.0"])
    tensors = load_file(model.save(tmp_path))
    old = {}
    for key, value in tensors.items():
        name, _, matrix = key.rpartition(".lora_")
        name, _, part = re.fullmatch(r"(.*)\.(to_(q|k|v|out\.0))", name)[1], None, re.fullmatch(r"(.*)\.(to_(q|k|v|out\.0))", name)[2]
        old[f"{name}.processor.{part.removesuffix('.0')}_lora.{dict(A='down', B='up')[matrix[0]]}.weight"] = value
    for name, state in dict(peft=tensors, old=old).items():
        save_file(state, tmp_path / f"{name}.safetensors")
        assert same(drawn(load(opened(bases["sd"]), adapter=tmp_path / f"{name}.safetensors").pipe), drawn(model.pipe)), name


# what the header says

def test_the_header(bases, tmp_path):
    for kind, architecture, version in (("sd", "stable-diffusion-v1/lora", "sd_v1"), ("sdxl", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0")):
        file = export_lora(tuned(bases[kind]), tmp_path / kind, "kohya", title="My LoRA")
        assert file.name == "My-LoRA.safetensors"
        meta = header(file)
        assert {"modelspec.sai_model_spec", "modelspec.implementation", "modelspec.date"} <= set(meta)
        assert meta["modelspec.title"] == "My LoRA" and meta["modelspec.architecture"] == architecture
        assert (meta["ss_network_module"], meta["ss_network_dim"], meta["ss_network_alpha"], meta["ss_base_model_version"]) == ("networks.lora", "4", "2", version)
        assert "lora_adapter_metadata" not in meta  # it speaks of names that this file does not have
        content = file.read_bytes()
        assert meta["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content[8 + int.from_bytes(content[:8], "little"):]).hexdigest()


def test_the_recommended_weight_goes_along(bases, tmp_path):
    model = tuned(bases["sd"])
    model.save(tmp_path / "run", weight="power_2")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(dict(model="tiny", reward="tiny", max_steps=80)))
    for source in (model, tmp_path / "run"):
        for format in ("diffusers", "kohya"):
            meta = header(export_lora(source, tmp_path / "out", format))
            assert meta["draft_nb.weight"] == "power_2" and "power_2" in meta["modelspec.usage_hint"]
    assert meta["draft_nb.reward"] == "tiny" and meta["draft_nb.max_steps"] == meta["ss_max_train_steps"] == "80"


# runs

@pytest.fixture
def run(bases, tmp_path):
    "The folder of a finished run."
    model = tuned(bases["sd"])
    file = model.save(tmp_path / "run")
    save_file(load_file(file), file, header(file) | {"note": "kept"})
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(dict(model="tiny", reward="tiny", max_steps=80)))
    (tmp_path / "run" / "README.md").write_text("# card\n\n![grid](before_after.png)\n")
    (tmp_path / "run" / "before_after.png").write_bytes(b"grid")
    return tmp_path / "run", model


@pytest.mark.parametrize("format", ["diffusers", "kohya", "merged"])
def test_a_run_is_exported_from_its_folder(run, format, tmp_path, bases):
    folder, model = run
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    path = export_lora(Run(folder, [], {}, {}) if format == "kohya" else str(folder), tmp_path / "out", format)
    if format == "merged":
        pipe = opened((StableDiffusionPipeline, path))
    else:
        assert header(path)["note"] == "kept" and header(path)["modelspec.title"] == "tiny aligned with tiny"
        pipe = opened(bases["sd"])
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    assert same(drawn(pipe), drawn(model.pipe))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert all((tmp_path / "out" / name).read_bytes() == before[name] for name in ("README.md", "before_after.png"))


def test_a_card_that_is_there_stays(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    export_lora(run[0], tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_full_run(tmp_path):
    model = load("tiny", adapter="full")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    model.save(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(dict(model="tiny", reward="tiny")))
    for source in (model, tmp_path / "run"):
        path = export_lora(source, tmp_path / "out", "merged")
        again = opened((StableDiffusionPipeline, path))
        assert all(torch.equal(p, q) for p, q in zip(again.unet.parameters(), model.parameters(), strict=True))
        assert same(drawn(again), drawn(model.pipe))
        with pytest.raises(ValueError, match="holds a LoRA; .* has none"):
            export_lora(source, tmp_path / "k", "kohya")


def test_merging_leaves_the_model_as_it_was(bases, tmp_path, monkeypatch):
    model = tuned(bases["sd"])
    network, before, weights = model.network, drawn(model.pipe), [p.clone() for p in model.parameters()]
    export_lora(model, tmp_path / "out", "merged")

    def full(*_, **__):
        raise OSError("no space left on device")
    monkeypatch.setattr(model.pipe, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        export_lora(model, tmp_path / "more", "merged")
    assert model.network is network and torch.equal(drawn(model.pipe), before)
    assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(model.parameters(), weights, strict=True))


def test_refusals(bases, run, tmp_path):
    folder, model = run
    with pytest.raises(ValueError, match="one of diffusers, kohya, merged; got 'ckpt'"):
        export_lora(model, tmp_path / "x", "ckpt")
    with pytest.raises(ValueError, match="nothing to export"):
        export_lora(load("tiny", adapter=None), tmp_path / "x")
    with pytest.raises(ValueError, match="there is no .*config.yaml"):
        export_lora(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(ValueError, match="must be a folder or a .safetensors file"):
        export_lora(model, folder / "config.yaml")
    with pytest.raises(ValueError, match="writes a folder"):
        export_lora(model, tmp_path / "x.safetensors", "merged")
    with pytest.raises(ValueError, match="writes? .*to a folder|written to a folder"):
        export_lora(load("tiny", adapter="full"), tmp_path / "x.safetensors")
    (folder / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(ValueError, match="run must be finished"):
        export_lora(folder, tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.safetensors").exists()


def test_what_kohya_cannot_hold_is_refused(bases, tmp_path):
    dora = tuned(bases["sd"], config=LoraConfig(r=4, target_modules=["to_q"], use_dora=True))
    with pytest.raises(ValueError, match="plain LoRA; .*lora_magnitude_vector"):
        export_lora(dora, tmp_path / "x", "kohya")
    pipe = opened((StableDiffusionPipeline, export_lora(dora, tmp_path / "merged", "merged")))
    assert same(drawn(pipe), drawn(dora.pipe))
    conv = tuned(bases["sdxl"], targets=["conv1"])
    with pytest.raises(ValueError, match="attention blocks of SDXL; the LoRA is also on .*conv1"):
        export_lora(conv, tmp_path / "x", "kohya")
    model = tuned(bases["sd"])
    model.pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="there is one on the text_encoder, which would be lost"):
        export_lora(model, tmp_path / "x")
    other = SimpleNamespace(pipe=SimpleNamespace(), name="m")
    with pytest.raises(ValueError, match="for SD and SDXL; got SimpleNamespace"):
        kohya_state(other)
    assert not (tmp_path / "x").exists()


def test_trained_gives_a_model_back_as_it_is(bases):
    model = tuned(bases["sd"])
    assert trained(model)[0] is model


# the hub

class Hub:
    "A hub that writes down what it is asked."
    calls = []

    def __init__(self, token=None):
        self.calls.append(("login", token))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        files = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        self.calls.append(("upload", repo_id, sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns)), options))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_a_run_goes_up_without_its_checkpoints(run, monkeypatch):
    folder, _ = run
    for name in ("README.md", "before_after.png", "history.csv", "history.csv.part", "samples/step_000020.png", "checkpoints/step_000020.pt",
                 "checkpoints/step_000040/state.safetensors", "draft_nb/1/events.out.tfevents.1", ".cache/huggingface/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    assert push_to_hub(folder, "fox", private=True, token="t") == "https://hub/me/fox/commit/1"
    login, create, upload = Hub.calls
    assert login == ("login", "t") and create == ("create", "fox", dict(private=True, exist_ok=True))
    assert upload[1:3] == ("me/fox", ["README.md", "before_after.png", "config.yaml", "history.csv", "pytorch_lora_weights.safetensors", "samples/step_000020.png"])
    assert "run" in upload[3]["commit_message"]


def test_nothing_is_asked_of_the_hub_for_bad_input(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    with pytest.raises(ValueError, match="holds neither"):
        push_to_hub(tmp_path, "me/fox")
    with pytest.raises(ValueError, match="repo_id must be owner/name"):
        push_to_hub(run[0], "me/my fox")
    assert Hub.calls == []


def test_the_options_are_those_of_huggingface_hub():
    "The fake above takes anything; the real one must too."
    import inspect

    from huggingface_hub import HfApi
    assert {"repo_id", "private", "exist_ok"} <= set(inspect.signature(HfApi.create_repo).parameters)
    assert {"repo_id", "folder_path", "commit_message", "revision", "create_pr", "ignore_patterns"} <= set(inspect.signature(HfApi.upload_folder).parameters)
