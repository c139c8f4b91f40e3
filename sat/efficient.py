"""The attentions that the field compares with: not softmax over keys, but something cheaper in its place.

`model.attention` names one: nystromformer, linformer, performer, reformer, skyformer, or `package.module:Class` for one
of your own (docs/attentions.md). A class is made once a layer, `Class(model)` or `Class(model, **attention_arguments)`
for one's own, with `model` the sat.config.Model, and called with

    q, k, v [B, H, S, d] float32, lengths [B] int64 (None: all S are real)  ->  [B, H, S, d]

S is always model.sequence_length, for segments, projections and buckets are cut from it: a batch that is trimmed to
its longest sequence would be another function. What is returned for padded queries is not used. Whatever is random is
drawn when the class is made: then neither the size of a micro-batch, nor an evaluation in between, nor a pause of the
run changes a result. For the same reason nothing here may depend on the other sequences of the batch.

Shape suffixes: B batch, H heads, S padded length, d head width, m landmarks or features.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from sat.config import EFFICIENT, ConfigError, Model

ITERATIONS = 6  # of the pseudo-inverse, as in both papers that use it
VALUE_KERNEL = (
    35  # taps of Nyströmformer's convolution of the values, as in its authors' LRA settings
)
RIDGE = 0.1  # added to the diagonal of Skyformer's landmark matrix, as in its authors' code


def make_attention(model: Model) -> nn.Module | None:
    """The attention that `model.attention` names for one layer, None for softmax. Raises ConfigError."""
    if model.attention == "softmax":
        return None
    path = EFFICIENT.get(model.attention, model.attention)
    module_name, class_name = path.split(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ConfigError(
            f"model.attention: cannot import {module_name} ({error}); its folder must be on PYTHONPATH"
        ) from None
    except AttributeError:
        raise ConfigError(
            f"model.attention: the module {module_name} has no {class_name}"
        ) from None
    try:
        return cls(model, **model.attention_arguments)
    except TypeError as error:
        raise ConfigError(f"model.attention_arguments do not fit {path}: {error}") from None


def source_file(attention: str) -> Path | None:
    """The file of the module of an attention of one's own, None for those that `model.attention` has a word for."""
    if ":" not in attention:
        return None
    return Path(importlib.import_module(attention.split(":")[0]).__file__)


def real_positions(x_BHSd: torch.Tensor, lengths_B: torch.Tensor | None) -> torch.Tensor:
    """Bool [B, 1, S, 1]: positions that are not padding, and the first one of an empty sequence.

    Without it an empty sequence had nothing to attend to; what it gets is padding, which the pooling leaves out.
    """
    B, _, S, _ = x_BHSd.shape
    if lengths_B is None:
        return torch.ones(B, 1, S, 1, dtype=torch.bool, device=x_BHSd.device)
    position = torch.arange(S, device=x_BHSd.device)
    return (position < lengths_B.clamp(min=1)[:, None])[:, None, :, None]


