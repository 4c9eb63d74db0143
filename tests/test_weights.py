"A network has all its numbers from its files, or it is refused: tiny networks of the real classes, whose files lack something."
import json
import re
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_families import build

from draft_nb.metrics import load_features
from draft_nb.models import asset, check_weights, load, weight_files

PARTS = [("sd1", "unet"), ("sd1", "vae"), ("sd1", "text_encoder"), ("sdxl", "text_encoder_2"), ("pixart", "text_encoder"), ("pixart", "transformer"),
         ("sd3", "text_encoder"), ("sd3", "text_encoder_3"), ("sd3", "transformer"), ("flux-dev", "transformer"), ("sana", "text_encoder"), ("sana", "vae"),
         ("sana", "transformer")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Folders of whole pipelines, made once."
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(made[kind])
        return made[kind]
    return folder


def changed(folder, part, tmp_path, change):
    "A copy of a pipeline's folder in which one file is another."
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file, = weight_files(copy / part)
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})
    return copy, file


def matrix(tensors):
    "The name of a matrix that is not at the end."
    return [k for k in sorted(tensors) if tensors[k].ndim == 2 and k.endswith("weight")][0]


def refused(folder, *words):
    with pytest.raises(ValueError) as e:
        load(str(folder), adapter=None, device="cpu")
    for word in words:
        assert str(word) in str(e.value), (word, str(e.value))
    return str(e.value)


@pytest.mark.parametrize("kind, part", PARTS)
def test_a_file_that_lacks_a_tensor(kind, part, saved, tmp_path):
    "Of the tensor that counts and of a bias: file, count and name are said."
    whole = load_file(weight_files(saved(kind) / part)[0])
    lost = [matrix(whole), next((k for k in whole if k.endswith("bias")), None)]
    lost = [k for k in lost if k]
    copy, file = changed(saved(kind), part, tmp_path, lambda t: {k: v for k, v in t.items() if k not in lost})
    message = refused(copy, file, f"{len(lost)} (")
    assert any(k in message for k in lost)


@pytest.mark.parametrize("kind, part", PARTS)
def test_a_file_with_a_tensor_of_another_shape(kind, part, saved, tmp_path):
    def grow(t):
        name = matrix(t)
        return t | {name: torch.zeros(t[name].shape[0] + 1, t[name].shape[1])}
    name = matrix(load_file(weight_files(saved(kind) / part)[0]))
    copy, file = changed(saved(kind), part, tmp_path, grow)
    refused(copy, file, f"1 ({name} (", "instead of", "shape")


@pytest.mark.parametrize("kind, part", PARTS)
def test_a_file_under_other_names(kind, part, saved, tmp_path):
    "A library that does not know the names keeps its random numbers."
    copy, file = changed(saved(kind), part, tmp_path, lambda t: {f"other.{k}": v for k, v in t.items()})
    count = int(re.search(r": (\d+) \(", refused(copy, file))[1])
    assert count > 5


def test_numbers_that_a_library_put_there_itself(saved):
    "Whatever the library reports: the names are right, the numbers are not the file's."
    for part in ("unet", "vae", "text_encoder"):
        network = getattr(build("sd1"), part)
        check_weights(network, saved("sd1") / part)
        name, p = next((n, p) for n, p in network.named_parameters() if p.ndim > 1)
        torch.nn.init.normal_(p)
        with pytest.raises(ValueError, match=rf"1 \({re.escape(name)}\) missing"):
            check_weights(network, saved("sd1") / part)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "pixart", "sd3", "sd3.5", "flux-dev", "flux-schnell", "sana"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_folders_load(kind, dtype, saved):
    assert load(str(saved(kind)), adapter=None, device="cpu", dtype=dtype).dtype == dtype


@pytest.mark.parametrize("kind, how", [("sd1", "shards"), ("sd3", "shards"), ("sana", "shards"), ("sd1", "bin"), ("pixart", "bin"), ("sd1", "half")])
def test_files_in_other_forms(kind, how, tmp_path):
    "Shards, pickled tensors and half precision load; without one tensor they are refused."
    pipe = build(kind)
    if how == "half":
        pipe.to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "p", max_shard_size="5KB" if how == "shards" else "1GB", safe_serialization=how != "bin")
    if how == "bin":  # transformers no longer writes them
        for part in (n for n, m in pipe.components.items() if isinstance(m, torch.nn.Module) and n.startswith("text_encoder")):
            torch.save(load_file(tmp_path / "p" / part / "model.safetensors"), tmp_path / "p" / part / "pytorch_model.bin")
            (tmp_path / "p" / part / "model.safetensors").unlink()
    load(str(tmp_path / "p"), adapter=None, device="cpu", dtype=torch.float32)
    for part in (n for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)):
        files = weight_files(tmp_path / "p" / part)
        assert len(files) > 1 or how != "shards" or part == "vae"
        for file in files:
            tensors = torch.load(file, weights_only=True) if how == "bin" else load_file(file)
            if names := [k for k, v in tensors.items() if v.ndim > 1]:
                break
        del tensors[names[0]]
        before = file.read_bytes()
        torch.save(tensors, file) if how == "bin" else save_file(tensors, file, metadata={"format": "pt"})
        refused(tmp_path / "p", tmp_path / "p" / part, "1 (", "missing")
        file.write_bytes(before)


