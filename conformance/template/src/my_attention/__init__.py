"""A kernel as isoform judges it: put yours in the place of :func:`kernel`."""

import torch

from isoform.reference.contract import Capabilities, evoformer_call


class Kernel:
    """What it is called, what it does, and the call."""

    name = "my-attention"
    framework = "torch"
    capabilities = Capabilities(
        "evoformer_attention",
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        grouped_heads=False,
        lse=False,
        deterministic=True,
    )

    @classmethod
    def evoformer_attention(cls, q, k, v, *, return_lse=False, **operands):
        """Wrong calls raise, what is not supported is refused with every reason, all else runs."""
        asked = evoformer_call(q, k, v, **operands, lse=return_lse)
        cls.capabilities.require(asked, cls.name)
        return kernel(q, k, v, **operands)


def kernel(q, k, v, *, mask=None, mask_bias=None, pair_bias=None, gate=None, scale=None):
    """Attention written out. Gradients come from autograd; yours may be an autograd.Function."""
    if mask is not None:
        k, v = (x.masked_fill(~mask[..., None, None], 0) for x in (k, v))
    s = torch.einsum("bsqhd,bskhd->bshqk", q.float(), k.float())
    s = s * (q.shape[-1] ** -0.5 if scale is None else scale)
    for bias in (mask_bias, pair_bias):
        s = s if bias is None else s + bias.float()
    if mask is not None:
        s = s.masked_fill(~mask[:, :, None, None, :], -torch.inf)
    left = (s > -torch.inf).any(-1, keepdim=True)  # a query without a key gets zeros
    p = torch.softmax(s.masked_fill(~left, 0), -1) * left
    out = torch.einsum("bshqk,bskhd->bsqhd", p, v.float())
    return (out if gate is None else out * torch.sigmoid(gate.float())).to(q.dtype)
