"""The published rewards without the hub: files with the published key names and shapes, written here from the architecture.

Each goes through our loader and through another path: open_clip's or transformers' own forward, timm, or plain torch, on
pictures that PIL prepared. The full size is compared by names and shapes; with DRAFT_NB_FULL_SIZE=1 also by scores.
"""
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from draft_nb import rewards as R
from draft_nb.rewards import load_reward

PROMPTS = ["a fox in the snow", "Two CATS & a dog, oil on canvas!", "a fox in the snow"]
TINY_OPEN_CLIP = dict(embed_dim=32, vision_cfg=dict(image_size=56, layers=2, width=64, head_width=16, patch_size=14),
                      text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=4, layers=2))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fox", "in", "the", "snow", "two", "cats", "&", "dog", ",", "oil", "on", "canvas", "!"]


# the published formats, spelled out

def tower(prefix, width, layers, mlp=4):
    "Keys and shapes of open_clip's transformer."
    out = {}
    for i in range(layers):
        p = f"{prefix}transformer.resblocks.{i}."
        for norm in ("ln_1", "ln_2"): out |= {f"{p}{norm}.weight": (width,), f"{p}{norm}.bias": (width,)}
        out |= {p+"attn.in_proj_weight": (3*width, width), p+"attn.in_proj_bias": (3*width,), p+"attn.out_proj.weight": (width, width),
                p+"attn.out_proj.bias": (width,), p+"mlp.c_fc.weight": (mlp*width, width), p+"mlp.c_fc.bias": (mlp*width,),
                p+"mlp.c_proj.weight": (width, mlp*width), p+"mlp.c_proj.bias": (width,)}
    return out