def test_names_that_a_library_maps_itself_are_right(saved, tmp_path):
    "The names of every Stable Diffusion on the hub: transformers has dropped their prefix, and knows it."
    copy, _ = changed(saved("sd1"), "text_encoder", tmp_path, lambda t: {f"text_model.{k.removeprefix('text_model.')}": v for k, v in t.items()})
    assert load(str(copy), adapter=None, device="cpu").name == str(copy)


def test_positions_may_be_absent_or_there(saved, tmp_path):
    "Older files hold them as integers."
    copy, _ = changed(saved("sd1"), "text_encoder", tmp_path, lambda t: t | {"embeddings.position_ids": torch.arange(32)[None]})
    load(str(copy), adapter=None, device="cpu")


def test_a_pipeline_from_the_hub_s_cache(saved, tmp_path, monkeypatch):
    "Found where huggingface_hub keeps it; with its own name, not that of the cache."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(saved("sd1"), snapshot)
    model = load("owner/tiny", adapter=None, device="cpu")
    assert model.name == "owner/tiny" and model.pipe.config._name_or_path == "owner/tiny"
    file, = weight_files(snapshot / "text_encoder")
    tensors = load_file(file)
    del tensors[matrix(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})
    refused("owner/tiny", file, "1 (")


def test_a_component_without_weights(saved, tmp_path):
    with pytest.raises(ValueError, match="must come with its weights"):
        weight_files(tmp_path)


# one file

def original(tensors, pairs):
    "Names as the authors of Stable Diffusion have them."
    out = {}
    for k, v in tensors.items():
        for there, here in pairs:
            k = k.replace(here, there)
        out[k] = v
    return out


