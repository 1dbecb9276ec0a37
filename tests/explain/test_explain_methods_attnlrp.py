"""AttnLRP against relevance passed back explicitly, layer by layer, by the paper's own equations."""

import pytest
import torch
from explain_references import ToyEncoder, explain_settings, images, linear, preprocess, vit
from torch import nn

from maehpc.explain.engine import Engine
from maehpc.models import Classifier

X = preprocess().normalise(images(3)).double()
TARGETS = torch.tensor([0, 3, 4])


def close(ours, theirs, relative):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * theirs.abs().max().item())


def attnlrp(classifier, x, targets):
    engine = Engine(classifier, explain_settings("attnlrp"), torch.zeros_like(x[:1]))
    return engine.attribute(x, targets).maps["attnlrp"]


def through_linear(x, weight, z, relevance):
    """Equation 8, epsilon 0: each input's share of z = W x + b."""
    return x * ((relevance / z) @ weight)


def through_sum(part, z, relevance):
    """Equation 8 for a sum: a part's share."""
    return part * relevance / z


def through_product(a, b, z, relevance):
    """Proposition 3.3: half of each term's relevance to either factor of z = a b."""
    share = relevance / (2 * z)
    return a * (share @ b.transpose(-1, -2)), b * (a.transpose(-1, -2) @ share)


def through_softmax(s, p, relevance):
    """Proposition 3.1."""
    return s * (relevance - p * relevance.sum(-1, keepdim=True))


class Norm:
    """LayerNorm: centring and bias by equation 8, the division by the deviation by proposition 3.4."""

    def __init__(self, module, x):
        self.module, self.x = module, x
        self.centred = x - x.mean(-1, keepdim=True)
        self.y = module(x)

    def back(self, relevance):
        deviation = (self.x.var(-1, unbiased=False, keepdim=True) + self.module.eps).sqrt()
        relevance = through_sum(self.centred / deviation * self.module.weight, self.y, relevance)
        width = self.x.shape[-1]
        centring = torch.eye(width, dtype=self.x.dtype) - 1 / width
        return through_linear(self.x, centring, self.centred, relevance)


class Linear:
    def __init__(self, module, x):
        self.module, self.x, self.y = module, x, module(x)

    def back(self, relevance):
        return through_linear(self.x, self.module.weight, self.y, relevance)


class SelfAttention:
    def __init__(self, module, x):
        self.heads, self.scale = module.num_heads, module.scale
        self.qkv = Linear(module.qkv, x)
        self.q, self.k, self.v = (self.split(part) for part in self.qkv.y.chunk(3, dim=-1))
        self.s = self.q @ self.k.transpose(-1, -2) * self.scale
        self.p = self.s.softmax(-1)
        self.o = self.p @ self.v
        self.proj = Linear(module.proj, self.join(self.o))
        self.y = self.proj.y

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, x):
        return x.transpose(1, 2).flatten(2)

    def back(self, relevance):
        relevance = self.split(self.proj.back(relevance))
        of_p, of_v = through_product(self.p, self.v, self.o, relevance)
        of_s = through_softmax(self.s, self.p, of_p)
        # s = (scale q) k^T; scaling has one input and passes all on
        of_q, of_k = through_product(self.scale * self.q, self.k.transpose(-1, -2), self.s, of_s)
        return self.qkv.back(torch.cat([self.join(part) for part in (of_q, of_k.transpose(-1, -2), of_v)], dim=-1))


class Block:
    def __init__(self, module, x):
        self.x = x
        self.norm1 = Norm(module.norm1, x)
        self.attention = SelfAttention(module.attn, self.norm1.y)
        self.middle = x + self.attention.y
        self.norm2 = Norm(module.norm2, self.middle)
        self.fc1 = Linear(module.mlp.fc1, self.norm2.y)
        self.fc2 = Linear(module.mlp.fc2, module.mlp.act(self.fc1.y))
        self.y = self.middle + self.fc2.y

    def back(self, relevance):
        # Equation 9: what an activation has, its input has.
        of_mlp = self.norm2.back(self.fc1.back(self.fc2.back(through_sum(self.fc2.y, self.y, relevance))))
        relevance = through_sum(self.middle, self.y, relevance) + of_mlp
        of_attention = self.norm1.back(self.attention.back(through_sum(self.attention.y, self.middle, relevance)))
        return through_sum(self.x, self.middle, relevance) + of_attention


