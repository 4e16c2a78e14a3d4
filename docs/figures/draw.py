"""The figures of the model and head pages: `python docs/figures/draw.py` writes an SVG for each function below.

A figure shows how a block computes, as the file that it names does it.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from canvas import Canvas  # a neighbour, not a package

FOLDER = Path(__file__).parent


def metaformer() -> Canvas:
    """`zoo/metaformer.py`: two half blocks, and what stands for the mixer."""
    c = Canvas(
        900,
        330,
        "A MetaFormer block",
        "The input is normalised, passes a token mixer and is added to itself; then it is normalised, passes an MLP "
        "and is added again. Below are the five token mixers.",
    )
    y = 100
    x, n1, mixer, s1 = c.chain(y, 20, [("x", "data"), ("norm", "norm"), ("token mixer", "tokens"), ("scale", "norm")])
    plus = c.sum(395, y)
    c.arrow(s1.right, plus.left)
    c.skip((x.right[0] + 8, y), plus, 55)
    n2, mlp, s2 = c.chain(y, 440, [("norm", "norm"), ("MLP, width 4 C", "channels"), ("scale", "norm")])
    c.arrow(plus.right, n2.left)
    plus2 = c.sum(755, y)
    c.arrow(s2.right, plus2.left)
    c.skip((422, y), plus2, 55)
    out = c.box(825, y, "out", "data")
    c.arrow(plus2.right, out.left)
    c.frame(20, 175, 880, 278, "one of")
    for x0, name, what in (
        (96, "PoolFormer", "3x3 mean\nminus the input"),
        (252, "IdentityFormer", "nothing"),
        (415, "RandFormer", "frozen random matrix\nin stages 3 and 4"),
        (592, "ConvFormer", "linear, StarReLU,\ndepthwise 7x7, linear"),
        (779, "CAFormer", "the same in stages 1, 2,\nattention in stages 3, 4"),
    ):
        c.text(x0, 200, name)
        c.box(x0, 240, what, "tokens", w={96: 130, 252: 130, 779: 186}.get(x0, 164), h=50)
    c.arrow(mixer.bottom, (mixer.x, 175))
    return c


def crate() -> Canvas:
    """`zoo/crate_blocks.py`: MSSA and ISTA."""
    c = Canvas(
        900,
        300,
        "A CRATE layer",
        "Tokens are normalised and projected once; the projection is query, key and value of an attention whose "
        "result is projected and added. The sum is normalised and takes one thresholded gradient step; nothing is "
        "added around that step.",
    )
    y = 130
    z, n1, u, att, wo = c.chain(
        y,
        20,
        [
            ("z", "data"),
            ("LayerNorm", "norm"),
            ("w = U x", "channels"),
            ("softmax(w wᵀ/√d) w\nfor each head", "tokens"),
            ("linear", "channels"),
        ],
        gap=20,
    )
    plus = c.sum(565, y)
    c.arrow(wo.right, plus.left)
    c.skip((z.right[0] + 7, y), plus, 65)
    n2, ista, out = c.chain(y, 600, [("LayerNorm", "norm"), ("ISTA step", "channels"), ("z'", "data")], gap=20)
    c.arrow(plus.right, n2.left)
    c.frame(178, 85, 510, 168)
    c.text(182, 185, "MSSA: compress the tokens towards learned subspaces", "note", "start")
    c.text(ista.x, 185, "no path around it", "note")
    c.box(620, 228, "ISTA: relu(x + η (Dᵀx − Dᵀ D x) − η λ),  η = λ = 0.1", "channels", w=430)
    c.arrow((ista.x, 190), (ista.x, 209), tip=False)
    c.text(20, 232, "zoo.fold: relu(K x − η λ), one product", "note", "start")
    return c


def fcaformer() -> Canvas:
    """`zoo/fcaformer_blocks.py`: a block of stages 3 and 4."""
    c = Canvas(
        940,
        340,
        "An FcaFormer block with cross tokens",
        "Attention has two segments of keys and values: the tokens of the block and cross tokens of earlier blocks, "
        "scaled and normalised. After the residual sum a strided depthwise convolution makes new cross tokens for "
        "later blocks, and a depthwise convolution in the residual stream is followed by an MLP.",
    )
    y = 115
    x, n1, q = c.chain(y, 20, [("x", "data"), ("LayerNorm", "norm"), ("q, k, v", "channels")], gap=22)
    att = c.box(350, y, "attention over\nboth segments", "tokens")
    c.arrow(q.right, att.left)
    proj = c.box(480, y, "linear, γ₁", "channels")
    c.arrow(att.right, proj.left)
    plus = c.sum(562, y)
    c.arrow(proj.right, plus.left)
    c.skip((x.right[0] + 8, y), plus, 60)
    local = c.box(655, y, "depthwise 3x3,\nBatchNorm", "tokens")
    c.arrow(plus.right, local.left)
    mlp = c.box(785, y, "2 LayerNorms,\nMLP, γ₂", "channels")
    c.arrow(local.right, mlp.left)
    plus2 = c.sum(860, y)
    c.arrow(mlp.right, plus2.left)
    c.skip((719, y), plus2, 60)
    c.arrow(plus2.right, (915, y))
    cross, scale, kv = c.chain(
        225, 20, [("cross tokens of\nearlier blocks", "data"), ("α, LayerNorm", "norm"), ("k, v", "channels")], gap=22
    )
    c.arrow(kv.right, (att.x, 225), att.bottom)
    new = c.box(590, 225, "depthwise 7x7,\nstride 4", "tokens")
    c.arrow((582, y), (582, 200))
    later = c.box(765, 225, "cross tokens for\nlater blocks", "data")
    c.arrow(new.right, later.left)
    c.text(
        20,
        285,
        "Logits of the first segment have a table of absolute offsets, those of the second a bias per key.",
        "note",
        "start",
    )
    return c


def slab() -> Canvas:
    """`zoo/prepbn.py` and `zoo/slab_attention.py`."""
    c = Canvas(
        900,
        450,
        "PRepBN and simplified linear attention",
        "Above, PRepBN blends LayerNorm with a BatchNorm that has an identity path; the blend goes to BatchNorm in "
        "training and folds into a neighbouring layer afterwards. Below, linear attention with relu features and a "
        "depthwise convolution of the values.",
    )
    x = c.box(50, 120, "x", "data")
    ln = c.box(190, 75, "LayerNorm", "norm")
    bn = c.box(190, 125, "BatchNorm", "norm")
    ident = c.box(190, 172, "α x", "norm")
    for b in (ln, bn, ident):
        c.arrow(x.right, (95, 120), (95, b.y), b.left)
    plus = c.sum(300, 148)
    c.arrow(bn.right, (300, 125), plus.top)
    c.arrow(ident.right, (300, 172), plus.bottom)
    m1 = c.box(400, 75, "times γ", "norm")
    m2 = c.box(400, 148, "times 1 − γ", "norm")
    c.arrow(ln.right, m1.left)
    c.arrow(plus.right, m2.left)
    total = c.sum(510, 112)
    c.arrow(m1.right, (510, 75), total.top)
    c.arrow(m2.right, (510, 148), total.bottom)
    y0 = c.box(590, 112, "y", "data")
    c.arrow(total.right, y0.left)
    c.text(650, 92, "training: γ falls from 1 to 0", "note", "start")
    c.text(650, 112, "afterwards: y = a x + b,", "note", "start")
    c.text(650, 132, "merged into the next layer", "note", "start")
    q = c.box(70, 260, "q", "channels")
    k = c.box(70, 305, "k + P", "channels")
    v = c.box(70, 350, "v", "channels")
    rq = c.box(180, 260, "relu", "norm")
    rk = c.box(180, 305, "relu", "norm")
    c.arrow(q.right, rq.left)
    c.arrow(k.right, rk.left)
    kv = c.box(340, 328, "S = Σ k vᵀ\nz = Σ k", "tokens")
    c.arrow(rk.right, (230, 305), (230, 320), (kv.left[0], 320))
    c.arrow(v.right, (230, 350), (230, 336), (kv.left[0], 336))
    read = c.box(500, 290, "q S / (q z + ε)", "tokens")
    c.arrow(rq.right, (500, 260), read.top)
    c.arrow(kv.right, (500, 328), read.bottom)
    conv = c.box(500, 372, "depthwise 5x5", "tokens")
    c.arrow((120, 350), (120, 372), conv.left)
    plus2 = c.sum(620, 330)
    c.arrow(read.right, (620, 290), plus2.top)
    c.arrow(conv.right, (620, 372), plus2.bottom)
    proj = c.box(700, 330, "linear", "channels")
    c.arrow(plus2.right, proj.left)
    c.arrow(proj.right, (780, 330))
    c.text(650, 270, "cost grows with the number", "note", "start")
    c.text(650, 288, "of tokens, not with its square", "note", "start")
    c.frame(20, 48, 880, 200)
    c.frame(20, 232, 880, 396)
    return c


def ascan() -> Canvas:
    """`zoo/ascan.py`: the two blocks and their order."""
    c = Canvas(
        900,
        380,
        "AsCAN: two plain blocks, and where they stand",
        "The convolution block is a 3x3 convolution to four times the width, a norm, an activation and a 1x1 "
        "convolution back; the transformer block is attention and MLP. Stages begin with convolution blocks and end, "
        "later and later stages more so, with transformer blocks.",
    )
    y = 92
    c.text(30, y + 5, "C", "title", "start")
    parts = [
        ("x", "data"),
        ("3x3, C to 4 C", "tokens"),
        ("BatchNorm, GELU", "norm"),
        ("1x1, 4 C to C", "channels"),
        ("BatchNorm", "norm"),
    ]
    boxes = c.chain(y, 60, parts, gap=22)
    plus = c.sum(705, y)
    c.arrow(boxes[-1].right, plus.left)
    c.skip((boxes[0].right[0] + 8, y), plus, 55)
    c.arrow(plus.right, (760, y))
    c.text(770, y + 5, "stride 2, no sum,", "note", "start")
    c.text(770, y + 22, "first in a stage", "note", "start")
    y = 182
    c.text(30, y + 5, "T", "title", "start")
    boxes = c.chain(y, 60, [("x", "data"), ("LayerNorm", "norm"), ("attention, all tokens", "tokens")], gap=22)
    plus = c.sum(460, y)
    c.arrow(boxes[-1].right, plus.left)
    c.skip((boxes[0].right[0] + 8, y), plus, 145)
    more = c.chain(y, 505, [("LayerNorm", "norm"), ("MLP, 4 C", "channels")], gap=22)
    c.arrow(plus.right, more[0].left)
    plus2 = c.sum(735, y)
    c.arrow(more[-1].right, plus2.left)
    c.skip((487, y), plus2, 145)
    c.arrow(plus2.right, (790, y))
    y = 270
    x = 60.0
    for stage, pattern in enumerate(("CCCC", "CCCT", "CCTTCCTT", "CTTTCTTT")):
        start = x
        for letter in pattern:
            c.box(x + 13, y, letter, "tokens" if letter == "C" else "gate", w=26, h=30)
            x += 28
        c.text((start + x) / 2 - 1, y + 36, f"stage {stage + 1}, stride {4 * 2**stage}", "note")
        x += 26
    c.kinds.remove("gate")
    c.text(20, 330, "The order of the three variants in this reading; patterns= takes any other.", "note", "start")
    return c


def ninformer() -> Canvas:
    """`zoo/ninformer_blocks.py`."""
    c = Canvas(
        940,
        330,
        "A NiNformer block",
        "The normalised tokens take two paths: a linear value, and a whole Mixer block of a token MLP and a channel "
        "MLP with residual sums. Their product is added to the input. An MLP follows behind the same LayerNorm.",
    )
    y = 200
    z, ln = c.chain(y, 20, [("z", "data"), ("LayerNorm a", "norm")], gap=22)
    value = c.box(380, y, "linear: the value u", "channels")
    c.arrow(ln.right, value.left)
    t = 115
    tok = c.box(283, t, "LayerNorm,\ntoken MLP", "tokens")
    p1 = c.sum(368, t)
    ch = c.box(450, t, "LayerNorm,\nchannel MLP", "channels")
    p2 = c.sum(534, t)
    c.arrow((205, y), (205, t), tok.left)
    c.arrow(tok.right, p1.left)
    c.skip((222, t), p1, 72)
    c.arrow(p1.right, ch.left)
    c.arrow(ch.right, p2.left)
    c.skip((390, t), p2, 72)
    c.frame(214, 60, 552, 148, "a Mixer block makes the gate g")
    prod = c.sum(590, y, "×")
    c.arrow(value.right, prod.left)
    c.arrow(p2.right, (590, t), prod.top)
    plus = c.sum(640, y)
    c.arrow(prod.right, plus.left)
    c.skip((z.right[0] + 8, y), plus, 250)
    ln2, mlp = c.chain(y, 672, [("LayerNorm a", "norm"), ("MLP", "channels")], gap=16)
    c.arrow(plus.right, ln2.left)
    plus2 = c.sum(870, y)
    c.arrow(mlp.right, plus2.left)
    c.skip((661, y), plus2, 250)
    c.arrow(plus2.right, (922, y))
    c.text(
        20,
        285,
        'Both boxes "LayerNorm a" are one module. The token MLP is where positions mix, with weights fixed after training.',
        "note",
        "start",
    )
    return c


def activator() -> Canvas:
    """`zoo/activator.py`."""
    c = Canvas(
        940,
        300,
        "An Activator block",
        "The normalised tokens take an activation path and a linear path, both normalised by one LayerNorm; their "
        "product is projected and added. The first version has an MLP behind it. No box mixes positions.",
    )
    y = 130
    z, ln = c.chain(y, 20, [("z", "data"), ("LayerNorm a", "norm")], gap=22)
    w1, g, h1 = c.chain(95, 230, [("W1", "channels"), ("GELU", "norm"), ("LayerNorm h", "norm")], gap=16)
    w2, h2 = c.chain(165, 230, [("W2", "channels"), ("LayerNorm h", "norm")], gap=76)
    for w in (w1, w2):
        c.arrow(ln.right, (208, y), (208, w.y), w.left)
    prod = c.sum(500, y, "×")
    c.arrow(h1.right, (500, 95), prod.top)
    c.arrow(h2.right, (500, 165), prod.bottom)
    w3 = c.box(560, y, "W3", "channels")
    c.arrow(prod.right, w3.left)
    plus = c.sum(615, y)
    c.arrow(w3.right, plus.left)
    c.skip((z.right[0] + 8, y), plus, 60)
    ln2, mlp = c.chain(y, 655, [("LayerNorm a", "norm"), ("MLP", "channels")], gap=16)
    c.arrow(plus.right, ln2.left)
    plus2 = c.sum(865, y)
    c.arrow(mlp.right, plus2.left)
    c.skip((636, y), plus2, 60)
    c.arrow(plus2.right, (920, y))
    c.frame(645, 95, 845, 170)
    c.text(745, 188, "activator_* only, not activator_geglu_*", "note")
    c.text(
        20,
        240,
        'Both boxes "a" are one module, both boxes "h" another. Nothing mixes positions: the logits are the mean of each patch\'s own.',
        "note",
        "start",
    )
    return c


def spartan() -> Canvas:
    """`zoo/spartan_blocks.py`."""
    c = Canvas(
        980,
        430,
        "A SpaRTAN block",
        "Above, the spatial mixer: a 1x1 convolution, a decomposition, two branches of 3x3 and 9x9 receptive field, "
        "each re-weighted, joined by a 1x1 convolution. Below, the channel mixer: amplitude times gate plus the "
        "strongest wave, a complex factor, a 3x3 convolution, a re-weighting and a 1x1 convolution.",
    )
    y = 130
    boxes = c.chain(
        y, 20, [("x", "data"), ("GroupNorm", "norm"), ("1x1", "channels"), ("x + γ (x − mean)", "norm")], gap=18
    )
    a = c.box(503, 92, "3x3, GELU", "tokens", w=180)
    b = c.box(503, 168, "3x3 dil. 2, 3x3 dil. 2, GELU", "tokens", w=212)
    sa = c.box(652, 92, "SE", "norm")
    sb = c.box(652, 168, "SE", "norm")
    for branch, se in ((a, sa), (b, sb)):
        c.arrow(boxes[-1].right, (388, y), (388, branch.y), branch.left)
        c.arrow(branch.right, se.left)
    join = c.box(748, y, "concat, 1x1", "channels")
    c.arrow(sa.right, (687, 92), (687, 122), (join.left[0], 122))
    c.arrow(sb.right, (687, 168), (687, 138), (join.left[0], 138))
    scale = c.box(845, y, "scale", "norm")
    c.arrow(join.right, scale.left)
    plus = c.sum(905, y)
    c.arrow(scale.right, plus.left)
    c.skip((boxes[0].right[0] + 7, y), plus, 55)
    c.arrow(plus.right, (955, y))
    y = 300
    gn = c.box(130, y, "GroupNorm", "norm")
    x = c.box(42, y, "x", "data")
    c.arrow(x.right, gn.left)
    amp = c.box(255, 265, "1x1: amplitude", "channels")
    ph = c.box(255, 335, "1x1, GELU: gate", "channels")
    for w in (amp, ph):
        c.arrow(gn.right, (188, y), (188, w.y), w.left)
    prod = c.sum(345, y, "×")
    c.arrow(amp.right, (345, 265), prod.top)
    c.arrow(ph.right, (345, 335), prod.bottom)
    wave = c.box(442, y, "+ the pixel's\nstrongest wave", "gate")
    c.arrow(prod.right, wave.left)
    rest = c.chain(
        y,
        522,
        [("× (α + iβ)\nper pair", "gate"), ("3x3", "tokens"), ("SE", "norm"), ("1x1", "channels"), ("scale", "norm")],
        gap=13,
    )
    c.arrow(wave.right, rest[0].left)
    plus2 = c.sum(905, y)
    c.arrow(rest[-1].right, plus2.left)
    c.skip((x.right[0] + 7, y), plus2, 228)
    c.arrow(plus2.right, (955, y))
    c.text(
        20,
        385,
        "3x3 layers are dense in stages 1, 2 of the spatial mixer and depthwise in 3, 4; SE: squeeze-and-excitation.",
        "note",
        "start",
    )
    return c


def vim2() -> Canvas:
    """`zoo/vim2_blocks.py`."""
    c = Canvas(
        960,
        490,
        "ViM2: token mixer, channel mixer, and what they read",
        "The token mixer scans the map in four directions with selective state spaces; the channel mixer scans the "
        "channels of each pixel in four orders. Each mixer of a stage reads a learned weighted sum of all earlier "
        "outputs of the stage.",
    )

    def mixer(y: float, first: str, conv: str, scan: str, last: str, kind: str) -> None:
        x, ln, lin, dw, ss, norm = c.chain(
            y,
            20,
            [
                ("x", "data"),
                ("LayerNorm", "norm"),
                (first, "channels"),
                (conv, kind),
                (scan, kind),
                ("sum, LayerNorm", "norm"),
            ],
            gap=16,
        )
        prod = c.sum(norm.right[0] + 28, y, "×")
        c.arrow(norm.right, prod.left)
        c.arrow((lin.right[0] + 7, y), (lin.right[0] + 7, y + 42), (prod.x, y + 42), prod.bottom)
        c.text(prod.x - 100, y + 37, "SiLU(z)", "note")
        out = c.box(prod.x + 60, y, last, "channels")
        c.arrow(prod.right, out.left)
        plus = c.sum(out.right[0] + 26, y)
        c.arrow(out.right, plus.left)
        c.skip((x.right[0] + 7, y), plus, y - 45)
        c.arrow(plus.right, (plus.x + 45, y))

    c.text(20, 58, "token mixer", "note", "start")
    mixer(110, "linear\nto 2 x 2 C", "depthwise 3x3,\nSiLU", "4 selective scans\nover the pixels", "linear", "tokens")
    c.text(20, 195, "channel mixer, at each pixel", "note", "start")
    mixer(
        245,
        "grouped\nlinear",
        "conv 3 along\nchannels, SiLU",
        "4 selective scans\nover the channels",
        "grouped",
        "channels",
    )
    y = 405
    names = [
        ("input", "data"),
        ("token 1", "tokens"),
        ("token 2", "tokens"),
        ("channel 1", "channels"),
        ("token 3", "tokens"),
    ]
    boxes = [c.box(75 + 150 * i, y, name, kind, w=92) for i, (name, kind) in enumerate(names)]
    for a, b in pairwise(boxes):
        c.arrow(a.right, b.left)
    spans = [(i, j) for i in range(5) for j in range(i + 2, 5)]
    for k, (i, j) in enumerate(sorted(spans, key=lambda s: (s[1] - s[0], s[0]))):
        start, end = boxes[i].x + 12 + 10 * (j - i - 2), boxes[j].x - 14 - 10 * (j - i - 2)
        height = y - 30 - 9 * k
        c.arrow((start, boxes[i].top[1]), (start, height), (end, height), (end, boxes[j].top[1]))
    c.text(745, y - 5, "beginning of stage 3: each arrow", "note", "start")
    c.text(745, y + 12, "has a learned weight", "note", "start")
    return c


def stdc() -> Canvas:
    """`zoo/stdc.py`."""
    c = Canvas(
        820,
        250,
        "An STDC block",
        "Four convolutions in a row, each narrower than the one before; the outputs of all four are concatenated.",
    )
    y = 150
    boxes = c.chain(
        y,
        20,
        [
            ("x", "data"),
            ("1x1, C/2", "channels"),
            ("3x3, C/4", "tokens"),
            ("3x3, C/8", "tokens"),
            ("3x3, C/8", "tokens"),
        ],
        gap=34,
    )
    cat = c.box(650, y, "concat: C channels", "data")
    c.arrow(boxes[-1].right, cat.left)
    for i, b in enumerate(boxes[1:-1]):
        h = 90 - 14 * (2 - i) + 14
        c.arrow((b.right[0] + 10, y), (b.right[0] + 10, h), (cat.x - 12 * i + 12, h), (cat.x - 12 * i + 12, cat.top[1]))
    c.arrow(cat.right, (780, y))
    c.text(
        20,
        195,
        "Each convolution is followed by BatchNorm and ReLU. Receptive fields 1, 3, 5 and 7 reach the output side by side.",
        "note",
        "start",
    )
    return c


def detection() -> Canvas:
    """`heads/pyramid.py`, `heads/fpn.py` and the detectors."""
    c = Canvas(
        900,
        300,
        "A detector on any backbone",
        "The picture is padded, the timm model gives maps, the pyramid crops or rescales them to strides 4 to 32, an "
        "FPN or RT-DETR's encoder joins them, and a head gives boxes, labels, scores and masks.",
    )
    y = 130
    boxes = c.chain(
        y,
        20,
        [("picture", "data"), ("pad to the\nlargest stride", "norm"), ("any timm or\nzoo backbone", "tokens")],
        gap=22,
    )
    maps = []
    for i, s in enumerate((4, 8, 16, 32)):
        maps.append(c.box(425, 70 + 40 * i, f"stride {s}", "data", w=92, h=30))
        c.arrow(boxes[-1].right, (362, y), (362, maps[-1].y), maps[-1].left)
    neck = c.box(570, y, "FPN, or\nRT-DETR's\nencoder", "tokens", h=150)
    for m in maps:
        c.arrow(m.right, (neck.left[0], m.y))
    heads = c.box(725, y, "RetinaNet, FCOS\nFaster R-CNN\nMask R-CNN\nRT-DETR", "channels", h=110)
    c.arrow(neck.right, heads.left)
    out = c.box(845, y, "boxes\n(masks)", "data")
    c.arrow(heads.right, out.left)
    c.text(
        20,
        235,
        "A map of stride s has ceil(H/s) x ceil(W/s) cells for every picture, whatever the backbone does at borders;",
        "note",
        "start",
    )
    c.text(
        20,
        252,
        "backbones with one scale get the other strides by transposed convolutions and pooling.",
        "note",
        "start",
    )
    return c


def segmentation() -> Canvas:
    """`heads/pem`."""
    c = Canvas(
        940,
        380,
        "PEM: queries that look at one token each",
        "Backbone maps pass a convolutional decoder with deformable convolutions. A hundred queries are refined six "
        "times: for each head a query takes the most similar token inside its last mask, multiplies it with itself, "
        "and then attends to the other queries. Each query gives a class and a mask.",
    )
    maps = c.box(75, 95, "maps of strides\n4, 8, 16, 32", "data")
    dec = c.box(270, 95, "1x1, channel gate,\ndeformable 3x3, x2 up,\nfrom coarse to fine", "tokens")
    c.arrow(maps.right, dec.left)
    feats = c.box(490, 95, "mask features,\nstride 4", "data")
    c.arrow(dec.right, feats.left)
    tokens = c.box(270, 185, "tokens of strides\n32, 16, 8 in turn", "data")
    c.arrow(dec.bottom, tokens.top)
    y = 265
    q = c.box(75, y, "100 queries", "data")
    pick = c.box(270, y, "for each head: the most similar\ntoken inside the last mask", "tokens")
    c.arrow(q.right, pick.left)
    c.arrow(tokens.bottom, pick.top)
    mult = c.box(478, y, "product with\nthe query", "gate")
    c.arrow(pick.right, mult.left)
    self = c.box(625, y, "self-attention,\nMLP", "tokens")
    c.arrow(mult.right, self.left)
    pred = c.box(790, y, "class, and mask =\nquery · features", "gate")
    c.arrow(self.right, pred.left)
    c.arrow(feats.right, (790, 95), pred.top)
    c.arrow(pred.bottom, (790, 325), (270, 325), pick.bottom)
    c.text(530, 319, "six times; the mask says where the next step may look", "note")
    return c


def super_resolution() -> Canvas:
    """`heads/craft/blocks.py`."""
    c = Canvas(
        940,
        370,
        "CRAFT: attention refined by high frequencies",
        "Above, the network: a convolution, four groups with a residual path, a convolution, a long residual path and "
        "a pixel shuffle. Below, a step of a group: window attention and a high-frequency branch see the same map, and "
        "attention across channels joins them.",
    )
    y = 95
    boxes = c.chain(
        y,
        20,
        [("small\npicture", "data"), ("3x3", "tokens"), ("4 groups of\n2 steps", "tokens"), ("norm, 3x3", "tokens")],
        gap=26,
    )
    plus = c.sum(505, y)
    c.arrow(boxes[-1].right, plus.left)
    c.skip((boxes[1].right[0] + 10, y), plus, 52)
    up = c.chain(y, 545, [("3x3, pixel shuffle", "channels"), ("+ mean", "norm"), ("large\npicture", "data")], gap=22)
    c.arrow(plus.right, up[0].left)
    c.frame(20, 160, 920, 325, "one step")
    x = c.box(65, 240, "x", "data")
    att = c.box(290, 200, "2 x window attention: half of the\nchannels 4 x 16, half 16 x 4", "tokens")
    high = c.box(290, 285, "high frequencies: 3x3 of one half,\n3x3 maximum of the other", "tokens")
    for b in (att, high):
        c.arrow(x.right, (105, 240), (105, b.y), b.left)
    fuse = c.box(580, 240, "attention across channels:\nq from high, k and v from low", "channels")
    c.arrow(att.right, (445, 200), (445, 230), (fuse.left[0], 230))
    c.arrow(high.right, (455, 285), (455, 250), (fuse.left[0], 250))
    plus = c.sum(715, 240)
    c.arrow(fuse.right, plus.left)
    c.arrow((445, 200), (715, 200), plus.top)
    ff = c.box(810, 240, "+ gated\nfeed-forward", "channels")
    c.arrow(plus.right, ff.left)
    c.arrow(ff.right, (900, 240))
    return c


FIGURES = {
    "metaformer": metaformer,
    "crate": crate,
    "fcaformer": fcaformer,
    "slab": slab,
    "ascan": ascan,
    "ninformer": ninformer,
    "activator": activator,
    "spartan": spartan,
    "vim2": vim2,
    "stdc": stdc,
    "detection": detection,
    "segmentation": segmentation,
    "super-resolution": super_resolution,
}


def main() -> int:
    """Write every figure."""
    for name, function in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(function().svg())
    return 0


if __name__ == "__main__":
    sys.exit(main())
