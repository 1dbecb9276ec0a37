"""The typed settings of a recipe. Every field has a unit or a range; unknown keys are refused.

A recipe says *what* to compute. Where it runs (device, threads) is a profile's business and never changes a result
beyond the rounding of another kind of device.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from maehpc.recipes.plugins import METHODS, METRICS

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

ENCODER_SIZES: dict[str, tuple[int, int, int, int]] = {
    "vit-tiny": (192, 12, 3, 16),
    "vit-small": (384, 12, 6, 16),
    "vit-base": (768, 12, 12, 16),
    "vit-large": (1024, 24, 16, 16),
    "vit-huge": (1280, 32, 16, 14),
}
"""Width, depth, heads and patch size by name (Dosovitskiy et al. 2021; Touvron et al. 2021 for tiny, small)."""

DEFAULT_METHODS = ("saliency", "gradcam", "deeplift")
SEARCHES = ("pgd", "topk", "centre", "targeted")
"""Searches for an adversarial perturbation; see `SensitivitySettings`."""
SEARCH_SCORES = ("change", "top", "spearman", "centre")
"""What is stored of a search, an image and method: METHOD_KIND_SCORE; see `maehpc.explain.attacks.Attacked`."""


class Settings(BaseModel):
    """Base of all settings: frozen, strict about unknown keys, documented defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DataSettings(Settings):
    """How an image becomes the encoder's input."""

    source_size: Literal[28, 64, 128, 224] = Field(28, description="MedMNIST resolution to read, pixels")
    image_size: Positive = Field(224, description="side of the square the encoder sees, pixels")
    channels: Literal[1, 3] = Field(3, description="grey images are repeated to 3, colour is averaged to 1")
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    normalization: Literal["imagenet", "dataset"] = Field(
        "imagenet",
        description="mean and standard deviation: ImageNet's, or those of the data set's train split",
    )
    resident_bytes: Positive = Field(2 << 30, description="splits up to this many bytes stay in memory")

    @model_validator(mode="after")
    def _statistics_fit_channels(self) -> Self:
        if self.channels == 1 and self.normalization == "imagenet":
            raise ValueError("channels: 1 has no statistics of ImageNet; use normalization: dataset with it")
        return self


class EncoderSettings(Settings):
    """The vision transformer and where its first weights come from."""

    name: str = Field(
        "vit-base",
        description="vit-tiny, vit-small, vit-base, vit-large, vit-huge, or timm:NAME for any timm ViT",
    )
    patch_size: Positive | None = Field(None, description="pixels; the size's own where null")
    width: Positive | None = Field(None, description="embedding dimension; the size's own where null")
    depth: Positive | None = Field(None, description="number of blocks; the size's own where null")
    heads: Positive | None = Field(None, description="attention heads; the size's own where null")
    weights: str = Field(
        "pretrain",
        description="pretrain: this experiment's own MAE; scratch: random; timm: timm's pretrained; or a file's path",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name.startswith("timm:"):
            given = [key for key in ("patch_size", "width", "depth", "heads") if getattr(self, key) is not None]
            if given:
                raise ValueError(f"{given[0]} cannot be set for {self.name}: a timm model has its own")
        elif self.name not in ENCODER_SIZES:
            raise ValueError(f"'{self.name}' is none of {', '.join(ENCODER_SIZES)} or timm:NAME")
        elif self.weights == "timm":
            raise ValueError("weights: timm needs name: timm:NAME (for example timm:vit_base_patch16_224.mae)")
        elif self.dimensions[0] % self.dimensions[2]:
            raise ValueError(f"width {self.dimensions[0]} is not divisible by heads {self.dimensions[2]}")
        elif self.dimensions[0] % 4:
            raise ValueError(f"width {self.dimensions[0]} is not divisible by 4, which 2-D sine-cosine positions need")
        return self

    @property
    def dimensions(self) -> tuple[int, int, int, int]:
        """Width, depth, heads, patch size of an encoder of ours.

        Raises:
            KeyError: a timm encoder, whose dimensions timm knows.
        """
        width, depth, heads, patch = ENCODER_SIZES[self.name]
        return self.width or width, self.depth or depth, self.heads or heads, self.patch_size or patch


class DecoderSettings(Settings):
    """The MAE decoder (He et al. 2022, section 3)."""

    width: Positive = 512
    depth: Positive = 8
    heads: Positive = 16

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads} and by 4")
        return self


