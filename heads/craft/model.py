"""CRAFT, Feature Modulation Transformer: Cross-Refinement of Global Representation via High-Frequency Prior for Image
Super-Resolution (ICCV 2023, arXiv 2308.05022).

Transformers restore low frequencies well and high frequencies less well than convolutions do. Each step of CRAFT runs
both, attention in rectangular windows and a small convolutional branch, and lets the high-frequency map query the
attention map across channels. 0.75 M parameters, the same one-step upsampler for every scale.

What differs from the official code:
- maps are channels-last, windows are one gather and one scatter, and with gradients off on a CPU the model works
  through strips of rows that stay in the cache (`zoo.heads.craft.strips`); the numbers are the same to rounding;
- any image size: `forward` pads as the official validation does, `upscale` as its inference script does; both crop;
- the position bias of the official width, which softmax ignores (`PositionBias.inert`), is not computed;
- `shift_mask=True` is the variant of the authors' second repository (journal version), which masks shifted windows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.checkpoint import CheckpointError, Conversion, StateDict, checkpoint_converter
from zoo.heads.craft.blocks import ChannelNorm, Group, spatial
from zoo.heads.craft.padding import Padding, pad_image

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as in the official code
_BUFFERS = ("relative_position_index_h", "relative_position_index_v", "biases_h", "biases_v")


class Craft(nn.Module):
    """Super-resolution of images in [0, 1]: (B, C, H, W) -> (B, C, scale*H, scale*W), not clamped.

    Args:
        scale: factor of enlargement.
        in_chans: channels of the images; the mean is subtracted from 3-channel ones only.
        embed_dim: width. The relative position bias has an effect from 64 on.
        depths: steps of each group.
        num_heads: heads of each group, even; half of them belong to each window shape.
        window: rows and columns of the windows of branch 0; branch 1 has them exchanged.
        mlp_ratio: hidden width of the MLPs after the attention.
        ffn_ratio: hidden width of the gated feed-forwards.
        qkv_bias: biases of queries, keys and values.
        img_range: factor applied to the images first.
        resi_connection: "1conv" or "identity", what ends each group and the body.
        shift_mask: mask shifted windows at the border (the variant of the journal version's repository).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: options that do not fit each other.
    """

    def __init__(
        self,
        scale: int = 4,
        in_chans: int = 3,
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] | int = 6,
        window: tuple[int, int] = (4, 16),
        mlp_ratio: float = 2.0,
        ffn_ratio: float = 2.66,
        qkv_bias: bool = True,
        img_range: float = 1.0,
        resi_connection: str = "1conv",
        shift_mask: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        heads = (num_heads,) * len(depths) if isinstance(num_heads, int) else tuple(num_heads)
        _check_options(scale, embed_dim, depths, heads, window, resi_connection)
        self.scale = scale
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.depths = tuple(depths)
        self.num_heads = heads
        self.window = tuple(window)
        self.img_range = img_range
        self.shift_mask = shift_mask
        self.multiple = math.lcm(*window)  # of rows and columns that windows fill
        self.register_buffer("mean", torch.empty(1, in_chans, 1, 1, **dd), persistent=False)

        conv = resi_connection == "1conv"
        attention = dict(window=self.window, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, shift_mask=shift_mask)
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1, **dd)
        self.layers = nn.ModuleList(
            Group(embed_dim, depth, h, ffn_ratio, conv, attention, **dd) for depth, h in zip(depths, heads)
        )
        self.norm = ChannelNorm(embed_dim, **dd)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, **dd) if conv else nn.Identity()
        self.upsample = nn.Sequential(
            nn.Conv2d(embed_dim, in_chans * scale**2, 3, padding=1, **dd), nn.PixelShuffle(scale)
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The official initialisation: linear layers truncated normal, convolutions as PyTorch has them."""
        mean = torch.tensor(RGB_MEAN) if self.in_chans == 3 else torch.zeros(self.in_chans)
        self.mean.copy_(mean.reshape(1, -1, 1, 1))
        own = (self.conv_first, self.layers, self.norm, self.conv_after_body, self.upsample)
        for module in (module for part in own for module in part.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()
            elif hasattr(module, "temperature"):
                nn.init.ones_(module.temperature)

    def freeze_inert(self) -> None:
        """Take the position MLPs without effect out of training: they get no gradient, which DDP takes for an error."""
        for module in self.modules():
            if getattr(module, "inert", False):
                module.requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimisers leave undecayed (the official recipe decays nothing)."""
        return {name for name, _ in self.named_parameters() if name.endswith("temperature") or ".pos." in name}

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge images of any size; those that are not whole windows are mirrored at the border and cropped after."""
        height, width = x.shape[2:]
        y = self.forward_padded(pad_image(x, self.multiple, "reflect"))
        return y[:, :, : height * self.scale, : width * self.scale]

    def upscale(self, x: Tensor, padding: Padding = "official") -> Tensor:
        """`forward` with the padding of the official inference script, which gave the published numbers."""
        height, width = x.shape[2:]
        y = self.forward_padded(pad_image(x, self.multiple, padding))
        return y[:, :, : height * self.scale, : width * self.scale]

    def predict(self, image, **options):
        """Enlarge a picture, or each of a list: path, PIL image, array or tensor in 0..1, of any size and mode.

        Args:
            image: what `zoo.read_image` takes, or a list of these.
            options: of `zoo.heads.craft.pictures.enlarge`: `max_memory`, `tile`, `ensemble`, `padding`, ...

        Returns:
            `UpscalePrediction`: `.image` is the result, `.picture.save(path)` writes it with its metadata.
        """
        from zoo.heads.craft.pictures import predict
        from zoo.prediction import evaluating

        with evaluating(self):
            if isinstance(image, (list, tuple)):
                return [predict(self, one, **options) for one in image]
            return predict(self, image, **options)

    def forward_padded(self, x: Tensor) -> Tensor:
        """The network itself, for rows and columns that are multiples of `multiple`."""
        if self._in_strips(x):
            from zoo.heads.craft.strips import forward_strips

            return forward_strips(self, x)
        return self.reconstruct(self.forward_features(x))

    def _in_strips(self, x: Tensor) -> bool:
        """Whether nothing is traced, recorded or hooked into, and the device has caches rather than many cores."""
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        return x.device.type == "cpu" and not plain

    def embed(self, x: Tensor) -> Tensor:
        """Images to the shallow map (B, H, W, C)."""
        x = (x - self.mean) * self.img_range
        return spatial(x.permute(0, 2, 3, 1).contiguous(), self.conv_first)

    def side_inputs(self, x: Tensor) -> list[Tensor]:
        """Maps that `join` adds to the groups' inputs: none here, those of a backbone in `CraftOnBackbone`."""
        return []

    def join(self, x: Tensor, side: list[Tensor], index: int) -> Tensor:
        """The input of group `index`: its predecessor's output, (B, H, W, C) or (H, W, C), and a side input."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the deep map (B, H, W, C) before the upsampler."""
        side = self.side_inputs(x)
        shallow = x = self.embed(x)
        for i, group in enumerate(self.layers):
            x = group(self.join(x, side, i))
        return self.close(self.norm(x)) + shallow

    def check_size(self, height: int, width: int) -> None:
        """Refuse what is not whole windows.

        Raises:
            ValueError: names the size and what to do.
        """
        if height % self.multiple or width % self.multiple or not (height and width):
            raise ValueError(
                f"an image of {height} x {width} does not consist of whole windows: rows and columns must be "
                f"multiples of {self.multiple} here; `forward` and `upscale` pad by themselves"
            )

    def close(self, x: Tensor) -> Tensor:
        """The convolution after the body."""
        return spatial(x, self.conv_after_body) if isinstance(self.conv_after_body, nn.Conv2d) else x

    def reconstruct(self, x: Tensor) -> Tensor:
        """The deep map to images, in float32 at least."""
        x = x.permute(0, 3, 1, 2)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.mean.dtype)
            return self.upsample(x) / self.img_range + self.mean


def _check_options(scale, embed_dim, depths, heads, window, resi_connection) -> None:
    if not (isinstance(scale, int) and scale >= 1):
        raise ValueError(f"scale is {scale!r}: expected a whole number from 1 on (the official models have 2, 3, 4)")
    if len(heads) != len(depths):
        raise ValueError(f"num_heads has {len(heads)} entries and depths {len(depths)}: give one for each group")
    if embed_dim < 32:
        raise ValueError(
            f"embed_dim is {embed_dim}: expected 32 or more, the width of the position MLP is a 32nd of it"
        )
    for h in heads:
        if h % 2 or embed_dim % h:
            raise ValueError(
                f"num_heads {h} does not fit embed_dim {embed_dim}: it must be even and divide the width, "
                "since half of the heads belong to each window shape"
            )
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"window is {window!r}: expected two positive numbers, rows and columns")
    if resi_connection not in ("1conv", "identity"):
        raise ValueError(f'resi_connection is {resi_connection!r}: expected "1conv" or "identity"')


