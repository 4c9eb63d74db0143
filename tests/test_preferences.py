"A reward learned from pairs: the loss, the split, the files, and what moves."
import io
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from archives import tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from draft_nb import preferences as page
from draft_nb.models import asset
from draft_nb.preferences import (Pair, check_pairs, choose, evaluate_pairs, fit_reward, last_layers, open_picture, pair_scores, preference_accuracy,
                                  preference_loss, read_pairs, reward_on_pairs, save_open_clip, split_pairs)
from draft_nb.rewards import clip_preprocess, clip_tokens, load_reward

LOOK = dict(size=16, mean=(.5,) * 3, std=(.5,) * 3, fit="shortest", interpolation="bicubic")
CONFIG = dict(embed_dim=16, vision_cfg=dict(layers=2, width=32, head_width=16, image_size=16, patch_size=8),
              text_cfg=dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=2))
RED, BLUE = torch.tensor([.9, .1, .1]), torch.tensor([.1, .1, .9])


def clip(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(**CONFIG).to(dtype).eval()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_open_clip(clip(), clip_tokens(16), CONFIG, tmp_path_factory.mktemp("start") / "clip", **LOOK)


def picture(colour, g, size=16):
    return (colour.view(3, 1, 1) + .15 * torch.randn(3, size, size, generator=g)).clamp(0, 1)


def pairs_of(n=48, prompts=8, tie=6, seed=0):
    "Red is preferred to blue, on either side; every so many a tie."
    g = torch.Generator().manual_seed(seed)
    out = []
    for k in range(n):
        red, blue, prompt = picture(RED, g), picture(BLUE, g), f"a thing {k % prompts}"
        label = .5 if k % tie == tie - 1 else 1.
        out.append(Pair(prompt, red, blue, label) if torch.rand(1, generator=g) < .5 else Pair(prompt, blue, red, 1 - label))
    return out


def quick(start, pairs, **options):
    return fit_reward(start, pairs, **dict(dict(max_steps=2, batch_size=8, learning_rate=1e-3, device="cpu"), **options))


# the loss

@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30), st.floats(0, 1)), min_size=1, max_size=6))
def test_loss_is_the_formula(rows):
    first, second, label = zip(*rows)
    each = []
    for a, b, y in rows:
        most = max(a, b)
        total = most + math.log(math.exp(a - most) + math.exp(b - most))
        each.append(y * (total - a) + (1 - y) * (total - b))
    found = preference_loss(torch.tensor([first, second], dtype=torch.float64), torch.tensor(label, dtype=torch.float64))
    assert found.item() == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_loss_by_hand():
    a, b = math.log(3.), 0.  # p = 3/4
    scores = torch.tensor([[a], [b]], dtype=torch.float64)

    def loss(y):
        return preference_loss(scores, torch.tensor([y], dtype=torch.float64)).item()

    assert loss(1.) == pytest.approx(math.log(4 / 3)) and loss(0.) == pytest.approx(math.log(4))
    assert loss(.5) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)  # the mean of the two logarithms
    assert preference_loss(torch.ones(2, 1), torch.tensor([.5])).item() == pytest.approx(math.log(2))
    both = preference_loss(scores.expand(2, 2), torch.tensor([1., 0.], dtype=torch.float64), torch.tensor([3., 1.], dtype=torch.float64))
    assert both.item() == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)


def test_a_tie_pulls_scores_together_and_swapping_changes_nothing():
    scores = torch.tensor([[2.], [0.]], requires_grad=True)
    preference_loss(scores, torch.tensor([.5])).backward()
    assert scores.grad[0] > 0 > scores.grad[1]
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(2, 9, generator=g), torch.rand(9, generator=g)
    assert torch.allclose(preference_loss(scores, labels), preference_loss(scores.flip(0), 1 - labels))


def test_accuracy_leaves_ties_out():
    scores = torch.tensor([[2., 1., 0., 5.], [1., 3., 9., 0.]])
    assert preference_accuracy(scores, torch.tensor([1., 1., .5, .5])) == .5
    assert preference_accuracy(scores, torch.tensor([.8, .2, .5, .5])) == 1.
    assert preference_accuracy(torch.zeros(2, 3), torch.tensor([1., 0., .5])) == 0.  # equal scores prefer nothing
    assert math.isnan(preference_accuracy(scores, torch.full((4,), .5)))


