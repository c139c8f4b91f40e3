"""The classifier: embeddings, pre-norm Transformer layers with dense or block-sparse attention, pooling, head.

Shape suffixes: B batch, S padded length, D model width (transformer_dim), H heads, d head width, n = S / block_size
blocks, C classes. The method is that of B. Yoon et al., "Exploring Attention Sparsity to Accelerate Transformer
Training on GPUs", IEEE Access 12 (2024).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional as F

from sat.attention import block_sparse_attention, dense_attention
from sat.config import Model
from sat.data import Batch
from sat.efficient import make_attention


@dataclasses.dataclass
class Encoded:
    """What an encoder returns: pooled [B, D]; maps: the mean attention map [S, S] of every layer when asked for."""

    pooled_BD: torch.Tensor
    maps: list[torch.Tensor]


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Fixed positions [length, width] (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(length)[:, None]
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)[:, : width // 2]
    return table


class SelfAttention(nn.Module):
    """Multi-head self-attention: dense, over the blocks of a mask [n, n], or one of sat/efficient.py in its place."""

    def __init__(self, config: Model, padded_queries: str):
        super().__init__()
        self.config = config
        self.padded_queries = "attend" if padded_queries == "counted" else "zero"
        inner = config.num_head * config.head_dim
        self.efficient = make_attention(config)
        shared = getattr(self.efficient, "shared_query_key", False)
        self.num_projections = 2 if shared else 3  # (query and key as one, value) or one of each
        self.qkv = nn.Linear(config.transformer_dim, self.num_projections * inner)
        self.out = nn.Linear(inner, config.transformer_dim)

    def forward(self, x_BSD, lengths_B, mask_nn, want_map):
        config = self.config
        B, S, _ = x_BSD.shape
        heads = (B, S, self.num_projections, config.num_head, config.head_dim)
        qkv = self.qkv(x_BSD).float().view(heads).permute(2, 0, 3, 1, 4)
        q_BHSd, k_BHSd, v_BHSd = qkv if len(qkv) == 3 else (qkv[0], qkv[0], qkv[1])
        dropout = config.attention_dropout if self.training else 0.0
        attention_map = None
        if self.efficient is not None:
            with torch.autocast(x_BSD.device.type, enabled=False):
                o_BHSd = self.efficient(q_BHSd, k_BHSd, v_BHSd, lengths_B)
        elif mask_nn is None:
            result = dense_attention(
                q_BHSd,
                k_BHSd,
                v_BHSd,
                lengths=lengths_B,
                padded_queries=self.padded_queries,
                return_map=want_map,
                dropout_p=dropout,
            )
            o_BHSd, attention_map = result if want_map else (result, None)
        else:
            o_BHSd = block_sparse_attention(
                q_BHSd,
                k_BHSd,
                v_BHSd,
                mask_nn,
                block_size=config.block_size,
                lengths=lengths_B,
                denominator=config.denominator,
                dropout_p=dropout,
            )
        o_BSD = o_BHSd.transpose(1, 2).reshape(B, S, -1)
        return self.out(o_BSD.to(x_BSD.dtype)), attention_map


class Layer(nn.Module):
    """Pre-norm layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: Model, padded_queries: str):
        super().__init__()
        width, hidden = config.transformer_dim, config.transformer_hidden_dim
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(config, padded_queries)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(config.dropout_prob),
            nn.Linear(hidden, width),
            nn.Dropout(config.dropout_prob),
        )
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(self, x_BSD, lengths_B, mask_nn, want_map):
        attended_BSD, attention_map = self.attention(
            self.attention_norm(x_BSD), lengths_B, mask_nn, want_map
        )
        x_BSD = x_BSD + self.dropout(attended_BSD)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD)), attention_map