def pseudo_inverse(a: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """Moore-Penrose inverse of each matrix [..., m, m] by iteration of third order.

    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T / (|A|_1 |A|_inf), each matrix with its own norms
    (M. K. Razavi et al., Journal of Applied Mathematics 2014; Xiong et al., AAAI 2021, section 3.2).
    """
    size = a.abs()
    norms = size.sum(-1).amax(-1) * size.sum(-2).amax(-1)
    z = a.mT / norms[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


class Nystromformer(nn.Module):
    """softmax(Q K~^T) (softmax(Q~ K~^T))^+ softmax(Q~ K^T) V + convolution of V along the sequence.

    Q~ and K~ are the means of `landmarks` equal segments, of their real positions. Source: Y. Xiong et al.,
    "Nyströmformer", AAAI 2021, equations 13 to 15; O(S m). Padded keys and segments without a real position get no
    weight.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.landmarks = model.landmarks
        self.convolution = nn.Conv2d(
            model.num_head,
            model.num_head,
            (VALUE_KERNEL, 1),
            padding=(VALUE_KERNEL // 2, 0),
            groups=model.num_head,
            bias=False,
        )

    def forward(self, q_BHSd, k_BHSd, v_BHSd, lengths_B):
        B, H, S, d = q_BHSd.shape
        real_B1S1 = real_positions(q_BHSd, lengths_B)
        q_BHSd, k_BHSd, v_BHSd = (x * real_B1S1 for x in (q_BHSd * d**-0.5, k_BHSd, v_BHSd))
        counts_B1m1 = real_B1S1.view(B, 1, self.landmarks, -1).sum(-1, keepdim=True)
        q_BHmd, k_BHmd = (
            x.reshape(B, H, self.landmarks, -1, d).sum(-2) / counts_B1m1.clamp(min=1)
            for x in (q_BHSd, k_BHSd)
        )
        used_B1m1 = counts_B1m1 > 0

        def softmax(scores, keys):
            return scores.masked_fill(~keys.mT, -math.inf).softmax(-1)

        to_landmarks_BHSm = softmax(q_BHSd @ k_BHmd.mT, used_B1m1)
        # With the rows of unused landmarks zero too, the inverse is that of the used ones and zero elsewhere.
        between_BHmm = softmax(q_BHmd @ k_BHmd.mT, used_B1m1) * used_B1m1
        from_landmarks_BHmS = softmax(q_BHmd @ k_BHSd.mT, real_B1S1)
        gathered_BHmd = pseudo_inverse(between_BHmm) @ (from_landmarks_BHmS @ v_BHSd)
        return to_landmarks_BHSm @ gathered_BHmd + self.convolution(v_BHSd)


class Linformer(nn.Module):
    """softmax(Q (E K)^T / sqrt(d)) E V with a learned projection E [H, projection, S] of keys and values.

    Source: S. Wang et al., "Linformer", 2020, equation 7, with one projection for keys and values of each layer and
    head; O(S m). Padded keys and values are zero before they are projected, as in the LRA code of Nyströmformer.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.projection = nn.Parameter(
            torch.empty(model.num_head, model.projection, model.sequence_length).normal_(std=0.02)
        )

    def forward(self, q_BHSd, k_BHSd, v_BHSd, lengths_B):
        real_B1S1 = real_positions(q_BHSd, lengths_B)
        k_BHmd, v_BHmd = (self.projection @ (x * real_B1S1) for x in (k_BHSd, v_BHSd))
        return F.scaled_dot_product_attention(q_BHSd, k_BHmd, v_BHmd)


class Performer(nn.Module):
    """phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1) with `features` orthogonal random features of the softmax kernel.

    Source: K. Choromanski et al., "Rethinking Attention with Performers", ICLR 2021 (FAVOR+); features and products
    are those of performer-pytorch; O(S m). The features of padded keys are zero: no weight, none in the denominator.
    """

    def __init__(self, model: Model):
        super().__init__()
        from performer_pytorch.performer_pytorch import gaussian_orthogonal_random_matrix

        features = gaussian_orthogonal_random_matrix(model.features, model.head_dim)
        self.register_buffer("features", features)

    def forward(self, q_BHSd, k_BHSd, v_BHSd, lengths_B):
        from performer_pytorch.performer_pytorch import linear_attention, softmax_kernel

        real_B1S1 = real_positions(q_BHSd, lengths_B)
        # Zero keys, because the largest of all keys scales their features.
        k_BHSd = k_BHSd * real_B1S1
        q_BHSm = softmax_kernel(q_BHSd, projection_matrix=self.features, is_query=True)
        k_BHSm = softmax_kernel(k_BHSd, projection_matrix=self.features, is_query=False) * real_B1S1
        return linear_attention(q_BHSm, k_BHSm, v_BHSd)


class Reformer(nn.Module):
    """Softmax over the keys that fall into the same bucket or the one before, `hashes` rounds of hashing.

    Source: N. Kitaev et al., "Reformer", ICLR 2020; sorting and chunks are those of reformer-pytorch; O(S log S).
    Queries and keys are one projection, keys of unit length; a position sees itself only where it sees nothing else.
    The rotations are drawn once a layer (the paper draws them for every call). Padded positions share a bucket and
    get no weight.
    """

    shared_query_key = True

    def __init__(self, model: Model):
        super().__init__()
        self.lsh = lsh_attention(model)

    def forward(self, q_BHSd, k_BHSd, v_BHSd, lengths_B):
        B, H, S, d = q_BHSd.shape
        real_B1S1 = real_positions(q_BHSd, lengths_B)
        qk, v = ((x * real_B1S1).reshape(B * H, S, d) for x in (q_BHSd, v_BHSd))
        real = None if lengths_B is None else real_B1S1.expand(B, H, S, 1).reshape(B * H, S)
        o, _, _ = self.lsh(qk, v, input_mask=real)
        return o.view(B, H, S, d)


def lsh_attention(model: Model) -> nn.Module:
    """reformer-pytorch's LSHAttention with rotations that are a buffer, not new random numbers in every call."""
    from reformer_pytorch.reformer_pytorch import LSHAttention

    class Hashed(LSHAttention):
        def __init__(self):
            super().__init__(bucket_size=model.bucket_size, n_hashes=model.hashes)
            num_buckets = model.sequence_length // model.bucket_size
            rotations = torch.randn(model.head_dim, model.hashes, num_buckets // 2)
            self.register_buffer("rotations", rotations)

        def hash_vectors(self, n_buckets, vecs, **_):
            """Buckets [batch, hashes * S] of vectors [batch, S, d], those of round r from r * n_buckets on."""
            rotated = torch.einsum("bsd,dri->brsi", vecs, self.rotations)
            buckets = torch.cat([rotated, -rotated], dim=-1).argmax(-1)
            first = torch.arange(self.n_hashes, device=vecs.device)[:, None] * n_buckets
            return (buckets + first).flatten(1)

    return Hashed()


class Skyformer(nn.Module):
    """Gaussian kernel attention kappa(Q, K) V by the Nyström method on queries and keys together.

    kappa(x, y) = exp(-|x - y|^2 / (2 sqrt(d))). With Z the `landmarks` sampled rows of [Q; K], half of each,

        O = kappa(Q, Z) (kappa(Z, Z) + 0.1 I)^-1 kappa(Z, K) V

    the inverse by iteration on D^-1/2 (kappa(Z, Z) + 0.1 I) D^-1/2, D its row sums. Source: Y. Chen, Q. Zeng, H. Ji,
    Y. Yang, "Skyformer", NeurIPS 2021, section 4; O(S m). The places that are sampled are drawn once a layer, as
    fractions of the real length (the paper draws them for every call). Padded keys get no weight and are not sampled.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.register_buffer("places", torch.rand(2, model.landmarks // 2))

    def forward(self, q_BHSd, k_BHSd, v_BHSd, lengths_B):
        B, H, S, d = q_BHSd.shape
        real_B1S1 = real_positions(q_BHSd, lengths_B)
        q_BHSd, k_BHSd = (x * d**-0.25 for x in (q_BHSd, k_BHSd))
        length_B11 = real_B1S1.sum((1, 2, 3))[:, None, None]
        rows_B2m = (self.places * length_B11).long().clamp(max=S - 1)
        sampled = [
            x.gather(2, rows_Bm[:, None, :, None].expand(B, H, -1, d))
            for x, rows_Bm in zip((q_BHSd, k_BHSd), rows_B2m.unbind(1), strict=True)
        ]
        z_BHmd = torch.cat(sampled, dim=2)
        eye_mm = torch.eye(z_BHmd.shape[2], device=q_BHSd.device)
        between_BHmm = gaussian(z_BHmd, z_BHmd) + RIDGE * eye_mm
        scale_BHm1 = between_BHmm.sum(-1, keepdim=True).rsqrt()
        inverse_BHmm = pseudo_inverse(between_BHmm * scale_BHm1 * scale_BHm1.mT)
        gathered_BHmd = (gaussian(z_BHmd, k_BHSd) * real_B1S1.mT) @ v_BHSd
        gathered_BHmd = scale_BHm1 * (inverse_BHmm @ (scale_BHm1 * gathered_BHmd))
        return gaussian(q_BHSd, z_BHmd) @ gathered_BHmd


def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-|x_i - y_j|^2 / 2) [..., I, J] of x [..., I, d] and y [..., J, d]."""
    squares = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return torch.exp(x @ y.mT - squares / 2)