def open_clip_format(embed, size, patch, width, layers, text_width, text_layers, vocab=49408, context=77):
    norms = {f"{n}.{k}": (w,) for n, w in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text_width)) for k in ("weight", "bias")}
    return {"positional_embedding": (context, text_width), "text_projection": (text_width, embed), "logit_scale": (), "token_embedding.weight": (vocab, text_width),
            "visual.class_embedding": (width,), "visual.positional_embedding": ((size//patch)**2+1, width), "visual.proj": (width, embed),
            "visual.conv1.weight": (width, 3, patch, patch), **norms, **tower("visual.", width, layers), **tower("", text_width, text_layers)}


def clip_format(embed, size, patch, width, layers, text_width, text_layers, mlp, text_mlp, vocab=49408, context=77):
    "transformers' CLIPModel, with the position ids that its older versions saved."
    out = {"logit_scale": (), "visual_projection.weight": (embed, width), "text_projection.weight": (embed, text_width),
           "text_model.embeddings.token_embedding.weight": (vocab, text_width), "text_model.embeddings.position_embedding.weight": (context, text_width),
           "vision_model.embeddings.class_embedding": (width,), "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
           "vision_model.embeddings.position_embedding.weight": ((size//patch)**2+1, width)}
    norms = [("text_model.final_layer_norm", text_width), ("vision_model.pre_layrnorm", width), ("vision_model.post_layernorm", width)]
    for kind, w, n, m in (("text", text_width, text_layers, text_mlp), ("vision", width, layers, mlp)):
        for i in range(n):
            p = f"{kind}_model.encoder.layers.{i}."
            norms += [(p+"layer_norm1", w), (p+"layer_norm2", w)]
            for q in "qkv": out |= {f"{p}self_attn.{q}_proj.weight": (w, w), f"{p}self_attn.{q}_proj.bias": (w,)}
            out |= {p+"self_attn.out_proj.weight": (w, w), p+"self_attn.out_proj.bias": (w,), p+"mlp.fc1.weight": (m, w), p+"mlp.fc1.bias": (m,),
                    p+"mlp.fc2.weight": (w, m), p+"mlp.fc2.bias": (w,)}
    return out | {f"{n}.{k}": (w,) for n, w in norms for k in ("weight", "bias")}


def head_format(width, prefix="layers"):
    sizes = (width, 1024, 128, 64, 16, 1)
    return {f"{prefix}.{at}.{k}": s for at, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:]) for k, s in (("weight", (b, a)), ("bias", (b,)))}


def imagereward_format(size, width, layers, text_width, text_layers, text_mlp, vocab, positions=512, patch=16):
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    out = {v+"cls_token": (1, 1, width), v+"pos_embed": (1, (size//patch)**2+1, width), v+"patch_embed.proj.weight": (width, 3, patch, patch),
           v+"patch_embed.proj.bias": (width,), t+"embeddings.word_embeddings.weight": (vocab, text_width),
           t+"embeddings.position_embeddings.weight": (positions, text_width), **head_format(text_width, "mlp.layers"),
           "blip.vision_proj.weight": (256, width), "blip.vision_proj.bias": (256,), "blip.text_proj.weight": (256, text_width), "blip.text_proj.bias": (256,)}
    norms, linear = [(v+"norm", width), (t+"embeddings.LayerNorm", text_width)], []
    for i in range(layers):
        p = f"{v}blocks.{i}."
        norms += [(p+"norm1", width), (p+"norm2", width)]
        linear += [(p+"attn.qkv", width, 3*width), (p+"attn.proj", width, width), (p+"mlp.fc1", width, 4*width), (p+"mlp.fc2", 4*width, width)]
    for i in range(text_layers):
        p = f"{t}encoder.layer.{i}."
        for kind, seen in (("attention", text_width), ("crossattention", width)):
            linear += [(f"{p}{kind}.self.query", text_width, text_width), (f"{p}{kind}.self.key", seen, text_width),
                       (f"{p}{kind}.self.value", seen, text_width), (f"{p}{kind}.output.dense", text_width, text_width)]
            norms += [(f"{p}{kind}.output.LayerNorm", text_width)]
        linear += [(p+"intermediate.dense", text_width, text_mlp), (p+"output.dense", text_mlp, text_width)]
        norms += [(p+"output.LayerNorm", text_width)]
    return out | {f"{n}.{k}": (w,) for n, w in norms for k in ("weight", "bias")} | {f"{n}.weight": (b, a) for n, a, b in linear} | {f"{n}.bias": (b,) for n, _, b in linear}


VIT_H = dict(embed=1024, size=224, patch=14, width=1280, layers=32, text_width=1024, text_layers=24)
VIT_L = dict(embed=768, size=224, patch=14, width=1024, layers=24, text_width=768, text_layers=12)
BLIP_L = dict(size=224, width=1024, layers=24, text_width=768, text_layers=12, text_mlp=3072, vocab=30524)
TINY = dict(embed=32, size=56, patch=14, width=64, layers=2, text_width=32, text_layers=2)
TINY_BLIP = dict(size=224, width=64, layers=2, text_width=128, text_layers=2, text_mlp=96, vocab=len(WORDS))


def random_weights(shapes, seed=0, dtype=torch.float32):
    "As large as a trained network's: pictures and texts make a difference."
    g = torch.Generator().manual_seed(seed)
    def one(name, shape):
        if name == "logit_scale": return torch.tensor(math.log(100.))
        noise = torch.randn(shape, generator=g)
        if len(shape) == 1 and name.endswith("weight"): return 1+.1*noise
        fan = math.prod(shape[1:]) if len(shape) > 1 and "embed" not in name and "token" not in name else 25
        return noise/fan**.5
    return {k: one(k, s).to(dtype) for k, s in shapes.items()}


# tiny files on a disk

def clip_config(folder):
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, hidden_act="gelu", projection_dim=32)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu", projection_dim=32, eos_token_id=2)
    (folder/"config.json").write_text(json.dumps(dict(model_type="clip", projection_dim=32, vision_config=vision, text_config=text)))


def blip_config(folder):
    vision = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=224, patch_size=16)
    text = dict(hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(WORDS))
    (folder/"config.json").write_text(json.dumps(dict(model_type="blip", vision_config=vision, text_config=text)))
    (folder/"vocab.txt").write_text("\n".join(WORDS))


def write(name, folder):
    "A tiny reward in its published format; returns its tensors."
    from safetensors.torch import save_file
    folder.mkdir(exist_ok=True)
    if name in ("hpsv2", "hpsv2.1", "clip", "aesthetic"):
        quick = dict(quick_gelu=True) if name == "aesthetic" else {}
        (folder/"open_clip_config.json").write_text(json.dumps(dict(model_cfg=TINY_OPEN_CLIP | quick, preprocess_cfg={})))
    if name in ("hpsv2", "hpsv2.1"):
        state = random_weights(open_clip_format(**TINY), dtype=torch.float16)
        torch.save({"state_dict": state}, folder/R.SOURCES[name].files[0])
    elif name == "clip":
        state = random_weights(open_clip_format(**TINY))
        save_file(state, folder/"open_clip_model.safetensors")
    elif name == "pickscore":
        clip_config(folder)
        state = random_weights(clip_format(**TINY, mlp=128, text_mlp=64))
        ids = {f"{k}_model.embeddings.position_ids": torch.arange(n)[None] for k, n in (("text", 77), ("vision", 17))}
        save_file(state | ids, folder/"model.safetensors")
    elif name == "aesthetic":
        state = random_weights(open_clip_format(**TINY))
        save_file(state, folder/"open_clip_model.safetensors")
        head = random_weights(head_format(32), seed=1)
        torch.save(head, folder/R.SOURCES[name].files[0])
        state = state | head
    elif name == "imagereward":
        blip_config(folder)
        state = random_weights(imagereward_format(**TINY_BLIP))
        torch.save(state | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}, folder/"ImageReward.pt")
    return state


PUBLISHED = ["clip", "pickscore", "hpsv2.1", "imagereward", "aesthetic"]


@pytest.fixture(scope="module", params=PUBLISHED)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)/"weights"
    state = write(request.param, folder)
    return SimpleNamespace(name=request.param, folder=folder, state=state, reward=load_reward(request.param, "cpu", path=folder))


def load(made, **options): return load_reward(made.name, "cpu", path=made.folder, **options)


# the independent path

def photo(n=3, size=(150, 97), seed=0):
    "Smooth 8-bit pictures, as PIL has them."
    rng = np.random.default_rng(seed)
    return [Image.fromarray((rng.random((9, 7, 3))*255).astype("uint8")).resize(size, Image.BICUBIC) for _ in range(n)]


def tensor(pictures): return torch.stack([torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1)/255 for p in pictures])