class Encoder(nn.Module):
    """ids [B, S] -> pooled [B, D]."""

    def __init__(self, config: Model, padded_queries: str):
        super().__init__()
        self.config = config
        S, width = config.sequence_length, config.embedding_dim
        with_class_token = config.pooling_mode == "CLS"
        self.embedding = nn.Embedding(config.vocab_size + with_class_token, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if config.learn_pos_emb:
            self.position = nn.Parameter(torch.empty(S, width).normal_(std=0.02))
        else:
            self.register_buffer("position", sinusoids(S, width), persistent=False)
        same = width == config.transformer_dim
        self.projection = nn.Identity() if same else nn.Linear(width, config.transformer_dim)
        self.dropout = nn.Dropout(config.dropout_prob)
        if config.tied_weights:
            layer = Layer(config, padded_queries)
            self.layers = nn.ModuleList([layer] * config.num_layers)
        else:
            self.layers = nn.ModuleList(
                Layer(config, padded_queries) for _ in range(config.num_layers)
            )
        self.norm = nn.LayerNorm(config.transformer_dim)

    def forward(self, ids_BS, lengths_B, masks=None, want_maps=False) -> Encoded:
        """lengths [B]: real ids, None when all S are; masks: a block mask [n, n] a layer, None = dense."""
        if self.config.pooling_mode == "CLS":
            # The class token takes the first place; one place behind max_seq_len is always free for it.
            class_token = ids_BS.new_full((len(ids_BS), 1), self.config.vocab_size)
            ids_BS = torch.cat([class_token, ids_BS[:, :-1]], dim=1)
            lengths_B = None if lengths_B is None else lengths_B + 1
        x_BSD = self.dropout(self.projection(self.embedding(ids_BS) + self.position))
        maps = []
        for index, layer in enumerate(self.layers):
            mask_nn = None if masks is None else masks[index]
            x_BSD, attention_map = layer(x_BSD, lengths_B, mask_nn, want_maps)
            maps.append(attention_map)
        h_BSD = self.norm(x_BSD)
        if self.config.pooling_mode == "CLS":
            pooled_BD = h_BSD[:, 0]
        else:
            real_BS = self._pooled_positions(ids_BS, lengths_B)
            if real_BS is not None:
                h_BSD = h_BSD * real_BS[:, :, None]
            pooled_BD = h_BSD.mean(dim=1)  # padding is zero but counted, as in SAT
        return Encoded(pooled_BD, maps if want_maps else [])

    def _pooled_positions(self, ids_BS, lengths_B):
        real_BS = None
        if lengths_B is not None:
            real_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) < lengths_B[:, None]
        if self.config.zero_pixel_is_padding:
            lit_BS = ids_BS != 0
            real_BS = lit_BS if real_BS is None else real_BS & lit_BS
        return real_BS


class Classifier(nn.Module):
    """The whole model for one or two inputs, and the pattern parameters P_l [n, d] where the pattern is learned.

    Two inputs share the encoder; the head sees [x, y, x * y, x - y].
    """

    def __init__(
        self,
        config: Model,
        num_inputs: int,
        padded_queries: str = "counted",
        learned_pattern: bool = False,
    ):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, padded_queries)
        width = config.transformer_dim * (1 if num_inputs == 1 else 4)
        self.head = nn.Sequential(
            nn.Linear(width, config.transformer_hidden_dim),
            nn.ReLU(),
            nn.Linear(config.transformer_hidden_dim, config.num_classes),
        )
        count = config.num_layers if learned_pattern else 0
        self.pattern = nn.ParameterList(
            torch.rand(config.num_blocks, config.head_dim) for _ in range(count)
        )

    def forward(self, batch: Batch, masks=None, want_maps=False):
        """-> (logits [B, C], maps: one list of mean attention maps [S, S] an input, empty unless asked for)."""
        encoded = [
            self.encoder(ids, lengths, masks, want_maps)
            for ids, lengths in zip(batch.ids, batch.lengths, strict=True)
        ]
        features = encoded[0].pooled_BD
        if len(encoded) == 2:
            x, y = (e.pooled_BD for e in encoded)
            features = torch.cat([x, y, x * y, x - y], dim=1)
        return self.head(features), [e.maps for e in encoded]


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def loss_and_hits(
    logits_BC: torch.Tensor, labels_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed cross entropy in nats, number of correct predictions)."""
    return F.cross_entropy(logits_BC.float(), labels_B, reduction="sum"), (
        logits_BC.argmax(1) == labels_B
    ).sum()
