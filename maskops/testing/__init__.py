"""Public testing kit: cases, and checks of any attention function against a float64 oracle.

Example::

    from torch.nn.functional import scaled_dot_product_attention
    from maskops import testing

    def mine(q, k, v, allowed, *, softmax_scale):
        return scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=softmax_scale, enable_gqa=True)

    for case in testing.cases("attention"):
        print(testing.check(mine, case))
"""

from maskops.testing.cases import Case, cases
from maskops.testing.check import PARTS, Budget, Finding, Report, check, error_budget, plain_attention
from maskops.testing.own import attention_on, refusals

__all__ = [
    "PARTS",
    "Budget",
    "Case",
    "Finding",
    "Report",
    "attention_on",
    "cases",
    "check",
    "error_budget",
    "plain_attention",
    "refusals",
]
