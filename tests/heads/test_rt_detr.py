"""RT-DETR against transformers' (a development dependency): same weights, same numbers."""

import contextlib
import re

import pytest
import torch

import zoo
from zoo.heads.detection import create_detector
from zoo.heads.rt_detr.criterion import criterion, match, paired_ious
from zoo.heads.rt_detr.decoder import Predictions
from zoo.heads.rt_detr.denoising import denoising_queries

CLASSES, QUERIES, DIM = 5, 30, 32
TINY = dict(
    size=96,
    hidden_dim=DIM,
    num_heads=4,
    ffn_dim=48,
    num_queries=QUERIES,
    num_decoder_layers=3,
    num_points=4,
    expansion=0.5,
)
SHAPES = ((12, 16), (6, 8), (3, 4))  # of the maps


@contextlib.contextmanager
def _double():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _ours(**kwargs):
    torch.manual_seed(0)
    model = create_detector("rt_detr", "resnet18", CLASSES, **{**TINY, **kwargs})
    for name, p in model.named_parameters():  # zeros and constants hide mistakes
        if p.ndim == 1 or "bbox_head" in name or "sampling" in name or "attention_weights" in name:
            torch.nn.init.normal_(p, std=0.3)
    for name, b in model.named_buffers():
        if name.endswith("running_var"):
            b.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            b.normal_(std=0.1)
    return model


def _theirs():
    transformers = pytest.importorskip("transformers")
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
        ),
        encoder_hidden_dim=DIM,
        encoder_in_channels=[8, 8, 8],
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=DIM,
        num_queries=QUERIES,
        decoder_in_channels=[DIM] * 3,
        decoder_ffn_dim=48,
        decoder_layers=3,
        decoder_attention_heads=4,
        num_denoising=20,
        num_labels=CLASSES,
    )
    # its mask is float32: SDPA takes no mask of another type than its float64 queries
    return transformers.RTDetrForObjectDetection._from_config(config, attn_implementation="eager")


