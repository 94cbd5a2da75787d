"""Next-token loss that never holds more logits than one tile: some tokens by some of the vocabulary.

Why: at 4096 tokens and a vocabulary of 128k the logits alone are 2.1 GB in fp32, and a plain loss holds four of them.
How: one pass over the vocabulary with a running maximum and sum of exponentials for each token (online softmax,
Milakov & Gimelshein 2018, arXiv:1805.02867), and with them, rescaled as the maximum grows, the sum that the hidden
state's gradient is made of (as FlashAttention does with the values, Dao et al. 2022, arXiv:2205.14135). So a head that
is fetched by chunks is read once, and backward has nothing to recompute. Positions that are not learned are left out
before the projection.
A head that is trained (`vocabulary.Trained`) passes once more in backward, logits made again: one product more than the
three of a head whose logits are kept. Its gradient is added up in `.grad`, TABLE_ROWS rows at a time, by
products over as many tokens as make a tile of the same size (8 C tokens), so in 16 bits it is rounded once for each.
The target is left out of both sums. With d = log(sum over v != t of exp(l_v)) - l_t the loss is log(1 + exp(d)), and
1 - p_t is sigmoid(d): exact also where p_t is nearly 1, and subtracting it from 1 would cancel.
Shapes: N learned tokens, D hidden, V vocabulary; a tile has C tokens and v rows of the head.
Imported by: training.loop, training.evaluate, export.verify.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.base.loader import Base
from qlora_kit.base.owners import mark, owner
from qlora_kit.base.vocabulary import Head, ResidentTable, head_of
from qlora_kit.data.tokenize import IGNORE_INDEX
from qlora_kit.planning.components import LOSS_CHUNK_VOCABULARY
from qlora_kit.planning.trained import TABLE_ROWS
from qlora_kit.training.blocks import backward_in_order, last_hidden_states, passage_of
from qlora_kit.widths import padded_width


def chunked_cross_entropy(
    hidden_ND: Tensor,
    head: Tensor | Head,
    targets_N: Tensor,
    *,
    chunk_tokens: int,
    chunk_vocabulary: int = LOSS_CHUNK_VOCABULARY,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the next-token losses of `hidden_ND @ head_VD.T`.

    Equal to `F.cross_entropy(reduction="sum")` on the fp32 logits up to the order of summation. With a head in 16 bits
    exponentials are rounded to its dtype before their product with it, and that product once for each chunk of rows.

    Args:
        hidden_ND: last hidden state, [all positions, D]; gradients flow into it.
        head: output projection: [V, D], frozen, or what brings it in by chunks; if that is trained, so it is here.
        targets_N: ids to predict, [all positions], already shifted; IGNORE_INDEX is skipped.
        chunk_tokens: C, learned positions of a tile.
        chunk_vocabulary: rows of the head of a tile.
        softcap: logits become c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2).
    Returns: fp32 scalar (fp64 if hidden_ND is), nats; zero when nothing is learned, NaN with a target outside of V.
    Raises: ValueError: lengths differ, or a chunk < 1. ModelError: a head that is fetched cannot be read.
    """
    if len(hidden_ND) != len(targets_N) or min(chunk_tokens, chunk_vocabulary) < 1:
        raise ValueError(
            f"{len(hidden_ND)} hidden states, {len(targets_N)} targets, tiles of {chunk_tokens} x {chunk_vocabulary}"
        )
    rows: Head = ResidentTable(head) if isinstance(head, Tensor) else head
    parameter = None if rows.trained is None else rows.trained.parameter
    chunk = (chunk_tokens, chunk_vocabulary)
    return _TiledCrossEntropy.apply(rows.widened(hidden_ND), targets_N, rows, chunk, softcap, parameter)