def by_pil(picture, size, fit):
    "A square of 8-bit pixels: the published preprocessing, in PIL and plain arithmetic."
    w, h = picture.size
    if fit == "longest":
        picture = picture.resize((round(w*size/max(w, h)), round(h*size/max(w, h))), Image.BICUBIC)
        out = Image.new("RGB", (size, size))
        out.paste(picture, ((size-picture.size[0])//2, (size-picture.size[1])//2))
        return out
    picture = picture.resize((int(size*w/min(w, h)), int(size*h/min(w, h))), Image.BICUBIC)
    cut = (lambda m: m//2) if fit == "floor" else (lambda m: int(round(m/2.)))
    left, top = cut(picture.size[0]-size), cut(picture.size[1]-size)
    return picture.crop((left, top, left+size, top+size))


def normalised(pictures): return (tensor(pictures)-torch.tensor(R.CLIP_MEAN).view(3, 1, 1))/torch.tensor(R.CLIP_STD).view(3, 1, 1)


def open_clip_features(state, pixels, prompts, quick=False):
    clip = open_clip.CLIP(**TINY_OPEN_CLIP, quick_gelu=quick).eval()
    clip.load_state_dict({k: v.float() for k, v in state.items()})
    return clip.encode_image(pixels, normalize=True), clip.encode_text(open_clip.get_tokenizer("ViT-H-14")(prompts), normalize=True)


def transformers_tokens(prompts):
    "transformers' tokenizer with CLIP's published vocabulary, padded with the end of text as PickScore's is."
    from transformers import CLIPTokenizer
    bpe = open_clip.SimpleTokenizer()
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokenizer = CLIPTokenizer(vocab={named.get(k, k): v for k, v in bpe.encoder.items()}, merges=list(bpe.bpe_ranks), pad_token="<|endoftext|>")
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")


def bert(state, ids, mask, seen, heads=4):
    "BERT with cross attention, from the file's own tensors."
    def p(name): return state["blip.text_encoder."+name]
    def linear(x, name): return F.linear(x, p(name+".weight"), p(name+".bias"))
    def norm(x, name): return F.layer_norm(x, x.shape[-1:], p(name+".weight"), p(name+".bias"), 1e-12)
    def attend(x, y, name, bias):
        q, k, v = (linear(z, f"{name}.self.{o}").unflatten(-1, (heads, -1)).transpose(1, 2) for o, z in (("query", x), ("key", y), ("value", y)))
        mixed = ((q@k.mT/q.shape[-1]**.5+bias).softmax(-1)@v).transpose(1, 2).flatten(2)
        return norm(x+linear(mixed, name+".output.dense"), name+".output.LayerNorm")
    x = norm(p("embeddings.word_embeddings.weight")[ids]+p("embeddings.position_embeddings.weight")[:ids.shape[1]], "embeddings.LayerNorm")
    hidden = torch.where(mask[:, None, None]>0, 0., -1e9)
    i = 0
    while f"blip.text_encoder.encoder.layer.{i}.output.dense.weight" in state:
        n = f"encoder.layer.{i}."
        x = attend(attend(x, x, n+"attention", hidden), seen, n+"crossattention", 0.)
        x = norm(x+linear(F.gelu(linear(x, n+"intermediate.dense")), n+"output.dense"), n+"output.LayerNorm")
        i += 1
    return x[:, 0]


def blip_by_timm(state, pixels, ids, mask, width=64, layers=2, heads=4, text_heads=4):
    from timm.models.vision_transformer import VisionTransformer
    size = pixels.shape[-1]
    vision = VisionTransformer(img_size=size, patch_size=16, embed_dim=width, depth=layers, num_heads=heads, num_classes=0, global_pool="").eval()
    vision.load_state_dict({k.removeprefix("blip.visual_encoder."): v for k, v in state.items() if k.startswith("blip.visual_encoder.")})
    x = bert(state, ids, mask, vision(pixels), text_heads)
    for at in (0, 2, 4, 6, 7): x = F.linear(x, state[f"mlp.layers.{at}.weight"], state[f"mlp.layers.{at}.bias"])
    return (x[:, 0]-.16717362830052426)/1.0333394966054072


def pieces(prompts, length=35):
    import re
    rows = [["[CLS]", *[w if w in WORDS else "[UNK]" for w in re.findall(r"\w+|[^\w\s]", p.lower())], "[SEP]"] for p in prompts]
    ids = torch.tensor([[WORDS.index(w) for w in r]+[0]*(length-len(r)) for r in rows])
    return ids, (torch.arange(length) < torch.tensor([[len(r)] for r in rows])).long()


@torch.no_grad()
def elsewhere(made, squares, prompts):
    "The score by another path, for pictures that are squares of the network's size."
    pixels = normalised(squares)
    if made.name in ("clip", "hpsv2.1"):
        image, text = open_clip_features(made.state, pixels, prompts)
        return (image*text).sum(1)
    if made.name == "pickscore":
        from transformers import CLIPModel
        clip = CLIPModel.from_pretrained(made.folder).eval()
        out = clip(pixel_values=pixels, **transformers_tokens(prompts))
        return out.logits_per_image.diagonal()
    if made.name == "aesthetic":
        x, _ = open_clip_features({k: v for k, v in made.state.items() if not k.startswith("layers.")}, pixels, prompts, quick=True)
        for at in (0, 2, 4, 6, 7): x = F.linear(x, made.state[f"layers.{at}.weight"], made.state[f"layers.{at}.bias"])
        return x[:, 0]
    return blip_by_timm(made.state, pixels, *pieces(prompts))


FIT = {"hpsv2.1": "longest", "pickscore": "floor"}
SIZE = {"imagereward": 224}


def test_equal_given_the_same_tensor(made):
    squares = photo(size=(SIZE.get(made.name, 56),)*2)
    with torch.no_grad(): scores = made.reward(tensor(squares), PROMPTS)
    expected = elsewhere(made, squares, PROMPTS)
    assert scores.dtype == torch.float32 and scores.std() > 1e-3
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("size", [(97, 150), (59, 57), (640, 480)], ids=str)
def test_equal_through_pil(made, size):
    "Resized by PIL to 8 bits: 2e-3 in the score."
    pictures = photo(size=size)
    squares = [by_pil(p, SIZE.get(made.name, 56), FIT.get(made.name, "shortest")) for p in pictures]
    with torch.no_grad(): scores = made.reward(tensor(pictures), PROMPTS)
    scale = 100. if made.name == "pickscore" else 1.  # a cosine times 100
    torch.testing.assert_close(scores/scale, elsewhere(made, squares, PROMPTS)/scale, atol=2e-3, rtol=0)


def test_pickscore_reads_as_transformers_does():
    "Up to the end of the text; what follows is hidden from everything before it."
    odd = [*PROMPTS, "Café — “naïve” ‘quotes’… 3.14", "x "*200, "  spaces\tand\nlines  ", "don't &amp; won't's", "日本の猫 🐱", ""]
    ours, theirs = R.clip_tokens(mend=False)(odd), transformers_tokens(odd).input_ids
    for a, b in zip(ours, theirs):
        end = (b == 49407).nonzero()[0].item()+1
        assert torch.equal(a[:end], b[:end])


# the full size, by names and shapes

@pytest.mark.parametrize("network, shapes, called", [
    (lambda: R.open_clip_network(open_clip.get_model_config("ViT-H-14")), open_clip_format(**VIT_H), lambda k: k),
    (lambda: R.open_clip_network(open_clip.get_model_config("ViT-L-14")), open_clip_format(**VIT_L), lambda k: k),
    (R.TransformersCLIP, clip_format(**VIT_H, mlp=5120, text_mlp=4096), lambda k: k.removeprefix("model.")),
    (R.BlipScorer, imagereward_format(**BLIP_L), R.imagereward_name),
    (lambda: R.score_head(768), head_format(768), lambda k: "layers."+k),
], ids=["hpsv2", "clip", "pickscore", "imagereward", "aesthetic"])
def test_full_size_has_the_published_keys(network, shapes, called):
    with torch.device("meta"): net = network()
    own = {called(k): tuple(v.shape) for k, v in net.state_dict().items()}
    assert own == {k: v for k, v in shapes.items() if "vision_proj" not in k and ".text_proj." not in k}
    R.fill(net, {k: torch.empty(s, device="meta", dtype=torch.float16) for k, s in shapes.items()}, "file", called=called, spare="_proj")


def test_full_size_of_vit_h():
    assert sum(map(math.prod, open_clip_format(**VIT_H).values())) == 986_109_441


@pytest.mark.skipif("DRAFT_NB_FULL_SIZE" not in os.environ, reason="gigabytes; set DRAFT_NB_FULL_SIZE=1")
@pytest.mark.parametrize("name", ["hpsv2.1", "pickscore", "imagereward", "aesthetic"])
@torch.no_grad()
def test_full_size_scores(name, tmp_path, monkeypatch):
    "The same two comparisons with networks of the published size."
    from safetensors.torch import save_file
    squares, pictures = photo(2, (224, 224)), photo(2, (640, 480))
    fit = {"hpsv2.1": "longest", "pickscore": "floor"}.get(name, "shortest")
    small = [by_pil(p, 224, fit) for p in pictures]
    if name == "imagereward":
        state = random_weights(imagereward_format(**(BLIP_L | dict(vocab=30524))))
        torch.save(state, tmp_path/"ImageReward.pt")
        (tmp_path/"vocab.txt").write_text("\n".join(WORDS))
        def other(s): return blip_by_timm(state, normalised(s), *pieces(PROMPTS[:2]), width=1024, layers=24, heads=16, text_heads=12)
    elif name == "pickscore":
        state = random_weights(clip_format(**VIT_H, mlp=5120, text_mlp=4096))
        save_file(state, tmp_path/"model.safetensors")
        def other(s):
            with torch.device("meta"): net = R.TransformersCLIP().model
            from transformers import CLIPModel
            return CLIPModel.from_pretrained(None, config=net.config, state_dict=state).eval()(pixel_values=normalised(s), **transformers_tokens(PROMPTS[:2])).logits_per_image.diagonal()/100
    else:
        shape, model = (VIT_H, "ViT-H-14") if name == "hpsv2.1" else (VIT_L, "ViT-L-14-quickgelu")
        state = random_weights(open_clip_format(**shape), dtype=torch.float16 if name == "hpsv2.1" else torch.float32)
        head = random_weights(head_format(768), seed=1)
        if name == "hpsv2.1": torch.save({"state_dict": state}, tmp_path/R.SOURCES[name].files[0])
        else:
            save_file(state, tmp_path/"open_clip_model.safetensors")
            torch.save(head, tmp_path/R.SOURCES[name].files[0])
        def other(s):
            with torch.device("meta"): clip = open_clip.CLIP(**open_clip.get_model_config(model))
            clip.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
            clip.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
            x = clip.eval().encode_image(normalised(s), normalize=True)
            if name == "hpsv2.1": return (x*clip.encode_text(open_clip.get_tokenizer(model)(PROMPTS[:2]), normalize=True)).sum(1)
            for at in (0, 2, 4, 6, 7): x = F.linear(x, head[f"layers.{at}.weight"], head[f"layers.{at}.bias"])
            return x[:, 0]
    reward, scale = load_reward(name, "cpu", path=tmp_path), 100. if name == "pickscore" else 1.
    scores = torch.stack([reward(tensor(o), PROMPTS[:2])/scale for o in (squares, pictures)])
    del reward
    expected = torch.stack([other(squares), other(small)])
    print(f"\n{name} same tensor: {(scores-expected)[0].abs().max()} through PIL: {(scores-expected)[1].abs().max()} two pictures: {expected[1].diff().abs().item()}")
    for file in tmp_path.iterdir(): file.unlink()
    torch.testing.assert_close(scores[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores[1], expected[1], atol=2e-3, rtol=0)


# what every reward keeps to

def test_gradient_against_finite_differences(made):
    "In float64 through the resize, in three directions."
    reward = load(made, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x = (.3+.4*torch.rand(1, 3, 70, 61, generator=g, dtype=torch.float64)).requires_grad_()
    score = reward(x, PROMPTS[:1])
    slope, = torch.autograd.grad(score.sum(), x)
    assert score.dtype == torch.float64
    with torch.no_grad():
        for direction in (slope/slope.norm(), *torch.randn(2, *x.shape, generator=g, dtype=torch.float64)):
            h = 1e-5
            quotient = (reward(x+h*direction, PROMPTS[:1])-reward(x-h*direction, PROMPTS[:1])).item()/(2*h)
            assert quotient == pytest.approx((slope*direction).sum().item(), rel=1e-5, abs=1e-8)


def test_frozen_and_deterministic(made):
    x = tensor(photo()).requires_grad_()
    first = made.reward(x, PROMPTS)
    first.sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        again = made.reward(x, PROMPTS)
        assert torch.equal(again, made.reward(x, PROMPTS))
        torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)  # attention has a faster path without gradient
        torch.testing.assert_close(made.reward(x.flip(0), PROMPTS[::-1]), first.flip(0), atol=1e-5, rtol=1e-5)


def test_chunks_and_checkpointing_change_nothing(made):
    x = tensor(photo(5)).requires_grad_()
    prompts = [PROMPTS[k % 2] for k in range(5)]
    saved = {}
    def run(key, **options):
        total = [0]
        def count(t):
            total[0] += t.numel()
            return t
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t): score = load(made, **options)(x, prompts)
        saved[key] = total[0]
        return score, torch.autograd.grad(score.sum(), x)[0]
    whole, slope = run("plain")
    for key, options in dict(chunked=dict(chunk=2), again=dict(checkpointing=True), both=dict(chunk=2, checkpointing=True)).items():
        score, other = run(key, **options)
        torch.testing.assert_close(score, whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other, slope, atol=1e-5, rtol=1e-4)
    assert saved["again"] < .7*saved["plain"]


def test_repeated_prompts_are_read_once(tmp_path):
    write("clip", tmp_path)
    clip, tokenize, look = R._open_clip_file(tmp_path/"open_clip_model.safetensors", "")
    read, encode = [], clip.encode_text
    clip.encode_text = lambda ids: read.append(ids) or encode(ids)
    reward = R.clip_reward("clip", clip, tokenize, **look)
    with torch.inference_mode(): reward(tensor(photo()), PROMPTS)  # what is kept from here must still carry gradients past it
    reward(tensor(photo()).requires_grad_(), PROMPTS).sum().backward()
    assert len(read) == 2 and all(len(ids) == 1 for ids in read)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_networks(made, dtype):
    x = tensor(photo())
    with torch.no_grad():
        score = load(made, dtype=dtype)(x, PROMPTS)
        assert score.dtype == torch.float32
        spread = {"pickscore": 100.}.get(made.name, 1.)
        torch.testing.assert_close(score/spread, made.reward(x, PROMPTS)/spread, atol=.1, rtol=.1)
        assert not torch.allclose(score/spread, made.reward(x, PROMPTS)/spread, atol=1e-6, rtol=0)


def test_autocast_changes_nothing(made):
    x = tensor(photo())
    with torch.no_grad():
        plain = made.reward(x, PROMPTS)
        with torch.autocast("cpu", torch.bfloat16): assert torch.equal(made.reward(x, PROMPTS), plain)


@pytest.mark.parametrize("size", [(1, 1), (2, 90), (57, 91)])
def test_any_height_and_width(made, size):
    x = torch.rand(1, 3, *size, requires_grad=True)
    score = made.reward(x, ["a fox"])
    score.sum().backward()
    assert score.shape == (1,) and score.isfinite().all() and x.grad.isfinite().all()


def test_features(made):
    with torch.no_grad(): f = made.reward.features(tensor(photo()))
    assert f.shape[0] == 3 and f.ndim == 2
    torch.testing.assert_close(f.norm(dim=1), torch.ones(3))


# where weights come from

def test_file_folder_and_text_are_the_same(made):
    file = made.folder/R.find_weights(made.name, made.folder, source=R.SOURCES.get(made.name)).name
    x = tensor(photo())
    with torch.no_grad():
        for other in (load_reward(made.name, "cpu", path=file), load_reward(f"{made.name}@{made.folder}", "cpu"), load_reward(f"{made.name}@{file}", "cpu")):
            torch.testing.assert_close(other(x, PROMPTS), made.reward(x, PROMPTS), atol=1e-5, rtol=1e-5)


def test_environment_variables(made, monkeypatch, tmp_path):
    x = tensor(photo())
    monkeypatch.setenv(R.variable(made.name), str(made.folder))
    with torch.no_grad(): torch.testing.assert_close(load_reward(made.name, "cpu")(x, PROMPTS), made.reward(x, PROMPTS), atol=1e-5, rtol=1e-5)
    assert made.name in R.available()
    monkeypatch.delenv(R.variable(made.name))
    (tmp_path/made.name).symlink_to(made.folder)
    monkeypatch.setenv("DRAFT_NB_REWARDS", str(tmp_path))
    with torch.no_grad(): torch.testing.assert_close(load_reward(made.name, "cpu")(x, PROMPTS), made.reward(x, PROMPTS), atol=1e-5, rtol=1e-5)
    assert made.name in R.available()
    monkeypatch.setenv(R.variable(made.name), str(tmp_path/"nowhere"))
    with pytest.raises(FileNotFoundError, match=f"{R.variable(made.name)} must be a file.*nowhere"): load_reward(made.name, "cpu")


@pytest.mark.parametrize("name", [*PUBLISHED, "hpsv2", "clip:ViT-B-32/laion2b_s34b_b79k"])
def test_offline_without_the_file(name, tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as e: load_reward(name)
    said = str(e.value)
    source = R.SOURCES.get(name) or R.Source(R.SOURCES["clip"].files, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "size unknown", "see there")
    for o in (source.files[0], source.place, source.size, f"licence: {source.licence}", "https://", "path=", f"{name}@/", "--reward", R.variable(name), "DRAFT_NB_REWARDS"):
        assert o in said, (o, said)


def test_the_second_file_is_asked_for_too(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write("imagereward", tmp_path)
    (tmp_path/"vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="bert-base-uncased needs vocab.txt"): load_reward("imagereward", path=tmp_path)


def test_import_and_offline_rewards_need_no_network():
    code = """
import socket
def no(*a, **k): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no
from draft_nb.rewards import KNOWN, load_reward
for name in ("jpeg", "colorfulness"): load_reward(name)
"""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


# files that do not fit

def rewrite(made, tmp_path, change):
    "The reward's main file again, changed, beside the rest."
    from safetensors.torch import load_file, save_file
    folder = tmp_path/"changed"
    folder.mkdir()
    for f in made.folder.iterdir(): (folder/f.name).symlink_to(f)
    file = folder/R.find_weights(made.name, made.folder, source=R.SOURCES[made.name]).name
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    inner = state.get("state_dict", state)
    change(inner)
    file.unlink()
    (save_file if file.suffix == ".safetensors" else torch.save)(state, file)
    return folder


def test_missing_keys_are_named(made, tmp_path):
    gone = []
    def change(state):
        gone.extend([k for k in state if k.endswith(".weight")][:4])
        for k in gone: del state[k]
    with pytest.raises(ValueError, match=r"4 \(.*, .*, .*, …\) missing") as e: load_reward(made.name, "cpu", path=rewrite(made, tmp_path, change))
    assert sum(k in str(e.value) for k in gone) == 3 and "unexpected" not in str(e.value)


def test_unexpected_keys_are_named(made, tmp_path):
    extra = {f"adapter.{k}": torch.zeros(1) for k in range(2)}
    with pytest.raises(ValueError, match=r"2 \(adapter.0, adapter.1\) unexpected"): load_reward(made.name, "cpu", path=rewrite(made, tmp_path, lambda s: s.update(extra)))


def test_other_shapes_are_named(made, tmp_path):
    def change(state):
        k = next(k for k in state if k.endswith(".weight") and state[k].ndim == 2)
        state[k] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"1 \(.*weight \(3, 5\) instead of \(\d+, \d+\)\) of another shape"): load_reward(made.name, "cpu", path=rewrite(made, tmp_path, change))


class Surprise:
    def __reduce__(self): return (os.mkdir, ("surprise",))


@pytest.mark.parametrize("spoil", ["cut", "text", "object", "list", "script"])
def test_files_that_are_not_weights(spoil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("hpsv2.1", tmp_path)
    file = tmp_path/"HPS_v2.1_compressed.pt"
    if spoil == "cut": file.write_bytes(file.read_bytes()[:5000])
    elif spoil == "text": file.write_text("<html>404</html>")
    elif spoil == "object": torch.save({"state_dict": Surprise()}, file)
    elif spoil == "list": torch.save([torch.zeros(1)], file)
    elif spoil == "script": torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(file))
    with pytest.raises(ValueError, match="HPS_v2.1_compressed.pt must hold"): load_reward("hpsv2.1", "cpu", path=tmp_path)
    assert not (tmp_path/"surprise").exists()


def test_a_cut_safetensors_file(tmp_path):
    write("pickscore", tmp_path)
    file = tmp_path/"model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.safetensors must hold tensors"): load_reward("pickscore", "cpu", path=tmp_path)


@pytest.mark.parametrize("spec, message", [
    ("clip:ViT-Z-99/openai", "unknown 'ViT-Z-99', known: .*ViT-B-32"),
    ("clip:ViT-B-32/nobody", "unknown 'nobody', known: .*laion2b_s34b_b79k"),
    ("hpsv2:ViT-B-32", "unknown reward 'hpsv2:ViT-B-32'; known: tiny, tiny-judge"),
])
def test_unknown_models(spec, message):
    with pytest.raises(ValueError, match=message): load_reward(spec)


def test_hpsv2_is_read_like_its_successor(tmp_path):
    for name in ("hpsv2", "hpsv2.1"): write(name, tmp_path/name)
    with torch.no_grad():
        one, two = (load_reward(name, "cpu", path=tmp_path/name)(tensor(photo()), PROMPTS) for name in ("hpsv2", "hpsv2.1"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_as_training_saves_it(tmp_path):
    "Wrapped in `state_dict`, each key behind `module.`: open_clip's own checkpoints; also behind the name of a model and a tag."
    state = write("clip", tmp_path)
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path/"epoch_1.pt")
    with torch.no_grad():
        expected = load_reward("clip", "cpu", path=tmp_path)(tensor(photo()), PROMPTS)
        torch.testing.assert_close(load_reward("clip:ViT-B-32/mine", "cpu", path=tmp_path/"epoch_1.pt")(tensor(photo()), PROMPTS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model, tag, quick", [("ViT-L-14", "openai", True), ("ViT-H-14", "laion2b_s32b_b79k", False)])
def test_a_tag_brings_its_activation(model, tag, quick):
    "OpenAI's networks have another GELU than the model's own description says."
    _, look = R._clip_source(model, tag, None)
    assert look.get("quick_gelu", False) is quick and tuple(look["mean"]) == R.CLIP_MEAN and look["interpolation"] == "bicubic"


def test_downloads_go_through_the_hub(tmp_path, monkeypatch):
    "The repository and the file that are asked for, and that what arrives is used."
    import huggingface_hub
    write("hpsv2.1", tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **k: asked.append((repo, file)) or str(tmp_path/file))
    load_reward("hpsv2.1", "cpu")
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]