class OptimSettings(Settings):
    """Optimizer and learning-rate schedule, by optimizer step."""

    name: Literal["adamw", "adam", "sgd", "lars"] = Field("adamw", description="lars: of the probe alone")
    lr: Annotated[float, Field(gt=0, le=1e30)] | None = Field(None, description="learning rate as it is")
    base_lr: Annotated[float, Field(gt=0, le=1e30)] | None = Field(
        None, description="learning rate at an effective batch of 256 (linear scaling rule)"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_tokens: bool = Field(
        False, description="also decay CLS, mask tokens and positions, as the MAE reference does"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="sgd and lars only")
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    min_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="where the cosine ends")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(None, description="largest L2 norm of all gradients")

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("give one of lr and base_lr, not both")
        return self

    def peak_lr(self, effective_batch: int) -> float:
        """The learning rate after warm-up for an effective batch of so many images."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * effective_batch / 256


class CheckpointSettings(Settings):
    """How often training state is written, and how much of it stays."""

    every_steps: Positive = 1000
    keep: Annotated[int, Field(ge=1)] = 2


class TrainingSettings(Settings):
    """What the training stages share."""

    optim: OptimSettings
    epochs: Positive
    batch_size: Positive
    accumulate: Positive = Field(1, description="micro-batches an optimizer step")
    crop_scale: tuple[Fraction, Fraction] | None
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        warmup = self.optim.warmup_epochs
        if warmup >= self.epochs:
            raise ValueError(f"optim.warmup_epochs {warmup:g} leaves none of {self.epochs} epochs; set it below that")
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError("crop_scale must be two rising fractions above 0, for example [0.2, 1.0]")
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        if self.optim.name == "lars" and not isinstance(self, ProbeSettings):
            raise ValueError("optim.name: lars trains the linear layer of the probe stage; choose adamw, adam or sgd")
        return self


class PretrainSettings(TrainingSettings):
    """Masked-autoencoder pretraining (He et al. 2022, appendix A.1)."""

    weights: str | None = Field(None, description="file to begin from, an MAE with or without its decoder")
    decoder: DecoderSettings = DecoderSettings()
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    norm_pix: bool = Field(True, description="targets are normalised a patch")
    optim: OptimSettings = OptimSettings(base_lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), schedule="cosine")
    epochs: Positive = 800
    batch_size: Positive = Field(4096, description="images an optimizer step")
    images: Positive | None = Field(None, description="seeded subset of the train split; all where null")
    crop_scale: tuple[Fraction, Fraction] | None = Field(
        (0.2, 1.0), description="area of the random resized crop; no crop and no flip where null"
    )
    reconstructions: Annotated[int, Field(ge=0)] = Field(8, description="test images dumped as reconstructions")


class AdapterSettings(Settings):
    """The head on the encoder's representation."""

    layers: Literal[1, 2] = Field(2, description="1: a linear layer; 2: linear, activation, linear")
    hidden: Positive | None = Field(None, description="width between the two layers; the encoder's where null")
    activation: Literal["relu", "gelu"] = "relu"