@torch.no_grad()
def naive_attnlrp(classifier, x, targets):
    encoder, head = classifier.encoder, classifier.head
    patch = encoder.patch_embed.patch_size[0]
    pixels = x.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, h, w, p, p]
    grid = pixels.shape[2:4]
    vectors = pixels.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    projection = encoder.patch_embed.proj
    embedded = vectors @ projection.weight.flatten(1).T + projection.bias
    tokens = torch.cat([encoder.cls_token.expand(len(x), -1, -1), embedded], dim=1) + encoder.pos_embed
    blocks, y = [], tokens
    for module in encoder.blocks:
        blocks.append(Block(module, y))
        y = blocks[-1].y
    norm = Norm(encoder.norm, y)
    pooled = norm.y[:, 0] if classifier.representation == "cls" else norm.y[:, 1:].mean(dim=1)
    hidden = Linear(head.hidden, pooled)
    output = Linear(head.output, head.activation(hidden.y))
    torch.testing.assert_close(output.y, classifier(x))

    logit = output.y.gather(1, targets[:, None])
    relevance = torch.zeros_like(output.y).scatter(1, targets[:, None], logit)
    relevance = hidden.back(output.back(relevance))
    of_tokens = torch.zeros_like(norm.y)
    if classifier.representation == "cls":
        of_tokens[:, 0] = relevance
    else:
        count = norm.y.shape[1] - 1
        of_tokens[:, 1:] = norm.y[:, 1:] / count * (relevance / pooled)[:, None]
    relevance = norm.back(of_tokens)
    for block in reversed(blocks):
        relevance = block.back(relevance)
    relevance = through_sum(embedded, tokens[:, 1:], relevance[:, 1:])
    of_vectors = through_linear(vectors, projection.weight.flatten(1), embedded, relevance)
    of_pixels = of_vectors.reshape(len(x), *grid, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return of_pixels.reshape(x.shape)


@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_explicit_relevance(representation, activation):
    classifier = vit(representation, activation).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(8)
        for name, parameter in classifier.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    ours = attnlrp(classifier, X, TARGETS)
    theirs = naive_attnlrp(classifier, X, TARGETS)
    close(ours, theirs, 1e-8)
    settings = explain_settings("input-x-gradient")
    plain = Engine(classifier, settings, torch.zeros_like(X[:1])).attribute(X, TARGETS).maps["input-x-gradient"]
    assert (ours - plain).abs().max() > 0.3 * plain.abs().max()  # the rules are told from the gradient here


def test_gates_by_explicit_relevance():
    """SwiGLU: the identity rule for SiLU (equation 9) and halves for the product (proposition 3.2)."""
    generator = torch.Generator().manual_seed(2)
    gate, value, out = (
        linear(
            torch.randn(rows, columns, generator=generator).double(), torch.randn(rows, generator=generator).double()
        )
        for rows, columns in ((7, 12), (7, 12), (5, 7))
    )
    encoder = ToyEncoder(lambda x: (nn.functional.silu(gate(x.flatten(1))) * value(x.flatten(1)))[:, None], (1, 1), 2)
    encoder.gate, encoder.value = gate, value
    classifier = Classifier(encoder, nn.Sequential(out), "mean")
    x, targets = images(3, side=2).double(), torch.tensor([1, 0, 4])
    ours = attnlrp(classifier, x, targets)
    with torch.no_grad():
        flat = x.flatten(1)
        product = nn.functional.silu(gate(flat)) * value(flat)
        logits = out(product)
        relevance = torch.zeros_like(logits).scatter(1, targets[:, None], logits.gather(1, targets[:, None]))
        relevance = through_linear(product, out.weight, logits, relevance) / 2
        of_gate = through_linear(flat, gate.weight, gate(flat), relevance)
        of_value = through_linear(flat, value.weight, value(flat), relevance)
    close(ours, (of_gate + of_value).reshape(x.shape), 1e-10)


def test_relevance_is_conserved_without_biases_and_attention():
    """Each product, norm and activation passes on all it gets, but softmax, whose Taylor expansion has a constant."""
    classifier = vit("mean").double()
    for module in classifier.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        classifier.encoder.pos_embed.zero_()
        classifier.encoder.cls_token.zero_()
        for block in classifier.encoder.blocks:
            block.attn.proj.weight.zero_()
    torch.testing.assert_close(
        attnlrp(classifier, X, TARGETS).sum((1, 2, 3)), classifier(X).gather(1, TARGETS[:, None])[:, 0]
    )
