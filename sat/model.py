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

from sat import layer
from sat.attention import block_sparse_attention, dense_attention, dropout
from sat.config import Model
from sat.data import Batch
from sat.efficient import make_attention


@dataclasses.dataclass
class Encoded:
    """What an encoder returns: pooled [B, D]; maps: the mean attention map [S, S] of every layer when asked for."""

    pooled_BD: torch.Tensor
    maps: list[torch.Tensor]


@dataclasses.dataclass
class Draws:
    """Where the dropout of a forward draws from: one seed, None without dropout, and a number for every place.

    length: S, whatever is left of it after trimming. first: number of the first place.
    """

    seed: torch.Tensor | None
    length: int
    first: int = 0

    def at(self, site: int, heads: int = 1) -> torch.Tensor | None:
        if self.seed is None:
            return None
        return dropout.seed_of(self.seed, self.first + site, heads * self.length)


# Places in a layer that drop, counted from the layer's first; the embedding has place 0.
ATTENTION_WEIGHTS, ATTENTION_OUTPUT, MLP_HIDDEN, MLP_OUTPUT = range(1, 5)
SITES_OF_A_LAYER = 4


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

    def forward(self, x_BSD, lengths_B, mask_nn, want_map, seed):
        """Normalised x [B, S, D] -> (the output before its bias [B, S, D], mean map or None)."""
        config = self.config
        B, T, _ = x_BSD.shape
        S = config.sequence_length
        heads = (B, S, self.num_projections, config.num_head, config.head_dim)
        qkv = self.qkv(x_BSD).float()
        # A trimmed batch gets its padding back here alone: unselected keys count in the denominator up to S, and
        # what is padding costs attention nothing.
        qkv = F.pad(qkv, (0, 0, 0, S - T)) if T < S else qkv
        qkv = qkv.view(heads).permute(2, 0, 3, 1, 4)
        q_BHSd, k_BHSd, v_BHSd = qkv if len(qkv) == 3 else (qkv[0], qkv[0], qkv[1])
        dropout_p = config.attention_dropout if self.training else 0.0
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
                padded_queries=self.padded_queries if T == S else "zero",
                return_map=want_map,
                dropout_p=dropout_p,
                seed=seed,
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
                dropout_p=dropout_p,
                seed=seed,
            )
        o_BSD = o_BHSd[:, :, :T].transpose(1, 2).reshape(B, T, -1)
        return F.linear(o_BSD.to(x_BSD.dtype), self.out.weight), attention_map


