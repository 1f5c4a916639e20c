"""Attention inputs, and what the score ops mean, written as slow float64 loops that share nothing with the reference."""

import math

import torch


def inputs(B=2, H=4, Hkv=2, Sq=13, S=21, D=24, R=5, N=9, dtype=torch.float32, device="cpu", seed=0):
    """Random query, key, rows and columns; with B > 1 the last sample pads one row and two columns."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, Sq, D, generator=g).to(dtype)
    key = torch.randn(B, Hkv, S, D, generator=g).to(dtype)
    rows = torch.stack([torch.randperm(Sq, generator=g)[:R].sort().values + S - Sq for _ in range(B)])
    columns = torch.stack([torch.randperm(S, generator=g)[:N].sort().values for _ in range(B)])
    if B > 1:
        rows[-1, max(R - 1, 0) :] = -1
        columns[-1, max(N - 2, 0) :] = -1
    return [t.to(device) for t in (query, key, rows, columns)]


def rope(B=1, S=21, D=24, scaling=1.2079, dtype=torch.float32, device="cpu"):
    """Rotate-half tables (cos, sin) of theta 10000, with a YaRN-like scaling folded in."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2) / D)
    angle = (torch.arange(S)[:, None] * frequency).repeat(1, 2)[None].expand(B, -1, -1)
    return tuple((scaling * t).to(device, dtype) for t in (angle.cos(), angle.sin()))


def _unrotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    c1, c2 = cos.chunk(2, -1)
    s1, s2 = sin.chunk(2, -1)
    top, bottom = c1 * c1 + s1 * s1, c2 * c2 + s2 * s2
    return torch.cat([(first * c1 + second * s1) / top, (second * c2 - first * s2) / bottom], -1)


def logits(query, key, rope, scale, rounded=None):
    """float64 ``[B, H, S, S]`` logits; rows without a query are NaN. ``rounded`` rounds un-rotated operands to a dtype."""
    (B, H, Sq, D), (Hkv, S) = query.shape, key.shape[1:3]
    q, k = query.double().cpu(), key.double().cpu()
    if rope is not None:
        cos, sin = (t.double().cpu().expand(B, S, D)[:, None] for t in rope)
        q, k = _unrotate(q, cos[:, :, S - Sq :], sin[:, :, S - Sq :]), _unrotate(k, cos, sin)
        if rounded is not None:
            q, k = q.to(rounded).double(), k.to(rounded).double()
    logits = torch.full((B, H, S, S), float("nan"), dtype=torch.float64)
    for h in range(H):
        logits[:, h, S - Sq :] = q[:, h] @ k[:, h * Hkv // H].transpose(1, 2) * scale
    return logits


def sees(row, position, b, key_mask, causal):
    return row >= 0 and (not causal or position <= row) and (key_mask is None or bool(key_mask[b, position]))


def lse(logits, rows, key_mask=None, causal=True):
    """float64 ``[B, H, R]``, one row at a time."""
    (B, H, S, _), R = logits.shape, rows.shape[1]
    out = torch.full((B, H, R), float("-inf"), dtype=torch.float64)
    for b in range(B):
        for i, row in enumerate(rows[b].tolist()):
            seen = [s for s in range(S) if sees(row, s, b, key_mask, causal)]
            if seen:
                out[b, :, i] = logits[b, :, row, seen].exp().sum(-1).log()
    return out


def scores(
    logits,
    rows,
    columns,
    key_mask=None,
    causal=True,
    row_weight=None,
    head_reduce="mean",
    row_reduce="mean",
    normalize="row",
    pair_weight=None,
    top_heads=None,
):
    """float64 scores, one (sample, head, column) at a time, straight from the definition."""
    (B, H, S, _), N = logits.shape, columns.shape[1]
    out = torch.zeros(B, H, N, dtype=torch.float64)
    for b in range(B):
        real = [(i, row) for i, row in enumerate(rows[b].tolist()) if row >= 0]
        chosen = [c for c in columns[b].tolist() if c >= 0]
        weight = {i: 1.0 if row_weight is None else float(row_weight[b, i]) for i, _ in real}
        for n, column in enumerate(columns[b].tolist()):
            terms = []  # (weight, attention per head, seen)
            for i, row in real:
                among = chosen if normalize == "columns" else range(S)
                seen = [s for s in among if sees(row, s, b, key_mask, causal)]
                if column not in seen and not (
                    normalize == "none" and sees(row, column, b, key_mask, causal)
                ):
                    terms.append((weight[i], torch.zeros(H, dtype=torch.float64), False))
                    continue
                p = logits[b, :, row, column]
                if normalize != "none":
                    p = p.exp() / logits[b, :, row, seen].exp().sum(-1)
                if pair_weight is not None:
                    p = p * float(pair_weight[b, i, n])
                terms.append((weight[i], p, True))
            out[b, :, n] = _reduce_rows(terms, row_reduce) if column >= 0 else 0.0
    if top_heads is not None:
        out = torch.stack([_top(heads, top_heads) for heads in out])
    reduce = {
        "none": lambda x: x,
        "mean": lambda x: x.mean(1),
        "sum": lambda x: x.sum(1),
        "max": lambda x: x.amax(1),
    }
    return reduce[head_reduce](out)


def _top(heads, count):
    """The heads ``[H, N]`` of one sample with the largest totals, the lower of equal ones, NaN last."""

    def goes_first(h):
        total = sum(heads[h].tolist())
        return (1, 0.0, h) if math.isnan(total) else (0, -total, h)

    return heads[sorted(range(len(heads)), key=goes_first)[:count]]


def _reduce_rows(terms, how):
    if how == "max":
        seen = [w * p for w, p, ok in terms if ok]
        return torch.stack(seen).amax(0) if seen else 0.0
    total = sum((w * p for w, p, _ in terms), torch.zeros((), dtype=torch.float64))
    if how == "sum":
        return total
    weights = sum(w for w, _, _ in terms)
    return total / weights if weights > 0 else 0.0


def assert_as_good(out, torch_out, truth):
    """No further from the truth than twice PyTorch at that dtype, plus a rounding floor."""
    out, torch_out = out.double().cpu(), torch_out.double().cpu()
    finite = truth.isfinite()
    assert torch.equal(out[~finite], truth[~finite])
    floor = 4e-6 * truth[finite].abs().max().item() if finite.any() else 0.0
    allowed = 2 * (torch_out - truth)[finite].abs().max().item() + floor if finite.any() else 0.0
    error = (out - truth)[finite].abs().max().item() if finite.any() else 0.0
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"