class FinetuneSettings(TrainingSettings):
    """A classifier on the encoder. The defaults are the course report's protocol."""

    freeze: bool = Field(True, description="train the adapter alone, on features computed once")
    representation: Literal["cls", "mean"] = Field("cls", description="CLS token, or mean of the patch tokens")
    adapter: AdapterSettings = AdapterSettings()
    optim: OptimSettings = OptimSettings(name="adam", lr=0.1)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="learning-rate factor a block; needs freeze: false"
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="stochastic depth; needs freeze: false")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Positive = 20
    batch_size: Positive = 64
    images: Positive | None = Field(
        1000, description="seeded, class-balanced subset of the train split; all where null"
    )
    crop_scale: tuple[Fraction, Fraction] | None = Field(
        None,
        description="random resized crop and flip; with freeze: true features are then computed every epoch",
    )

    @model_validator(mode="after")
    def _trains_what_it_changes(self) -> Self:
        if self.freeze and (self.layer_decay != 1.0 or self.drop_path):
            raise ValueError("layer_decay and drop_path change a trained encoder; set freeze: false or leave them out")
        return self


class ProbeSettings(TrainingSettings):
    """A linear classifier on frozen, normalised features, by LARS (He et al. 2022, appendix A.1, table 10).

    The published batch of 16384 would leave sets of some thousand images one step an epoch, which is too few for LARS:
    its steps are in proportion to the weights, and those begin small. The defaults are a batch that such sets can fill
    at the published rate a step (6.4 = 0.1 * 16384 / 256); `probe/mae` is the published recipe.
    """

    representation: Literal["cls", "mean"] = Field("cls", description="CLS token, or mean of the patch tokens")
    optim: OptimSettings = OptimSettings(name="lars", lr=6.4, momentum=0.9, schedule="cosine", warmup_epochs=10)
    epochs: Positive = 90
    batch_size: Positive = Field(64, description="images an optimizer step; all of them where there are fewer")
    images: Positive | None = Field(
        None, description="seeded, class-balanced subset of the train split; all where null"
    )
    crop_scale: tuple[Fraction, Fraction] | None = Field(
        None,
        description="random resized crop and flip, by which features are computed in every step; once where null",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder; the linear layer's is fp32")

    @model_validator(mode="after")
    def _in_one_piece(self) -> Self:
        if self.accumulate != 1:
            raise ValueError("accumulate cuts nothing here, features always come in small batches; leave it at 1")
        return self


class GradCamSettings(Settings):
    """GradCAM on tokens reshaped to the patch grid (Selvaraju et al. 2017)."""

    layer: str = Field(
        "blocks.-1.norm1",
        description="module of the encoder whose tokens are weighted; -1 is the last block. With a CLS head the "
        "patch gradients after the last block are 0, so its first norm is the last useful place",
    )
    relu: bool = Field(False, description="keep positive evidence alone")
    upsample: Literal["none", "nearest", "bilinear"] = Field(
        "none", description="stored on the patch grid, or at image size"
    )


class DeepLiftSettings(Settings):
    """The reference input of DeepLIFT, and of every other method that measures from one."""

    baseline: Literal["mean", "black"] = Field("mean", description="mean: 0 in normalised space; black: pixel value 0")


class SearchSettings(Settings):
    """The search for the perturbation that changes an explanation most (Ghorbani et al. 2019, algorithm 1)."""

    steps: Positive = Field(20, description="steps of projected gradient ascent in the same ball as `random`")
    step_size: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of a step, in units of `space`; 2.5 radius / steps where null"
    )
    top: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="share of the map that counts as its top")
    target: Literal["corner", "opposite"] = Field(
        "corner", description="where `targeted` moves the map: the upper left quarter, or the least attributed part"
    )