class _TiledCrossEntropy(torch.autograd.Function):
    """The last argument is there for the graph to see: what a head that is trained learns by."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        targets_N: Tensor,
        head: Head,
        chunk: tuple[int, int],
        softcap: float | None,
        parameter: nn.Parameter | None,
    ) -> Tensor:
        mark("loss")
        learned = (targets_N != IGNORE_INDEX).nonzero().squeeze(1)
        learned = learned[targets_N[learned].argsort(stable=True)]
        padded = _padded(learned, len(targets_N))
        hidden, targets = hidden_ND[padded], targets_N[padded]
        tile = _Tile(hidden, head.shape[0], chunk, softcap, any(ctx.needs_input_grad))
        scores = _score(hidden, targets, head, tile)
        if tile.with_grad:
            ctx.save_for_backward(learned, hidden[: len(learned)])  # which is its own gradient by now
            ctx.shape = hidden_ND.shape
        if ctx.needs_input_grad[5]:
            ctx.again = hidden_ND, padded, targets, head, scores.without_rows(len(learned)), (chunk[0], softcap)
        return scores.losses_N[: len(learned)].sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        learned, grad = ctx.saved_tensors
        if ctx.needs_input_grad[5]:
            hidden_ND, padded, targets, head, scores, how = ctx.again
            del ctx.again
            _add_head_gradient(hidden_ND[padded], targets, head, scores, how, grad_total)
            del hidden_ND
        full = grad.new_zeros(ctx.shape)
        full[learned] = grad
        return full.mul_(grad_total.to(grad.dtype)), None, None, None, None, None


def _padded(learned: Tensor, positions: int) -> Tensor:
    """Learned positions, on a CPU the last one repeated: kernels are compiled for a number of rows (`widths`)."""
    missing = padded_width(len(learned), positions) - len(learned) if learned.device.type == "cpu" else 0
    return torch.cat((learned, learned[-1:].expand(missing))) if missing else learned


def _add_head_gradient(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Head,
    scores: _Scores,
    how: tuple[int, float | None],
    grad_total: Tensor,
) -> None:
    """Add (p - onehot) slope x, summed over tokens and times `grad_total`, to the gradient of what is trained.

    Args:
        targets_N: ascending.
        how: tokens of a tile of LOSS_CHUNK_VOCABULARY rows, and the cap.
    """
    assert head.trained is not None
    chunk_tokens, softcap = how
    tokens = chunk_tokens * (LOSS_CHUNK_VOCABULARY // TABLE_ROWS)
    tile = _Tile(hidden_ND, head.shape[0], (tokens, TABLE_ROWS), softcap, True)
    starts = [*range(0, head.shape[0], TABLE_ROWS), head.shape[0]]
    bounds = torch.searchsorted(targets_N, torch.tensor(starts, device=targets_N.device)).tolist()
    for first_row, rows_VD in head.chunks(TABLE_ROWS):
        first, last = bounds[first_row // TABLE_ROWS :][:2]
        grad_VK = head.trained.gradient(first_row, first_row + len(rows_VD))
        for start in range(0, len(hidden_ND), tokens):
            part = slice(start, min(start + tokens, len(hidden_ND)))
            probs_CV = tile.logits(hidden_ND[part], rows_VD).sub_(scores.log_sum_N[part, None]).exp_()
            begin, end = max(first, start), min(last, part.stop)
            if begin < end:
                own = targets_N[begin:end, None] - first_row
                probs_CV[begin - start : end - start].scatter_(1, own, -scores.miss_N[begin:end, None])
            narrow_CV = tile.narrowed(tile.with_slope(probs_CV.mul_(grad_total), rows_VD), rows_VD)
            _add_product(grad_VK, narrow_CV.t(), hidden_ND[part, -grad_VK.shape[1] :])
        del rows_VD


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


@dataclass(frozen=True)
class _Scores:
    """What a pass over the head leaves of N tokens: losses, log sum exp of their logits, and 1 - p of the target."""

    losses_N: Tensor
    log_sum_N: Tensor
    miss_N: Tensor

    def without_rows(self, first: int) -> _Scores:
        """The same, with nothing to learn from rows from `first` on."""
        self.log_sum_N[first:] = math.inf
        self.miss_N[first:] = 0
        return self


def _score(hidden_ND: Tensor, targets_N: Tensor, head: Head, tile: _Tile) -> _Scores:
    """`hidden_ND` becomes the gradient of their sum, if the tile is made for one.

    A head that is fetched passes once, for all tokens. One that is there passes for each chunk of tokens, so that the
    sums exist for one chunk only: the same tiles in another order, and the same bits.
    Args:
        targets_N: ascending, so that the targets among a chunk of rows stand together.
    """
    starts = [*range(0, head.shape[0], tile.rows), head.shape[0]]
    bounds = torch.searchsorted(targets_N, torch.tensor(starts, device=targets_N.device)).tolist()
    together = tile.tokens if head.is_resident else max(1, len(hidden_ND))
    found = [(tile.wide.new_empty(0),) * 3]
    for start in range(0, len(hidden_ND), together):
        scores = _OnlineScores(hidden_ND[start : start + together], targets_N[start : start + together], tile.with_grad)
        for first_row, rows_VD in head.chunks(tile.rows):
            first, last = bounds[first_row // tile.rows :][:2]
            scores.add(tile, first_row, rows_VD, (first - start, last - start))
            del rows_VD  # which may have been made for this pass, before the next is
        found.append(scores.finish(tile))
        del scores  # its sums, before those of the next tokens are made
    return _Scores(*map(torch.cat, zip(*found)))


class _Tile:
    """The reused buffers of one tile, and the elementwise work on it.

    Attributes:
        tokens, rows: C, and rows of the head, at most.
        wide: logits, then exponentials, in fp32 (fp64 for hidden states in fp64), flat.
        with_grad: whether the sums that the gradient is made of are wanted.
    """

    def __init__(
        self, hidden_ND: Tensor, vocabulary: int, chunk: tuple[int, int], softcap: float | None, with_grad: bool
    ) -> None:
        (self.tokens, self.rows), self.softcap, self.with_grad = chunk, softcap, with_grad
        size = min(self.tokens, len(hidden_ND)) * min(self.rows, vocabulary)
        with owner("logits"):
            self.wide = hidden_ND.new_empty(size, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
            self._narrow = self.wide if hidden_ND.dtype == self.wide.dtype else hidden_ND.new_empty(size)
            self._squares = torch.empty_like(self.wide) if softcap is not None and with_grad else None

    def logits(self, hidden_CD: Tensor, rows_VD: Tensor) -> Tensor:
        """[C, v] in fp32, capped; in the buffer `wide`."""
        logits_CV, narrow_CV = (_shaped(buffer, hidden_CD, rows_VD) for buffer in (self.wide, self._narrow))
        torch.mm(hidden_CD, rows_VD.t(), out=narrow_CV)
        if self._narrow is not self.wide:
            logits_CV.copy_(narrow_CV)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_()
            if self._squares is not None:
                torch.mul(logits_CV, logits_CV, out=_shaped(self._squares, hidden_CD, rows_VD))
            logits_CV.mul_(self.softcap)
        return logits_CV

    def weighted_rows(self, exps_CV: Tensor, rows_VD: Tensor) -> Tensor:
        """Sum of exp * slope * row over the tile's rows, [C, D]; the slope of a capped logit is 1 - tanh^2."""
        return torch.mm(self.narrowed(self.with_slope(exps_CV, rows_VD), rows_VD), rows_VD)

    def with_slope(self, values_CV: Tensor, rows_VD: Tensor) -> Tensor:
        """What `logits` gave, changed elementwise, times the slope; in place."""
        if self._squares is not None:
            values_CV.addcmul_(values_CV, _shaped(self._squares, values_CV, rows_VD), value=-1)
        return values_CV

    def narrowed(self, values_CV: Tensor, rows_VD: Tensor) -> Tensor:
        """Values of the buffer `wide` in the hidden states' dtype."""
        narrow_CV = _shaped(self._narrow, values_CV, rows_VD)
        if self._narrow is not self.wide:
            narrow_CV.copy_(values_CV)
        return narrow_CV

    def slope(self, logits_N: Tensor) -> Tensor | float:
        """Derivative of capped logits by those before the cap."""
        return 1.0 if self.softcap is None else 1 - (logits_N / self.softcap).square()