def test_scores_are_the_rewards():
    pairs = pairs_of(5)
    network = clip()
    with torch.no_grad():
        found = pair_scores(network, clip_tokens(16), pairs, **LOOK)
        for side, which in enumerate(("first", "second")):
            pixels = clip_preprocess(torch.stack([getattr(p, which) for p in pairs]), **LOOK)
            seen = network.encode_image(pixels, normalize=True)
            texts = network.encode_text(open_clip.SimpleTokenizer(context_length=16)([p.prompt for p in pairs]), normalize=True)
            assert torch.allclose(found[side], network.logit_scale.exp() * (seen * texts).sum(1), atol=1e-4)


def test_gradient_against_a_difference_quotient():
    network, pairs = clip(torch.float64), pairs_of(4, tie=3)
    labels = torch.tensor([p.label for p in pairs], dtype=torch.float64)

    def loss():
        return preference_loss(pair_scores(network, clip_tokens(16), pairs, **LOOK), labels)

    for name in ("visual.proj", "text_projection", "logit_scale", "visual.transformer.resblocks.0.attn.in_proj_weight"):
        p = dict(network.named_parameters())[name]
        slope, = torch.autograd.grad(loss(), p)
        direction, h = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1e-6
        with torch.no_grad():
            p.add_(h * direction)
            up = loss()
            p.sub_(2 * h * direction)
            down = loss()
            p.add_(h * direction)
        assert ((up - down) / (2 * h)).item() == pytest.approx((slope * direction).sum().item(), rel=1e-4, abs=1e-9), name


# the split

@given(st.lists(st.sampled_from(["a fox", "A  Fox ", "a rose", "a key", "a hat", "a cup"]), min_size=2, max_size=40), st.floats(.01, .99), st.integers(0, 9))
def test_no_prompt_is_on_both_sides(prompts, share, seed):
    pairs = [Pair(p, b"", b"", 1.) for p in prompts]
    keys = {" ".join(p.lower().split()) for p in prompts}
    if len(keys) < 2:
        with pytest.raises(ValueError, match="at least 2 prompts"):
            split_pairs(pairs, share, seed)
        return
    train, test = split_pairs(pairs, share, seed)
    read = [{" ".join(p.prompt.lower().split()) for p in side} for side in (train, test)]
    assert train and test and not read[0] & read[1] and sorted(train + test) == sorted(pairs)
    assert (train, test) == split_pairs(pairs, share, seed)


# files

def encoded(colour, kind="PNG", size=8):
    out = io.BytesIO()
    Image.new("RGB", (size, size), tuple(int(255 * c) for c in colour)).save(out, kind)
    return out.getvalue()