# their name -> ours
_RENAME = (
    (r"^model\.", ""),
    (r"^encoder\.aifi\.0\.layers", "encoder.layers"),
    (r"\.self_attn\.o_proj", ".attn.proj"),
    (r"\.self_attn\.v_proj", ".attn.v"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc", ".fc"),
    (r"^(encoder\.layers.*)\.self_attn_layer_norm", r"\1.norm1"),
    (r"^(encoder\.layers.*)\.final_layer_norm", r"\1.norm2"),
    (r"^(decoder\.layers.*)\.self_attn_layer_norm", r"\1.norm1"),
    (r"\.encoder_attn_layer_norm", ".norm2"),
    (r"^(decoder\.layers.*)\.final_layer_norm", r"\1.norm3"),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.bottlenecks\.", ".blocks."),
    (r"^decoder_input_proj", "decoder.input_proj"),
    (r"^enc_", "decoder.enc_"),
    (r"decoder\.class_embed", "decoder.score_heads"),
    (r"decoder\.bbox_embed", "decoder.bbox_heads"),
)


def _give_weights(ours, theirs):
    """Their names, our weights; every entry of both sides after the projection of the backbone's maps is used."""
    own = {k: v for k, v in ours.state_dict().items() if not k.startswith(("backbone", "encoder.input_proj"))}
    state, used = {}, set()
    for name in theirs.state_dict():
        if name.startswith(("model.backbone", "model.encoder_input_proj")):
            continue
        target = name
        for pattern, by in _RENAME:
            target = re.sub(pattern, by, target)
        part = re.search(r"\.attn\.([qk])_proj\.", target)
        if part:
            target = target.replace(f"{part[1]}_proj", "qk")
            value = own[target].chunk(2)["qk".index(part[1])]
        else:
            value = own[target]
        used.add(target)
        state[name] = value.clone()
    assert used == set(own)
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys


class _Maps(torch.nn.Module):
    """In the place of transformers' backbone."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, pixels, mask):
        return [(m.clone(), None) for m in self.maps]


def _maps(batch=2):
    return [torch.randn(batch, DIM, h, w) for h, w in SHAPES]


def _labels():
    torch.manual_seed(3)
    counts = (4, 0, 2)
    boxes = [torch.cat([torch.rand(n, 2) * 0.6 + 0.2, torch.rand(n, 2) * 0.3 + 0.05], 1) for n in counts]
    return [torch.randint(0, CLASSES, (n,)) for n in counts], boxes


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_losses_are_those_of_transformers_in_float64(training):
    with _double():
        theirs, ours = _theirs(), _ours(num_denoising=20)
        _give_weights(ours, theirs)
        labels, boxes = _labels()
        maps = _maps(3)
        identities = torch.nn.ModuleList(torch.nn.Identity() for _ in maps)
        ours.encoder.input_proj = theirs.model.encoder_input_proj = identities
        theirs.model.backbone = _Maps(maps)
        ours.train(training)
        theirs.train(training)
        targets = [{"class_labels": own, "boxes": box} for own, box in zip(labels, boxes)]
        torch.manual_seed(7)
        expected = theirs(torch.zeros(3, 3, 96, 128), labels=targets)
        torch.manual_seed(7)
        encoded = ours.encoder([m.clone() for m in maps])
        denoising = None
        if training:
            denoising = denoising_queries(labels, boxes, ours.denoising_class_embed, QUERIES, num_denoising=20)
        found = ours.decoder(encoded, denoising)
    bar = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.logits[-1], expected.logits, **bar)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, **bar)
    torch.testing.assert_close(found.start_logits, expected.enc_topk_logits, **bar)
    torch.testing.assert_close(found.start_boxes, expected.enc_topk_bboxes, **bar)
    if not training:
        return
    torch.testing.assert_close(found.boxes.transpose(0, 1), expected.intermediate_reference_points, **bar)
    losses = criterion(found, labels, boxes, denoising)
    names = {f"layer{i}": f"_aux_{i}" for i in range(2)} | {"layer2": "", "start": "_aux_2"}
    names |= {f"denoising{i}": f"_dn_{i}" for i in range(3)}
    assert set(losses) == set(names)
    for layer, suffix in names.items():
        for name in ("vfl", "bbox", "giou"):
            theirs_loss = expected.loss_dict[f"loss_{name}{suffix}"]
            torch.testing.assert_close(losses[layer][name], theirs_loss, rtol=1e-9, atol=1e-9)
    total = sum(v for own in losses.values() for v in own.values())
    torch.testing.assert_close(total, expected.loss, rtol=1e-9, atol=0)

    # and the gradients of all of it
    total.backward()
    expected.loss.backward()
    for ours_p, theirs_p in (
        (ours.decoder.enc_score_head.weight, theirs.model.enc_score_head.weight),
        (ours.encoder.layers[0].fc1.weight, theirs.model.encoder.aifi[0].layers[0].mlp.fc1.weight),
        (ours.denoising_class_embed.weight, theirs.model.denoising_class_embed.weight),
        (
            ours.decoder.layers[0].cross_attn.sampling_offsets.weight,
            theirs.model.decoder.layers[0].encoder_attn.sampling_offsets.weight,
        ),
    ):
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, rtol=1e-8, atol=1e-10)


def test_ious_of_pairs_are_torchvisions():
    from torchvision.ops import box_convert, box_iou, generalized_box_iou

    torch.manual_seed(0)
    a, b = torch.rand(2, 9, 4, dtype=torch.float64)
    iou, giou = paired_ious(a, b)
    corners = [box_convert(x, "cxcywh", "xyxy") for x in (a, b)]
    torch.testing.assert_close(iou, box_iou(*corners).diagonal())
    torch.testing.assert_close(giou, generalized_box_iou(*corners).diagonal())


def test_the_best_query_is_matched_with_its_object_and_losses_vanish_with_the_error():
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.7, 0.6, 0.2, 0.4], [0.5, 0.5, 0.9, 0.9]]])
    logits = torch.full((1, 3, 4), -20.0)
    logits[0, 1, 2] = logits[0, 0, 3] = 20
    labels, targets = [torch.tensor([2, 3])], [boxes[0, [1, 0]]]
    ((queries, objects),) = match(logits, boxes, labels, targets)
    assert dict(zip(queries.tolist(), objects.tolist())) == {1: 0, 0: 1}
    losses = criterion(Predictions(logits[None], boxes[None], logits, boxes), labels, targets, None)
    assert all(v < 1e-5 for own in losses.values() for v in own.values())


def test_denoising_groups_see_themselves_and_no_one_sees_them():
    embedding = torch.nn.Embedding(4, 8, padding_idx=3)
    labels = [torch.tensor([0, 1]), torch.tensor([2])]
    boxes = [torch.full((2, 4), 0.5), torch.full((1, 4), 0.3)]
    dn = denoising_queries(labels, boxes, embedding, 5, num_denoising=6)
    assert dn.groups == 3
    assert dn.count == 12
    assert not dn.mask[12:, :12].any()
    assert dn.mask[:, 12:].all()
    assert dn.mask[:12, :12].sum() == 3 * 16
    assert dn.mask[4:8, 4:8].all()
    assert [len(p) for p in dn.positives] == [6, 3]
    assert dn.pairs(labels)[0][1].tolist() == [0, 1] * 3
    assert denoising_queries([labels[0][:0]], [boxes[0][:0]], embedding, 5) is None


def test_a_batch_without_objects_trains_every_parameter():
    model = create_detector("rt_detr", "resnet18", CLASSES, **TINY).train()
    target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    losses = model([torch.rand(3, 50, 70)] * 2, [target, target])
    sum(losses.values()).backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("size", [96, (70, 101)])
def test_the_folded_model_is_the_model(size):
    with _double():
        model = _ours().eval()
        image = torch.rand(1, 3, *((size, size) if isinstance(size, int) else size))
        with torch.no_grad():
            expected = model.network(image)
            found = zoo.fold(model).network(image)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-9, atol=1e-9)


def test_counts_are_those_of_the_official_detector_code():
    # SpaRTAN-T under the settings of RT-DETR's ResNet-18, -34 and -50 models, as trained
    for arguments, millions in (
        (dict(expansion=0.5, num_decoder_layers=3), 12.43),
        (dict(expansion=0.5, num_decoder_layers=4), 13.58),
        (dict(), 22.18),
    ):
        with torch.device("meta"):
            model = create_detector("rt_detr", "spartan_tiny", 80, **arguments)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_images_are_resized_to_one_size_and_boxes_come_back():
    torch.manual_seed(0)
    model = create_detector("rt_detr", "resnet18", CLASSES, **{**TINY, "multi_scale": (64, 128)})
    assert {model.train()._batch([torch.rand(3, 40, 90)]).shape[-1] for _ in range(20)} == {64, 128}
    found = model.eval()([torch.rand(3, 40, 90), (torch.rand(3, 200, 31) * 255).byte()])
    for one, (h, w) in zip(found, ((40, 90), (200, 31))):
        assert (one["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
        assert (one["scores"].diff() <= 0).all()
    drawn = create_detector("rt_detr", "resnet18", CLASSES, **TINY, multi_scale=(64,), resize_in_training=False).train()
    assert drawn._batch([torch.rand(3, 96, 96)] * 2).shape == (2, 3, 64, 64)
    fixed = create_detector("rt_detr", "resnet18", CLASSES, **TINY, resize_in_training=False).train()
    assert fixed._batch([torch.rand(3, 40, 90)]).shape == (1, 3, 40, 90)
    with pytest.raises(ValueError, match="differ in size"):
        fixed._batch([torch.rand(3, 40, 90), torch.rand(3, 40, 91)])