def read_options(state: StateDict) -> dict:
    """Constructor options that the entries of a CRAFT checkpoint tell; what they cannot tell is left out.

    Not told: `shift_mask` and `img_range`.

    Raises:
        CheckpointError: an entry is missing that every CRAFT file has.
    """
    try:
        embed_dim, in_chans = state["conv_first.weight"].shape[:2]
        up = state["upsample.0.weight"].shape[0]
        groups = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
        part = "layers.{}.residual_group.{}"
        depths = []
        for g in range(groups):
            start = part.format(g, "hf_blocks.")
            depths.append(1 + max(int(name[len(start) :].split(".")[0]) for name in state if name.startswith(start)))
        heads = tuple(state[part.format(g, "hf_blocks.0.attn.temperature")].shape[0] for g in range(groups))
        block = part.format(0, "srwa_blocks.0.")
        hidden = state[block + "mlp.fc1.weight"].shape[0]
        gated = state[part.format(0, "hf_blocks.0.ffn.project_out.weight")].shape[1]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"not a CRAFT checkpoint: it has no entry for {error}") from error
    options = dict(
        scale=math.isqrt(up // in_chans),
        in_chans=in_chans,
        embed_dim=embed_dim,
        depths=tuple(depths),
        num_heads=heads,
        mlp_ratio=hidden / embed_dim,
        ffn_ratio=2.66 if int(embed_dim * 2.66) == gated else (gated + 0.5) / embed_dim,
        qkv_bias=block + "qkv.bias" in state,
        resi_connection="1conv" if "conv_after_body.weight" in state else "identity",
    )
    index, table = state.get("relative_position_index_h"), state.get("biases_h")
    if index is not None and table is not None:
        options["window"] = _window(index, table.shape[0])
    return options


def _window(index: Tensor, offsets: int) -> tuple[int, int]:
    """Rows and columns h <= w of windows of h*w tokens with (2h-1)(2w-1) offsets; the index tells which comes first."""
    area = index.shape[0]
    for h in range(1, area + 1):
        if area % h == 0 and (2 * h - 1) * (2 * (area // h) - 1) == offsets:
            w = area // h
            # tokens 0 and 1 are neighbours in a row, except in windows of one column
            rows_first = w == 1 or int(index[0, 0] - index[0, 1]) == 1
            # from one row to the next the index moves by 2w - 1
            if rows_first and (h == 1 or int(index[w, 0] - index[0, 0]) == 2 * w - 1):
                return h, w
    raise CheckpointError(f"windows of {area} tokens cannot have {offsets} offsets: not a CRAFT checkpoint")


@checkpoint_converter(
    Craft,
    layouts={
        "CRAFT": (
            "conv_first.weight",
            "layers.*.residual_group.srwa_blocks.*.qkv.weight",
            "layers.*.residual_group.hf_blocks.*.attn.temperature",
        )
    },
)
def convert_checkpoint(state_dict: StateDict, model: Craft) -> Conversion:
    """Official files: the names are zoo's; the four tables of offsets and indices are built, not stored."""
    official = any(name in state_dict for name in _BUFFERS)
    state = {name: value for name, value in state_dict.items() if name not in _BUFFERS}
    notes = []
    pos = model.layers[0].residual_group.srwa_blocks[0].attns[0].pos
    table = state_dict.get("biases_h")
    if table is not None and table.shape[0] != pos.offsets().shape[0]:
        raise CheckpointError(
            f"the file is of windows with {table.shape[0]} offsets, the model has windows of {model.window}: "
            f"build it with window={_window(state_dict['relative_position_index_h'], table.shape[0])}"
        )
    if table is not None and not pos.inert and not table.is_meta:
        own = pos.offsets().to(table)
        if not torch.equal(own, table):
            notes.append("the file's table of offsets differs from whole numbers; the model's own is used")
    _check_scale(state, model)
    return Conversion(state, "CRAFT" if official else "zoo", tuple(notes))


def _check_scale(state: StateDict, model: Craft) -> None:
    weight = state.get("upsample.0.weight")
    own = model.upsample[0].weight
    if weight is not None and weight.shape[1:] == own.shape[1:] and weight.shape[0] != own.shape[0]:
        scale = math.isqrt(weight.shape[0] // model.in_chans)
        raise CheckpointError(
            f"the file is of a model for scale {scale}, this one is for {model.scale}: build it with scale={scale}"
        )