def stored(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def corners():
    "Red, green above; blue, white below; 2x3 of 8 pixels, so that a turn shows in the shape as well."
    image = Image.new("RGB", (24, 16), "white")
    for colour, at in (("red", (0, 0, 8, 8)), ("lime", (16, 0, 24, 8)), ("blue", (0, 8, 8, 16))):
        image.paste(colour, at)
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(tmp_path, orientation, kind):
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how the camera held it: the inverse of what EXIF asks for
    lying, exif = corners() if undo is None else corners().transpose(Image.Transpose(undo)), Image.Exif()
    exif[0x0112] = orientation
    options = dict(JPEG=dict(quality=100, subsampling=0), WEBP=dict(lossless=True)).get(kind, {})
    data = stored(lying, kind, exif=exif, **options)
    (tmp_path / "p").write_bytes(data)
    meant = torch.from_numpy(np.array(corners())).permute(2, 0, 1) / 255
    for given_as in (data, tmp_path / "p", str(tmp_path / "p"), lambda: data, Image.open(io.BytesIO(data))):
        got = open_picture(given_as)
        assert got.shape == (3, 16, 24)
        torch.testing.assert_close(got, meant, atol=.02, rtol=0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_levels(kind):
    levels = np.array([[0, 257, 32768], [65535, 1000, 40000]], np.uint16)
    got = open_picture(stored(Image.fromarray(levels), kind))
    torch.testing.assert_close(got, torch.from_numpy(levels / 65535).float().expand(3, 2, 3), atol=1e-6, rtol=0)
    assert torch.equal(open_picture(Image.fromarray(levels.astype(np.int32))), got)


def test_fractions_are_read_and_other_ranges_refused():
    levels = np.array([[0, .25, 1]], np.float32)
    got = open_picture(stored(Image.fromarray(levels), "TIFF"))
    torch.testing.assert_close(got, torch.from_numpy(levels).expand(3, 1, 3), atol=1e-6, rtol=0)
    for wrong in (levels * 255, levels - 1, levels * float("nan"), np.array([[70000]], np.int32), np.array([[-1]], np.int32)):
        with pytest.raises(ValueError, match="it must hold grey levels in 0..(1|65535)"):
            open_picture(Image.fromarray(wrong))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_what_is_transparent_is_laid_on_white_and_said(mode):
    "Left opaque, right transparent with black behind."
    grey = Image.new("L", (2, 1), 0)
    alpha = Image.new("L", (2, 1), 255)
    alpha.putpixel((1, 0), 0)
    if mode in ("RGBA", "LA"):
        image = Image.merge(mode, [grey] * (len(mode) - 1) + [alpha])
    elif mode == "PA":
        image = Image.merge("RGBA", [grey, grey, grey, alpha]).convert("PA")
    elif mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image = Image.open(io.BytesIO(stored(image, "PNG", transparency=1)))
    else:  # one colour counts as transparent
        image = Image.new(mode, (2, 1), 0)
        image.putpixel((0, 0), 1 if mode == "L" else (1, 0, 0))
        image = Image.open(io.BytesIO(stored(image, "PNG", transparency=0 if mode == "L" else (0, 0, 0))))
        assert image.mode == mode
    with pytest.warns(UserWarning, match="transparent are laid on white"):
        got = open_picture(image)
    assert got[:, 0, 0].max() <= 1/255 and got[:, 0, 1].tolist() == [1, 1, 1]


def test_half_transparent_is_half_white_and_opaque_is_silent(recwarn):
    assert open_picture(Image.new("RGBA", (1, 1), (255, 0, 0, 255))).flatten().tolist() == [1, 0, 0] and not recwarn
    half = open_picture(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))
    torch.testing.assert_close(half.flatten(), torch.tensor([1, .5, .5]), atol=.01, rtol=0)


@pytest.mark.parametrize("mode, colour, meant", [
    ("L", 51, (.2, .2, .2)), ("1", 1, (1, 1, 1)), ("CMYK", (0, 255, 255, 0), (1, 0, 0)), ("YCbCr", (255, 128, 128), (1, 1, 1)),
    ("P", 0, (0, 0, 1)),
])
def test_other_modes(mode, colour, meant):
    image = Image.new(mode, (4, 4), colour)
    if mode == "P":
        image.putpalette([0, 0, 255])
    file = stored(image, "PNG") if mode in ("1", "P") else stored(image, "JPEG", quality=100)
    for given_as in (image, file):
        torch.testing.assert_close(open_picture(given_as).mean((1, 2)), torch.tensor(meant, dtype=torch.float32), atol=.02, rtol=0)


def test_a_picture_that_was_cut_short_is_refused():
    with pytest.raises(ValueError, match="it could not be read"):
        open_picture(stored(corners().resize((240, 160)), "PNG")[:300])


def test_a_table_of_pairs_is_read_as_a_table_of_prompts(tmp_path):
    write(tmp_path, ".csv")
    semicolons = "prompt;image_0;image_1;label\na fox, running;r.png;b.png;1\n"
    spaces = 'prompt, image_0, image_1, label\n"a fox, running", r.png, b.png, 1\n'
    for text in (semicolons, spaces):
        (tmp_path / "pairs.csv").write_text(text)
        assert [(p.prompt, p.label) for p in read_pairs(tmp_path / "pairs.csv")] == [("a fox, running", 1.)]
    (tmp_path / "pairs.csv").write_text("prompt,image_0,image_1,label\na fox, running,r.png,b.png,1\n")
    with pytest.raises(ValueError, match="pairs must be a table; .* row 2 of .* has 5 cells, the first has 4"):
        read_pairs(tmp_path / "pairs.csv")


def test_an_archive_of_pairs_that_was_cut_between_two_pairs(tmp_path):
    path = write(tmp_path, ".tar")
    data = path.read_bytes()
    path.write_bytes(data[:data.index(b"0001.0.jpg")])
    with pytest.raises(ValueError, match="it ends or is broken after 4 members"):
        read_pairs(path)


ROWS = [("a fox, running", 1.), ("ein Fuchs im Grünen", 0.), ("狐", .5)]


def published(rows=ROWS, **more):
    "The columns of Pick-a-Pic, as far as they matter."
    return dict(caption=[p for p, _ in rows], jpg_0=[encoded(RED, "JPEG")] * len(rows), jpg_1=[encoded(BLUE, "JPEG")] * len(rows),
                label_0=[y for _, y in rows], label_1=[1 - y for _, y in rows], has_label=[True] * len(rows), **more)


def write(folder, ending, rows=ROWS, table=None):
    folder.mkdir(exist_ok=True)
    for name, colour in (("r.png", RED), ("b.png", BLUE)):
        (folder / name).write_bytes(encoded(colour))
    path = folder / f"pairs{ending}"
    table = table or [dict(prompt=p, image_0="r.png", image_1="b.png", label=y) for p, y in rows]
    if ending in (".csv", ".tsv"):
        mark = "," if ending == ".csv" else "\t"
        quote = [[f'"{v}"' if isinstance(v, str) else str(v) for v in r.values()] for r in table]
        path.write_text("\n".join([mark.join(table[0]), *map(mark.join, quote)]))
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in table))
    elif ending == ".tar":
        tar(path, [(f"{n:04d}.{e}", c) for n, (p, y) in enumerate(rows) for e, c in
                   (("0.jpg", encoded(RED, "JPEG")), ("1.jpg", encoded(BLUE, "JPEG")), ("txt", p.encode()), ("json", json.dumps(dict(label=y)).encode()))])
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import ipc, parquet
        data = pa.table(published(rows))
        if ending == ".parquet":
            parquet.write_table(data, path, row_group_size=2)
        else:
            with pa.OSFile(str(path), "wb") as out, (ipc.new_file if ending == ".feather" else ipc.new_stream)(out, data.schema) as w:
                w.write_table(data)
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".tar", ".parquet", ".arrow", ".feather"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, ending):
    path = write(tmp_path / "set", ending)
    for pairs in read_pairs(path), read_pairs(tmp_path / "set"):
        assert [(p.prompt, p.label) for p in pairs] == ROWS
        assert len(check_pairs(pairs)) == 3
        for p in pairs:
            assert not isinstance(p.first, torch.Tensor)  # opened when it is needed
            for seen, meant in ((p.first, RED), (p.second, BLUE)):
                opened = open_picture(seen)
                assert opened.shape == (3, 8, 8) and torch.allclose(opened.mean((1, 2)), meant, atol=.02)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".tar", ".parquet"])