def single(pipe):
    "The checkpoint of a tiny Stable Diffusion in its authors' layout: two levels, one layer each."
    unet = [("time_embed.0.", "time_embedding.linear_1."), ("time_embed.2.", "time_embedding.linear_2."), ("input_blocks.0.0.", "conv_in."), ("out.0.", "conv_norm_out."),
            ("out.2.", "conv_out."), ("input_blocks.1.0.", "down_blocks.0.resnets.0."), ("input_blocks.2.0.op.", "down_blocks.0.downsamplers.0.conv."),
            ("input_blocks.3.0.", "down_blocks.1.resnets.0."), ("input_blocks.3.1.", "down_blocks.1.attentions.0."), ("middle_block.0.", "mid_block.resnets.0."),
            ("middle_block.1.", "mid_block.attentions.0."), ("middle_block.2.", "mid_block.resnets.1."), ("output_blocks.0.0.", "up_blocks.0.resnets.0."),
            ("output_blocks.0.1.", "up_blocks.0.attentions.0."), ("output_blocks.1.0.", "up_blocks.0.resnets.1."), ("output_blocks.1.1.", "up_blocks.0.attentions.1."),
            ("output_blocks.1.2.", "up_blocks.0.upsamplers.0."), ("output_blocks.2.0.", "up_blocks.1.resnets.0."), ("output_blocks.3.0.", "up_blocks.1.resnets.1.")]
    block = [("in_layers.0.", "norm1."), ("in_layers.2.", "conv1."), ("out_layers.0.", "norm2."), ("out_layers.3.", "conv2."), ("emb_layers.1.", "time_emb_proj."),
             ("skip_connection.", "conv_shortcut.")]
    out = {}
    for k, v in original(pipe.unet.state_dict(), unet).items():
        resnet = re.match(r"(input_blocks\.\d+\.0|middle_block\.[02]|output_blocks\.\d+\.0)\.", k) and k != "input_blocks.0.0.weight"
        out["model.diffusion_model." + (next(iter(original({k: v}, block))) if resnet else k)] = v
    vae = [("mid.attn_1.", "mid_block.attentions.0."), ("mid.block_1.", "mid_block.resnets.0."), ("mid.block_2.", "mid_block.resnets.1."), ("nin_shortcut", "conv_shortcut"),
           ("norm_out", "conv_norm_out"), (".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")]
    for i in (0, 1):
        vae += [(f"encoder.down.{i}.block.", f"encoder.down_blocks.{i}.resnets."), (f"down.{i}.downsample.", f"down_blocks.{i}.downsamplers.0."),
                (f"decoder.up.{1-i}.block.", f"decoder.up_blocks.{i}.resnets."), (f"up.{1-i}.upsample.", f"up_blocks.{i}.upsamplers.0.")]
    for k, v in original(pipe.vae.state_dict(), vae).items():
        out["first_stage_model." + k] = v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v
    for k, v in pipe.text_encoder.state_dict().items():
        out["cond_stage_model.transformer.text_model." + k.removeprefix("text_model.")] = v
    return {k: v.contiguous() for k, v in out.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A checkpoint in one file, and the folder of its settings."
    folder = tmp_path_factory.mktemp("single")
    pipe = build("sd1")
    small = pipe.unet.config | dict(layers_per_block=1)
    pipe.unet = type(pipe.unet).from_config(small)
    pipe.vae = type(pipe.vae).from_config(pipe.vae.config)
    pipe.save_pretrained(folder / "settings")
    for file in (folder / "settings").rglob("*.safetensors"):
        file.unlink()
    return single(pipe), folder / "settings", pipe


def test_a_whole_file_loads(checkpoint, tmp_path):
    tensors, settings, pipe = checkpoint
    save_file(tensors, tmp_path / "m.safetensors")
    model = load(str(tmp_path / "m.safetensors"), adapter=None, config=settings, device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        for (n, a), b in zip(getattr(pipe, part).state_dict().items(), getattr(model.pipe, part).state_dict().values()):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=f"{part} {n}")


@pytest.mark.parametrize("lost, ours", [
    ("model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    ("model.diffusion_model.out.2.bias", "conv_out.bias"),
    ("first_stage_model.post_quant_conv.weight", "post_quant_conv.weight"),
    ("first_stage_model.decoder.conv_out.bias", "decoder.conv_out.bias"),
    ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight", "encoder.layers.1.mlp.fc1.weight"),
    ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "final_layer_norm.bias"),
])
def test_one_file_that_lacks_a_tensor(lost, ours, checkpoint, tmp_path):
    tensors, settings, _ = checkpoint
    file = tmp_path / "m.safetensors"
    save_file({k: v for k, v in tensors.items() if k != lost}, file)
    with pytest.raises(ValueError, match=re.escape(str(file)) + r".*1 \(.*" + re.escape(ours)):
        load(str(file), adapter=None, config=settings, device="cpu")


@pytest.mark.parametrize("lost", ["cond_stage_model", "first_stage_model", "model.diffusion_model"])
def test_one_file_that_lacks_a_network(lost, checkpoint, tmp_path):
    tensors, settings, _ = checkpoint
    file = tmp_path / "m.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith(lost)}, file)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load(str(file), adapter=None, config=settings, device="cpu")


def test_one_file_with_a_tensor_of_another_shape(checkpoint, tmp_path):
    tensors, settings, _ = checkpoint
    file = tmp_path / "m.safetensors"
    save_file(tensors | {"first_stage_model.decoder.conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=re.escape(str(file)) + r".*1 \(decoder.conv_in.bias \(3,\) instead of \(16,\)\)"):
        load(str(file), adapter=None, config=settings, device="cpu")


# features

@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "vit"])
@pytest.mark.parametrize("how", ["lack", "shape", "names"])
def test_dino(kind, how, tmp_path):
    from test_metrics import dino
    dino(kind, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in sorted(tensors) if tensors[k].ndim == 2 and not k.startswith("pooler"))
    if how == "lack":
        del tensors[name]
    elif how == "shape":
        tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])
    else:
        tensors = {f"other.{k}": v for k, v in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(str(file)) + (r".*1 \(" if how != "names" else r".*\d\d \(")):
        load_features(f"dino:{tmp_path}", "cpu")


def test_a_vit_may_lack_its_pooler(tmp_path):
    "DINO was published without; the class token is taken before it."
    from test_metrics import dino
    dino("vit", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("pooler")}, file, metadata={"format": "pt"})
    load_features(f"dino:{tmp_path}", "cpu")


def test_the_shipped_pipeline_is_whole():
    pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    for part in ("unet", "vae", "text_encoder"):
        check_weights(getattr(pipe, part), asset("tiny") / part)
    assert json.loads((asset("tiny") / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