class Layer(nn.Module):
    """Pre-norm layer: attention and MLP, each added to the residual stream.

    The bias of a product, dropout, the residual and the norm that follows are one operation of sat/layer.py; so a
    layer takes x with its norm and gives x with the norm of what comes next.
    """

    def __init__(self, config: Model, padded_queries: str):
        super().__init__()
        self.config = config
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

    def forward(self, x_BSD, h_BSD, next_norm, lengths_B, mask_nn, want_map, draws, place):
        """(x, attention_norm(x)) -> (x, next_norm(x), mean map or None); place: number of the layer's first draw."""
        p, S = self.config.dropout_prob, draws.length
        y_BSD, attention_map = self.attention(
            h_BSD,
            lengths_B,
            mask_nn,
            want_map,
            draws.at(place + ATTENTION_WEIGHTS, self.config.num_head),
        )
        seed = draws.at(place + ATTENTION_OUTPUT)
        norm = self.mlp_norm
        x_BSD, h_BSD = layer.dropout_add_norm(
            y_BSD, self.attention.out.bias, x_BSD, norm.weight, norm.bias, p, seed, S
        )
        first, second = self.mlp[0], self.mlp[3]
        seed = draws.at(place + MLP_HIDDEN)
        u_BSC = layer.gelu_dropout(F.linear(h_BSD, first.weight), first.bias, p, seed, S)
        seed = draws.at(place + MLP_OUTPUT)
        x_BSD, h_BSD = layer.dropout_add_norm(
            F.linear(u_BSC, second.weight),
            second.bias,
            x_BSD,
            next_norm.weight,
            next_norm.bias,
            p,
            seed,
            S,
        )
        return x_BSD, h_BSD, attention_map


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
        self.projects = width != config.transformer_dim
        self.projection = (
            nn.Linear(width, config.transformer_dim) if self.projects else nn.Identity()
        )
        if config.tied_weights:
            layer = Layer(config, padded_queries)
            self.layers = nn.ModuleList([layer] * config.num_layers)
        else:
            self.layers = nn.ModuleList(
                Layer(config, padded_queries) for _ in range(config.num_layers)
            )
        self.norm = nn.LayerNorm(config.transformer_dim)

    def forward(self, ids_BS, lengths_B, masks=None, want_maps=False, draws=None) -> Encoded:
        """lengths [B]: real ids, None when all S are; masks: a block mask [n, n] a layer, None = dense.

        draws: where dropout draws from, None for no dropout.
        """
        S = self.config.sequence_length
        draws = draws or Draws(None, S)
        if self.config.pooling_mode == "CLS":
            # The class token takes the first place; one place behind max_seq_len is always free for it.
            class_token = ids_BS.new_full((len(ids_BS), 1), self.config.vocab_size)
            ids_BS = torch.cat([class_token, ids_BS[:, :-1]], dim=1)
            lengths_B = None if lengths_B is None else lengths_B + 1
        ids_BS = ids_BS[:, : self.trimmed_length(lengths_B, masks, want_maps)]
        norms = [each.attention_norm for each in self.layers] + [self.norm]
        embedded_BSD, position_SD = self.embedding(ids_BS), self.position[: ids_BS.shape[1]]
        if self.projects:
            embedded_BSD = self.projection(embedded_BSD + position_SD)
            position_SD = torch.zeros_like(embedded_BSD[0])
        x_BSD, h_BSD = layer.embed(
            embedded_BSD,
            position_SD,
            norms[0].weight,
            norms[0].bias,
            self.config.dropout_prob,
            draws.at(0),
            S,
        )
        maps = []
        for index, each in enumerate(self.layers):
            mask_nn = None if masks is None else masks[index]
            x_BSD, h_BSD, attention_map = each(
                x_BSD,
                h_BSD,
                norms[index + 1],
                lengths_B,
                mask_nn,
                want_maps,
                draws,
                index * SITES_OF_A_LAYER,
            )
            maps.append(attention_map)
        if self.config.pooling_mode == "CLS":
            pooled_BD = h_BSD[:, 0]
        else:
            real_BS = self._pooled_positions(ids_BS, lengths_B)
            if real_BS is not None:
                h_BSD = h_BSD * real_BS[:, :, None]
            pooled_BD = h_BSD.sum(dim=1) / S  # padding is zero but counted, as in SAT
        return Encoded(pooled_BD, maps if want_maps else [])

    def trimmed_length(self, lengths_B, masks, want_maps) -> int:
        """Positions to compute: up to the longest sequence, rounded up to a block, where that changes no result.

        In a dense step whose map counts padded queries, and for attentions of sat/efficient.py, it does. On a GPU
        the longest is not known without waiting for the device.
        """
        S, block = self.config.sequence_length, self.config.block_size
        attention = self.layers[0].attention
        counted = masks is None and want_maps and attention.padded_queries == "attend"
        if lengths_B is None or counted or attention.efficient is not None:
            return S
        if lengths_B.device.type != "cpu" or torch.compiler.is_compiling():
            return S
        return min(S, max(1, -(-int(lengths_B.max()) // block)) * block)

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
        seed = None
        drops = self.config.dropout_prob > 0 or self.config.attention_dropout > 0
        if self.training and drops:
            seed = dropout.draw_seed(0)
        sites = 1 + SITES_OF_A_LAYER * self.config.num_layers
        encoded = []
        for tower, (ids, lengths) in enumerate(zip(batch.ids, batch.lengths, strict=True)):
            draws = Draws(seed, self.config.sequence_length, tower * sites)
            encoded.append(self.encoder(ids, lengths, masks, want_maps, draws))
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