def test_labels_must_be_shares(tmp_path, ending):
    with pytest.raises(ValueError, match=r"the label of .* must lie in \[0,1\]"):
        read_pairs(write(tmp_path, ending, [("a", 1.), ("b", 2.)]))


def test_tables_with_other_columns(tmp_path):
    table = [dict(words="a", left="r.png", right="b.png", liked=.25)]
    path = write(tmp_path, ".csv", table=table)
    with pytest.raises(ValueError, match="pairs need a column for prompt: prompt or prompts or caption or text; .* has words, left, right, liked"):
        read_pairs(path)
    assert read_pairs(path, dict(prompt="words", first="left", second="right", label="liked"))[0].label == .25
    with pytest.raises(ValueError, match="column for first: gone"):
        read_pairs(path, dict(prompt="words", first="gone", second="right", label="liked"))
    with pytest.raises(ValueError, match="columns must name prompt, first, second, label; got picture"):
        read_pairs(path, dict(picture="left"))


def test_both_labels_and_rows_without_one(tmp_path):
    row = dict(prompt="a", image_0="r.png", image_1="b.png", label_0=0., label_1=1., has_label=True)
    path = write(tmp_path, ".jsonl", table=[row, dict(row, has_label=False, label_0=None)])
    assert [p.label for p in read_pairs(path)] == [0.]
    with pytest.raises(ValueError, match="two labels must add up to 1; got 1.0, 1.0"):
        read_pairs(write(tmp_path, ".jsonl", table=[dict(row, label_0=1.)]))
    with pytest.raises(ValueError, match="holds none"):
        read_pairs(write(tmp_path, ".jsonl", table=[dict(row, has_label=False)]))


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        read_pairs(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="files of one kind; .* holds none of"):
        read_pairs(tmp_path)
    (tmp_path / "p.doc").write_text("x")
    with pytest.raises(ValueError, match="a file of a known kind"):
        read_pairs(tmp_path / "p.doc")
    with pytest.raises(ValueError, match="image_1 of row 0 of .* must be a file, relative to .*; got 'gone.png'"):
        read_pairs(write(tmp_path, ".csv", table=[dict(prompt="a", image_0="r.png", image_1="gone.png", label=1)]))
    with pytest.raises(ValueError, match="the prompt of row 0 of .* must be a text; got 3"):
        read_pairs(write(tmp_path, ".jsonl", table=[dict(prompt=3, image_0="r.png", image_1="b.png", label=1)]))
    with pytest.raises(ValueError, match="one kind; .* holds .csv and .jsonl"):
        read_pairs(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    with pytest.raises(ValueError, match="must be JSON; .*, line 1"):
        read_pairs(tmp_path / "broken.jsonl")
    (tmp_path / "list.jsonl").write_text('\n[1]')
    with pytest.raises(ValueError, match="an object a line; .*, line 2 holds list"):
        read_pairs(tmp_path / "list.jsonl")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_pairs(tmp_path / "binary.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="holds none"):
        read_pairs(tmp_path / "empty.csv")


def test_bad_archives(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nothing" * 200)
    with pytest.raises(ValueError, match="must be a tar archive"):
        read_pairs(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="0001 in .* has no 1, json"):
        read_pairs(tar(tmp_path / "b.tar", [("0001.0.jpg", encoded(RED)), ("0001.txt", b"a fox")]))
    parts = [("k.0.jpg", encoded(RED)), ("k.1.jpg", encoded(BLUE)), ("k.txt", b"a fox")]
    with pytest.raises(ValueError, match="must be UTF-8 text and JSON"):
        read_pairs(tar(tmp_path / "c.tar", [*parts, ("k.json", b"{")]))
    assert read_pairs(tar(tmp_path / "d.tar", [*parts, ("k.json", b"0.5")]))[0].label == .5  # a bare number
    with pytest.raises(ValueError, match="columns are for tables"):
        read_pairs(tmp_path / "d.tar", dict(prompt="txt"))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_arrow_files(tmp_path, ending):
    if page.find_spec("pyarrow") is None:
        (tmp_path / f"a{ending}").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="need the package pyarrow, which is not installed"):
            read_pairs(tmp_path / f"a{ending}")
        return
    import pyarrow as pa
    from pyarrow import parquet
    (tmp_path / f"a{ending}").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=f"must be a whole {ending} file"):
        read_pairs(tmp_path / f"a{ending}")
    table = published()
    del table["jpg_1"]
    parquet.write_table(pa.table(table), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="column for second: jpg_1 or image_1 or second"):
        read_pairs(tmp_path / "b.parquet")
    nested = published()
    nested["jpg_0"] = [dict(bytes=b, path=None) for b in nested["jpg_0"]]
    parquet.write_table(pa.table(nested), tmp_path / "c.parquet")
    assert torch.allclose(open_picture(read_pairs(tmp_path / "c.parquet")[0].first).mean((1, 2)), RED, atol=.02)


# what pairs may be

@pytest.mark.parametrize("pair, message", [
    (("a", RED.view(3, 1, 1)), r"pair 1 must be \(prompt, first, second, label\)"),
    ((3, RED.view(3, 1, 1), BLUE.view(3, 1, 1), 1), "the prompt of pair 1 must be a text; got 3"),
    (("a", RED.view(3, 1, 1), BLUE, 1), r"the second picture of pair 1 must be \(3,H,W\); got \(3,\)"),
    (("a", RED.view(3, 1, 1) * 9, BLUE.view(3, 1, 1), 1), r"the first picture of pair 1: images must lie in \[0,1\]; got 0.9 to 8.1"),
    (("a", (RED * 255).byte().view(3, 1, 1), BLUE.view(3, 1, 1), 1), "the first picture of pair 1: .* floating point"),
    (("a", 7, BLUE.view(3, 1, 1), 1), "the first picture of pair 1 must be a tensor, .*; got int"),
    (("a", "gone.png", BLUE.view(3, 1, 1), 1), "the first picture of pair 1 must be a file; there is no gone.png"),
    *[(("a", RED.view(3, 1, 1), BLUE.view(3, 1, 1), y), r"the label of pair 1 must lie in \[0,1\]") for y in (2, -1, math.nan, "first", None)],
])
def test_bad_pairs_are_named_before_anything_is_loaded(pair, message, monkeypatch):
    monkeypatch.setattr(page, "_start", lambda *a: pytest.fail("a network was loaded"))
    with pytest.raises(ValueError, match=message):
        fit_reward("tiny", [("a", RED.view(3, 1, 1), BLUE.view(3, 1, 1), 1), pair])


@pytest.mark.parametrize("pairs, options, message", [
    ([], {}, "at least one pair; got none"),
    ([p._replace(label=.5) for p in pairs_of(6)], {}, "pairs must hold a preference; all 6 are ties"),
    ("pairs.csv", {}, "see `read_pairs` for files"),
    (pairs_of(6, prompts=1), {}, "at least 2 prompts to hold one out; got 1"),
    (pairs_of(6), dict(held_out=1.), "held_out must lie in"),
    (pairs_of(6), dict(held_out=[p._replace(prompt="other", label=.5) for p in pairs_of(2)]), "held_out must hold a preference; all 2 are ties"),
    (pairs_of(6), dict(held_out=pairs_of(2)), "held_out must have other prompts than pairs; 2 are in both"),
    (pairs_of(6), dict(batch_size=0), "batch_size must be at least 1; got 0"),
    (pairs_of(6), dict(learning_rate=0), "learning_rate must be greater than 0"),
    (pairs_of(6), dict(epochs=0), "epochs must be greater than 0"),
    (pairs_of(6), dict(max_steps=3, warmup_steps=3), "warmup_steps must be less than the 3 steps of the run; got 3"),
    (pairs_of(6), dict(mixed_precision="fp16"), "mixed_precision must be no or bf16; got 'fp16'"),
    (pairs_of(6), dict(output_dir=__file__), "output_dir must be a new or empty folder"),
])
def test_bad_options_are_named_before_anything_is_loaded(pairs, options, message, monkeypatch):
    monkeypatch.setattr(page, "_start", lambda *a: pytest.fail("a network was loaded"))
    with pytest.raises(ValueError, match=message):
        fit_reward("tiny", pairs, **options)


def test_bad_starts(start):
    with pytest.raises(ValueError, match="clip must be tiny, .*; got 'imagereward'"):
        quick("imagereward", pairs_of(6))
    for learn in (3, -1):
        with pytest.raises(ValueError, match=f"learn must be 0 to 2 of the last layers of each tower; got {learn}"):
            quick(start, pairs_of(6), learn=learn)
    with pytest.raises(ValueError, match="learn must choose at least one parameter"):
        quick(start, pairs_of(6), learn=lambda name: False)


def test_a_broken_picture_is_named(start, tmp_path):
    (tmp_path / "half.png").write_bytes(encoded(RED, size=64)[:60])
    with pytest.raises(ValueError, match="the first picture of 'a thing .', .*half.png: it could not be read"):
        quick(start, [p._replace(first=tmp_path / "half.png") for p in pairs_of(6)])
    with pytest.raises(ValueError, match="the second picture of .* must be \\(3,H,W\\)"):
        quick(start, [p._replace(second=lambda: torch.rand(1, 3, 8, 8)) for p in pairs_of(6)])


def test_a_picture_that_cannot_be_read_is_named_with_its_archive(start, tmp_path):
    members = [(f"{k}.{e}", c) for k in "ab" for e, c in (("0.jpg", b"no picture"), ("1.jpg", encoded(BLUE)), ("txt", k.encode()), ("json", b"1"))]
    with pytest.raises(ValueError, match="the first picture of '.', .*x.tar: it could not be read: cannot identify"):
        quick(start, read_pairs(tar(tmp_path / "x.tar", members)))


def test_other_starts(start, tmp_path):
    "An architecture of open_clip's list with a file, and HPSv2's checkpoint, both as folders in open_clip's format."
    (tmp_path / "smallest.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "smallest.json")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "open_clip_model.safetensors").write_bytes((start / "open_clip_model.safetensors").read_bytes())
    hps = tmp_path / "hps"
    hps.mkdir()
    torch.save({"epoch": torch.ones(()), "state_dict": numbers(start)}, hps / "HPS_v2_compressed.pt")
    (hps / "open_clip_config.json").write_text((start / "open_clip_config.json").read_text())
    images = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    for name, path, fit in (("clip:smallest/none", tmp_path / "alone", "shortest"), ("hpsv2", hps, "longest")):
        out = tmp_path / fit
        reward, _ = quick(name, pairs_of(8), path=path, output_dir=out)
        assert json.loads((out / "open_clip_config.json").read_text())["preprocess_cfg"]["resize_mode"] == fit
        assert_close(load_reward(str(out))(images, ["a", "b"]), reward(images, ["a", "b"]), atol=1e-4, rtol=1e-5)


# learning

def test_a_rule_is_learned_and_kept(start, tmp_path):
    pairs = pairs_of(80)
    reward, history = quick(start, pairs, max_steps=30, batch_size=16, output_dir=tmp_path / "warm", warmup_steps=2, eval_every=10)
    assert [r["step"] for r in history] == [0, 10, 20, 30] and history[0]["accuracy"] < .9
    assert history[-1]["accuracy"] > .9 and history[-1]["held_out_loss"] < history[0]["held_out_loss"]
    again, images, prompts = load_reward(str(tmp_path / "warm")), torch.stack([p.first for p in pairs]), [p.prompt for p in pairs]
    assert again.name == reward.name == "warm"
    assert_close(again(images, prompts), reward(images, prompts), atol=1e-4, rtol=1e-5)
    own = open_clip.create_model(f"local-dir:{tmp_path/'warm'}").eval()  # open_clip itself reads the folder
    with torch.no_grad():
        seen, texts = own.encode_image(images * 2 - 1, normalize=True), own.encode_text(open_clip.SimpleTokenizer(context_length=16)(prompts), normalize=True)
        assert torch.allclose(own.logit_scale.exp() * (seen * texts).sum(1), reward(images, prompts), atol=1e-3)
    held = split_pairs(check_pairs(pairs))[1]
    assert evaluate_pairs(reward_on_pairs(reward), held)["accuracy"] == history[-1]["accuracy"]
    x = images[:2].clone().requires_grad_()  # it can be trained against
    reward(x, prompts[:2]).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    lines = (tmp_path / "warm" / "history.csv").read_text().splitlines()
    assert len(lines) == 5 and "accuracy" in lines[0]


def numbers(reward_folder):
    from safetensors.torch import load_file
    return load_file(reward_folder / "open_clip_model.safetensors")


def test_same_seed_same_weights_and_global_state_untouched(start, tmp_path):
    pairs = pairs_of(24)
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quick(start, pairs, seed=seed, output_dir=tmp_path / name, held_out=pairs_of(4, prompts=2) and [p._replace(prompt="other") for p in pairs_of(4)])
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (numbers(tmp_path / n) for n in "abc")
    assert_close(a, b, atol=1e-5, rtol=0)  # two networks
    assert any(not torch.allclose(a[k], c[k], atol=1e-4) for k in a)


ENDS = {"logit_scale", "text_projection", "visual.proj", "visual.ln_post.weight", "visual.ln_post.bias", "ln_final.weight", "ln_final.bias"}


@pytest.mark.parametrize("learn", [None, 0, 1, "proj"])
def test_frozen_parameters_do_not_move(start, tmp_path, learn):
    quick(start, pairs_of(12), learn=(lambda n: n == "visual.proj") if learn == "proj" else learn, output_dir=tmp_path / "new")
    before, after = numbers(start), numbers(tmp_path / "new")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    if learn == "proj":
        assert moved == {"visual.proj"}
    elif learn == 0:
        assert moved == ENDS
    elif learn == 1:
        assert ENDS < moved and all(k in ENDS or "resblocks.1." in k for k in moved)
    else:
        assert {"token_embedding.weight", "visual.conv1.weight", "logit_scale"} <= moved


def test_batch_norms_keep_their_statistics(tmp_path):
    "The embedded reward is a ResNet: what is trained is what is scored."
    reward, history = quick("tiny", pairs_of(10), output_dir=tmp_path / "new")
    before, after = numbers(asset("rewards") / "tiny"), numbers(tmp_path / "new")
    kept = [k for k in before if "running" in k or "num_batches" in k]
    assert kept and all(torch.equal(before[k].float(), after[k].float()) for k in kept)
    assert not torch.equal(before["visual.conv1.weight"].float(), after["visual.conv1.weight"])
    images, prompts = torch.rand(2, 3, 64, 64), ["an emoji of a fox", "a rose"]
    assert_close(load_reward(str(tmp_path / "new"))(images, prompts), reward(images, prompts), atol=1e-4, rtol=1e-5)  # with its own tokenizer


def test_layers_of_networks_that_open_clip_has():
    for model in ("RN50", "ViT-B-32"):
        with torch.device("meta"):
            network = open_clip.CLIP(**open_clip.get_model_config(model))
        names = [n for n, _ in network.named_parameters()]
        for n in (0, 1, 2):
            chosen = set(last_layers(names, n))
            assert {"logit_scale", "text_projection", "ln_final.weight"} <= chosen
            assert not chosen & {"visual.conv1.weight", "token_embedding.weight", "positional_embedding", "visual.class_embedding", "visual.ln_pre.weight"}
            depth = {"RN50": "visual.layer{}.0.conv1.weight", "ViT-B-32": "visual.transformer.resblocks.{}.ln_1.weight"}[model]
            top = 4 if model == "RN50" else 11
            assert [k for k in range(top + 1) if depth.format(k) in chosen] == list(range(top - n + 1, top + 1))
        chosen = choose(network, 1)
        assert {n for n, p in network.named_parameters() if p.requires_grad} == {n for n, _ in chosen} and not network.training


def test_an_epoch_sees_every_pair_once(start):
    seen, original = [], page.pair_scores
    pairs, held = pairs_of(10), [p._replace(prompt="other") for p in pairs_of(3)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(page, "pair_scores", lambda c, t, batch, **look: seen.append([p for p in batch if p.prompt != "other"]) or original(c, t, batch, **look))
        _, history = quick(start, pairs, held_out=held, max_steps=None, epochs=2, batch_size=4, eval_every=99)
    sizes = [len(b) for b in seen if b]
    assert sizes == [4, 4, 2] * 2 and [r["step"] for r in history] == [0, 6]
    for epoch in (seen[1:4], seen[4:7]):
        assert sorted(id(p.first) for b in epoch for p in b) == sorted(id(p.first) for p in pairs)
    assert [r["learning_rate"] for r in history] == pytest.approx([1e-3, 0.])


def test_balanced_prompts_weigh_the_same(start):
    "One pair of a prompt counts as much as the nine of another."
    pairs = [Pair("a", *p[1:3], 1.) for p in pairs_of(9)] + [Pair("b", *p[1:3], 0.) for p in pairs_of(1, seed=3)]
    held = [p._replace(prompt="other") for p in pairs_of(3)]
    seen = []
    original = page.preference_loss

    def spy(scores, labels, weights=None):
        seen.append(weights)
        return original(scores, labels, weights)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(page, "preference_loss", spy)
        quick(start, pairs, held_out=held, max_steps=1, batch_size=16, balance_prompts=True)
    weights = next(w for w in seen if w is not None)
    assert sorted(weights.tolist()) == pytest.approx([1 / 9] * 9 + [1.])


def test_bf16_and_pictures_of_any_size(start):
    g = torch.Generator().manual_seed(0)
    pairs = [p._replace(first=picture(RED, g, 20), label=1.) for p in pairs_of(8)]
    reward, history = quick(start, pairs, mixed_precision="bf16")
    assert math.isfinite(history[-1]["loss"]) and reward(torch.rand(1, 3, 9, 30), ["a"]).dtype == torch.float32