class SensitivitySettings(Settings):
    """How far an explanation moves inside a small ball around the image: by chance, and at worst.

    `random` samples uniformly (Yeh et al. 2019, equation 1). The others search by gradient ascent, the prediction
    unchanged: `pgd` maximises that same relative change of the map; `topk`, `centre` and `targeted` are Ghorbani et
    al.'s (2019) attacks on the top features, the centre of mass and towards a region.
    """

    kinds: tuple[Literal["random", "pgd", "topk", "centre", "targeted"], ...] = ("random",)
    samples: Annotated[int, Field(ge=0)] = Field(10, description="perturbations an image; 0 leaves `random` out")
    radius: Annotated[float, Field(gt=0)] = Field(0.02, description="half side of the L-inf ball, in units of `space`")
    space: Literal["normalised", "pixel"] = Field("normalised", description="pixel values lie in [0, 1]")
    clip: bool = Field(False, description="clip the perturbed image to valid pixel values")
    norm: Literal["l2", "l1", "linf"] = Field(
        "l2", description="norm of the map over all its elements; l2 is Frobenius"
    )
    search: SearchSettings = SearchSettings()

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(kinds)) != len(kinds):
            raise ValueError("name each kind once")
        return kinds

    @property
    def drawn(self) -> int:
        """Random perturbations an image."""
        return self.samples if "random" in self.kinds else 0

    @property
    def searches(self) -> tuple[str, ...]:
        """The kinds that search."""
        return tuple(kind for kind in self.kinds if kind in SEARCHES)


class MapSettings(Settings):
    """How maps are stored."""

    dtype: Literal["float16", "float32"] = "float32"
    channels: Literal["reduced", "full"] = Field(
        "reduced",
        description="reduced: largest magnitude over channels for saliency, sum over channels for DeepLIFT",
    )
    shard_images: Positive = Field(256, description="images computed and written as one unit")
    pixels: bool = Field(True, description="store the images beside their maps, for figures and export")


class ExplainSettings(Settings):
    """Which images are explained, how, and what is stored."""

    split: Literal["train", "val", "test"] = "test"
    images: Positive | None = Field(None, description="the first so many of the split; all where null")
    methods: tuple[str, ...] = Field(DEFAULT_METHODS, description=f"of {', '.join(METHODS)}")
    options: dict[str, dict[str, Any]] = Field(
        {}, description="a method's or metric's own settings, by its name, as {integrated-gradients: {steps: 64}}"
    )
    target: Literal["prediction", "label"] = Field(
        "prediction", description="class explained: the unperturbed image's prediction, or the label"
    )
    gradcam: GradCamSettings = GradCamSettings()
    deeplift: DeepLiftSettings = DeepLiftSettings()
    sensitivity: SensitivitySettings = SensitivitySettings()
    metrics: tuple[str, ...] = Field((), description=f"further measures of trust, of {', '.join(METRICS)}")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="of matrix products with weights; tf32 needs a GPU. All else is computed in fp32"
    )
    noise_floor_images: Annotated[int, Field(ge=0)] = Field(
        4, description="images of the split whose maps are also computed in float64, to tell rounding from sensitivity"
    )
    batch_size: Positive | None = Field(
        None, description="images a pass, with all their perturbations; as many as the device's memory takes where null"
    )
    maps: MapSettings = MapSettings()

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"'{method}' is none of {', '.join(METHODS)}")
        if not methods or len(set(methods)) != len(methods):
            raise ValueError("name each method once, and at least one")
        return methods

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for metric in metrics:
            if metric not in METRICS:
                raise ValueError(f"'{metric}' is none of {', '.join(METRICS)}")
        if len(set(metrics)) != len(metrics):
            raise ValueError("name each metric once")
        return metrics


class Recipe(Settings):
    """The whole of an experiment: data sets, encoder, and the settings of each stage."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    datasets: tuple[str, ...] = Field(("digits",), description="catalogue names, .npz files or image folders")
    data: DataSettings = DataSettings()
    encoder: EncoderSettings = EncoderSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    probe: ProbeSettings = ProbeSettings()
    explain: ExplainSettings = ExplainSettings()

    @field_validator("datasets")
    @classmethod
    def _each_once(cls, datasets: tuple[str, ...]) -> tuple[str, ...]:
        if not datasets or len(set(datasets)) != len(datasets):
            raise ValueError("name each data set once, and at least one")
        return datasets

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if not self.encoder.name.startswith("timm:"):
            patch = self.encoder.dimensions[3]
            if self.data.image_size % patch:
                raise ValueError(
                    f"data.image_size {self.data.image_size} is not divisible by the patch size {patch}; "
                    f"set data.image_size to a multiple of it or set encoder.patch_size"
                )
        return self