def _shaped(buffer: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    shape = (len(rows), len(columns))
    return buffer[: math.prod(shape)].view(shape)


class _OnlineScores:
    """What is known of N tokens after a part of the vocabulary; over its rows v other than the token's target t:

    maximum = max l_v,   others = sum exp(l_v - maximum),   total = sum exp(l_v - maximum) slope_v W_v.
    """

    def __init__(self, hidden_ND: Tensor, targets_N: Tensor, with_grad: bool) -> None:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        self.hidden_ND, self.targets_N = hidden_ND, targets_N
        self.maximum_N = hidden_ND.new_full((len(hidden_ND),), torch.finfo(wide).min, dtype=wide)
        self.others_N = torch.zeros_like(self.maximum_N)
        self.target_logit_N = torch.full_like(self.maximum_N, math.nan)
        self.total_ND = torch.zeros_like(hidden_ND, dtype=wide) if with_grad else None
        self.target_rows_ND = torch.empty_like(hidden_ND) if with_grad else None

    def add(self, tile: _Tile, first_row: int, rows_VD: Tensor, owners: tuple[int, int]) -> None:
        """Take in some rows of the head; `owners` are the first token whose target is one of them, and the end."""
        first, last = (min(max(owner, 0), len(self.targets_N)) for owner in owners)
        columns = self.targets_N[first:last] - first_row
        if self.target_rows_ND is not None:
            torch.index_select(rows_VD, 0, columns, out=self.target_rows_ND[first:last])
        for start in range(0, len(self.hidden_ND), tile.tokens):
            logits_CV = tile.logits(self.hidden_ND[start : start + tile.tokens], rows_VD)
            begin, end = max(first, start), min(last, start + tile.tokens)
            if begin < end:
                own_CV, own = logits_CV[begin - start : end - start], columns[begin - first : end - first, None]
                self.target_logit_N[begin:end] = own_CV.gather(1, own).squeeze(1)
                own_CV.scatter_(1, own, -math.inf)
            self._add_others(tile, start, logits_CV, rows_VD)

    def _add_others(self, tile: _Tile, start: int, logits_CV: Tensor, rows_VD: Tensor) -> None:
        tokens = slice(start, start + tile.tokens)
        maximum_C = torch.maximum(self.maximum_N[tokens], logits_CV.amax(dim=1))
        shrink_C = (self.maximum_N[tokens] - maximum_C).exp_()
        self.maximum_N[tokens] = maximum_C
        exps_CV = logits_CV.sub_(maximum_C[:, None]).exp_()
        self.others_N[tokens].mul_(shrink_C).add_(exps_CV.sum(dim=1))
        if self.total_ND is not None:
            self.total_ND[tokens].mul_(shrink_C[:, None]).add_(tile.weighted_rows(exps_CV, rows_VD))

    def finish(self, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of `_Scores` once all rows were added; `hidden_ND` becomes the gradient of the losses' sum.

        That is (1 - p_t) (total / others - slope_t W_t).
        """
        log_odds_N = self.maximum_N + self.others_N.log() - self.target_logit_N
        losses_N, miss_N = -F.logsigmoid(-log_odds_N), log_odds_N.sigmoid()
        if self.total_ND is not None and self.target_rows_ND is not None:
            of_total_N, of_target_N = miss_N / self.others_N, miss_N * tile.slope(self.target_logit_N)
            for start in range(0, len(miss_N), tile.tokens):
                tokens = slice(start, start + tile.tokens)
                total_CD = self.total_ND[tokens].mul_(of_total_N[tokens, None])
                total_CD.sub_(self.target_rows_ND[tokens].to(total_CD.dtype).mul_(of_target_N[tokens, None]))
                self.hidden_ND[tokens] = total_CD
        return losses_N, self.target_logit_N + losses_N, miss_N


def batch_losses(
    base: Base, batches: Sequence[Any], chunk_tokens: int, dropout_keys: Sequence[tuple[int, ...]] | None = None
) -> list[Tensor]:
    """Summed loss of each `data.batches.MicroBatch` on the base with its active adapters; see `blocks.attach`.

    Args:
        batches: they pass each block together; block inputs of all of them are kept for backward.
        dropout_keys: of each, what its dropout is drawn from.
    """
    keys = dropout_keys or [()] * len(batches)
    hiddens = last_hidden_states(base, batches, keys)
    softcap = getattr(base.model.config, "final_logit_softcapping", None)
    head, dropout_seed, losses = head_of(base.model), passage_of(base).dropout_seed, list[Tensor]()
    for hidden, batch, key in backward_in_order(list(zip(hiddens, batches, keys))):
        dropout_seed.key = key
        loss = chunked_cross_entropy(
            hidden.flatten(0, 1),
            head,
            batch.targets.to(base.device).flatten(),
            chunk_tokens=chunk_tokens,
            softcap=softcap,
        )
        losses.insert(0, loss)
    return losses
